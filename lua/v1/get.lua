-- get.lua -- Show one task whole.
--
-- State    any -> (unchanged)
-- Args     task
-- Returns  the task
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
-- Flags    no-writes

meta = project()
return whole(load(arg.task))
