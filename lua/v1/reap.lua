-- reap.lua -- End leases that ran out, oldest first; finish transitions that were cut off.
--
-- State    claimed | in-progress -> pending, or blocked while a dependency is not completed;
--          failed when expiryCount reaches deadLetterAfter
-- Args     actor
-- Returns  the ids it reaped, how many it settled, seconds of grace left, when the next lease ends
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    reap for each ended lease, release for an assignment that was not picked up; what the
--          transitions that were cut off had left to emit
-- Flags    allow-oom
--
-- At most BATCH tasks of each kind per call.  After a start of the server the holders of earlier
-- leases get GRACE seconds to renew them.

meta = project()
local ended = {}
for lane in each_lane() do
  local found = read('ZRANGEBYSCORE', key('running', lane), '-inf', now, 'WITHSCORES',
                     'LIMIT', 0, BATCH)
  for i = 1, #found, 2 do
    ended[#ended + 1] = {id = found[i], lane = lane, ends = tonumber(found[i + 1])}
  end
end
table.sort(ended, function(a, b) return a.ends < b.ends end)
local unsettled = read('ZRANGE', root .. ':unsettled', 0, BATCH - 1)
local start = #ended > 0 and restarted()

local reaped, settled_count, grace = {}, 0, 0
for i = 1, math.min(#ended, BATCH) do
  local lost = ended[i]
  local task = fields(lost.id, 'fence', 'claimedBy', 'session', 'priority', 'order', 'blocked',
                      'edges', 'expiryCount', 'assigned', 'claimTTL')
  if not task or not held(task) or task.lane ~= lost.lane then
    if task and heal(task) then write('ZADD', root .. ':unsettled', at, task.id) end
    write('ZREM', key('running', lost.lane), lost.id)
    settled_count = settled_count + 1
  elseif task.assigned == '1' then
    local status = settled(task)
    emit(task, 'release', status, task.claimedBy .. ' did not pick it up')
    write('SREM', key('assigned', task.claimedBy), task.id)
    move(task, status, '', 'assigned', '')
    finish(task)
  elseif start and lost.ends - (tonumber(task.claimTTL) or 0) * 1000 < start then
    grace = GRACE - math.floor((now - start) / 1000)
  else
    local expiries = (tonumber(task.expiryCount) or 0) + 1
    local dead = expiries >= limit('deadLetterAfter')
    local status = dead and 'failed' or settled(task)
    local reason = 'the lease of ' .. task.claimedBy .. ' ended without a heartbeat'
    emit(task, 'reap', status, reason)
    if dead then write_work(task, {failureReason = reason .. ', ' .. expiries .. ' times'}) end
    local failed = dead and {'failedAt', at} or {}
    move(task, status, '', 'expiryCount', expiries,
         'reaped', task.fence .. ' ' .. task.session .. ' ' .. task.claimedBy, unpack(failed))
    finish(task)
    reaped[#reaped + 1] = task.id
  end
end
for _, id in ipairs(unsettled) do
  local task = fields(id, 'priority', 'order', 'notBefore', 'blocked', 'edges')
  if not (task and heal(task)) then write('ZREM', root .. ':unsettled', id) end
  settled_count = settled_count + 1
end
promote()
local soonest
for lane in each_lane() do
  local first = read('ZRANGE', key('running', lane), 0, 0, 'WITHSCORES')
  if first[2] and (not soonest or tonumber(first[2]) < soonest) then soonest = tonumber(first[2]) end
end
return {'OK', row('now', now, 'soonest', soonest or '', 'reaped', table.concat(reaped, ' '),
                  'settled', settled_count, 'grace', grace)}
