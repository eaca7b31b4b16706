-- policy.lua -- Show the project's policy; with apply, store the one that is sent.
--
-- State    project
-- Args     epoch apply policy lanes
-- Returns  claimTTL maxRetries deadLetterAfter retryDelay assign lanes, and since when they are stored
-- Rejects  SCHEMA INVALID TOO_LARGE NOT_FOUND
-- Emits    nothing
--
-- Lanes are added and their caps change; a lane is never taken away, since tasks may be in it.

meta = project(true)
local limits, lanes = meta.limits, meta.lanes
if arg.apply == '1' then limits, lanes = require_policy() end

if arg.apply == '1' then
  if not meta.limits then write('HSET', root, 'epoch', arg.epoch) end
  write('HSET', root, 'limits', limits, 'lanes', lanes)
  meta = project()
end
return {'OK', policy()}
