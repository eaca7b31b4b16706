-- start.lua -- Say that work on a claimed task has begun.
--
-- State    claimed -> in-progress
-- Args     op actor task agent session fence force ttl
-- Returns  status, rev, fence; claimTTL and leaseExpiresAt where it picks up an assignment
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION STALE_FENCE
-- Emits    start

meta = project()
local ttl = arg.ttl == '' and limit('claimTTL') or require_integer(arg.ttl, 'ttl', 1, WEEK)
local task = load(arg.task, 'op', 'fence', 'claimedBy', 'session', 'assigned')
local done = recall(task)
if done then return replay(done) end
require_status(task, 'claimed')
require_owner(task)

emit(task, 'start', 'in-progress')
if task.assigned == '1' then
  pick_up(task, ttl)
  lease(task, ttl)
end
change(task, 'status', 'in-progress')
return show(task, 'status', 'in-progress', 'fence', task.fence,
            'claimTTL', rawget(task, 'claimTTL') or '',
            'leaseExpiresAt', rawget(task, 'leaseExpiresAt') or '')
