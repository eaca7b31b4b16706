-- reopen.lua -- Take a completion back; dependents that it freed stay as they are.
--
-- State    completed -> pending, or blocked while a dependency is not completed
-- Args     op actor task reason
-- Returns  status, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS
-- Emits    reopen

meta = project()
require_text(arg.reason, 'reason', 4096)
local task = load(arg.task, 'op', 'priority', 'order', 'notBefore', 'edges')
local done = recall(task, anonymous)
if done then return replay(done) end
require_status(task, 'completed')
-- A dependency that is gone was completed, and a new task of its name is another.
local edges, scores, waits = {}, {}, false
for id in (task.edges == '' and '' or dependencies_of(task.id)):gmatch('%S+') do
  local other = fields(id)
  if other then
    edges[#edges + 1], scores[id] = id, other.status == 'completed' and 1 or 0
    waits = waits or scores[id] == 0
  end
end
local text = tostring(#edges) ~= task.edges and task.edges ~= '' and
             with_dependencies(task.id, table.concat(edges, ' '))
local status = waits and 'blocked' or 'pending'

emit(task, 'reopen', status, arg.reason)
begin(task)
wait_for(task, scores)
depend_on(task, scores)
if text then write('SET', key('text', task.id), text) end
move(task, status, '', 'completedAt', '', 'late', '', 'blocked', '',
     'edges', #edges > 0 and #edges or '')
finish(task)
return show(task, 'status', status)
