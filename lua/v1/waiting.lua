-- waiting.lua -- Who waits for an assignment, in the order in which they give up.
--
-- State    project
-- Args     actor
-- Returns  `agent lane` of each; at most BATCH
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing

meta = project()

write('ZREMRANGEBYSCORE', root .. ':waiting', '-inf', now)
return {'OK', read('ZRANGE', root .. ':waiting', 0, BATCH - 1)}
