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
-- A dependency that was purged since was completed, and is none any more.
local text, edges, needs = nil, {}, {}
if task.edges ~= '' then
  text = cjson.decode(read('GET', key('text', task.id)) or '{}')
  for id in (text.dependencies or ''):gmatch('%S+') do
    local other = fields(id)
    if other then edges[#edges + 1] = id end
    if other and other.status ~= 'completed' then needs[id] = true end
  end
end
local status = next(needs) and 'blocked' or 'pending'

emit(task, 'reopen', status, arg.reason)
begin(task)
if text then
  text.dependencies = given(table.concat(edges, ' '))
  write('SET', key('text', task.id), cjson.encode(text))
  write_edges(task, edges, needs)
end
move(task, status, '', 'completedAt', '', 'late', '', 'blocked', '',
     'edges', #edges > 0 and #edges or '')
finish(task)
return show(task, 'status', status)
