-- next.lua -- Take the best ready tasks: by priority, then age.
--
-- State    pending -> claimed; with resume also claimed | in-progress of the same agent
-- Args     op actor agent session ttl lane mission resume wait waiter count
-- Returns  the task, and `count` - 1 more at most, or NOTHING and why
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND
-- Emits    claim
--
-- A claimer with a lane gets tasks of that lane and of `any`, one without gets all; full lanes are
-- passed over.  `wait` is in ms.  First comes what was assigned to the agent, then what an earlier session of it
-- left behind (resume: `orphans`) or all that it holds (`1`), of the lane and mission asked for.
-- With a mission at most LOOK tasks are looked at.  A project that is not there yet has no work.

meta = project(false, true)
require_id(arg.agent, 'agent')
local ttl = arg.ttl == '' and limit('claimTTL') or require_integer(arg.ttl, 'ttl', 1, WEEK)
if not meta.limits then
  local bells = arg.lane == '' and LANES or arg.lane .. ' any'
  local why = no_project() .. ' yet' .. (meta.rev > 0 and ': it is being restored' or '')
  return {'NOTHING', why, 0, '', bells, 0, 1}
end
if arg.lane ~= '' then require_lane(arg.lane) end
if arg.mission ~= '' then require_id(arg.mission, 'mission') end
local count = arg.count == '' and 1 or require_integer(arg.count, 'count', 1, BATCH)
local wait = arg.wait == '' and 0 or require_integer(arg.wait, 'wait', 0, 3600000)
if not (arg.waiter == '' or arg.waiter:find('^%S+ %S* %S+$')) then
  reject('INVALID', 'waiter is not agent, lane and mark')
end
-- Who waits where tasks are assigned gets them from the monitor; it knows of no missions.
local served = wait > 0 and limit('assign') == 1 and arg.mission == ''
local claimer = arg.mission == '' and arg.waiter or arg.waiter .. ' ' .. arg.mission
local done = recall(nil, true)
if done then
  local replies, fences, revs = {}, done.fence:gmatch('[^,]+'), done.rev:gmatch('[^,]+')
  for id in done.task:gmatch('[^,]+') do
    local was = {task = id, fence = fences(), rev = revs()}
    local task = fields(id, 'fence')
    if task and tonumber(task.fence) and tonumber(task.fence) >= tonumber(was.fence) then
      append(replies, replay(was, true))
    end
  end
  if replies[1] then return together(replies) end
end

local rare = read('EXISTS', root .. ':delayed', key('assigned', arg.agent)) > 0
if rare then promote() end

local asked = {}
for lane in each_lane() do
  if arg.lane == '' or lane == arg.lane or lane == 'any' then asked[#asked + 1] = lane end
end

local function ready_among(first, last)
  local indexes = {}
  for i = first, last do indexes[#indexes + 1] = key('ready', asked[i]) end
  return read('EXISTS', unpack(indexes))
end

-- Finds the `count` lanes that have ready tasks among those asked for, by halves, so that a claim
-- costs by the lanes that have work and not by those that are declared.
local function find_ready(first, last, count, found)
  if count == 0 then return found end
  if count > last - first then
    for i = first, last do found[#found + 1] = asked[i] end
    return found
  end
  local middle = math.floor((first + last) / 2)
  local left = ready_among(first, middle)
  return find_ready(middle + 1, last, count - left, find_ready(first, middle, left, found))
end

local lanes, heads, full, stale, turn, passed = {}, {}, {}, {}, nil, nil
local few = #asked <= 4        -- which are asked for one by one
for _, lane in ipairs(few and asked or find_ready(1, #asked, ready_among(1, #asked), {})) do
  local most = cap(lane)
  if not (most and read('ZCARD', key('running', lane)) >= most) then
    lanes[#lanes + 1] = lane
  elseif read('ZCARD', key('ready', lane)) > 0 then
    full[#full + 1] = lane
  end
end

-- The next of a lane's ready tasks that was not looked at yet, with its score.
local function head(lane, chunk)
  local ahead = heads[lane] or {at = 0, list = {}, i = 1}
  heads[lane] = ahead
  if ahead.i > #ahead.list and not ahead.done then
    local first = ahead.at - (ahead.taken or 0)
    ahead.list = read('ZRANGE', key('ready', lane), first, first + chunk - 1, 'WITHSCORES')
    ahead.at, ahead.i, ahead.done = ahead.at + chunk, 1, #ahead.list < 2 * chunk
  end
  return ahead.list[ahead.i], tonumber(ahead.list[ahead.i + 1]), ahead
end

local function best_ready()
  local chunk = arg.mission == '' and count + 1 or 100
  for _ = 1, LOOK do
    local id, score, from, lane
    for _, name in ipairs(lanes) do
      local candidate, its, ahead = head(name, chunk)
      if candidate and (not score or its < score) then
        id, score, from, lane = candidate, its, ahead, name
      end
    end
    if not id then return nil end
    from.i = from.i + 2
    local task = fields(id, '*')
    if not task or task.status ~= 'pending' or task.lane ~= lane then
      stale[#stale + 1] = {lane, id}
    elseif arg.mission == '' or task.mission == arg.mission then
      local mine = turn_of(task)
      if not mine then return task end
      if not turn or mine < turn then turn, passed = mine, id end
    end
  end
  return nil, true
end

local function assigned()
  for _, id in ipairs(read('SRANDMEMBER', key('assigned', arg.agent), 10)) do
    local task = fields(id, '*')
    if task and task.assigned == '1' and resumable(task) then return task end
    stale[#stale + 1] = {false, id}
  end
end

local function left_behind()
  local looked = 0
  for lane in each_lane() do
    local wanted = arg.lane == '' or lane == arg.lane or lane == 'any'
    for _, id in ipairs(wanted and read('ZRANGE', key('running', lane), 0, LOOK - looked) or {}) do
      local task = fields(id, 'claimedBy')
      if task and task.claimedBy == arg.agent and resumable(task) and
         (arg.mission == '' or task.mission == arg.mission) then
        return fields(id, '*')
      end
      looked = looked + 1
    end
  end
end

local task, limited
if not limit('paused') then
  task = rare and assigned() or arg.resume ~= '' and left_behind()
  if not task and not served then
    task, limited = best_ready()
  end
end
local function drop_stale()
  for _, entry in ipairs(stale) do
    if entry[1] then
      write('ZREM', key('ready', entry[1]), entry[2])
      if heads[entry[1]] then heads[entry[1]].taken = (heads[entry[1]].taken or 0) + 1 end
    else
      write('SREM', key('assigned', arg.agent), entry[2])
    end
  end
  stale = {}
end
drop_stale()
if task then
  local replies, earlier = {}, nil
  while task do
    local ahead = task.status == 'pending' and heads[task.lane]
    append(replies, take(task, 'claim', arg.agent, ttl, arg.session, earlier))
    if ahead then ahead.taken = (ahead.taken or 0) + 1 end
    if #replies == count then break end
    local ids, fences, revs = unpack(earlier or {'', '', ''})
    earlier = {ids .. task.id .. ',', fences .. task.fence .. ',', revs .. task.rev .. ','}
    local most = cap(task.lane)
    for i = #lanes, 1, -1 do
      if most and lanes[i] == task.lane and read('ZCARD', key('running', task.lane)) >= most then
        table.remove(lanes, i)
      end
    end
    task = not served and best_ready()
    drop_stale()
  end
  if wait > 0 then write('ZREM', root .. ':claimers', claimer) end
  -- Who is still among those that wait was given what was meant for another of its name, if for
  -- anybody that waits: that one asks again.
  if served and write('ZREM', root .. ':waiting', arg.waiter) == 1 then
    write('RPUSH', key('inbox', arg.agent), '1')
  end
  -- One token wakes one waiter: whoever was woken by one wakes the next if there is more.
  for _, lane in ipairs(wait > 0 and lanes or {}) do
    local ahead = heads[lane]
    if ahead and (ahead.list[ahead.i] or not ahead.done) then ring(lane) end
  end
  return together(replies)
end
if served then
  write('ZADD', root .. ':waiting', now + wait, arg.waiter)
elseif wait > 0 then
  write('ZREMRANGEBYSCORE', root .. ':claimers', '-inf', now)
  write('ZADD', root .. ':claimers', now + math.min(wait, ASKS_AGAIN), claimer)
end

-- Why there is nothing.
local why = 'nothing is ready'
local due_at = tonumber(read('ZRANGE', root .. ':delayed', 0, 0, 'WITHSCORES')[2])
if limit('paused') then
  why = 'the project is paused since ' .. moment(limit('paused'))
elseif #full > 0 then
  why = full_lane(full[1])
elseif limited then
  why = 'nothing of mission ' .. arg.mission .. ' is among the first ' .. LOOK .. ' ready tasks'
elseif served then
  why = 'nothing was assigned'
end
if turn then
  why = why .. '; others get ' .. passed .. ' first, which ' .. arg.agent ..
        ' failed last, until ' .. moment(decimal(turn))
end
if due_at and not limit('paused') then
  why = why .. '; the next task is due at ' .. moment(decimal(due_at))
end
local wake = turn and math.min(turn, due_at or turn) or due_at
local expired = due()
if expired > 0 then why = why .. grace() end
return {'NOTHING', why, expired, wake and wake - now or '', table.concat(asked, ' '),
        limit('assign'), 0}
