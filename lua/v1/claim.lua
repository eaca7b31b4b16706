-- claim.lua -- Take a pending task; nobody else can while the lease lasts.
--
-- State    pending -> claimed; with resume also claimed | in-progress of the same agent
-- Args     op actor task agent session ttl resume
-- Returns  the task, with its new fence and the end of the lease
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND PAUSED HELD BLOCKED WRONG_STATUS NOT_DUE LANE_FULL
-- Emits    claim

meta = project()
require_id(arg.agent, 'agent')
local ttl = arg.ttl == '' and limit('claimTTL') or require_integer(arg.ttl, 'ttl', 1, WEEK)
local done = recall(nil, true)
local task = load(arg.task, '*')
if done and tonumber(task.fence) and tonumber(task.fence) >= tonumber(done.fence) then
  return replay(done, true)
end
require_claimable(task)
require_lane_room(task)

return take(task, 'claim', arg.agent, ttl, arg.session)
