-- complete.lua -- Say that a task is done; frees what waited for it.
--
-- State    claimed | in-progress -> completed; with force also pending | blocked | failed
-- Args     op actor task agent session fence force summary
-- Returns  status, rev, fence, completedAt, late, the ids it freed
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS NOT_OWNER STALE_SESSION
--          STALE_FENCE
-- Emits    complete, and free for each task that waited for this one alone
-- Flags    allow-oom

meta = project()
require_text(arg.summary, 'summary', 65536)
local task = load(arg.task, 'op', 'fence', 'claimedBy', 'session', 'edges')
local done = recall(task, anonymous)
if done then return replay(done) end
-- Work that comes in after its lease was reaped is not thrown away while nobody took it up.
local late = ''
if task.status == 'completed' then
  require_status(task, 'claimed', 'in-progress')
elseif not held(task) and task.reaped ~= '' then
  local fence, session, agent = task.reaped:match('^(%S+) (%S*) (%S+)$')
  if arg.agent == agent and (arg.session == '' or arg.session == session) and
     (arg.fence == '' or arg.fence == fence) then
    late = '1'
  end
end
if late == '' and arg.force ~= '1' then
  require_status(task, 'claimed', 'in-progress')
end
if held(task) then require_owner(task) end

emit(task, 'complete', 'completed', #arg.summary <= 4096 and arg.summary or '')
if arg.summary ~= '' then write('SET', key('summary', task.id), arg.summary) end
local past = {}
if late ~= '' then past = {'late', late, 'reaped', ''} end
move(task, 'completed', '', 'completedAt', at, unpack(past))
if task.edges ~= '' then depend_no_more(task) end
local freed, more = {}, false
if read('EXISTS', key('dependents', task.id)) == 1 then freed, more = free_dependents(task) end
local texts = {key('work', task.id)}
if arg.summary == '' then append(texts, key('summary', task.id)) end
finish(task, more, unpack(texts))
return show(task, 'status', 'completed', 'fence', task.fence, 'completedAt', at, 'late', late,
            'freed', table.concat(freed, ' '))
