//! What a region tells the others: an entry of its stream has one field, which is this.
//!
//! `1, kind, writer (16), milliseconds (8)`, and then of each tag its length (4) and its bytes.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};

use crate::{key::Tag, store::Fence};

/// The field's name.
pub(crate) const FIELD: &[u8] = b"d";

const VERSION: u8 = 1;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// These tags were dropped, and are fenced for so long; the writer's fences were lifted.
    Drop,
    /// A writer fences them for so long.
    Fence,
    /// Everything was dropped.
    Clear,
    /// Nothing: the region is alive.
    Beat,
}

const KINDS: [Kind; 4] = [Kind::Drop, Kind::Fence, Kind::Clear, Kind::Beat];

/// An entry of a region's stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    pub(crate) writer: u128,
    pub(crate) stands: Duration,
    pub(crate) tags: Vec<Tag>,
}

impl Record {
    pub(crate) fn beat() -> Self {
        Self { kind: Kind::Beat, writer: 0, stands: Duration::ZERO, tags: vec![] }
    }

    pub(crate) fn clear() -> Self {
        Self { kind: Kind::Clear, ..Self::beat() }
    }

    pub(crate) fn encode<'t>(
        kind: Kind,
        fence: Option<&Fence>,
        stands: Duration,
        tags: impl Iterator<Item = &'t Tag>,
    ) -> Vec<u8> {
        let mut out = vec![VERSION, kind as u8];
        out.put_u128(fence.map_or(0, |fence| fence.writer));
        out.put_u64(u64::try_from(stands.as_millis()).unwrap_or(u64::MAX));
        for tag in tags {
            let bytes = tag.as_bytes();
            out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
            out.put_slice(bytes);
        }
        out
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let fence = Fence { writer: self.writer, lease: Duration::ZERO, hold: Duration::ZERO };
        Self::encode(self.kind, Some(&fence), self.stands, self.tags.iter())
    }

    /// `None` for what was written by nobody who is known.
    pub(crate) fn decode(mut bytes: Bytes) -> Option<Self> {
        if bytes.try_get_u8().ok()? != VERSION {
            return None;
        }
        let kind = *KINDS.get(usize::from(bytes.try_get_u8().ok()?))?;
        let writer = bytes.try_get_u128().ok()?;
        let stands = Duration::from_millis(bytes.try_get_u64().ok()?);
        let mut tags = vec![];
        while !bytes.is_empty() {
            let length = usize::try_from(bytes.try_get_u32().ok()?).ok()?;
            if length > bytes.len() {
                return None;
            }
            tags.push(Tag(bytes.split_to(length)));
        }
        Some(Self { kind, writer, stands, tags })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_else(
            kind in 0usize..4, writer: u128, stands: u64, tags: Vec<Vec<u8>>, cut: usize, noise: Vec<u8>,
        ) {
            let tags = tags.into_iter().map(|tag| Tag(tag.into())).collect();
            let record = Record { kind: KINDS[kind], writer, stands: Duration::from_millis(stands), tags };
            let bytes = record.bytes();
            prop_assert_eq!(Record::decode(bytes.clone().into()), Some(record.clone()));
            let cut = Record::decode(Bytes::copy_from_slice(&bytes[..cut % bytes.len()]));
            prop_assert!(cut.is_none_or(|cut| cut.tags.len() < record.tags.len() || record.tags.is_empty()));
            let _ = Record::decode(noise.into());
        }
    }

    #[test]
    fn that_everything_was_dropped_is_told_as_that() {
        for (record, kind) in [(Record::clear(), Kind::Clear), (Record::beat(), Kind::Beat)] {
            assert_eq!(Record::decode(record.bytes().into()).map(|read| read.kind), Some(kind));
        }
    }
}
