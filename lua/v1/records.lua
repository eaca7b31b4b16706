-- records.lua -- Show some tasks whole, and the project they belong to.
--
-- State    any -> (unchanged)
-- Args     ids
-- Returns  epoch, rev, fence, limits and lanes; each task, but those that are gone; how many ids it
--          got to
-- Rejects  SCHEMA INVALID NOT_FOUND TOO_LARGE
-- Emits    nothing
-- Flags    no-writes
--
-- `ids` stand between spaces, BATCH of them at most; after TEXTS bytes it stops.  With each task come the dependencies that it
-- waits for.

meta = project()
local tasks, count, size = {}, 0, 0
for id in arg.ids:gmatch('%S+') do
  require_id(id, 'taskId')
  if size > TEXTS then break end
  count = count + 1
  if count > BATCH then reject('TOO_LARGE', 'accepted: up to ' .. BATCH .. ' ids') end
  local task = fields(id, '*')
  if task and task.status ~= 'deleted' then
    local waits = task.edges ~= '' and read('SMEMBERS', key('waits', id)) or {}
    local reply = whole(task, 'waits', table.concat(waits, ' '))
    tasks[#tasks + 1], size = reply, size + #reply[4] + #reply[5] + #reply[6] + #reply[7]
  end
end
return {'OK', row('epoch', read('HGET', root, 'epoch') or '', 'rev', meta.rev, 'fence', meta.fence,
                  'limits', meta.limits, 'lanes', meta.lanes), tasks, count}
