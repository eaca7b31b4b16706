-- effects.lua -- What changes a task: it writes, and cannot refuse.

-- Gives the change its number and tells it; other fields of project meta as names and values.
-- One packed field, tab-separated: task op from to rev fence agent at text.
local function emit(task, op, to, text, ...)
  meta.rev = meta.rev + 1
  task.rev = string.format('%d', meta.rev)
  write('HSET', root, 'rev', task.rev, ...)
  local event = task.id .. '\t' .. op .. '\t' .. task.status .. '\t' .. to .. '\t' .. task.rev ..
                '\t' .. task.fence .. '\t' .. arg.actor .. '\t' .. at .. '\t' .. (text or '')
  local events = root .. ':events'
  write('XADD', events, task.rev .. '-0', 'e', event)
  write('PUBLISH', events, event)
  if meta.rev % 100 == 0 then
    -- Older events stay for the followers that keep them and have not seen them yet.
    local seen, followers = meta.rev - EVENTS, read('HGETALL', root)
    for i = 1, #followers, 2 do
      local cursor, keep = followers[i + 1]:match('^(%d+) (%d+) ')
      if followers[i]:find('^follow:') and tonumber(keep) > 0 then
        seen = math.min(seen, math.max(tonumber(cursor), meta.rev - keep))
      end
    end
    if seen > 0 then write('XTRIM', events, 'MINID', '~', decimal(seen)) end
  end
end

local function ring(lane)
  if read('LLEN', key('bell', lane)) == 0 then write('LPUSH', key('bell', lane), '1') end
end

local function keep_receipt(task, earlier)
  if arg.op ~= '' then
    local ids, fences, revs = task.id, task.fence, task.rev
    if earlier then
      ids, fences, revs = earlier[1] .. ids, earlier[2] .. fences, earlier[3] .. revs
    end
    write('SET', key('op', arg.op:sub(1, 24)), arg.op:sub(26) .. ' ' .. ids .. ' ' .. fences ..
          ' ' .. revs, 'PX', RECEIPT)
  end
end

-- The receipt in a task's hash is that of its last change.  The holder's next call takes the place
-- of the last one; any other call moves what it finds to a key, and ` +` says that there are such.
local function receipt_of(task)
  local mark, digest, fence, rev, more = task.op:match('^(%S+) (%S+) (%S*) (%S+)( ?%+?)$')
  if mark and not (arg.fence ~= '' and fence == task.fence) then
    write('SET', key('op', mark), digest .. ' ' .. task.id .. ' ' .. fence .. ' ' .. rev, 'PX',
          RECEIPT)
    more = ' +'
  end
  return arg.op .. ' ' .. task.fence .. ' ' .. task.rev .. (more or '')
end

-- Sets fields of the task, with the number and time of this change, and the receipt of its call.
local function change(task, ...)
  if arg.op == '' then
    write('HSET', task.key, 'rev', task.rev, 'updatedAt', at, ...)
  else
    write('HSET', task.key, 'rev', task.rev, 'updatedAt', at, 'op', receipt_of(task), ...)
  end
end

-- The long texts of the run.  Each name has a new value, or '' to take it away.
local function write_work(task, changes)
  local work = cjson.decode(read('GET', key('work', task.id)) or '{}')
  for name, value in pairs(changes) do work[name] = given(value) end
  if next(work) then
    write('SET', key('work', task.id), cjson.encode(work))
  else
    write('DEL', key('work', task.id))
  end
end

-- When a delay is over, or '' for none.
local function after(seconds)
  return seconds > 0 and string.format('%d', now + seconds * 1000) or ''
end

-- Where a task belongs that nobody holds and that is neither completed nor failed.
local function settled(task)
  local waits = task.blocked ~= '' or
                task.edges ~= '' and read('SCARD', key('waits', task.id)) > 0
  return waits and 'blocked' or 'pending'
end

-- Enters a task that nobody holds into the index of its status; a ready one rings.
local function place(task, status)
  if status == 'blocked' then
    write('ZADD', root .. ':blocked', task.order, task.id)
  elseif status ~= 'pending' then
    write('ZADD', root .. ':' .. status, rawget(task, 'ended') or at, task.id)
  elseif task.notBefore ~= '' and tonumber(task.notBefore) > now then
    write('ZADD', root .. ':delayed', task.notBefore, task.id)
  else
    write('ZADD', key('ready', task.lane), RANK[task.priority] + task.order, task.id)
    ring(task.lane)
  end
end

-- The opposite; the index of held tasks is `finish`'s.
local function displace(task)
  if task.status == 'pending' then
    write('ZREM', key('ready', task.lane), task.id)
    if task.notBefore ~= '' then write('ZREM', root .. ':delayed', task.id) end
  elseif not held(task) then
    write('ZREM', root .. ':' .. task.status, task.id)
  end
end

-- A transition of a task that nobody holds leaves a mark, so that reap finishes it if need be.
-- A mark that is there already stays for reap.
local function begin(task)
  if held(task) or rawget(task, 'begun') then return end
  task.begun = true
  task.marked = write('ZADD', root .. ':unsettled', at, task.id) == 0
end

-- Between emit and finish: the new status, its index, other fields as names and values.
local function move(task, status, notBefore, ...)
  begin(task)
  displace(task)
  if held(task) and notBefore == '' then
    change(task, 'status', status, ...)
  else
    change(task, 'status', status, 'notBefore', notBefore, ...)
  end
  task.notBefore = notBefore
  place(task, status)
end

-- Takes the mark away: the last write to a task.  Room in a capped lane rings its bell.  With
-- `more`, dependents are left to free, and reap goes on with them.  The keys named go too.
local function finish(task, more, ...)
  if anonymous then keep_receipt(task) end
  if more then write('ZADD', root .. ':unsettled', at, task.id) end
  write('DEL', key('lock', task.id), ...)
  if held(task) then
    write('ZREM', key('running', task.lane), task.id)
    if cap(task.lane) and read('ZCARD', key('ready', task.lane)) > 0 then ring(task.lane) end
  elseif not more and not rawget(task, 'marked') then
    write('ZREM', root .. ':unsettled', task.id)
  end
end

-- Grants the lease, or extends it to not before `ends`; never past claimedAt + maxRuntime.
local function lease(task, ttl, ends)
  ends = math.max(now + ttl * 1000, tonumber(ends) or 0)
  if task.maxRuntime ~= '' then
    ends = math.min(ends, task.claimedAt + task.maxRuntime * 1000)
  end
  task.leaseExpiresAt = string.format('%d', ends)
  write('ZADD', key('running', task.lane), task.leaseExpiresAt, task.id)
  write('SET', key('lock', task.id), task.claimedBy, 'PXAT', task.leaseExpiresAt)
end

-- A claim.  The lease comes first, so that reap finds whatever is left half done; the receipt
-- counts only once the task carries its fence.
-- `earlier` has ids, fences and revs, with commas, of what the same call has claimed before.
local function take(task, op, agent, ttl, session, earlier)
  task.fence = string.format('%d', math.max(meta.fence + 1, now))
  meta.fence = task.fence
  emit(task, op, 'claimed', '', 'fence', task.fence)
  task.claimedBy, task.claimedAt = agent, at
  lease(task, ttl)
  keep_receipt(task, earlier)
  displace(task)
  if task.assigned == '1' then write('SREM', key('assigned', agent), task.id) end
  local past = {}
  for _, name in ipairs({'notBefore', 'reaped', 'orphaned', 'assigned'}) do
    if task[name] ~= '' then append(past, name, '') end
  end
  if op == 'assign' then append(past, 'assigned', '1') end
  -- The last receipt in the hash stays: whoever sent that call may be about to repeat it.
  write('HSET', task.key, 'rev', task.rev, 'updatedAt', at, 'status', 'claimed',
        'claimedBy', agent, 'claimedAt', at, 'claimTTL', ttl, 'session', session,
        'fence', task.fence, unpack(past))
  task.status = 'claimed'
  return whole(task, 'rev', task.rev, 'updatedAt', at, 'status', 'claimed', 'claimedBy', agent,
               'claimedAt', at, 'claimTTL', ttl, 'session', session, 'fence', task.fence,
               'notBefore', '')
end

-- The agent has taken note of its assignment: from now on it is a claim like any other.
local function pick_up(task, ttl) -- seldom
  write('HSET', task.key, 'assigned', '', 'session', arg.session, 'claimTTL', ttl)
  write('SREM', key('assigned', task.claimedBy), task.id)
  task.claimTTL = ttl
end

-- What a task depends on: `waits` has what it waits for (score 0), and `dependents` of each
-- dependency has the task with its score.  Both are said again from the text when a call is cut
-- off, so what the text does not name yet is waited for before it changes, and the rest follows.
local function wait_for(task, scores) -- seldom
  for id, score in pairs(scores) do
    if score == 0 then
      write('SADD', key('waits', task.id), id)
      write('ZADD', key('dependents', id), 0, task.id)
    end
  end
end

-- Before the text changes: takes a task out of the dependents of what it names, but for `scores`.
local function leave_dependents(task, scores) -- seldom
  for id in dependencies_of(task.id):gmatch('%S+') do
    if not scores[id] then write('ZREM', key('dependents', id), task.id) end
  end
end

-- After the text has changed: leaves what the task waits for no more.
local function depend_on(task, scores) -- seldom
  for _, id in ipairs(read('SMEMBERS', key('waits', task.id))) do
    if not scores[id] then write('ZREM', key('dependents', id), task.id) end
    if scores[id] ~= 0 then write('SREM', key('waits', task.id), id) end
  end
  for id, score in pairs(scores) do
    if score == 1 then write('ZADD', key('dependents', id), 1, task.id) end
  end
end

-- For a task that is done, or gone.
local function depend_no_more(task) -- seldom
  leave_dependents(task, {})
  depend_on(task, {})
end

-- Says both again from the text; what a completion freed stays free.
local function mend_dependencies(task) -- seldom
  local scores, count = {}, 0
  for id in dependencies_of(task.id):gmatch('%S+') do
    count = count + 1
    local other = fields(id)
    if other then
      local waits = other.status ~= 'completed' and
                    (read('SISMEMBER', key('waits', task.id), id) == 1 or
                     read('ZSCORE', key('dependents', id), task.id) == '0')
      scores[id] = waits and 0 or 1
    end
  end
  wait_for(task, scores)
  depend_on(task, scores)
  task.edges = count > 0 and count or ''
  write('HSET', task.key, 'edges', task.edges)
end

-- A task that waits for nothing any more becomes pending, by an event that `op` and `text` tell.
local function free(task, op, text) -- seldom
  if task.status ~= 'blocked' or settled(task) ~= 'pending' then return false end
  emit(task, op, 'pending', text)
  place(task, 'pending')
  displace(task)
  write('HSET', task.key, 'status', 'pending', 'rev', task.rev, 'updatedAt', at)
  return true
end

-- Tells the tasks that wait for this one that it is completed; frees those that wait for no
-- other.  BATCH of them in one call: returns the freed, and whether some are left for reap.
local function free_dependents(task) -- seldom
  local freed = {}
  for _, id in ipairs(waiting_for(task.id, BATCH + 1)) do
    if (meta.told or 0) == BATCH then return freed, true end
    meta.told = (meta.told or 0) + 1
    local dependent = fields(id, 'fence', 'priority', 'order', 'notBefore', 'blocked', 'edges')
    write('SREM', key('waits', id), task.id)
    if dependent and free(dependent, 'free', task.id) then freed[#freed + 1] = id end
    if dependent then
      write('ZADD', key('dependents', task.id), 1, id)
    else
      write('ZREM', key('dependents', task.id), id)
    end
  end
  return freed, false
end

-- Takes a task out of everything.  Once its status is `deleted` reap finishes what is cut off; its
-- hash goes last.  Unfinished tasks do not depend on it any more; BATCH of them at most.
local function bury(task) -- seldom
  displace(task)
  write('HSET', task.key, 'status', 'deleted')
  for _, id in ipairs(read('ZRANGE', key('dependents', task.id), 0, BATCH)) do
    local dependent = fields(id, 'fence', 'priority', 'order', 'notBefore', 'blocked', 'edges')
    if is_open(dependent) then
      local others = {}
      for other in dependencies_of(id):gmatch('%S+') do
        if other ~= task.id then others[#others + 1] = other end
      end
      write('SREM', key('waits', id), task.id)
      local text = with_dependencies(id, table.concat(others, ' '))
      if not free(dependent, 'update', 'dependencies') then
        emit(dependent, 'update', dependent.status, 'dependencies')
      end
      write('SET', key('text', id), text)
      write('HSET', dependent.key, 'edges', #others > 0 and #others or '', 'rev', dependent.rev,
            'updatedAt', at)
    end
    write('ZREM', key('dependents', task.id), id)
  end
  if task.edges ~= '' then depend_no_more(task) end
  write('ZREM', key('mission', task.mission), task.id)
  for _, kind in ipairs({'text', 'work', 'summary', 'notes', 'waits', 'dependents'}) do
    write('DEL', key(kind, task.id))
  end
  keep_receipt(task)
  write('DEL', task.key)
end

-- Moves tasks that have become due from delayed to ready.
local function promote()
  for _, id in ipairs(read('ZRANGEBYSCORE', root .. ':delayed', '-inf', now, 'LIMIT', 0, BATCH)) do
    local task = fields(id, 'priority', 'order', 'notBefore')
    if task and task.status == 'pending' then place(task, 'pending') end
    write('ZREM', root .. ':delayed', id)
  end
end

-- Puts a task that is pending or blocked where its dependencies say.
local function settle_again(task)
  local status = settled(task)
  if status ~= task.status then
    emit(task, 'update', status, 'dependencies')
    write('HSET', task.key, 'status', status, 'rev', task.rev, 'updatedAt', at)
  end
  place(task, status)
end

-- Finishes the transition that left a task as its hash says: the indexes follow from the hash.
-- Returns whether dependents are left to free.
local function heal(task)
  write('ZREM', key('ready', task.lane), task.id)
  for _, index in ipairs({'delayed', 'blocked', 'failed', 'completed'}) do
    write('ZREM', root .. ':' .. index, task.id)
  end
  if task.status ~= 'completed' and task.status ~= 'deleted' then mend_dependencies(task) end
  if held(task) then return false end
  write('DEL', key('lock', task.id))
  if task.status == 'deleted' then
    task.rev = meta.rev
    bury(task)
  elseif task.status == 'completed' or task.status == 'failed' then
    task.ended = given(task[task.status .. 'At'])
    place(task, task.status)
  else
    settle_again(task)
  end
  if task.status ~= 'completed' then return false end
  write('DEL', key('work', task.id))
  depend_no_more(task)
  local _, more = free_dependents(task)
  return more
end
