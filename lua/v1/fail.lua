-- fail.lua -- Say that work on a task failed: it is retried, or becomes a dead letter.
--
-- State    claimed | in-progress -> pending while retryCount < maxRetries, else failed;
--          with force from any status but completed
-- Args     op actor task agent session fence force reason retry retryDelay delay
-- Returns  status, rev, retryCount, notBefore, failedAt
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION
--          STALE_FENCE
-- Emits    fail
-- Flags    allow-oom
--
-- The wait before a retry is `delay`, or retryDelay (the call's or the policy's) doubled for
-- each retry before; a week at most.

meta = project()
require_text(arg.reason, 'reason', 4096)
local delay = arg.delay ~= '' and require_integer(arg.delay, 'delay', 0, WEEK)
local retry_delay = arg.retryDelay == '' and limit('retryDelay')
                    or require_integer(arg.retryDelay, 'retryDelay', 0, WEEK)
local task = load(arg.task, 'op', 'fence', 'claimedBy', 'session', 'priority', 'order', 'blocked',
                  'edges', 'retryCount')
local done = recall(task, anonymous)
if done then return replay(done) end
if arg.force ~= '1' or task.status == 'completed' then
  require_status(task, 'claimed', 'in-progress')
end
if held(task) then require_owner(task) end
local retries = tonumber(task.retryCount) or 0
local status, due_at = 'failed', ''
if arg.retry ~= '0' and retries < limit('maxRetries') then
  delay = math.min(delay or retry_delay * 2 ^ retries, WEEK)
  due_at = after(delay)
  retries = retries + 1
  status = settled(task)
end

emit(task, 'fail', status, arg.reason)
write_work(task, {failureReason = arg.reason})
move(task, status, due_at, 'retryCount', retries, 'failedAt', at)
finish(task)
return show(task, 'status', status, 'retryCount', retries, 'notBefore', due_at,
            'failedAt', at)
