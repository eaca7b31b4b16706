-- note.lua -- Leave a finding on a task, for whoever claims it next.
--
-- State    any -> (unchanged)
-- Args     op actor task text
-- Returns  status, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND
-- Emits    note
--
-- The last NOTES of them are part of the task, of NOTE_BYTES in all; noteCount counts every one.

meta = project()
require_text(arg.text, 'text', 4096)
local task = load(arg.task, 'op', 'noteCount')
local done = recall(task)
if done then return replay(done) end
local notes, size = cjson.decode(read('GET', key('notes', task.id)) or '[]'), 0
-- The same words of the same agent again: a call that was cut off, and has written its note.
local last = notes[#notes]
if last and last.agent == arg.actor and last.text == arg.text then notes[#notes] = nil end
append(notes, {agent = arg.actor, at = now, text = arg.text})
for _, note in ipairs(notes) do size = size + #note.text end
while #notes > NOTES or size > NOTE_BYTES do size = size - #table.remove(notes, 1).text end

emit(task, 'note', task.status, arg.text)
write('SET', key('notes', task.id), cjson.encode(notes))
change(task, 'noteCount', (tonumber(task.noteCount) or 0) + 1)
return show(task, 'status', task.status)
