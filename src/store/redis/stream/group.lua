-- What a fleet has read of it. KEYS[2]: who reads, KEYS[3]: the place, which goes ahead in the same step as the group does.
-- ARGV[1]: the group.
local group = ARGV[1]
local place = redis.call('HMGET', KEYS[3], 'at', 'added', 'reign', 'gap')
local own
for _, flat in ipairs(info and redis.call('XINFO', 'GROUPS', stream) or {}) do
    local fields = named(flat)
    if fields.name == group then own = fields end
end

-- What is to be unchanged when a gap is acknowledged.
local function token()
    local delivered = own and own['last-delivered-id'] or ''
    return table.concat({place[1] or '', place[2] or '', place[3] or '', place[4] or '', delivered}, ' ')
end
