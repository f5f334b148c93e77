-- A gap was acknowledged: reading goes on from where it was then. ARGV[2]: what was seen then, [3]: after which entry to go
-- on, [4]: the reign, [5]: how many entries had come up to it ('' if unknown). Somebody else may have been quicker.
if token() ~= ARGV[2] then return 0 end
if own then redis.call('XGROUP', 'DESTROY', stream, group) end
redis.call('XGROUP', 'CREATE', stream, group, ARGV[3], 'MKSTREAM')
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[3], 'at', ARGV[3], 'reign', ARGV[4])
if ARGV[5] ~= '' then redis.call('HSET', KEYS[3], 'added', ARGV[5]) end
return 1
