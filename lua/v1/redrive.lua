-- redrive.lua -- Give a dead letter another life; its counters start again.
--
-- State    failed -> pending, or blocked while a dependency is not completed
-- Args     op actor task delay
-- Returns  status, rev, notBefore
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND WRONG_STATUS
-- Emits    redrive

meta = project()
local delay = arg.delay == '' and 0 or require_integer(arg.delay, 'delay', 0, WEEK)
local task = load(arg.task, 'op', 'priority', 'order', 'blocked', 'edges', 'notBefore')
local done = recall(task, anonymous)
if done then return replay(done) end
require_status(task, 'failed')
local status = settled(task)
local due_at = after(delay)

emit(task, 'redrive', status)
move(task, status, due_at, 'retryCount', '', 'expiryCount', '', 'failedAt', '', 'reaped', '')
write_work(task, {failureReason = ''})
finish(task)
return show(task, 'status', status, 'notBefore', due_at)
