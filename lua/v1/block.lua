-- block.lua -- Keep a task from being claimed until somebody unblocks it; ends the holder's claim.
--
-- State    pending | blocked | claimed | in-progress -> blocked
-- Args     op actor task agent session fence force reason
-- Returns  status, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION
--          STALE_FENCE
-- Emits    block

meta = project()
require_text(arg.reason, 'reason', 4096)
if arg.reason == '' then reject('INVALID', 'reason is missing; accepted: why it is blocked') end
local task = load(arg.task, 'op', 'claimedBy', 'claimedAt', 'session', 'priority', 'order', 'notBefore')
local done = recall(task, anonymous)
if done then return replay(done) end
require_status(task, 'pending', 'blocked', 'claimed', 'in-progress')
if held(task) then require_owner(task) end

emit(task, 'block', 'blocked', arg.reason)
write_work(task, {blockedReason = arg.reason})
move(task, 'blocked', task.notBefore, 'blocked', '1')
finish(task)
return show(task, 'status', 'blocked')
