-- heartbeat.lua -- Extend the lease on a task you hold; leave progress and a checkpoint.
--
-- State    claimed | in-progress -> (unchanged)
-- Args     op actor task agent session fence force ttl progress checkpoint orphaned
-- Returns  status, rev, fence, claimTTL, leaseExpiresAt
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION
--          STALE_FENCE
-- Emits    progress, when progress or checkpoint came with it
-- Flags    allow-oom
--
-- With orphaned the session says that it ends: another of the same agent may take the task over.
-- A heartbeat never shortens the lease: whoever renews it does so at the rhythm of its length.

meta = project()
local ttl = arg.ttl ~= '' and require_integer(arg.ttl, 'ttl', 1, WEEK)
require_text(arg.progress, 'progress', 4096)
require_text(arg.checkpoint, 'checkpoint', 65536)
local task = load(arg.task, 'op', 'claimedBy', 'session', 'claimTTL', 'maxRuntime', 'assigned',
                  'rev', 'fence')
local done = recall(task)
if done then return replay(done) end
require_status(task, 'claimed', 'in-progress')
require_owner(task)

-- A late heartbeat still counts: nobody else can hold the task before it is reaped, and
-- refusing here would only throw away live work.
local tells = arg.progress ~= '' or arg.checkpoint ~= ''
if tells then
  emit(task, 'progress', task.status, arg.progress)
  local work = {}
  if arg.progress ~= '' then work.progress = arg.progress end
  if arg.checkpoint ~= '' then work.checkpoint = arg.checkpoint end
  write_work(task, work)
end
if arg.orphaned == '1' then
  write('HSET', task.key, 'orphaned', '1')
else
  if task.assigned == '1' then pick_up(task, ttl or limit('claimTTL')) end
  if ttl and tostring(ttl) ~= task.claimTTL then
    write('HSET', task.key, 'claimTTL', ttl)
    task.claimTTL = ttl
  end
  lease(task, task.claimTTL, read('ZSCORE', key('running', task.lane), task.id))
end
if tells then change(task) end
return {'OK', row('taskId', task.id, 'status', task.status,
                  'leaseExpiresAt', rawget(task, 'leaseExpiresAt') or '',
                  'claimTTL', task.claimTTL, 'fence', task.fence, 'rev', task.rev)}
