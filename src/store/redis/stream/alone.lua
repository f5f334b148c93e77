-- Reads for one process. ARGV: how many at most, after which entry ('' if none is known), how many had come up to it.
local at, entries = ARGV[2], {}
local why = at == '' and 'it is not known how far the stream was read' or missed(at, tonumber(ARGV[3]))
if info and not why then
    local read = redis.call('XREAD', 'COUNT', ARGV[1], 'STREAMS', stream, at)
    entries = read and read[1][2] or {}
end
return {1, why or false, last, total or false, at, false, false, '', entries}
