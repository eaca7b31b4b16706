-- delete.lua -- Take a task out of the queue.
--
-- State    any -> gone
-- Args     op actor task force reason
-- Returns  taskId, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND HELD HAS_DEPENDENTS
-- Emits    delete, and free for each task that waited for this one alone
--
-- With force also a held task, and one that others depend on: the edge is taken out of each.

meta = project()
require_text(arg.reason, 'reason', 4096)
require_id(arg.task, 'taskId')
local done = receipt()
if done and not fields(arg.task) then return replay(done) end
local task = load(arg.task, 'fence', 'mission', 'notBefore', 'edges')
local dependents = read('ZRANGE', key('dependents', task.id), 0, BATCH)
if arg.force ~= '1' then
  if held(task) then reject('HELD', held_by(task), due(task.lane)) end
  if #dependents > 0 then
    reject('HAS_DEPENDENTS', #dependents .. ' unfinished tasks depend on ' .. name_of(task) ..
           ': ' .. table.concat(dependents, ', ', 1, math.min(#dependents, 10)))
  end
elseif #dependents > BATCH then
  reject('TOO_LARGE', 'more than ' .. BATCH .. ' unfinished tasks depend on ' .. name_of(task))
end

emit(task, 'delete', '', arg.reason)
begin(task)
for _, id in ipairs(dependents) do
  local text = unpacked(read('GET', key('text', id)))
  local others = {}
  for other in (text.dependencies or ''):gmatch('%S+') do
    if other ~= task.id then others[#others + 1] = other end
  end
  text.dependencies = given(table.concat(others, ' '))
  write('SET', key('text', id), cjson.encode(text))
end
free_dependents(task)
erase(task)
return {'OK', row('taskId', task.id, 'rev', task.rev)}
