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

local function keep_receipt(task)
  if arg.op ~= '' then
    write('SET', key('op', arg.op:sub(1, 24)), arg.op:sub(26) .. ' ' .. task.id .. ' ' ..
          task.fence .. ' ' .. task.rev, 'PX', RECEIPT)
  end
end

-- Sets fields of the task, with the number, time and receipt of this change.
local function change(task, ...)
  local op = arg.op ~= '' and arg.op .. ' ' .. task.fence .. ' ' .. task.rev or ''
  write('HSET', task.key, 'rev', task.rev, 'updatedAt', at, 'op', op, ...)
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

-- The long texts of what a task says of itself.  Title and dependencies stand first, so that a list
-- reads them without the others.
local function text_of(values, dependencies)
  local text = '{"title":' .. cjson.encode(values.title)
  if dependencies ~= '' then text = text .. ',"dependencies":"' .. dependencies .. '"' end
  if values.metadata ~= '' then text = text .. ',"metadata":' .. cjson.encode(values.metadata) end
  if values.description ~= '' then
    text = text .. ',"description":' .. cjson.encode(values.description)
  end
  return text .. '}'
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
local function take(task, op, agent, ttl, session)
  task.fence = string.format('%d', math.max(meta.fence + 1, now))
  emit(task, op, 'claimed', '', 'fence', task.fence)
  task.claimedBy, task.claimedAt = agent, at
  lease(task, ttl)
  keep_receipt(task)
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

-- Edges of the dependency graph: what the task depends on, and what of it is not completed.
local function write_edges(task, edges, needs) -- seldom
  write('DEL', key('waits', task.id))
  for _, id in ipairs(edges) do write('ZADD', key('dependents', id), needs[id] and 0 or 1, task.id) end
  for id in pairs(needs) do write('SADD', key('waits', task.id), id) end
end

-- Derives both from the task's text again: what a completion freed stays free.
local function restore_edges(task) -- seldom
  local text = cjson.decode(read('GET', key('text', task.id)) or '{}')
  local edges, needs = {}, {}
  for id in (text.dependencies or ''):gmatch('%S+') do
    local other = fields(id)
    if other then edges[#edges + 1] = id end
    if other and other.status ~= 'completed' and
       read('ZSCORE', key('dependents', id), task.id) ~= '1' then needs[id] = true end
  end
  write_edges(task, edges, needs)
  task.edges = text.dependencies and select(2, text.dependencies:gsub('%S+', '')) or ''
  write('HSET', task.key, 'edges', task.edges)
end

local function remove_edges(task) -- seldom
  local text = cjson.decode(read('GET', key('text', task.id)) or '{}')
  for id in (text.dependencies or ''):gmatch('%S+') do
    write('ZREM', key('dependents', id), task.id)
  end
end

-- Tells the tasks that wait for this one that it is completed; frees those that wait for no
-- other.  Returns the freed, and whether some of a long list are left for reap.
local function free_dependents(task) -- seldom
  local freed, edges = {}, key('dependents', task.id)
  if read('ZCARD', edges) == 0 then return freed, false end
  for i, id in ipairs(read('ZRANGEBYSCORE', edges, 0, 0, 'LIMIT', 0, BATCH + 1)) do
    if i > BATCH then return freed, true end
    local dependent = fields(id, 'fence', 'priority', 'order', 'notBefore', 'blocked', 'edges')
    write('SREM', key('waits', id), task.id)
    if dependent and dependent.status == 'blocked' and settled(dependent) == 'pending' then
      emit(dependent, 'free', 'pending', task.id)
      place(dependent, 'pending')
      displace(dependent)
      write('HSET', dependent.key, 'status', 'pending', 'rev', dependent.rev, 'updatedAt', at)
      freed[#freed + 1] = id
    end
    write('ZADD', edges, 1, id)
  end
  return freed, false
end

-- Takes a task out of everything.  Once its status is `deleted` reap finishes what is cut off; its
-- hash goes last.  Tasks that depended on it do not any more; BATCH of them at most.
local function bury(task)
  displace(task)
  write('HSET', task.key, 'status', 'deleted')
  for _, id in ipairs(read('ZRANGE', key('dependents', task.id), 0, BATCH)) do
    local dependent = fields(id, 'fence', 'priority', 'order', 'notBefore', 'blocked')
    if dependent then
      local text, others = cjson.decode(read('GET', key('text', id)) or '{}'), {}
      for other in (text.dependencies or ''):gmatch('%S+') do
        if other ~= task.id then others[#others + 1] = other end
      end
      text.dependencies = given(table.concat(others, ' '))
      dependent.edges = #others > 0 and #others or ''
      write('SREM', key('waits', id), task.id)
      local frees = dependent.status == 'blocked' and settled(dependent) == 'pending'
      local status = frees and 'pending' or dependent.status
      emit(dependent, 'update', status, 'dependencies')
      write('SET', key('text', id), cjson.encode(text))
      if frees then
        place(dependent, 'pending')
        displace(dependent)
      end
      write('HSET', dependent.key, 'status', status, 'edges', dependent.edges,
            'rev', dependent.rev, 'updatedAt', at)
    end
    write('ZREM', key('dependents', task.id), id)
  end
  if task.edges ~= '' then remove_edges(task) end
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
  if task.status ~= 'completed' and task.status ~= 'deleted' then restore_edges(task) end
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
  write('DEL', key('work', task.id), key('waits', task.id))
  if task.edges ~= '' then remove_edges(task) end
  local _, more = free_dependents(task)
  return more
end
