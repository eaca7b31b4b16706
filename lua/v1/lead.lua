-- lead.lua -- Be the one monitor that leads, or learn who does.
--
-- State    KEYS[1] is the leader's key, a string: its token, PX = its lease
-- Args     token ttl
-- Returns  the token of whoever leads now
-- Rejects  INVALID
-- Emits    nothing
-- Flags    allow-oom
--
-- The leader renews with its own token; with ttl 0 it steps down.

local ttl = require_integer(arg.ttl, 'ttl', 0, 3600)
local leader = read('GET', root)

if leader and leader ~= arg.token then return {'OK', leader} end
if ttl == 0 then
  write('DEL', root)
else
  write('SET', root, arg.token, 'PX', ttl * 1000)
end
return {'OK', arg.token}
