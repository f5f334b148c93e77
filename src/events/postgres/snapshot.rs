//! Which transactions somebody who reads now can see.

/// What `pg_current_snapshot()` says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// All below it are over.
    xmin: u64,
    /// None from it on is.
    xmax: u64,
    /// Those between the two that are not.
    open: Vec<u64>,
}

impl Snapshot {
    /// `xmin:xmax:open,open`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (xmin, xmax, open) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
        let open = open.split(',').filter(|xid| !xid.is_empty()).map(|xid| xid.parse().ok());
        Some(Self { xmin, xmax, open: open.collect::<Option<_>>()? })
    }

    /// Whether the changes of a transaction that has been committed are seen, whose id the log gives without its epoch.
    pub(crate) fn sees(&self, xid: u32) -> bool {
        let xid = nearest(self.xmax, xid);
        xid < self.xmin || (xid < self.xmax && !self.open.contains(&xid))
    }
}

/// The id with these lower 32 bits that is nearest to another: no two ids that are in use are further apart than half of them.
fn nearest(near: u64, xid: u32) -> u64 {
    let ahead = xid.wrapping_sub(near as u32).cast_signed();
    near.saturating_add_signed(ahead.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_not_seen() {
        let snapshot = Snapshot::parse("10:20:12,15").unwrap();
        let seen: Vec<_> = (8..23).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [8, 9, 10, 11, 13, 14, 16, 17, 18, 19]);
        assert_eq!(Snapshot::parse("10:10:").unwrap(), Snapshot { xmin: 10, xmax: 10, open: vec![] });
        assert!(["", "10", "10:20", "10:20:x", "a:20:"].iter().all(|text| Snapshot::parse(text).is_none()));
    }

    #[test]
    fn ids_go_on_after_the_last_of_32_bits() {
        let epoch = 1 << 32;
        // The snapshot is after the turn, the transaction before it; and the other way round.
        let after = Snapshot { xmin: epoch + 5, xmax: epoch + 5, open: vec![] };
        assert!(after.sees(u32::MAX - 3) && after.sees(4) && !after.sees(5));
        let before = Snapshot { xmin: epoch - 4, xmax: epoch - 2, open: vec![epoch - 4] };
        assert!(!before.sees(u32::MAX - 3) && before.sees(u32::MAX - 2) && !before.sees(3));
    }
}
