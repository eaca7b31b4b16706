-- list.lua -- List tasks by mission, status, lane, agent, priority and words.
--
-- State    any -> (unchanged)
-- Args     mission status lane agent priority text limit cursor full
-- Returns  total where an index knows it, cursor when there is more, the tasks
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
-- Flags    no-writes
--
-- Reads the smallest index that has all the tasks asked for, looks at LOOK of them and TEXTS bytes at
-- most, and goes on at the cursor: `<index>,<score>,<id>` of the last one it looked at.  `text` has a
-- word in a line, its spellings between tabs: each word stands in taskId, title or description; small
-- letters of ASCII are as good as capitals.

meta = project()
local limit = require_integer(arg.limit, 'limit', 1, LOOK)
if arg.mission ~= '' then require_id(arg.mission, 'mission') end
if arg.agent ~= '' then require_id(arg.agent, 'agent') end
if arg.lane ~= '' then require_lane(arg.lane) end
if arg.priority ~= '' then require_priority(arg.priority) end

-- Which indexes have the tasks of a status, in the order in which people want to see them.
local indexes, lanes = {}, {}
local function add(index) indexes[#indexes + 1] = index end
for lane in each_lane() do
  if arg.lane == '' or arg.lane == lane then lanes[#lanes + 1] = lane end
end
local wanted = arg.status
local mine = wanted == '' and arg.agent ~= ''
local any = wanted == '' and not mine
if any or mine or wanted == 'claimed' or wanted == 'in-progress' then
  for _, lane in ipairs(lanes) do add('running:' .. lane) end
end
if any or wanted == 'pending' then
  add('ready')
  add('delayed')
end
for _, status in ipairs({'blocked', 'failed', 'completed'}) do
  if any or wanted == status then add(status) end
end
if #indexes == 0 then
  reject('INVALID', 'status is ' .. wanted:sub(1, 40):gsub('[^ -~]', '?') ..
         '; accepted: pending, claimed, in-progress, completed, failed, blocked')
end

-- The sorted sets of an index: the ready tasks of all lanes stand as they would be claimed.
local function sets_of(index)
  if index ~= 'ready' then return {index} end
  local sets = {}
  for i, lane in ipairs(lanes) do sets[i] = 'ready:' .. lane end
  return sets
end

local total = 0
for _, index in ipairs(indexes) do
  for _, set in ipairs(sets_of(index)) do total = total + read('ZCARD', root .. ':' .. set) end
end
if arg.mission ~= '' then
  local size = read('ZCARD', key('mission', arg.mission))
  if arg.cursor:find('^mission:') or arg.cursor == '' and (any or size < total) then
    indexes, total = {'mission:' .. arg.mission}, size
  end
end
local known = arg.text == '' and arg.lane == '' and arg.agent == '' and arg.priority == '' and
              (arg.mission == '' and wanted ~= 'claimed' and wanted ~= 'in-progress' or
               any and arg.mission ~= '')

-- Latest first, where the score is the time of an end.
local function latest_first(index)
  return index == 'failed' or index == 'completed'
end

-- How many of a set come before those that follow a task which was looked at.
local function passed(set, score, id)
  local place = root .. ':' .. set
  if read('ZSCORE', place, id) == score then
    return read(latest_first(set) and 'ZREVRANK' or 'ZRANK', place, id) + 1
  elseif latest_first(set) then
    return read('ZCOUNT', place, '(' .. score, '+inf')
  end
  return read('ZCOUNT', place, '-inf', '(' .. score)
end

local at, starts = 1, {}
if arg.cursor ~= '' then
  local index, score, id = arg.cursor:match('^([^,]+),(%d+),([^,]+)$')
  index = index and index:gsub('^ready:.*', 'ready')  -- as an older program names it
  at = 0
  for i, name in ipairs(indexes) do
    if name == index then at = i end
  end
  if at == 0 then
    reject('INVALID', 'cursor is ' .. arg.cursor:sub(1, 80):gsub('[^ -~]', '?') ..
           '; accepted: the cursor of the last answer to the same question')
  end
  for _, set in ipairs(sets_of(index)) do starts[set] = passed(set, score, id) end
end

local ahead = {}               -- by set, what was read of it; `at` is the next to look at

local function head_of_set(set, chunk)
  local head = ahead[set]
  if not head or (head.at > #head and #head > 0) then
    local start = head and head.start + #head / 2 or starts[set] or 0
    head = read(latest_first(set) and 'ZREVRANGE' or 'ZRANGE', root .. ':' .. set,
                start, start + chunk - 1, 'WITHSCORES')
    head.at, head.start, ahead[set] = 1, start, head
  end
  return head
end

-- The next of an index with their scores, the best of all its sets first; one more than the limit.
local function following(index)
  local sets, found = sets_of(index), {}
  local chunk = math.max(10, math.ceil((limit + 1) / #sets))
  while #found < 2 * (limit + 1) do
    local best, score
    for _, set in ipairs(sets) do
      local head = head_of_set(set, chunk)
      local its = tonumber(head[head.at + 1])
      if its and (not score or its < score) then best, score = head, its end
    end
    if not best then break end
    append(found, best[best.at], best[best.at + 1])
    best.at = best.at + 2
  end
  return found
end

local function matches(task)
  return task and (arg.mission == '' or task.mission == arg.mission) and
         (wanted == '' or task.status == wanted) and (not mine or held(task)) and
         (arg.lane == '' or task.lane == arg.lane) and
         (arg.agent == '' or task.claimedBy == arg.agent and task.status ~= 'pending' and
          task.status ~= 'blocked') and
         (arg.priority == '' or task.priority == arg.priority)
end

local read_so_far = 0          -- bytes of texts

local function has_words(task)
  local text = read('GET', key('text', task.id)) or '{}'
  read_so_far = read_so_far + #text
  local values = cjson.decode(text)
  text = (task.id .. '\n' .. (values.title or '') .. '\n' .. (values.description or '')):lower()
  for word in arg.text:lower():gmatch('[^\n]+') do
    local found = false
    for spelling in word:gmatch('[^\t]+') do found = found or text:find(spelling, 1, true) end
    if not found then return false end
  end
  return true
end

local function line(task)
  if arg.full == '1' then
    local reply = whole(task)
    read_so_far = read_so_far + #reply[4] + #reply[5] + #reply[6] + #reply[7]
    return reply
  end
  local title, dependencies, size = head_of(task)
  local ends = held(task) and read('ZSCORE', key('running', task.lane), task.id) or ''
  read_so_far = read_so_far + size
  local brief = row('taskId', task.id, 'status', task.status, 'lane', task.lane,
                    'mission', task.mission, 'priority', task.priority,
                    'claimedBy', task.claimedBy, 'claimedAt', task.claimedAt,
                    'order', task.order, 'rev', task.rev, 'updatedAt', task.updatedAt,
                    'retryCount', task.retryCount, 'notBefore', task.notBefore,
                    'leaseExpiresAt', ends, 'claimTTL', task.claimTTL,
                    'orphaned', task.orphaned,
                    'dependencies', dependencies)
  return {'OK', brief, '', '{"title":' .. title .. '}'}
end

local rows, looked, cursor, last = {}, 0, '', ''
while at <= #indexes and cursor == '' do
  local index = indexes[at]
  local found = following(index)
  for i = 1, #found, 2 do
    if looked == LOOK or read_so_far > TEXTS then
      cursor = last
      break
    end
    local task = fields(found[i], 'mission', 'priority', 'claimedBy', 'claimedAt', 'order',
                        'rev', 'updatedAt', 'retryCount', 'notBefore', 'claimTTL', 'orphaned', 'edges')
    if matches(task) and (arg.text == '' or has_words(task)) then
      if #rows == limit then
        cursor = last
        break
      end
      rows[#rows + 1] = line(task)
    end
    looked = looked + 1
    last = index .. ',' .. found[i + 1] .. ',' .. found[i]
  end
  if #found == 0 then at = at + 1 end
end
if not known then total = arg.cursor == '' and cursor == '' and #rows or '' end
return {'OK', total, cursor, rows}
