-- update.lua -- Change what a task says of itself.
--
-- State    any but completed -> (unchanged); pending <-> blocked as its dependencies say
-- Args     op actor task ifRev given title description priority lane mission dependencies
--          metadata delay
-- Returns  status, rev
-- Rejects  SCHEMA INVALID TOO_LARGE OP_REUSED NOT_FOUND WRONG_STATUS STALE_REV CYCLE
-- Emits    update
--
-- `given` names the fields to change, between spaces; an empty value takes one away.  The search
-- for cycles looks at LOOK tasks at most.

meta = project()
local function changes(name)
  return (' ' .. arg.given .. ' '):find(' ' .. name .. ' ', 1, true) ~= nil
end
require_text(arg.title, 'title', 500)
require_text(arg.description, 'description', 65536)
require_text(arg.metadata, 'metadata', 65536)
if changes('title') and arg.title == '' then reject('INVALID', 'title is empty') end
if changes('priority') then require_priority(arg.priority) end
if changes('lane') then require_lane(arg.lane) end
if changes('mission') then require_id(arg.mission, 'mission') end
local delay = arg.delay ~= '' and require_integer(arg.delay, 'delay', 0, WEEK) or 0
local task = load(arg.task, 'op', 'rev', 'priority', 'order', 'mission', 'notBefore', 'blocked', 'edges',
                  'claimedBy', 'claimedAt')
local done = recall(task, anonymous)
if done then return replay(done) end
require_status(task, 'pending', 'blocked', 'claimed', 'in-progress', 'failed')
-- What is held has begun; its holder releases it with a delay.
if changes('delay') then require_status(task, 'pending', 'blocked', 'failed') end
if arg.ifRev ~= '' and arg.ifRev ~= task.rev then
  reject('STALE_REV', name_of(task) .. ' has rev ' .. task.rev .. ', not ' .. arg.ifRev:sub(1, 40))
end
local text = cjson.decode(read('GET', key('text', task.id)) or '{}')
local edges, scores, waits
if changes('dependencies') then
  edges, scores, waits = require_dependencies(task.id, arg.dependencies, {}, {})
  require_no_path(task, scores)
end
local status = task.status
if status == 'pending' or status == 'blocked' then
  status = (edges and (waits or task.blocked ~= '') or not edges and settled(task) == 'blocked')
           and 'blocked' or 'pending'
end

emit(task, 'update', status, arg.given)
begin(task)
local marks = edges and held(task)
if marks then write('ZADD', root .. ':unsettled', at, task.id) end
if edges then
  wait_for(task, scores)
  leave_dependents(task, scores)
end
local values = {title = changes('title') and arg.title or text.title or task.id}
for name, value in pairs({description = arg.description, metadata = arg.metadata}) do
  values[name] = changes(name) and value or not changes(name) and text[name] or ''
end
write('SET', key('text', task.id),
      text_of(values, edges and table.concat(edges, ' ') or text.dependencies or ''))
if edges then depend_on(task, scores) end
local mission = changes('mission') and arg.mission or task.mission
if mission ~= task.mission then write('ZADD', key('mission', mission), task.order, task.id) end
local notBefore = task.notBefore
if changes('delay') then notBefore = after(delay) end
local new = {id = task.id, status = status, order = task.order, notBefore = notBefore,
             lane = changes('lane') and arg.lane or task.lane,
             priority = changes('priority') and arg.priority or task.priority}
if held(task) and new.lane ~= task.lane then
  write('ZADD', key('running', new.lane), read('ZSCORE', key('running', task.lane), task.id), task.id)
end
local placed = task.status == 'pending' or task.status == 'blocked'
if placed then displace(task) end
change(task, 'status', status, 'lane', new.lane, 'priority', new.priority, 'notBefore', notBefore,
       'mission', mission,
       'edges', edges and (#edges > 0 and #edges or '') or task.edges)
if mission ~= task.mission then write('ZREM', key('mission', task.mission), task.id) end
if placed then place(new, status) end
if not held(task) then
  finish(task)
elseif new.lane ~= task.lane then
  write('ZREM', key('running', task.lane), task.id)
end
if marks then write('ZREM', root .. ':unsettled', task.id) end
return show(task, 'status', status)
