-- replies.lua -- What a script answers.

-- A reply about a task is OK, REPEATED or SUPERSEDED and what follows in `show` or `whole`.
local function show(task, ...)
  return {'OK', table.concat({'taskId', task.id, 'rev', task.rev, 'updatedAt', at, ...}, '\t')}
end

local function policy() -- seldom
  local values = {'lanes', meta.lanes, 'storedAt', limit('policy') or ''}
  for name in POLICY:gmatch('%a+') do append(values, name, limit(name)) end
  return table.concat(values, '\t')
end

-- The answers of one call about several tasks: the first one's, and behind it the others whole.
local function together(replies)
  local reply = replies[1]
  for i = 2, #replies do reply[#reply + 1] = replies[i] end
  return reply
end

-- The answer to a call that was carried out before: its own fence and rev, the task as it is.  A
-- claim that has ended since is superseded too.
local function replay(done, claims) -- seldom
  local task = fields(done.task, 'fence')
  if not task then
    return {'SUPERSEDED', table.concat({'taskId', done.task, 'opFence', done.fence,
                                        'opRev', done.rev}, '\t')}
  end
  local reply = whole(task, 'opFence', done.fence, 'opRev', done.rev)
  local ended = claims and (task.status == 'pending' or task.status == 'blocked')
  reply[1] = task.fence == done.fence and not ended and 'REPEATED' or 'SUPERSEDED'
  return reply
end
