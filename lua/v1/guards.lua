-- guards.lua -- What may refuse a call: it reads, and writes nothing.

local function require_id(value, what)
  if #value > 128 or not value:find('^[%w][%w._@-]*$') then
    reject('INVALID', what .. ' is not an id: ' .. value:sub(1, 40):gsub('[^ -~]', '?') ..
           ' (accepted: a letter or digit, then up to 127 of letters, digits and ._@-)')
  end
end

-- By pattern, since tonumber also takes nan, inf, 0x10, 1e3 and ' 7 '.
local function require_integer(value, what, low, high)
  local number = #value <= 15 and value:find('^%d+$') and tonumber(value)
  if not number or number < low or number > high then
    reject('INVALID', what .. ' is ' .. (value == '' and 'missing' or
           value:sub(1, 40):gsub('[^ -~]', '?')) .. '; accepted: a whole number from ' .. low .. ' to ' .. high)
  end
  return number
end

local function require_text(value, what, limit)
  if #value > limit then
    reject('TOO_LARGE', what .. ' is ' .. #value .. ' bytes long; accepted: up to ' .. limit, 0, 'text')
  elseif value:find('\0', 1, true) then
    reject('INVALID', what .. ' contains a NUL byte')
  end
end

local function require_lane(lane)
  require_id(lane, 'lane')
  local lanes = ' ' .. meta.lanes .. ' '
  if not (lanes:find(' ' .. lane .. ' ', 1, true) or lanes:find(' ' .. lane .. '=', 1, true)) then
    reject('INVALID', 'there is no lane ' .. lane .. '; accepted: ' ..
           meta.lanes:gsub('=%d+', ''):gsub(' ', ', '))
  end
end

local function require_priority(priority)
  if not RANK[priority] then
    reject('INVALID', 'priority is ' .. priority:sub(1, 40):gsub('[^ -~]', '?') ..
           '; accepted: critical, high, medium, low')
  end
end

-- A task's name for a person; with `holder` who holds it, since and until when.
local function name_of(task, holder) -- seldom
  local name = 'task ' .. root:match('{(.*)}') .. '/' .. task.id
  if not holder then return name end
  local ends = read('ZSCORE', key('running', task.lane), task.id)
  return name .. ' is held by ' .. task.claimedBy .. ' since ' .. moment(task.claimedAt) ..
         ', lease until ' .. moment(ends or task.claimedAt)
end

local function load(id, ...)
  require_id(id, 'taskId')
  local task = fields(id, ...)
  if not task then
    reject('NOT_FOUND', 'there is no task ' .. root:match('{(.*)}') .. '/' .. id)
  end
  return task
end

local function require_status(task, one, or_other, ...)
  if task.status == one or task.status == or_other then return end
  local accepted = {one, or_other, ...}
  for _, status in ipairs(accepted) do
    if task.status == status then return end
  end
  reject('WRONG_STATUS', name_of(task) .. ' is ' .. task.status .. '; ' .. SCRIPT .. ' takes: ' ..
         table.concat(accepted, ', '), 0, task.status)
end

-- A held task that its own agent may take again: assigned and not picked up; left behind by an
-- earlier session, which said so or let two thirds of the lease pass; or by asking.
local function resumable(task) -- seldom
  if task.claimedBy ~= arg.agent or not held(task) then return false end
  if task.assigned == '1' or arg.resume == '1' then return true end
  if task.session == arg.session or task.session == '' then return false end
  local ends = read('ZSCORE', key('running', task.lane), task.id)
  return task.orphaned == '1' or
         not ends or tonumber(ends) - now < (tonumber(task.claimTTL) or 0) * 1000 / 3
end

-- Each of agent, session and fence that the call names must be the holder's.
local function require_owner(task)
  if arg.force == '1' then return end
  if arg.agent ~= '' and arg.agent ~= task.claimedBy then
    reject('NOT_OWNER', name_of(task, true) .. ', not by ' .. arg.agent)
  elseif arg.session ~= '' and arg.session ~= task.session and task.assigned ~= '1' then
    reject('STALE_SESSION', name_of(task) .. ' was claimed by another session of ' ..
           task.claimedBy .. ' at ' .. moment(task.claimedAt), 0, resumable(task) and 'left' or '')
  elseif arg.fence ~= '' and arg.fence ~= task.fence then
    reject('STALE_FENCE', name_of(task) .. ' has fence ' .. task.fence .. ', not ' ..
           arg.fence:sub(1, 40):gsub('[^ -~]', '?') .. ': it was claimed again')
  end
end

-- Who fills a lane, for a person.
local function full_lane(lane) -- seldom
  local holders = {}
  for i, id in ipairs(read('ZRANGE', key('running', lane), 0, 9)) do
    local other = fields(id, 'claimedBy')
    holders[i] = id .. ' of ' .. (other and other.claimedBy or 'nobody')
  end
  return 'lane ' .. lane .. ' has its ' .. cap(lane) .. ' held tasks: ' .. table.concat(holders, ', ')
end

-- The held tasks of a lane are counted, never remembered; a task's own stale entry is no other.
local function require_lane_room(task)
  local most = cap(task.lane)
  if most and read('ZCARD', key('running', task.lane)) >= most and
     not read('ZSCORE', key('running', task.lane), task.id) then
    reject('LANE_FULL', full_lane(task.lane), due(task.lane))
  end
end

-- A receipt of its own has a call that chooses its task, and one that names no fence: its repeat
-- would end the claim of whoever holds the task by then.
local anonymous = arg.fence == ''

-- What is left of this very call if it was carried out before.  `arg.op` is `op digest`; the
-- receipt in a task's hash goes on with `fence rev`, and with `+` where there are earlier ones.
local function recall(task, alone)
  if arg.op == '' then return nil end
  if #arg.op ~= 37 then reject('INVALID', 'op is not 24 digits, a space and 12 digits') end
  local mark, digest, id, fence, rev = arg.op:sub(1, 24), nil, task and task.id
  if task and task.op:sub(1, 24) == mark then
    digest, fence, rev = task.op:match('^%S+ (%S+) (%S*) (%S+)')
  elseif alone or task and task.op:sub(-1) == '+' then
    local value = read('GET', key('op', mark))
    if value then digest, id, fence, rev = value:match('^(%S+) (%S+) (%S*) (%S+)$') end
  end
  if not digest then return nil end
  if digest ~= arg.op:sub(26) then
    reject('OP_REUSED', 'op id was used before with other arguments, on task ' .. id)
  end
  return {task = id, fence = fence, rev = rev}
end

-- A task that failed goes to others first: the agent that failed it last waits twice the delay.
-- When its turn comes (ms), while that is in the future.
local function turn_of(task)
  if task.failedAt == '' or task.notBefore == '' or task.claimedBy ~= arg.agent or
     tonumber(task.failedAt) < tonumber(task.claimedAt) then
    return nil
  end
  local turn = 2 * task.notBefore - task.failedAt
  return turn > now and turn
end

local function require_claimable(task)
  if limit('paused') then
    reject('PAUSED', 'project ' .. root:match('{(.*)}') .. ' is paused since ' ..
           moment(limit('paused')))
  elseif held(task) then
    if resumable(task) then return end
    local own = task.claimedBy == arg.agent and (task.session == arg.session and 'yours' or 'session')
    reject('HELD', name_of(task, true), due(task.lane), own or '')
  elseif task.status == 'blocked' then
    local waits = read('SRANDMEMBER', key('waits', task.id), 10)
    local reason = cjson.decode(read('GET', key('work', task.id)) or '{}').blockedReason
    reject('BLOCKED', name_of(task) .. (#waits > 0 and ' waits for ' .. table.concat(waits, ', ')
           or ' is blocked') .. (reason and ': ' .. reason or ''), due(task.lane),
           reason and 'by hand' or '')
  elseif task.status ~= 'pending' then
    require_status(task, 'pending')
  elseif task.notBefore ~= '' and tonumber(task.notBefore) > now then
    reject('NOT_DUE', name_of(task) .. ' is not due before ' .. moment(task.notBefore))
  end
end

-- The dependencies of a new task: a list in which each stands once, and by name whether it has to be
-- waited for (0) or is completed (1), as `dependents` has it; then whether the task waits at all.
-- `batch` has the tasks that the same call creates, `looked` what it has looked at.
local function require_dependencies(id, dependencies, batch, looked) -- seldom
  local edges, scores, waits = {}, {}, false
  for other in dependencies:gmatch('%S+') do
    require_id(other, 'dependency')
    if other == id then reject('CYCLE', 'task ' .. id .. ' depends on itself') end
    local known = batch[other] or looked[other] or fields(other)
    if not known then
      reject('NOT_FOUND', 'there is no task ' .. root:match('{(.*)}') .. '/' .. other ..
             ', which ' .. id .. ' depends on', 0, 'dependency')
    end
    if not scores[other] then edges[#edges + 1] = other end
    scores[other], looked[other] = known.status == 'completed' and 1 or 0, known
    waits = waits or scores[other] == 0
  end
  if #edges > 200 then
    reject('TOO_LARGE', 'task ' .. id .. ' has ' .. #edges .. ' dependencies; accepted: up to 200')
  end
  return edges, scores, waits
end

-- New tasks in an order in which each stands behind those it depends on.
local function require_order(batch, by_id) -- seldom
  local sorted, open, waiting = {}, {}, {}
  for _, new in ipairs(batch) do
    open[new.task] = 0
    for _, id in ipairs(new.edges) do
      if by_id[id] then
        open[new.task] = open[new.task] + 1
        waiting[id] = waiting[id] or {}
        append(waiting[id], new)
      end
    end
    if open[new.task] == 0 then append(sorted, new) end
  end
  local at = 1
  while sorted[at] do
    for _, new in ipairs(waiting[sorted[at].task] or {}) do
      open[new.task] = open[new.task] - 1
      if open[new.task] == 0 then append(sorted, new) end
    end
    at = at + 1
  end
  if #sorted == #batch then return sorted end
  local cycle = {}
  for _, new in ipairs(batch) do
    if open[new.task] > 0 and #cycle < 10 then append(cycle, new.task) end
  end
  reject('CYCLE', 'these tasks depend on each other: ' .. table.concat(cycle, ', '))
end

-- The mission that all tasks of the project belong to.
local function only_mission() -- seldom
  local indexes, total, one = {':delayed', ':blocked', ':failed', ':completed'}, 0, nil
  for lane in each_lane() do append(indexes, ':ready:' .. lane, ':running:' .. lane) end
  for _, index in ipairs(indexes) do
    total = total + read('ZCARD', root .. index)
    one = one or read('ZRANGE', root .. index, 0, 0)[1]
  end
  local task = one and fields(one, 'mission')
  if not task then
    reject('INVALID', 'mission is missing, and the project has no task yet whose mission could be meant')
  elseif read('ZCARD', key('mission', task.mission)) < total then
    reject('INVALID', 'mission is missing, and the project has several: ' .. task.mission ..
           ' and others')
  end
  return task.mission
end

-- Gives each new task that has no id one of its mission's initials and a number, in one row; returns
-- the number before the first.  Ids that people gave are stepped over, farther each time.
local function give_ids(batch, done) -- seldom
  local number = tonumber(done and done.task or read('HGET', root, 'made') or 0)
  local made, step = {}, 1
  for _, new in ipairs(batch) do
    if new.task == '' then
      local initials = new.mission:gsub('(%w)%w*', '%1'):gsub('%W', ''):upper():sub(1, 4)
      made[#made + 1] = {new = new, initials = initials}
    end
  end
  local i = 1
  while made[i] do
    local id = string.format('%s-%03d', made[i].initials, number + i)
    made[i].new.task, i = id, i + 1
    if not done and read('EXISTS', key('task', id)) == 1 then
      number, i, step = number + i - 1 + step, 1, step * 2
    end
  end
  return number
end

-- What a task would wait for may not wait for it.
local function require_no_path(task, scores) -- seldom
  if not waiting_for(task.id, 1)[1] then return end
  local seen, todo, edges = {}, {}, 0
  local function look_at(id)
    if id == task.id then
      reject('CYCLE', 'with these dependencies ' .. name_of(task) .. ' would wait for itself')
    end
    if not seen[id] then
      seen[id], todo[#todo + 1] = true, id
      if #todo > LOOK or edges > 10 * EDGES then
        reject('TOO_LARGE', 'more than ' .. LOOK .. ' tasks, or ' .. 10 * EDGES ..
               ' dependencies, would have to be completed before ' .. name_of(task))
      end
    end
  end
  for id, score in pairs(scores) do
    if score == 0 then look_at(id) end
  end
  local i = 1
  while todo[i] do
    local further = read('SMEMBERS', key('waits', todo[i]))
    edges = edges + #further
    for _, id in ipairs(further) do look_at(id) end
    i = i + 1
  end
end

-- The policy that a call brings, as `limits` with it, and the lanes with its lanes.  Lanes are
-- never taken away.
local function require_policy() -- seldom
  local limits, lanes = meta.limits or 'schema=' .. SCHEMA, meta.lanes
  for name, value in arg.policy:gmatch('(%S+) (%S+)') do
    if not POLICY:find(' ' .. name .. '=', 1, true) then
      reject('INVALID', 'the policy has no ' .. name:sub(1, 40))
    end
    local lowest = (name == 'claimTTL' or name == 'deadLetterAfter') and 1 or 0
    require_integer(value, name, lowest, name == 'assign' and 1 or WEEK)
    limits = limits:gsub(' ' .. name .. '=%d+', '') .. ' ' .. name .. '=' .. value
  end
  if arg.lanes ~= '' then
    lanes = ' ' .. arg.lanes .. ' '
    local count = 0
    for name in (LANES .. ' ' .. meta.lanes):gmatch('([^ =]+)[^ ]*') do
      local escaped = name:gsub('%p', '%%%0')
      if not lanes:find(' ' .. escaped .. '[= ]') then lanes = lanes .. name .. ' ' end
    end
    for name, most in lanes:gmatch('([^ =]+)=?([^ ]*)') do
      require_id(name, 'lane')
      if most ~= '' then require_integer(most, name .. '.maxConcurrent', 1, 1000000) end
      count = count + 1
    end
    if count > 32 then reject('TOO_LARGE', 'there are ' .. count .. ' lanes; accepted: up to 32') end
    lanes = lanes:match('^ (.*) $')
  end
  return limits:gsub(' policy=%d+', '') .. ' policy=' .. at, lanes
end
