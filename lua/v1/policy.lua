-- policy.lua -- Show the project's policy; with apply, store the one that is sent.
--
-- State    project
-- Args     epoch apply policy lanes
-- Returns  claimTTL maxRetries deadLetterAfter retryDelay assign lanes, and since when they are stored
-- Rejects  SCHEMA INVALID TOO_LARGE
-- Emits    nothing
--
-- Lanes are added and their caps change; a lane is never taken away, since tasks may be in it.

meta = project(true)
local policy = arg.apply == '1' and require_policy() or {}

if arg.apply == '1' then
  if not meta.schema then write('HSET', root, 'schema', SCHEMA, 'epoch', arg.epoch) end
  write('HSET', root, 'policy', now, unpack(policy))
  meta = project()
end
return {'OK', 'claimTTL', meta.claimTTL, 'maxRetries', meta.maxRetries,
        'deadLetterAfter', meta.deadLetterAfter, 'retryDelay', meta.retryDelay,
        'assign', meta.assign, 'lanes', meta.lanes, 'storedAt', meta.policy or ''}
