-- delete.lua -- Take a task out of the queue.
--
-- State    any -> gone
-- Args     op actor task force reason
-- Returns  taskId, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND HELD HAS_DEPENDENTS
-- Emits    delete, and update for each task that depended on it
-- Flags    allow-oom
--
-- With force also a held task, and one that others depend on: the edge is taken out of each.

meta = project()
require_text(arg.reason, 'reason', 4096)
require_id(arg.task, 'taskId')
local done = recall(nil, true)
local again = done and fields(arg.task)
if done and (not again or tonumber(again.rev) > tonumber(done.rev)) then
  return {'REPEATED', row('taskId', done.task, 'rev', done.rev)}
end
local task = load(arg.task, 'fence', 'mission', 'notBefore', 'edges')
local dependents = unfinished_dependents(task.id)
if arg.force ~= '1' then
  if held(task) then reject('HELD', name_of(task, true), due(task.lane)) end
  if #dependents > 0 then
    reject('HAS_DEPENDENTS', #dependents .. ' unfinished tasks depend on ' .. name_of(task) ..
           ': ' .. table.concat(dependents, ', ', 1, math.min(#dependents, 10)))
  end
elseif #dependents > BATCH then
  reject('TOO_LARGE', 'more than ' .. BATCH .. ' unfinished tasks depend on ' .. name_of(task))
end

emit(task, 'delete', '', arg.reason)
begin(task)
bury(task)
finish(task)
return {'OK', row('taskId', task.id, 'rev', task.rev)}
