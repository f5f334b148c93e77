//! What is counted of entries on their way to and from a store outside this process.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Entry, StoreError, codec};

/// Counters of entries on their way to and from the store, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WireStats {
    /// Values that were no entries: corrupt, truncated, foreign, or of another version.
    pub unreadable: u64,
    /// Entries that were not stored: with more headers or tags than the format has room for, or longer ones; or larger than the
    /// server takes.
    pub too_large: u64,
    /// Bytes of bodies before they were compressed.
    pub uncompressed: u64,
    /// Bytes of the same bodies after.
    pub compressed: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) unreadable: AtomicU64,
    pub(super) too_large: AtomicU64,
    uncompressed: AtomicU64,
    compressed: AtomicU64,
}

impl Counters {
    /// The entry as bytes; `shift` is how far the shared clock is ahead.
    pub(super) fn encode(&self, entry: &Entry, shift: i64) -> Result<Vec<u8>, StoreError> {
        let Ok(encoded) = codec::encode(entry, shift) else {
            self.too_large.fetch_add(1, Ordering::Relaxed);
            return Err(StoreError::new("too many or too long headers or tags"));
        };
        if let Some((from, to)) = encoded.compressed {
            self.uncompressed.fetch_add(from as u64, Ordering::Relaxed);
            self.compressed.fetch_add(to as u64, Ordering::Relaxed);
        }
        Ok(encoded.bytes)
    }

    pub(super) fn stats(&self) -> WireStats {
        WireStats {
            unreadable: self.unreadable.load(Ordering::Relaxed),
            too_large: self.too_large.load(Ordering::Relaxed),
            uncompressed: self.uncompressed.load(Ordering::Relaxed),
            compressed: self.compressed.load(Ordering::Relaxed),
        }
    }
}
