-- plumbing.lua -- What every script starts with: keys, the clock, project meta, reading a task.
--
-- The prelude has four parts: plumbing, guards, effects, replies.  A script is guards, a blank
-- line, effects.  Guards read and may `reject`; effects write and cannot refuse.  Valkey has no
-- rollback, so effects come in an order that makes every prefix harmless: the change number and
-- the event first (a follower re-reads the task), the task's hash after what points at it, and the
-- mark that makes `reap` look at the task again - its lease, or its place in `unsettled` - last.
--
-- Every definition that is not marked is made at each call of a script that needs it; one that is
-- marked `seldom`, when it is called.
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
--   <root>:waits:<id>       set     the dependencies that a task waits for
--   <root>:dependents:<id>  zset    unfinished tasks that depend on it; score 0: they wait for it,
--                                   1: they do not
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
--   <root>:claimers         zset    `agent lane mark mission` of the others that wait for a task, by
--                                   when they are forgotten unless they ask again (ms)
--   <root>:files            hash    mark -> path of the files that are kept in step
--   <root>:file:<mark>      hash    what file and queue last agreed on: task -> JSON; and `:state`
--   <root>:op:<op>          string  receipt: digest task fence rev, PX = 15 minutes
--   <root>:events           stream  <rev>-0 -> one field; the channel of the same name carries
--                                   the same string

local SCHEMA = 1
local BATCH = 100              -- the most tasks that one call reaps or frees
local LOOK = 1000              -- the most tasks that one call looks at
local NOTES = 20               -- the last notes of a task that are kept
local NOTE_BYTES = 16384       -- and what their texts take at most
local EDGES = 3000             -- the most dependencies that one call brings
local TEXTS = 4194304          -- bytes of texts after which an answer goes on in the next call
local GRACE = 60               -- s after a start of the server in which no earlier lease is reaped
local ASKS_AGAIN = 15000       -- ms after which a claimer that waits has asked again, or is gone
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
local function moment(ms) -- seldom
  return '\0' .. ms .. '\0'
end

-- When the server was started (ms), while that is less than GRACE ago.  Nobody could renew a lease
-- while it was down, so leases of before have until the end of GRACE.  INFO may be denied, and it
-- counts seconds that have begun: what was claimed in the server's first second is not of before.
local function restarted() -- seldom
  local info = redis.pcall('INFO', 'server')
  local uptime = type(info) == 'string' and tonumber(info:match('uptime_in_seconds:(%d+)'))
  return uptime and uptime < GRACE and now - now % 1000 - uptime * 1000
end

-- What whoever has to wait for the end of a lease is told in that time; '' afterwards.
local function grace() -- seldom
  local start = restarted()
  return start and '; the server was started at ' .. moment(decimal(start)) ..
         ': earlier leases that ran out are ended from ' .. moment(decimal(start + GRACE * 1000)) ..
         ' on' or ''
end

-- The refusal of a call: CODE, a sentence, how many tasks `reap` would move on first, and which of
-- the code's cases it is, where the next step depends on that.
local function reject(code, sentence, due, case) -- seldom
  if due and due > 0 then sentence = sentence .. grace() end
  error({refusal = {code, sentence, due or 0, case or ''}}, 0)
end

local function no_project() -- seldom
  return 'there is no project ' .. root:match('{(.*)}')
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
    reject('NOT_FOUND', no_project() ..
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

-- How far the stream has got, where that is beyond the project's rev: no event can follow an id
-- that another program has added, or the rev was lost.
local function beyond() -- seldom
  local events, last = root .. ':events', 0
  if read('TYPE', events).ok ~= 'stream' then return nil end
  local facts = read('XINFO', 'STREAM', events)
  for i = 1, #facts, 2 do
    if facts[i] == 'last-generated-id' then last = tonumber(facts[i + 1]:match('^%d+')) end
  end
  return last > meta.rev and last
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

-- Where the title ends in a text that begins with it, as one of an older program may not.
local function end_of_title(text)
  local at = text:find('^{"title":"') and 11
  while at do
    at = text:find('["\\]', at)
    if not at or text:byte(at) == 34 then break end
    at = at + 2
  end
  return at
end

-- The title of a task as JSON, its dependencies between spaces, and how much was read for it.
local function head_of(task)
  local text = read('GETRANGE', key('text', task.id), 0, 1023)
  local at = end_of_title(text)
  local edges = at and text:match('^,"dependencies":"([^"]*)"', at + 1)
  if at and (edges or task.edges == '' or text:byte(at + 1) == 125) then
    return text:sub(10, at), edges or '', #text
  end
  text = read('GET', key('text', task.id)) or '{}'
  local values = cjson.decode(text)
  return cjson.encode(values.title or ''), values.dependencies or '', #text
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

local function dependencies_of(id)
  local _, dependencies = head_of({id = id})
  return dependencies
end

-- The text of a task with other dependencies.
local function with_dependencies(id, dependencies) -- seldom
  local text = read('GET', key('text', id)) or '{}'
  local at = end_of_title(text)
  local _, behind = text:find('^,"dependencies":"[^"]*"', (at or 0) + 1)
  if at and behind then
    local told = dependencies ~= '' and ',"dependencies":"' .. dependencies .. '"' or ''
    return text:sub(1, at) .. told .. text:sub(behind + 1)
  end
  local values = cjson.decode(text)
  return text_of({title = values.title or id, description = values.description or '',
                  metadata = values.metadata or ''}, dependencies)
end

-- Who waits for a task, `most` of them.
local function waiting_for(id, most)
  return read('ZRANGEBYSCORE', key('dependents', id), 0, 0, 'LIMIT', 0, most)
end

-- Who waits for work, in `waiting` or in `claimers`.
local function those_in(name)
  return read('ZRANGEBYSCORE', root .. ':' .. name, now, '+inf', 'LIMIT', 0, LOOK)
end

local function is_open(task) -- seldom
  return task and task.status ~= 'completed' and task.status ~= 'deleted'
end

local function depends_on(task, id) -- seldom
  return is_open(task) and
         (' ' .. dependencies_of(task.id) .. ' '):find(' ' .. id .. ' ', 1, true) and true
end

-- The unfinished tasks that depend on one, BATCH + 1 of them at most.  A call that was cut off may
-- have left others in the index.
local function unfinished_dependents(id) -- seldom
  local found = {}
  for _, other in ipairs(read('ZRANGE', key('dependents', id), 0, BATCH)) do
    if depends_on(fields(other, 'edges'), id) then found[#found + 1] = other end
  end
  return found
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
local function due(lane) -- seldom
  local count = read('ZCARD', root .. ':unsettled')
  for name in each_lane() do
    if not lane or name == lane then
      count = count + read('ZCOUNT', key('running', name), '-inf', now)
    end
  end
  return count
end
