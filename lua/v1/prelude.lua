-- prelude.lua -- What every script starts with: plumbing, guards, effects, replies.
--
-- A script is guards, a blank line, effects.  Guards read and may `reject`; effects write and
-- cannot refuse.  Valkey has no rollback, so effects come in an order that makes every prefix
-- harmless: the change number and the event first (a follower re-reads the task), the task's
-- hash after what points at it, and the mark that makes `reap` look at the task again - its
-- lease, or its place in `unsettled` - goes last.
--
-- Every key of a project starts with the root, which is KEYS[1]:
--   <root>                  hash    epoch rev fence made, the last number of an id that the queue
--                                   made; limits: `schema=1 paused=<ms> policy=<ms>
--                                   claimTTL=3600 ...`; lanes: `any coding=4 planning`;
--                                   follow:<follower>: `rev keep at`, how far it has come, how many
--                                   events wait for it at most, when it was last heard of (ms)
--   <root>:task:<id>        hash    the task, but for its long texts; every value is short, so
--                                   that the hash stays a listpack
--   <root>:text:<id>        string  JSON object of strings: title description metadata
--                                   dependencies (between spaces)
--   <root>:work:<id>        string  JSON object of strings: progress checkpoint failureReason
--                                   blockedReason
--   <root>:summary:<id>     string  what the last completion said
--   <root>:notes:<id>       string  JSON array of the last notes: agent at (ms) text
--   <root>:waits:<id>       set     the dependencies of a task that are not completed
--   <root>:dependents:<id>  zset    tasks that depend on it and are not completed; score 0:
--                                   waiting for it, 1: freed
--   <root>:ready:<lane>     zset    pending and due, by priority, then age
--   <root>:delayed          zset    pending and not due, by notBefore (ms)
--   <root>:running:<lane>   zset    claimed and in-progress, by the end of the lease (ms)
--   <root>:blocked          zset    blocked, by age
--   <root>:failed           zset    dead letters, by failedAt (ms)
--   <root>:completed        zset    completed, by completedAt (ms)
--   <root>:mission:<name>   zset    all tasks of a mission, by age
--   <root>:unsettled        zset    tasks that nobody holds and whose transition is not finished,
--                                   by when it began (ms)
--   <root>:lock:<id>        string  the holder, PX = the lease; information for other programs
--   <root>:assigned:<agent> set     tasks assigned to the agent that it has not picked up
--   <root>:bell:<lane>      list    at most one token: something became ready
--   <root>:inbox:<agent>    list    the agent's own bell, a token for each assignment; at most 32
--   <root>:waiting          zset    `agent lane mark` of agents that wait for an assignment, by the end
--                                   of their wait (ms)
--   <root>:files            hash    mark -> path of the files that are kept in step
--   <root>:file:<mark>      hash    what file and queue last agreed on: task -> JSON; and `:state`
--   <root>:op:<op>          string  receipt: digest task fence rev, PX = 15 minutes
--   <root>:events           stream  <rev>-0 -> one field; the channel of the same name carries
--                                   the same string

-- Plumbing ------------------------------------------------------------------------------------

local SCHEMA = 1
local BATCH = 100              -- the most tasks that one call reaps or frees
local LOOK = 1000              -- the most tasks that one call looks at
local NOTES = 20               -- the last notes of a task that are kept
local NOTE_BYTES = 16384       -- and what their texts take at most
local EDGES = 5000             -- the most dependencies that one call brings
local TEXTS = 4194304          -- bytes of texts after which an answer goes on in the next call
local GRACE = 60               -- s after a start of the server in which no earlier lease is reaped
local RECEIPT = '900000'       -- ms
local EVENTS = 10000
local WEEK = 604800
local RANK = {critical = 0, high = 2251799813685248, medium = 4503599627370496,
              low = 6755399441055744}    -- 0..3 * 2^51; below it the age in microseconds
local PICK_UP = 60             -- s in which an assigned task has to be picked up
local POLICY = ' claimTTL=3600 maxRetries=3 deadLetterAfter=3 retryDelay=30 assign=0'
local LANES = 'any coding planning'

local read, write = redis.call, redis.call
local root = KEYS[1]
local clock = read('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local at = string.format('%d', now)    -- once: formatting a number costs 2,000 instructions

local function key(kind, name)
  return root .. ':' .. kind .. ':' .. name
end

-- `..` prints 14 digits of a number, and microseconds have 16.
local function decimal(number)
  return string.format('%.0f', number)
end

-- A time (ms) in a sentence, for the client to print.  It stands between NUL bytes, since no id and
-- no text can have one: what a user wrote is never taken for a time.
local function moment(ms)
  return '\0' .. ms .. '\0'
end

-- When the server was started (ms), while that is less than GRACE ago.  Nobody could renew a lease
-- while it was down, so leases of before have until the end of GRACE.  INFO may be denied.
local function restarted()
  local info = redis.pcall('INFO', 'server')
  local uptime = type(info) == 'string' and tonumber(info:match('uptime_in_seconds:(%d+)'))
  return uptime and uptime < GRACE and now - uptime * 1000
end

-- What whoever has to wait for the end of a lease is told in that time; '' afterwards.
local function grace()
  local start = restarted()
  return start and '; the server was started at ' .. moment(decimal(start)) ..
         ': earlier leases that ran out are ended from ' .. moment(decimal(start + GRACE * 1000)) ..
         ' on' or ''
end

-- The refusal of a call: CODE, a sentence, how many tasks `reap` would move on first, and which of
-- the code's cases it is, where the next step depends on that.
local function reject(code, sentence, due, case)
  if due and due > 0 then sentence = sentence .. grace() end
  error({refusal = {code, sentence, due or 0, case or ''}}, 0)
end

-- Project meta.  Few fields, since each costs: the rest stands in `limits`.  A project with a rev
-- and without limits is being restored, and nobody else sees it.  One that is not there yet may be
-- made by this call, or may be missing for whoever waits for work in it.
local function project(may_be_new, may_be_missing)
  local values = read('HMGET', root, 'rev', 'fence', 'limits', 'lanes')
  local schema = values[3] and values[3]:match('^schema=(%d+)')
  if (arg.actor .. arg.session):find('%s') then
    reject('INVALID', 'actor or session has white space in it')
  end
  if schema and tonumber(schema) > SCHEMA then
    reject('SCHEMA', 'the project has data of schema ' .. schema ..
           '; this program knows schema ' .. SCHEMA .. ' and older')
  elseif not schema and not may_be_missing and
         (not may_be_new or values[1] and SCRIPT ~= 'restore') then
    reject('NOT_FOUND', 'there is no project ' .. root:match('{(.*)}') ..
           (values[1] and ' yet: it is being restored' or ''), 0,
           values[1] and 'restoring' or 'project')
  end
  return {rev = tonumber(values[1] or 0), fence = values[2] or '0', limits = values[3],
          lanes = values[4] or LANES, all = (values[3] or '') .. POLICY}
end

-- A project's first write makes its meta.
local meta

-- A number of the policy, stored or built in; when the project was paused, the policy stored.
local function limit(name)
  return tonumber(meta.all:match(' ' .. name .. '=(%d+)'))
end

-- The lane's cap on held tasks, or nil.  Lanes stand in meta as `any coding=4 planning=2`.
local function cap(lane)
  local _, to = (' ' .. meta.lanes):find(' ' .. lane .. '=', 1, true)
  return to and tonumber(meta.lanes:match('^%d+', to))
end

local function each_lane()
  return meta.lanes:gmatch('([^ =]+)[^ ]*')
end

-- A field that was not read at once is read when it is used; '' where there is none.
local LAZY = {__index = function(task, name)
  local value = read('HGET', task.key, name) or ''
  rawset(task, name, value)
  return value
end}

-- A task, with the fields that are named, or with all (`*`, for whoever shows it afterwards); nil
-- if there is none.
local function fields(id, first, ...)
  local task_key = key('task', id)
  local task
  if first == '*' then
    local before = read('HGETALL', task_key)
    if not before[1] then return nil end
    task = {id = id, key = task_key, before = before, claimedBy = '', notBefore = '',
            maxRuntime = '', reaped = '', orphaned = '', assigned = '', session = '', fence = '',
            failedAt = ''}
    for i = 1, #before, 2 do task[before[i]] = before[i + 1] end
  else
    first = first or 'rev'
    local names, values = {first, ...}, read('HMGET', task_key, 'status', 'lane', first, ...)
    if not values[1] then return nil end
    task = {id = id, key = task_key, status = values[1], lane = values[2]}
    for i = 1, #names do task[names[i]] = values[i + 2] or '' end
  end
  return setmetatable(task, LAZY)
end

local function held(task)
  return task.status == 'claimed' or task.status == 'in-progress'
end

-- The title of a task as JSON, its dependencies between spaces, and how much was read for it: a text
-- begins with both.  One of an older program has them in any order.
local function head_of(task)
  local text = read('GETRANGE', key('text', task.id), 0, 1023)
  local at = text:find('^{"title":"') and 11
  while at do
    at = text:find('["\\]', at)
    if not at or text:byte(at) == 34 then break end
    at = at + 2
  end
  local edges = at and text:match('^,"dependencies":"([^"]*)"', at + 1)
  if at and (edges or task.edges == '') then return text:sub(10, at), edges or '', #text end
  text = read('GET', key('text', task.id)) or '{}'
  local values = cjson.decode(text)
  return cjson.encode(values.title or ''), values.dependencies or '', #text
end

local function append(list, ...)
  for _, value in ipairs({...}) do list[#list + 1] = value end
end

local function given(value)
  return value ~= '' and value or nil
end

-- A task whole: what is given, its hash, its texts.  The client merges them; what comes first wins.
-- Every element of a reply costs, so names and values make one string, a row: tab-separated, and
-- none has a tab in it.
local function whole(task, ...)
  local ends = rawget(task, 'leaseExpiresAt') or
               held(task) and read('ZSCORE', key('running', task.lane), task.id)
  local texts = read('MGET', key('text', task.id), key('work', task.id), key('summary', task.id),
                     key('notes', task.id))
  return {'OK', table.concat({'taskId', task.id, 'leaseExpiresAt', ends or '', ...}, '\t'),
          table.concat(rawget(task, 'before') or read('HGETALL', task.key), '\t'),
          texts[1] or '', texts[2] or '', texts[3] or '', texts[4] or ''}
end

local function row(...)
  return table.concat({...}, '\t')
end

-- How many tasks `reap` would move on now, in one lane or in all.
local function due(lane)
  local count = read('ZCARD', root .. ':unsettled')
  for name in each_lane() do
    if not lane or name == lane then
      count = count + read('ZCOUNT', key('running', name), '-inf', now)
    end
  end
  return count
end

-- Guards --------------------------------------------------------------------------------------

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
local function name_of(task, holder)
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
local function resumable(task)
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
local function full_lane(lane)
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
-- receipt in a task's hash goes on with `fence rev` and lasts until the next change.
local function recall(task, alone)
  if arg.op == '' then return nil end
  if #arg.op ~= 37 then reject('INVALID', 'op is not 24 digits, a space and 12 digits') end
  local mark, digest, id, fence, rev = arg.op:sub(1, 24), nil, task and task.id
  if task and task.op:sub(1, 24) == mark then
    digest, fence, rev = task.op:match('^%S+ (%S+) (%S*) (%S+)$')
  elseif alone then
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

-- The dependencies of a new task: each once, and those that are not completed, as a set.
-- `batch` has the tasks that the same call creates, `looked` what it has looked at.
local function require_dependencies(id, dependencies, batch, looked)
  local edges, needs, seen = {}, {}, {}
  for other in dependencies:gmatch('%S+') do
    require_id(other, 'dependency')
    if other == id then reject('CYCLE', 'task ' .. id .. ' depends on itself') end
    local known = batch[other] or looked[other] or fields(other)
    if not known then
      reject('NOT_FOUND', 'there is no task ' .. root:match('{(.*)}') .. '/' .. other ..
             ', which ' .. id .. ' depends on', 0, 'dependency')
    end
    if known.status ~= 'completed' then needs[other] = true end
    if not seen[other] then edges[#edges + 1] = other end
    seen[other], looked[other] = true, known
  end
  if #edges > 200 then
    reject('TOO_LARGE', 'task ' .. id .. ' has ' .. #edges .. ' dependencies; accepted: up to 200')
  end
  return edges, needs
end

-- New tasks in an order in which each stands behind those it depends on.
local function require_order(batch, by_id)
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
local function only_mission()
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
local function give_ids(batch, done)
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

-- New dependencies may not lead back to the task.
local function require_no_path(task, edges)
  local seen, todo, count = {}, {unpack(edges)}, 0
  while #todo > 0 do
    local id = table.remove(todo)
    if id == task.id then
      reject('CYCLE', 'with these dependencies ' .. name_of(task) .. ' would wait for itself')
    end
    if not seen[id] then
      seen[id], count = true, count + 1
      if count > LOOK then
        reject('TOO_LARGE', 'more than ' .. LOOK .. ' tasks would have to be completed before ' ..
               name_of(task))
      end
      local other = fields(id, 'edges')
      if other and other.edges ~= '' then
        local text = cjson.decode(read('GET', key('text', id)) or '{}')
        for further in (text.dependencies or ''):gmatch('%S+') do todo[#todo + 1] = further end
      end
    end
  end
end

-- The policy that a call brings, as `limits` with it, and the lanes with its lanes.  Lanes are
-- never taken away.
local function require_policy()
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

-- Effects -------------------------------------------------------------------------------------

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
local function pick_up(task, ttl)
  write('HSET', task.key, 'assigned', '', 'session', arg.session, 'claimTTL', ttl)
  write('SREM', key('assigned', task.claimedBy), task.id)
  task.claimTTL = ttl
end

-- Edges of the dependency graph: what the task depends on, and what of it is not completed.
local function write_edges(task, edges, needs)
  write('DEL', key('waits', task.id))
  for _, id in ipairs(edges) do write('ZADD', key('dependents', id), needs[id] and 0 or 1, task.id) end
  for id in pairs(needs) do write('SADD', key('waits', task.id), id) end
end

-- Derives both from the task's text again: what a completion freed stays free.
local function restore_edges(task)
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

local function remove_edges(task)
  local text = cjson.decode(read('GET', key('text', task.id)) or '{}')
  for id in (text.dependencies or ''):gmatch('%S+') do
    write('ZREM', key('dependents', id), task.id)
  end
end

-- Tells the tasks that wait for this one that it is completed; frees those that wait for no
-- other.  Returns the freed, and whether some of a long list are left for reap.
local function free_dependents(task)
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

-- Replies -------------------------------------------------------------------------------------

-- A reply about a task is OK, REPEATED or SUPERSEDED and what follows in `show` or `whole`.
local function show(task, ...)
  return {'OK', table.concat({'taskId', task.id, 'rev', task.rev, 'updatedAt', at, ...}, '\t')}
end

local function policy()
  local values = {'lanes', meta.lanes, 'storedAt', limit('policy') or ''}
  for name in POLICY:gmatch('%a+') do append(values, name, limit(name)) end
  return table.concat(values, '\t')
end

-- The answer to a call that was carried out before: its own fence and rev, the task as it is.  A
-- claim that has ended since is superseded too.
local function replay(done, claims)
  local task = fields(done.task, 'fence')
  if not task then
    return {'SUPERSEDED', table.concat({'taskId', done.task, 'opFence', done.fence,
                                        'opRev', done.rev}, '\t')}
  end
  local reply = whole(task, 'opFence', done.fence, 'opRev', done.rev)
  local ended = claims and (task.status == 'pending' or task.status == 'blocked')
  reply[1] = task.fence == done.fence and not ended and 'REPEATED' or 'SUPERSEDED'
  return reply
end
