-- note.lua -- Leave a finding on a task.
--
-- State    any -> (unchanged)
-- Args     op actor task text
-- Returns  status, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND
-- Emits    note

meta = project()
require_text(arg.text, 'text', 4096)
local task = load(arg.task, 'op')
local done = recall(task)
if done then return replay(done) end

emit(task, 'note', task.status, arg.text)
change(task)
return show(task, 'status', task.status)
