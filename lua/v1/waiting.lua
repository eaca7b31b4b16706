-- waiting.lua -- Who waits for an assignment, in the order in which they give up; who else waits.
--
-- State    project
-- Args     actor left
-- Returns  `agent lane mark` of each, and of the others `agent lane mark mission`; at most LOOK
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
--
-- `left` is one of them that does not wait any more.

meta = project()

write('ZREMRANGEBYSCORE', root .. ':waiting', '-inf', now)
for _, name in ipairs(arg.left == '' and {} or {'waiting', 'claimers'}) do
  write('ZREM', root .. ':' .. name, arg.left)
end
return {'OK', those_in('waiting'), those_in('claimers')}
