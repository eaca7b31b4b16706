-- status.lua -- Count a project's tasks by status and lane; what is old, what is about to expire.
--
-- State    any -> (unchanged)
-- Args     soon
-- Returns  the counts, one row per lane, leases that end within `soon` seconds, the policy, the
--          followers, how many tasks ended in each five minutes of the last hour, who waits
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
-- Flags    no-writes
--
-- Only claimed and in-progress have to be told apart task by task, among the first LOOK.

meta = project()
local soon = now + require_integer(arg.soon, 'soon', 0, WEEK) * 1000
local lanes, expiring, claimed, ready, running, looked = {}, {}, 0, 0, 0, 0
-- Tasks whose delay is over are ready: whoever claims next moves them there.
local late = {}
for _, id in ipairs(read('ZRANGEBYSCORE', root .. ':delayed', '-inf', now, 'LIMIT', 0, LOOK)) do
  local task = fields(id)
  if task then late[task.lane] = (late[task.lane] or 0) + 1 end
end
local oldest, oldest_id
for lane in each_lane() do
  local waiting = read('ZCARD', key('ready', lane)) + (late[lane] or 0)
  local taken = read('ZCARD', key('running', lane))
  lanes[#lanes + 1] = row('lane', lane, 'ready', waiting, 'held', taken,
                          'maxConcurrent', cap(lane) or '')
  ready, running = ready + waiting, running + taken
  for _, rank in pairs(RANK) do
    local first = read('ZRANGEBYSCORE', key('ready', lane), decimal(rank),
                       decimal(rank + RANK.high - 1), 'WITHSCORES', 'LIMIT', 0, 1)
    if first[1] and (not oldest or first[2] - rank < oldest) then
      oldest, oldest_id = first[2] - rank, first[1]
    end
  end
  local held_here = read('ZRANGE', key('running', lane), 0, LOOK - looked, 'WITHSCORES')
  for i = 1, #held_here, 2 do
    if looked < LOOK then
      looked = looked + 1
      local id, ends = held_here[i], held_here[i + 1]
      if read('HGET', key('task', id), 'status') == 'claimed' then claimed = claimed + 1 end
      local task = #expiring < 10 and tonumber(ends) <= soon and fields(id, 'claimedBy')
      if task then
        expiring[#expiring + 1] = row('taskId', id, 'claimedBy', task.claimedBy,
                                      'leaseExpiresAt', ends)
      end
    end
  end
end
-- How many tasks have ended in each five minutes of the last hour.
local function last_hour(index)
  local counts = {}
  for i = 12, 1, -1 do
    local from, to = now - i * 300000, now - (i - 1) * 300000
    counts[#counts + 1] = read('ZCOUNT', root .. ':' .. index, '(' .. decimal(from), decimal(to))
  end
  return table.concat(counts, ' ')
end
local delayed = read('ZCARD', root .. ':delayed')
for _, count in pairs(late) do delayed = delayed - count end
local followers, stored = {}, read('HGETALL', root)
for i = 1, #stored, 2 do
  local name, cursor, heard = stored[i]:match('^follow:(.*)'), stored[i + 1]:match('^(%d+) %d+ (%d+)')
  if name then
    followers[#followers + 1] = row('follower', name, 'lag', meta.rev - cursor, 'lastHeard', heard)
  end
end
return {'OK',
        row('pending', ready + delayed, 'claimed', claimed, 'in-progress', looked - claimed,
         'completed', read('ZCARD', root .. ':completed'),
         'failed', read('ZCARD', root .. ':failed'),
         'blocked', read('ZCARD', root .. ':blocked')),
        row('ready', ready, 'delayed', delayed, 'held', running, 'due', due(), 'rev', meta.rev,
         'pausedAt', limit('paused') or '', 'now', now,
         'oldestReady', oldest_id or '',
         'oldestReadySince', oldest and math.floor(oldest / 1000) or ''),
        lanes, expiring,
        policy(), followers, row('completed', last_hour('completed'), 'failed', last_hour('failed')),
        those_in('waiting'), those_in('claimers')}
