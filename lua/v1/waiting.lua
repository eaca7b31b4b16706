-- waiting.lua -- Who waits for an assignment, in the order in which they give up.
--
-- State    project
-- Args     actor left
-- Returns  `agent lane mark` of each; at most BATCH
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
--
-- `left` is one of them that does not wait any more.

meta = project()

write('ZREMRANGEBYSCORE', root .. ':waiting', '-inf', now)
if arg.left ~= '' then write('ZREM', root .. ':waiting', arg.left) end
return {'OK', read('ZRANGE', root .. ':waiting', 0, BATCH - 1)}
