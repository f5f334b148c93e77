-- How a stream is read: what both ways of doing so begin with. KEYS[1] is the stream.
-- Whatever is decided here is decided in one step: nothing can be trimmed between the look and the read.

-- Whether an entry's id comes before another's. As texts, since Lua's numbers have 53 bits.
local function less(a, b)
    local a1, a2 = string.match(a, '^(%d+)%-(%d+)$')
    local b1, b2 = string.match(b, '^(%d+)%-(%d+)$')
    if a1 == b1 then a1, b1 = a2, b2 end
    return #a1 < #b1 or (#a1 == #b1 and a1 < b1)
end

local function named(flat)
    local fields = {}
    for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
    return fields
end

local stream = KEYS[1]
local info = redis.call('EXISTS', stream) == 1 and named(redis.call('XINFO', 'STREAM', stream))
local last = info and info['last-generated-id'] or '0-0'
-- How many entries were ever added. Redis 6.2 does not say, unless there is nothing yet.
local total = not info and 0 or info['entries-added']

-- Why there may have been entries beyond `at`, which `added` entries had come up to, that can be read no more.
local function missed(at, added)
    if not info then return at ~= '0-0' and 'the stream is gone' end
    if less(last, at) then return 'the stream is behind what was read of it' end
    local fresh = total and added and total - added
    if fresh and (fresh < 0 or (last == at and fresh > 0)) then return 'the stream is another' end
    if last == at then return false end
    local first = info['first-entry']
    local function is_gone() return #redis.call('XRANGE', stream, at, at) == 0 end
    if not fresh then
        return is_gone() and 'the entry that was read last is there no more, so others may have gone unread'
    elseif not first or less(at, first[1]) then
        return info.length ~= fresh and 'entries were trimmed before they were read'
    end
    local deleted = info['max-deleted-entry-id']
    if less(at, deleted) then return 'entries were deleted before they were read' end
    return deleted ~= at and is_gone() and 'the stream is another'
end
