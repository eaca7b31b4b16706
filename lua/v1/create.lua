-- create.lua -- Enter new tasks, all of them or none.
--
-- State    - -> pending, or blocked while a dependency is not completed
-- Args     op actor epoch policy lanes
-- Each     task mission title description priority lane dependencies metadata delay maxRuntime
-- Returns  taskId, status, rev, createdAt of each
-- Rejects  SCHEMA INVALID TOO_LARGE EXISTS NOT_FOUND CYCLE OP_REUSED
-- Emits    create, for each
--
-- `dependencies` are ids between spaces and may name tasks of the same call, in any order.
-- `delay` counts in seconds.  `policy` and `lanes` are what the first create of a
-- project stores.

meta = project(true)
local limits, lanes = meta.limits, meta.lanes
if (arg.policy ~= '' or arg.lanes ~= '') and not limit('policy') then
  limits, lanes = require_policy()
  meta.lanes = lanes
end

local order = clock[1] * 1000000 + clock[2]
local batch, by_id = {}, {}
for new in each_task() do
  require_id(new.task, 'taskId')
  require_id(new.mission, 'mission')
  require_text(new.title, 'title', 500)
  if new.title == '' then reject('INVALID', 'title is empty; accepted: 1 to 500 bytes') end
  require_text(new.description, 'description', 65536)
  require_text(new.metadata, 'metadata', 65536)
  require_priority(new.priority)
  require_lane(new.lane)
  if new.delay ~= '' then require_integer(new.delay, 'delay', 0, WEEK) end
  if new.maxRuntime ~= '' then require_integer(new.maxRuntime, 'maxRuntime', 1, WEEK) end
  if by_id[new.task] then reject('EXISTS', 'the call names task ' .. new.task .. ' twice') end
  local task = fields(new.task, 'rev', 'op')
  local done = task and recall(task)
  if task and not done then
    reject('EXISTS', 'there is a task ' .. root:match('{(.*)}') .. '/' .. new.task ..
           ' already; it is ' .. task.status)
  end
  new.known, new.rev = task, done and done.rev
  new.order = decimal(order + #batch)
  batch[#batch + 1], by_id[new.task] = new, new
end
if #batch == 0 or #batch > 200 then
  reject('TOO_LARGE', 'the call has ' .. #batch .. ' tasks; accepted: 1 to 200')
end
-- What an earlier sending of this call has entered was looked at then.
for _, new in ipairs(batch) do
  new.edges, new.needs = require_dependencies(new.task, new.known and '' or new.dependencies, by_id)
end

-- Dependencies first; what is left when no task follows any more is a cycle.
local sorted, entered = #batch == 1 and batch or {}, {}
while #sorted < #batch do
  local before = #sorted
  for _, new in ipairs(batch) do
    local follows = not entered[new.task]
    for _, id in ipairs(new.edges) do
      follows = follows and (not by_id[id] or entered[id])
    end
    if follows then sorted[#sorted + 1], entered[new.task] = new, true end
  end
  if #sorted == before then
    local cycle = {}
    for _, new in ipairs(batch) do
      if not entered[new.task] and #cycle < 10 then append(cycle, new.task) end
    end
    reject('CYCLE', 'these tasks depend on each other: ' .. table.concat(cycle, ', '))
  end
end

if not meta.limits then write('HSET', root, 'epoch', arg.epoch) end
if not limits or limits ~= meta.limits then
  write('HSET', root, 'limits', limits or 'schema=' .. SCHEMA, 'lanes', lanes)
end
local reply = {'OK'}
for _, new in ipairs(sorted) do
  local task = new.known
  if not task then
    task = {id = new.task, key = key('task', new.task), status = '', fence = '', lane = new.lane,
            priority = new.priority, order = new.order, notBefore = ''}
    if new.delay ~= '' and new.delay ~= '0' then task.notBefore = string.format('%d', now + new.delay * 1000) end
    local status = next(new.needs) and 'blocked' or 'pending'
    emit(task, 'create', status)
    write('SET', key('text', task.id), cjson.encode({title = new.title,
          description = given(new.description), metadata = given(new.metadata),
          dependencies = given(table.concat(new.edges, ' '))}))
    if #new.edges > 0 then write_edges(task, new.edges, new.needs) end
    write('ZADD', key('mission', new.mission), task.order, task.id)
    place(task, status)
    local rare = {}
    if task.notBefore ~= '' then append(rare, 'notBefore', task.notBefore) end
    if new.maxRuntime ~= '' then append(rare, 'maxRuntime', new.maxRuntime) end
    if #new.edges > 0 then append(rare, 'edges', #new.edges) end
    change(task, 'status', status, 'priority', new.priority, 'lane', new.lane,
           'mission', new.mission, 'order', task.order, unpack(rare))
    task.status = status
  end
  reply[#reply + 1] = row('taskId', task.id, 'status', task.status, 'rev', new.rev or task.rev,
                          'order', task.order or new.order)
end
return reply
