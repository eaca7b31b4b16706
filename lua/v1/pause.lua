-- pause.lua -- Grant no new claims; running work goes on.
--
-- State    project
-- Args     paused
-- Returns  since when it is paused
-- Rejects  SCHEMA INVALID NOT_FOUND
-- Emits    nothing
--
-- With paused `0` claims are granted again, and every lane that has ready tasks rings.

meta = project()

if arg.paused == '0' then
  write('HSET', root, 'limits', (meta.limits:gsub(' paused=%d+', '')))
  for lane in each_lane() do
    if read('ZCARD', key('ready', lane)) > 0 then ring(lane) end
  end
  return {'OK', ''}
end
if not limit('paused') then write('HSET', root, 'limits', meta.limits .. ' paused=' .. at) end
return {'OK', limit('paused') or at}
