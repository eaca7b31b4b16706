-- release.lua -- Give a task back without blame; it keeps its place.
--
-- State    claimed | in-progress -> pending, or blocked while a dependency is not completed
-- Args     op actor task agent session fence force delay reason
-- Returns  status, rev, notBefore
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION
--          STALE_FENCE
-- Emits    release
-- Flags    allow-oom

meta = project()
local delay = arg.delay == '' and 0 or require_integer(arg.delay, 'delay', 0, WEEK)
require_text(arg.reason, 'reason', 4096)
local task = load(arg.task, 'op', 'fence', 'claimedBy', 'session', 'priority', 'order', 'blocked',
                  'edges')
local done = recall(task, anonymous)
if done then return replay(done) end
require_status(task, 'claimed', 'in-progress')
require_owner(task)
local status = settled(task)
local due_at = after(delay)

emit(task, 'release', status, arg.reason)
move(task, status, due_at)
finish(task)
return show(task, 'status', status, 'notBefore', due_at)
