-- restore.lua -- Make a project again from its records; nobody sees it before it is whole.
--
-- State    - -> any
-- Args     actor mark step epoch rev fence limits lanes keys
-- Each     task hash text work summary notes ends waits
-- Returns  nothing; REPEATED, with the project's rev, when it lives with this epoch already
-- Rejects  SCHEMA INVALID TOO_LARGE EXISTS
-- Emits    update for each task that is blocked, or no longer, and its record says otherwise
--
-- Steps: `begin`; `clear`, for the `keys`, without the root, that an earlier restore left; `enter`,
-- with tasks; `settle`, when all are there, with those whose place depends on others; `open`.
-- Until then the root has a rev, no limits, and for its epoch the mark of this restore; one that
-- begins later takes its place.  `hash` is a row; `waits` has ids between spaces.

meta = project(true)
local name = root:match('{(.*)}')
local epoch = read('HGET', root, 'epoch')
local steps = {begin = true, clear = true, enter = true, settle = true, open = true}
if not steps[arg.step] then reject('INVALID', 'there is no step ' .. arg.step:sub(1, 40)) end
local rev = require_integer(arg.rev, 'rev', 0, 1e15 - 1)
require_integer(arg.fence, 'fence', 0, 1e15 - 1)
require_id(arg.epoch, 'epoch')
require_id(arg.mark, 'mark')
if meta.limits then
  local its = 'project ' .. name .. ' is there already, '
  if epoch ~= arg.epoch then
    reject('EXISTS', its .. 'with another epoch: ' .. (epoch or 'none') .. ', not ' .. arg.epoch)
  elseif arg.step ~= 'open' and meta.rev ~= rev then
    reject('EXISTS', its .. 'and ' .. (meta.rev > rev and 'has newer changes' or
           'lacks the last changes') .. ': its rev is ' .. meta.rev .. ', the record has ' .. rev)
  end
  return {'REPEATED', meta.rev}
elseif arg.step ~= 'begin' and epoch ~= arg.mark then
  reject('EXISTS', 'project ' .. name .. ' is being restored by somebody else')
end
local schema = arg.limits:match('^schema=(%d+)[%w= ]*$')
if not schema then reject('INVALID', 'limits are ' .. arg.limits:sub(1, 40):gsub('[^ -~]', '?')) end
if tonumber(schema) > SCHEMA then
  reject('SCHEMA', 'the record has data of schema ' .. schema .. '; this program knows schema ' ..
         SCHEMA .. ' and older')
end
meta.lanes = arg.lanes
local lanes = 0
for lane, most in arg.lanes:gmatch('([^ =]+)=?([^ ]*)') do
  require_id(lane, 'lane')
  if most ~= '' then require_integer(most, lane .. '.maxConcurrent', 1, 1000000) end
  lanes = lanes + 1
end
if lanes > 32 then reject('TOO_LARGE', 'there are ' .. lanes .. ' lanes; accepted: up to 32') end

local function require_number(task, field, needed)
  local value = task[field] or ''
  if value == '' and not needed then return end
  if #value > 16 or not value:find('^%d+$') then
    reject('INVALID', field .. ' of ' .. task.id .. ' is ' ..
           (value == '' and 'missing' or value:sub(1, 40):gsub('[^ -~]', '?')))
  end
end

-- A task of the record, with every field that has a part in an effect.
local function require_record(new)
  require_id(new.task, 'taskId')
  local task = {id = new.task, key = key('task', new.task), fields = {}}
  for field, value in (new.hash .. '\t'):gmatch('([^\t]+)\t([^\t]*)\t') do
    task[field] = value
    append(task.fields, field, value)
  end
  local statuses = ' pending claimed in-progress completed failed blocked '
  if not statuses:find(' ' .. (task.status or '') .. ' ', 1, true) then
    reject('INVALID', 'status of ' .. new.task .. ' is ' .. tostring(task.status):sub(1, 40))
  end
  require_id(task.mission or '', 'mission')
  require_lane(task.lane or '')
  require_priority(task.priority or '')
  for _, field in ipairs({'order', 'rev', 'updatedAt'}) do require_number(task, field, true) end
  for _, field in ipairs({'notBefore', 'maxRuntime', 'retryCount', 'expiryCount'}) do
    require_number(task, field)
  end
  for _, field in ipairs({'claimedAt', 'claimTTL', 'fence'}) do
    require_number(task, field, held(task))
  end
  require_number(task, 'completedAt', task.status == 'completed')
  require_number(task, 'failedAt', task.status == 'failed')
  if held(task) then
    require_id(task.claimedBy or '', 'claimedBy')
    task.ends = require_integer(new.ends, 'leaseExpiresAt', 0, 1e15 - 1)
  end
  for _, field in ipairs({'notBefore', 'blocked', 'edges'}) do task[field] = task[field] or '' end
  task.ended = task[task.status .. 'At']
  return task
end

local entered, fence = {}, tonumber(meta.fence)
rev = math.max(rev, meta.rev)
fence = math.max(fence, tonumber(arg.fence))
if arg.step == 'enter' then
  for new in each_task() do
    local task = require_record(new)
    task.new = new
    entered[#entered + 1] = task
    rev, fence = math.max(rev, tonumber(task.rev)), math.max(fence, tonumber(task.fence) or 0)
  end
end

-- A lease ends when the record says; in its last third, and later, its holder gets the time that
-- it needs to renew it: it could not while the project was away, and of a renewal that was no
-- change the record does not know.
local function lease_again(task)
  local ttl, ends = tonumber(task.claimTTL), task.ends
  if ends < now + ttl * 1000 / 3 then
    ends = now + math.min(ttl, math.max(GRACE, ttl / 3)) * 1000
  end
  if tonumber(task.maxRuntime) then
    ends = math.min(ends, task.claimedAt + task.maxRuntime * 1000)
  end
  write('ZADD', key('running', task.lane), decimal(ends), task.id)
  if ends > now then write('SET', key('lock', task.id), task.claimedBy, 'PXAT', decimal(ends)) end
  if task.assigned == '1' then write('SADD', key('assigned', task.claimedBy), task.id) end
end

local function enter(task)
  write('SET', key('text', task.id), task.new.text)
  if task.new.work ~= '' then write('SET', key('work', task.id), task.new.work) end
  if task.new.summary ~= '' then write('SET', key('summary', task.id), task.new.summary) end
  if task.new.notes ~= '' then write('SET', key('notes', task.id), task.new.notes) end
  write('ZADD', key('mission', task.mission), task.order, task.id)
  local scores = {}
  for id in task.new.waits:gmatch('%S+') do scores[id] = 0 end
  wait_for(task, scores)
  write('HSET', task.key, unpack(task.fields))
  if held(task) then
    lease_again(task)
  elseif task.ended or task.edges == '' and (task.status == 'blocked') == (task.blocked ~= '') then
    place(task, task.status)
  end
end

local function settle(task)
  mend_dependencies(task)
  if task.status == 'pending' or task.status == 'blocked' then settle_again(task) end
end

if arg.step == 'begin' then
  write('HSET', root, 'epoch', arg.mark, 'rev', arg.rev, 'fence', arg.fence)
elseif arg.step == 'clear' then
  for left in arg.keys:gmatch('%S+') do write('DEL', root .. ':' .. left) end
elseif arg.step == 'enter' then
  write('HSET', root, 'rev', decimal(rev), 'fence', decimal(fence))
  for _, task in ipairs(entered) do enter(task) end
elseif arg.step == 'settle' then
  for new in each_task() do
    local task = fields(new.task, 'fence', 'priority', 'order', 'notBefore', 'blocked', 'edges')
    if task then settle(task) end
  end
else
  write('HSET', root, 'epoch', arg.epoch, 'rev', decimal(rev), 'fence', decimal(fence),
        'limits', arg.limits, 'lanes', arg.lanes)
  for lane in each_lane() do
    if read('ZCARD', key('ready', lane)) > 0 then ring(lane) end
  end
end
return {'OK'}
