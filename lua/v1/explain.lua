-- explain.lua -- Say what stands between a task and its completion.
--
-- State    any -> (unchanged)
-- Args     task
-- Returns  the task, its unmet dependencies with their status, tasks that wait for it, its place
--          among the ready tasks of its lane, the lane's cap and holders, pausedAt, now; who waits; the
--          statuses of its dependencies and of what waits for it
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
-- Flags    no-writes

meta = project()
local task = load(arg.task, 'claimedBy', 'claimedAt')
local ends = held(task) and read('ZSCORE', key('running', task.lane), task.id)
local late = ends and tonumber(ends) <= now
local waits, holders = {}, {}
for i, id in ipairs(read('SMEMBERS', key('waits', task.id))) do
  if i > BATCH then break end
  local other = fields(id, 'claimedBy')
  waits[#waits + 1] = row('taskId', id, 'status', other and other.status or 'gone',
                          'claimedBy', other and held(other) and other.claimedBy or '')
end
for _, id in ipairs(read('ZRANGE', key('running', task.lane), 0, 9)) do
  local other = fields(id, 'claimedBy')
  if other then holders[#holders + 1] = row('taskId', id, 'claimedBy', other.claimedBy) end
end
local function with_statuses(ids)
  local rows = {}
  for id in ids:gmatch('%S+') do
    local other = fields(id)
    rows[#rows + 1] = row('taskId', id, 'status', other and other.status or 'gone')
  end
  return rows
end
return {'OK', whole(task), waits, waiting_for(task.id, 10),
        holders,
        row('place', read('ZRANK', key('ready', task.lane), task.id) or '',
         'held', read('ZCARD', key('running', task.lane)), 'maxConcurrent', cap(task.lane) or '',
         'pausedAt', limit('paused') or '', 'now', now, 'maxRetries', limit('maxRetries'),
         'deadLetterAfter', limit('deadLetterAfter'), 'spared', late and grace() or ''),
        those_in('waiting'), those_in('claimers'), with_statuses(dependencies_of(task.id)),
        with_statuses(table.concat(waiting_for(task.id, BATCH), ' '))}
