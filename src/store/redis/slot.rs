//! The slots of a cluster (its specification: CRC-16 of what a key has in braces).

/// How many slots a cluster has.
pub(super) const SLOTS: usize = 16_384;

/// What the slot of a key is counted by.
const CRC: crc::Crc<u16> = crc::Crc::<u16>::new(&crc::CRC_16_XMODEM);

/// The slot of a tenant's keys; `tenant` as it is in keys, with its braces.
pub(crate) fn slot(tenant: &[u8]) -> usize {
    let begin = tenant.iter().position(|&c| c == b'{').map_or(0, |at| at + 1);
    let inner = tenant[begin..].strip_suffix(b"}").unwrap_or(tenant);
    usize::from(CRC.checksum(inner)) % SLOTS
}

/// What a key must have in braces to be in one of these slots: the first such name, or the next, and so on.
pub(crate) fn name_in(own: &[(u16, u16)], nth: usize) -> Option<String> {
    let is_own = |name: &String| {
        let at = slot(format!("{{{name}}}").as_bytes());
        own.iter().any(|&(first, last)| (usize::from(first)..=usize::from(last)).contains(&at))
    };
    // A server that is no cluster's claims none, and a search in vain takes milliseconds.
    if own.is_empty() {
        return None;
    }
    // Few masters have so few slots that this finds none; those are not worth a longer search.
    (0..4 * SLOTS).map(|n| format!("~{n}")).filter(is_own).nth(nth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        for (tenant, expected) in [(&b"{123456789}"[..], 0x31C3), (b"cas:g:agents{user1000}", 3443), (b"{}", 0)] {
            assert_eq!(slot(tenant), expected % SLOTS);
        }
        let name = name_in(&[(100, 200)], 1).unwrap();
        assert!((100..=200).contains(&slot(format!("{{{name}}}").as_bytes())));
        assert_ne!(Some(name), name_in(&[(100, 200)], 0));
        assert_eq!(name_in(&[], 0), None);
    }
}
