-- purge.lua -- Forget completed tasks and dead letters of long ago; the record keeps them.
--
-- State    completed | failed -> gone
-- Args     actor status older
-- Returns  how many it purged, and how many it passed over because unfinished tasks need them
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    purge for each
-- Flags    allow-oom
--
-- At most BATCH tasks per call, of the first LOOK that are old enough.

meta = project()
local older = require_integer(arg.older, 'older', 0, 10 * 365 * 86400)
if arg.status ~= 'completed' and arg.status ~= 'failed' then
  reject('INVALID', 'status is ' .. arg.status:sub(1, 40) .. '; accepted: completed, failed')
end
local old = read('ZRANGEBYSCORE', root .. ':' .. arg.status, '-inf', now - older * 1000,
                 'LIMIT', 0, LOOK)

local purged, kept = 0, 0
for _, id in ipairs(old) do
  if purged == BATCH then break end
  if #unfinished_dependents(id) > 0 then
    kept = kept + 1
  else
    local task = fields(id, 'mission', 'notBefore', 'edges')
    if task and task.status == arg.status then
      emit(task, 'purge', '')
      begin(task)
      bury(task)
      finish(task)
    else
      write('ZREM', root .. ':' .. arg.status, id)
    end
    purged = purged + 1
  end
end
return {'OK', 'purged', purged, 'kept', kept}
