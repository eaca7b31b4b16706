-- repair.lua -- Derive everything that points at some tasks from their hashes again.
--
-- State    any -> (unchanged), but blocked <-> pending as the dependencies say
-- Args     actor ids
-- Returns  how many tasks it set right
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    update for each task that is blocked, or no longer, and free
--
-- A task without a hash is taken out of everything.  A held one without a lease gets that of its
-- lock; without a lock one that has ended, so that reap gives it back.  An event of ours that
-- is beyond the project's rev brings the rev back; where other programs have added some, of the
-- last LOOK events ours stay.

meta = project()
local repaired = 0

for id in arg.ids:gmatch('%S+') do
  local task = fields(id, 'mission', 'priority', 'order', 'notBefore', 'blocked', 'edges')
  for lane in each_lane() do
    write('ZREM', key('ready', lane), id)
    if not task or not held(task) or task.lane ~= lane then write('ZREM', key('running', lane), id) end
  end
  for _, name in ipairs({'delayed', 'blocked', 'failed', 'completed', 'unsettled'}) do
    write('ZREM', root .. ':' .. name, id)
  end
  if not task then
    depend_no_more({id = id})
    for _, kind in ipairs({'text', 'work', 'summary', 'notes', 'waits', 'dependents', 'lock'}) do
      write('DEL', key(kind, id))
    end
  else
    local text = cjson.decode(read('GET', key('text', id)) or '{}')
    if not text.title then
      text.title = id
      write('SET', key('text', id), cjson.encode(text))
    end
    for _, other in ipairs(read('ZRANGE', key('dependents', id), 0, BATCH)) do
      if not depends_on(fields(other, 'edges'), id) then
        write('ZREM', key('dependents', id), other)
      elseif read('SISMEMBER', key('waits', other), id) == 0 then
        write('ZADD', key('dependents', id), 1, other)
      end
    end
    write('ZADD', key('mission', task.mission), task.order, id)
    if held(task) then
      local left = math.max(0, read('PTTL', key('lock', id)))
      write('ZADD', key('running', task.lane), 'NX', now + left, id)
    end
    if heal(task) then write('ZADD', root .. ':unsettled', now, id) end
  end
  repaired = repaired + 1
end
local ahead = beyond()
if ahead then
  -- No command lowers the last id of a stream, so it is made anew.
  local events, own, last = root .. ':events', {}, meta.rev
  for _, entry in ipairs(read('XREVRANGE', events, '+', '-', 'COUNT', LOOK)) do
    local rev = entry[1]:match('^(%d+)%-0$')
    if rev and entry[2][1] == 'e' and
       entry[2][2]:match('^%S+\t%S+\t%S*\t%S*\t(%d+)\t') == rev then
      own[#own + 1] = entry
      last = math.max(last, tonumber(rev))
    end
  end
  write('HSET', root, 'rev', decimal(last))
  if ahead > last then
    write('UNLINK', events)
    for i = #own, 1, -1 do write('XADD', events, own[i][1], 'e', own[i][2][2]) end
  end
end
return {'OK', 'repaired', repaired}
