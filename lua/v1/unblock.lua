-- unblock.lua -- Take back what `block` said; dependencies still count.
--
-- State    blocked -> pending, or blocked while a dependency is not completed
-- Args     op actor task
-- Returns  status, rev
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND WRONG_STATUS
-- Emits    unblock

meta = project()
local task = load(arg.task, 'op', 'priority', 'order', 'notBefore', 'blocked')
local done = recall(task, anonymous)
if done then return replay(done) end
require_status(task, 'blocked')
local waits = read('SCARD', key('waits', task.id))
if task.blocked == '' then
  reject('WRONG_STATUS', name_of(task) .. ' is not blocked by hand; it waits for ' ..
         table.concat(read('SRANDMEMBER', key('waits', task.id), 10), ', '))
end
local status = waits > 0 and 'blocked' or 'pending'

emit(task, 'unblock', status)
move(task, status, task.notBefore, 'blocked', '')
write_work(task, {blockedReason = ''})
finish(task)
return show(task, 'status', status)
