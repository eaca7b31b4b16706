-- assign.lua -- Claim a task for an agent, which picks it up within PICK_UP seconds.
--
-- State    pending -> claimed
-- Args     op actor task agent lane waiter
-- Returns  the task; without a task to name: the best ready one, or NOTHING
-- Rejects  SCHEMA INVALID OP_REUSED NOT_FOUND PAUSED HELD BLOCKED WRONG_STATUS NOT_DUE LANE_FULL
-- Emits    assign
--
-- The best: by priority, then how many tasks wait for it, then age; among the first BATCH of each
-- lane; a project that is not there yet has none.  The claim has no session; the agent's next,
-- claim, start or heartbeat picks it up.

meta = project(false, arg.task == '')
require_id(arg.agent, 'agent')
local done = recall(nil, true)
local did = done and fields(done.task)
if did and tonumber(did.fence) and tonumber(did.fence) >= tonumber(done.fence) then
  return replay(done, true)
end

local function best()
  local found, rank, waiting
  for lane in each_lane() do
    local most = cap(lane)
    local wanted = arg.lane == '' or lane == arg.lane or lane == 'any'
    if wanted and not (most and read('ZCARD', key('running', lane)) >= most) then
      for _, id in ipairs(read('ZRANGE', key('ready', lane), 0, BATCH - 1)) do
        local task = fields(id, '*')
        if task and task.status == 'pending' and not turn_of(task) then
          local its = RANK[task.priority]
          if rank and its > rank then break end
          local count = #waiting_for(id, BATCH)
          if not rank or its < rank or count > waiting or
             count == waiting and tonumber(task.order) < tonumber(found.order) then
            found, rank, waiting = task, its, count
          end
        end
      end
    end
  end
  return found
end

if not meta.limits then return {'NOTHING', no_project() .. ' yet', due(), '', '', 0, 1} end
local task
if arg.task ~= '' then
  task = load(arg.task, '*')
  if held(task) then reject('HELD', name_of(task, true), due(task.lane)) end
  require_claimable(task)
  require_lane_room(task)
elseif not limit('paused') then
  task = best()
end
if not task then return {'NOTHING', 'nothing is ready', due(), '', '', limit('assign'), 0} end

write('SADD', key('assigned', arg.agent), task.id)
task.assigned = ''
local reply = take(task, 'assign', arg.agent, PICK_UP, '')
write('RPUSH', key('inbox', arg.agent), '1')
write('LTRIM', key('inbox', arg.agent), 0, 31)
if arg.waiter ~= '' then write('ZREM', root .. ':waiting', arg.waiter) end
return reply
