-- check.lua -- Hold some tasks against every rule of the key space.
--
-- State    any -> (unchanged)
-- Args     ids
-- Returns  a sentence for each rule that is broken; how many ids it got to
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
-- Flags    no-writes
--
-- `ids` stand between spaces; after BATCH dependencies it stops.  Every task is in the index of its
-- status and in no other.  Without ids it looks at the project's events: what it finds names no id.

meta = project()
local found, count, looked = {}, 0, 0
local function problem(id, sentence) found[#found + 1] = {id, sentence} end

local function indexes_of(id)
  local indexes = {}
  for lane in each_lane() do
    for _, kind in ipairs({'ready', 'running'}) do
      local score = read('ZSCORE', key(kind, lane), id)
      if score then indexes[kind .. ':' .. lane] = tonumber(score) end
    end
  end
  for _, name in ipairs({'delayed', 'blocked', 'failed', 'completed', 'unsettled'}) do
    local score = read('ZSCORE', root .. ':' .. name, id)
    if score then indexes[name] = tonumber(score) end
  end
  return indexes
end

local function check(id, task, indexes)
  local expected
  if held(task) then
    expected = 'running:' .. task.lane
  elseif task.status == 'pending' then
    local delayed = task.notBefore ~= '' and indexes.delayed
    expected = delayed and 'delayed' or 'ready:' .. task.lane
    if not delayed and indexes[expected] and
       indexes[expected] ~= RANK[task.priority] + task.order then
      problem(id, 'stands in the wrong place of ' .. expected)
    end
  else
    expected = task.status
  end
  if not indexes[expected] then problem(id, 'is ' .. task.status .. ' and not in ' .. expected) end
  for name in pairs(indexes) do
    if name ~= expected then problem(id, 'is ' .. task.status .. ' and in ' .. name) end
  end
  if not read('ZSCORE', key('mission', task.mission), id) then
    problem(id, 'is not in its mission ' .. task.mission)
  end
  local title, dependencies = head_of(task)
  if title == '""' then problem(id, 'has no title') end
  local needs = 0
  for other in dependencies:gmatch('%S+') do
    looked = looked + 1
    local waits = read('SISMEMBER', key('waits', id), other) == 1
    local dependency = fields(other)
    if waits then needs = needs + 1 end
    if waits and not dependency then
      problem(id, 'waits for ' .. other .. ', which is gone')
    elseif waits and dependency.status == 'completed' and
           not read('ZSCORE', root .. ':unsettled', other) then
      problem(id, 'waits for ' .. other .. ', which is completed')
    elseif dependency and task.status ~= 'completed' and
           read('ZSCORE', key('dependents', other), id) ~= (waits and '0' or '1') then
      problem(id, 'is missing among the dependents of ' .. other)
    end
  end
  for _, other in ipairs(read('ZRANGE', key('dependents', id), 0, BATCH)) do
    looked = looked + 1
    if not depends_on(fields(other, 'edges'), id) then
      problem(id, 'has ' .. other .. ' among its dependents, which does not depend on it')
    end
  end
  if read('SCARD', key('waits', id)) ~= needs then problem(id, 'waits for what it does not depend on') end
  local blocked = task.blocked ~= '' or needs > 0
  if task.status == 'blocked' and not blocked then problem(id, 'is blocked by nothing') end
  if task.status == 'pending' and blocked then problem(id, 'is pending and has to wait') end
  if not held(task) and read('EXISTS', key('lock', id)) == 1 then problem(id, 'is locked and not held') end
  if tonumber(task.rev) > meta.rev then problem(id, 'has a rev that the project has not reached') end
  if held(task) and tonumber(task.fence) > tonumber(meta.fence) then
    problem(id, 'has a fence that the project has not reached')
  end
end

for id in arg.ids:gmatch('%S+') do
  if looked > BATCH then break end
  count = count + 1
  local task = fields(id, 'mission', 'priority', 'order', 'notBefore', 'blocked', 'rev', 'edges')
  local indexes = indexes_of(id)
  if task then
    check(id, task, indexes)
  else
    for name in pairs(indexes) do problem(id, 'is in ' .. name .. ' and does not exist') end
    for _, kind in ipairs({'text', 'work', 'summary', 'notes', 'waits', 'dependents', 'lock'}) do
      if read('EXISTS', key(kind, id)) == 1 then problem(id, 'left its ' .. kind .. ' behind') end
    end
  end
end
local ahead = arg.ids == '' and beyond()
if ahead then
  problem('', 'cannot change: its stream of events goes to ' .. decimal(ahead) ..
          ', beyond its rev ' .. meta.rev)
end
return {'OK', found, count}
