-- redrive.lua -- Give a dead letter another life; its counters start again.
--
-- State    failed -> pending, or blocked while a dependency is not completed
-- Args     op digest actor task delay
-- Returns  status, rev, notBefore
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND WRONG_STATUS
-- Emits    redrive

meta = project()
local delay = arg.delay == '' and 0 or require_integer(arg.delay, 'delay', 0, WEEK)
local task = load(arg.task, 'priority', 'order', 'blocked', 'notBefore')
local done = carried_out(task)
if done then return replay(done) end
require_status(task, 'failed')
local status = settled(task)
local due_at = delay > 0 and now + delay * 1000 or ''

emit(task, 'redrive', status)
begin(task)
write_work(task, {failureReason = ''})
move(task, status, due_at, 'retryCount', '', 'expiryCount', '', 'failedAt', '', 'reaped', '')
finish(task)
return show(task, 'status', status, 'notBefore', due_at)
