-- Reads for a fleet, if this process is the one that does. ARGV[2]: how many at most, [3]: its name, [4]: its lease in
-- milliseconds, [5]: the reign under which it may read.
local me = ARGV[3]
local owner = redis.call('GET', KEYS[2])
if not owner then
    redis.call('SET', KEYS[2], me, 'PX', ARGV[4])
    owner = me
elseif owner == me then
    redis.call('PEXPIRE', KEYS[2], ARGV[4])
end

local at, entries, pending = place[1], {}, false
local why = not at and 'it is not known how far the stream was read'
    or place[4]
    or missed(at, tonumber(place[2] or ''))
    or not own and 'the group is gone'
    or own['last-delivered-id'] ~= at and 'the group was moved'
if own and own.pending > 0 then pending = redis.call('XPENDING', stream, group)[2] end

local function claim()
    local claimed = redis.call('XAUTOCLAIM', stream, group, me, 0, '0-0', 'COUNT', ARGV[2])
    -- Redis 7 names those that are gone, and forgets them; 6.2 leaves holes.
    local is_lost = claimed[3] and #claimed[3] > 0
    for _, entry in ipairs(claimed[2]) do
        if entry then entries[#entries + 1] = entry else is_lost = true end
    end
    if is_lost then
        -- Kept, for whoever comes next if this answer is lost.
        why = 'entries were trimmed before they were acknowledged'
        redis.call('HSET', KEYS[3], 'gap', why)
        place[4] = why
    end
end

local function read()
    local found = redis.call('XREADGROUP', 'GROUP', group, me, 'COUNT', ARGV[2], 'STREAMS', stream, '>')
    entries = found and found[1][2] or {}
    if #entries > 0 then
        place[1] = entries[#entries][1]
        own['last-delivered-id'] = place[1]
        redis.call('HSET', KEYS[3], 'at', place[1])
        if place[2] then place[2] = string.format('%.0f', redis.call('HINCRBY', KEYS[3], 'added', #entries)) end
    end
    -- Nothing is pending but what has just been read.
    if own.consumers > 1 then
        for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
            local name = named(flat).name
            if name ~= me then redis.call('XGROUP', 'DELCONSUMER', stream, group, name) end
        end
    end
end

if owner == me and not why and place[3] == ARGV[5] then
    if pending then claim() else read() end
end
return {owner == me and 1 or 0, why or false, last, total or false, at, pending, place[3], token(), entries}
