-- complete.lua -- Say that a task is done; frees what waited for it.
--
-- State    claimed | in-progress -> completed; with force also pending | blocked | failed
-- Args     op digest actor task agent session fence force summary
-- Returns  status, rev, fence, completedAt, late, the ids it freed
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION
--          STALE_FENCE
-- Emits    complete, and free for each task that waited for this one alone
-- Flags    allow-oom

meta = project()
require_text(arg.summary, 'summary', 65536)
local task = load(arg.task, 'claimedBy', 'claimedAt', 'session', 'reaped', 'notBefore', 'edges')
local done = carried_out(task)
if done then return replay(done) end
-- Work that comes in after its lease was reaped is not thrown away while nobody took it up.
local late = not held(task) and was_holder(task) and '1' or ''
if late == '' and (arg.force ~= '1' or task.status == 'completed') then
  require_status(task, 'claimed', 'in-progress')
end
if held(task) then require_owner(task) end
local waiting = waiting_for(task)

emit(task, 'complete', 'completed', #arg.summary <= 4096 and arg.summary or '')
begin(task)
if arg.summary == '' then
  write('DEL', key('work', task.id))
else
  write('SET', key('work', task.id), cmsgpack.pack({summary = arg.summary}))
end
local past = {}
if late ~= '' then past = {'late', late, 'reaped', ''} end
move(task, 'completed', '', 'completedAt', now, unpack(past))
if task.edges ~= '' then remove_edges(task) end
local freed, more = free_dependents(task, waiting)
finish(task, more)
return show(task, 'status', 'completed', 'fence', task.fence, 'completedAt', now, 'late', late,
            'freed', table.concat(freed, ' '))
