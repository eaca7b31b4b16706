-- base.lua -- Remember what a file and the queue last agreed on.
--
-- State    project
-- Args     actor file path
-- Each     task cells
-- Returns  OK
-- Rejects  SCHEMA INVALID TOO_LARGE NOT_FOUND
-- Emits    nothing
--
-- `file` stands for a path; `cells` is JSON, and '' forgets the task.  An empty path forgets the
-- file.  Tasks do not change by it.

meta = project(true)
require_id(arg.file, 'file')
require_text(arg.path, 'path', 4096)

if arg.path == '' then
  write('HDEL', root .. ':files', arg.file)
  write('UNLINK', key('file', arg.file))
  return {'OK'}
end
write('HSET', root .. ':files', arg.file, arg.path)
for new in each_task() do
  if new.cells == '' then
    write('HDEL', key('file', arg.file), new.task)
  else
    write('HSET', key('file', arg.file), new.task, new.cells)
  end
end
return {'OK'}
