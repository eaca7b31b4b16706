-- create.lua -- Enter new tasks, all of them or none.
--
-- State    - -> pending, or blocked: by a reason, or while a dependency is not completed
-- Args     op actor epoch policy lanes
-- Each     task mission title description priority lane dependencies metadata delay maxRuntime
--          reason
-- Returns  taskId, status, rev, order of each, in the order of the call
-- Rejects  SCHEMA INVALID TOO_LARGE EXISTS NOT_FOUND CYCLE OP_REUSED
-- Emits    create, for each
--
-- `dependencies` are ids between spaces and may name tasks of the same call, in any order; EDGES of
-- them at most in one call.  `delay` counts in seconds; with a `reason` a task is blocked by hand
-- from the first.  `policy` and `lanes` are what the first create of a project stores.  A task
-- without an id gets the initials of its mission and a number; one without a mission belongs to
-- the project's only one.

meta = project(true)
local limits, lanes = meta.limits, meta.lanes
if (arg.policy ~= '' or arg.lanes ~= '') and not limit('policy') then
  limits, lanes = require_policy()
  meta.lanes = lanes
end

local order = clock[1] * 1000000 + clock[2]
local batch, by_id, nameless, count, mission = {}, {}, 0, 0, nil
for new in each_task() do
  if new.mission == '' then
    mission = mission or only_mission()
    new.mission = mission
  end
  require_id(new.mission, 'mission')
  require_text(new.title, 'title', 500)
  if new.title == '' then reject('INVALID', 'title is empty; accepted: 1 to 500 bytes') end
  require_text(new.description, 'description', 65536)
  require_text(new.metadata, 'metadata', 65536)
  require_text(new.reason, 'blockedReason', 4096)
  require_priority(new.priority)
  require_lane(new.lane)
  if new.delay ~= '' then require_integer(new.delay, 'delay', 0, WEEK) end
  if new.maxRuntime ~= '' then require_integer(new.maxRuntime, 'maxRuntime', 1, WEEK) end
  new.order = decimal(order + #batch)
  batch[#batch + 1] = new
  if new.task == '' then nameless = nameless + 1 end
  if new.dependencies ~= '' then
    count = count + select(2, new.dependencies:gsub('%S+', ''))
  end
end
if #batch == 0 or #batch > 200 then
  reject('TOO_LARGE', 'the call has ' .. #batch .. ' tasks; accepted: 1 to 200')
elseif count > EDGES then
  reject('TOO_LARGE', 'the call has ' .. count .. ' dependencies; accepted: up to ' .. EDGES)
end

-- Ids that are made here follow a number, which the receipt keeps: a repeat makes the same.
local done_before = nameless > 0 and recall(nil, true)
local number = nameless > 0 and give_ids(batch, done_before)
for _, new in ipairs(batch) do
  require_id(new.task, 'taskId')
  if by_id[new.task] then reject('EXISTS', 'the call names task ' .. new.task .. ' twice') end
  local task = fields(new.task, 'rev', 'op')
  local done = task and recall(task)
  if task and not done then
    reject('EXISTS', 'there is a task ' .. root:match('{(.*)}') .. '/' .. new.task ..
           ' already; it is ' .. task.status)
  end
  new.known, new.rev, by_id[new.task] = task, done and done.rev, new
end
-- What an earlier sending of this call has entered was looked at then.
local seen = {}
for _, new in ipairs(batch) do
  local dependencies = new.known and '' or new.dependencies
  new.edges, new.scores, new.waits = require_dependencies(new.task, dependencies, by_id, seen)
end
local sorted = #batch == 1 and batch or require_order(batch, by_id)

if not meta.limits then write('HSET', root, 'epoch', arg.epoch) end
if not limits or limits ~= meta.limits then
  write('HSET', root, 'limits', limits or 'schema=' .. SCHEMA, 'lanes', lanes)
end
if number and not done_before then
  write('HSET', root, 'made', number + nameless)
  keep_receipt({id = number, fence = '', rev = decimal(meta.rev)})
end
for _, new in ipairs(sorted) do
  local task = new.known
  if not task then
    task = {id = new.task, key = key('task', new.task), status = '', fence = '', op = '',
            lane = new.lane, priority = new.priority, order = new.order, notBefore = ''}
    if new.delay ~= '' and new.delay ~= '0' then
      task.notBefore = string.format('%d', now + new.delay * 1000)
    end
    local by_hand = new.reason ~= ''
    local status = (by_hand or new.waits) and 'blocked' or 'pending'
    emit(task, 'create', status)
    write('SET', key('text', task.id), text_of(new, table.concat(new.edges, ' ')))
    if by_hand then write_work(task, {blockedReason = new.reason}) end
    if #new.edges > 0 then
      wait_for(task, new.scores)
      depend_on(task, new.scores)
    end
    write('ZADD', key('mission', new.mission), task.order, task.id)
    place(task, status)
    local rare = {}
    if task.notBefore ~= '' then append(rare, 'notBefore', task.notBefore) end
    if new.maxRuntime ~= '' then append(rare, 'maxRuntime', new.maxRuntime) end
    if #new.edges > 0 then append(rare, 'edges', #new.edges) end
    if by_hand then append(rare, 'blocked', '1') end
    change(task, 'status', status, 'priority', new.priority, 'lane', new.lane,
           'mission', new.mission, 'order', task.order, unpack(rare))
    task.status = status
  end
  new.reply = row('taskId', task.id, 'status', task.status, 'rev', new.rev or task.rev,
                  'order', task.order or new.order, 'mission', new.mission)
end
local reply = {'OK'}
for i, new in ipairs(batch) do reply[i + 1] = new.reply end
return reply
