//! What the stores outside this process have in common: what they count, how a held entry is validated, whose tags are whose,
//! and which times make sense.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;

use super::{
    Entry, Generation, Guard, Inquiry, Lookup, MemoryStore, Stamp, Store, StoreError, TagGroup, codec,
    decoded::{Times, decoded},
};
use crate::{catalog::Tier, error::ConfigError, key::Tag};

const DAY: Duration = Duration::from_secs(86_400);

/// Tags that are gone through more than once.
pub(super) trait Tags<'t>: ExactSizeIterator<Item = &'t Tag> + Clone + Send {}

impl<'t, I: ExactSizeIterator<Item = &'t Tag> + Clone + Send> Tags<'t> for I {}

/// A store that can be asked for generations alone.
pub(super) trait Generations: Store {
    /// The current generation of each tag, in that order.
    fn generations<'t>(
        &self,
        tags: impl Tags<'t>,
    ) -> impl Future<Output = Result<Vec<Option<Generation>>, StoreError>> + Send;
}

/// A look-up whose entry may be held in `memory`, but each hit asks whether it is current.
#[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
pub(super) fn validated<'a, S: Generations>(
    remote: &'a Guard<S>,
    memory: &'a MemoryStore,
    inquiry: Inquiry<'a>,
) -> impl Future<Output = Result<Lookup, StoreError>> + Send + use<'a, S> {
    async move {
        // What has ended is not asked about: the store may have another by now.
        let held = memory.raw(inquiry.key.as_bytes());
        if let Some(entry) = held.filter(|entry| inquiry.now < entry.ends(inquiry.longest)) {
            let generations = remote.call(|remote| remote.generations(inquiry.tags.iter())).await?;
            if is_current(&entry, &inquiry, &generations) {
                return Ok(Lookup::new(Some(entry), generations));
            }
        }
        let found = remote.lookup(inquiry).await?;
        if let Some(entry) = &found.entry
            && is_current(entry, &inquiry, &found.generations)
        {
            memory.insert(inquiry.key, entry.clone(), vec![], 0);
        }
        Ok(found)
    }
}

/// Whether an entry that is held in `memory` is current. One that is not is not asked about again.
#[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
pub(super) fn still_current<'a, S: Generations>(
    remote: &'a Guard<S>,
    memory: &'a MemoryStore,
    key: &'a [u8],
    entry: &'a Entry,
) -> impl Future<Output = Result<bool, StoreError>> + Send + use<'a, S> {
    async move {
        let tags = entry.stamps.iter().map(|stamp| &stamp.tag);
        let now = remote.call(|remote| remote.generations(tags)).await?;
        let is_current = entry.stamps.iter().map(|stamp| Some(stamp.generation)).eq(now);
        if !is_current {
            memory.forget(key, |held| held.stamps == entry.stamps);
        }
        Ok(is_current)
    }
}

/// Whether an entry is valid under these generations, with all the tags that it must have.
pub(super) fn is_current(entry: &Entry, inquiry: &Inquiry<'_>, generations: &[Option<Generation>]) -> bool {
    let Inquiry { tags, required, .. } = inquiry;
    let is_now = |at: usize, stamp: &Stamp| generations.get(at) == Some(&Some(stamp.generation));
    entry.has(tags.get(..*required).unwrap_or(tags))
        && entry.places(tags).all(|(stamp, at)| at.is_some_and(|at| is_now(at, stamp)))
}

/// The tags of the groups, each with the number of its group, by tenant.
pub(super) fn by_tenant(groups: &[TagGroup]) -> BTreeMap<&[u8], Vec<(usize, &Tag)>> {
    let mut tenants: BTreeMap<&[u8], Vec<(usize, &Tag)>> = BTreeMap::new();
    for (i, group) in groups.iter().enumerate() {
        for tag in &group.tags {
            tenants.entry(tag.tenant()).or_default().push((i, tag));
        }
    }
    tenants
}

/// That each time that is set lies between its bounds. `store` is the name of its kind.
pub(super) fn check_times(
    store: &str,
    times: impl IntoIterator<Item = (&'static str, Option<Duration>, Duration, Duration)>,
) -> Result<(), ConfigError> {
    for (name, time, least, most) in times {
        if let Some(time) = time.filter(|time| !(least..=most).contains(time)) {
            return Err(ConfigError::new(format!(
                "{store} {name} of {time:?}: choose one from {least:?} to {}",
                if most < DAY { format!("{most:?}") } else { format!("{} days", most.as_secs() / DAY.as_secs()) }
            )));
        }
    }
    Ok(())
}

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
    unreadable: AtomicU64,
    pub(super) too_large: AtomicU64,
    uncompressed: AtomicU64,
    compressed: AtomicU64,
}

impl Counters {
    /// The entry that these bytes are, if they are one.
    pub(super) fn decode(&self, bytes: &Bytes, times: Times, tier: Tier) -> Option<Arc<Entry>> {
        let entry = decoded(bytes, times, tier != Tier::Off).ok();
        if entry.is_none() {
            self.unreadable.fetch_add(1, Ordering::Relaxed);
        }
        entry
    }

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
