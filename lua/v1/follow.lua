-- follow.lua -- Say how far a follower of the events has come.
--
-- State    any -> (unchanged)
-- Args     name cursor keep of
-- Returns  epoch and rev of the project
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
--
-- Events after the cursor wait for it, `keep` of them at most; with no cursor it is forgotten.  One
-- that is `of` another epoch is told so, and nothing is kept for it.

meta = project()
require_id(arg.name, 'follower')
if arg.cursor ~= '' then
  require_integer(arg.cursor, 'cursor', 0, 1e15 - 1)
  require_integer(arg.keep, 'keep', 0, 1e9)
end
local epoch = read('HGET', root, 'epoch') or ''

if arg.of ~= '' and arg.of ~= epoch then
  return {'OK', row('epoch', epoch, 'rev', meta.rev)}
elseif arg.cursor == '' then
  write('HDEL', root, 'follow:' .. arg.name)
else
  write('HSET', root, 'follow:' .. arg.name, arg.cursor .. ' ' .. arg.keep .. ' ' .. at)
end
return {'OK', row('epoch', epoch, 'rev', meta.rev)}
