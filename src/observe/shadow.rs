//! What a cache with half the memory would do, and with twice as much: in small, with a part of the keys (SHARDS: Waldspurger et al.,
//! FAST 2015) and the same eviction.

use std::{
    collections::BTreeMap,
    hash::BuildHasher,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use foldhash::fast::FixedState;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter, unsync::Cache};

/// Of the keys of a cache of this size all are looked at; of a larger one as many as have room in it.
const SMALL: u64 = 2 << 20;

/// Part of a whole.
const SIZES: [(u64, &str); 3] = [(1, "half"), (2, "now"), (4, "twice")];

/// A stored entry: its type's number, and what it weighs.
#[derive(Clone, Copy, Debug)]
struct Ghost {
    data_type: usize,
    weight: u64,
}

#[derive(Clone, Debug)]
struct Weigh;

impl Weighter<u64, Ghost> for Weigh {
    fn weight(&self, _: &u64, ghost: &Ghost) -> u64 {
        ghost.weight.max(1)
    }
}

type Ghosts = Cache<u64, Ghost, Weigh, DefaultHashBuilder>;

/// Look-ups of a part of the keys, and what caches of other sizes had of them.
#[derive(Debug)]
pub(super) struct Shadow {
    /// One key in so many, as a power of two.
    rate: u32,
    lookups: AtomicU64,
    inner: Option<Mutex<Inner>>,
}

struct Inner {
    caches: [Ghosts; SIZES.len()],
    hits: [u64; SIZES.len()],
    /// By type.
    real: BTreeMap<usize, u64>,
    since: Instant,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("hits", &self.hits).finish_non_exhaustive()
    }
}

/// What it tells.
#[derive(Clone, Debug, Default)]
pub(super) struct Estimate {
    pub(super) lookups: u64,
    /// Hits with half the memory, with what there is, and with twice as much.
    pub(super) hits: [u64; SIZES.len()],
    /// By the type's number: hits each second for each mebibyte that it takes.
    pub(super) worth: BTreeMap<usize, f64>,
}

impl Shadow {
    /// Of a cache that takes so many bytes; 0 if there is none.
    pub(super) fn new(capacity: u64) -> Self {
        let rate = (capacity / SMALL).max(1).ilog2();
        let ghosts = |(part, _): (u64, &str)| {
            let mut options = OptionsBuilder::new();
            let room = ((capacity * part / 2) >> rate).max(1);
            options.estimated_items_capacity(4_096).weight_capacity(room);
            let options = options.build().ok()?;
            Some(Cache::with_options(options, Weigh, DefaultHashBuilder::default(), Default::default()))
        };
        let inner = || {
            let caches = [ghosts(SIZES[0])?, ghosts(SIZES[1])?, ghosts(SIZES[2])?];
            Some(Mutex::new(Inner { caches, hits: [0; SIZES.len()], real: BTreeMap::new(), since: Instant::now() }))
        };
        Self { rate, lookups: AtomicU64::new(0), inner: (capacity > 0).then(inner).flatten() }
    }

    /// Whether a key is one of those that are looked at.
    fn picks(&self, key: &[u8]) -> Option<(u64, &Mutex<Inner>)> {
        let inner = self.inner.as_ref()?;
        let hash = FixedState::default().hash_one(key);
        (hash.trailing_zeros() >= self.rate).then_some((hash, inner))
    }

    /// A key was looked up in this process, and there or not.
    pub(super) fn looked(&self, key: &[u8], data_type: usize, is_hit: bool) {
        let Some((hash, inner)) = self.picks(key) else { return };
        // Nobody waits for it: what comes meanwhile is not looked at.
        let Ok(mut inner) = inner.try_lock() else { return };
        self.lookups.fetch_add(1, Relaxed);
        let Inner { caches, hits, real, .. } = &mut *inner;
        let had = caches.each_ref().map(|cache| cache.get(&hash).is_some());
        if is_hit {
            *real.entry(data_type).or_default() += 1;
        } else if had[1] {
            // A write has dropped it, or it has expired: with any memory.
            return;
        }
        hits.iter_mut().zip(had).for_each(|(hits, had)| *hits += u64::from(had));
    }

    /// Something was stored.
    pub(super) fn stored(&self, key: &[u8], data_type: usize, weight: u64) {
        let Some((hash, inner)) = self.picks(key) else { return };
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.caches.iter_mut().for_each(|cache| cache.insert(hash, Ghost { data_type, weight }));
    }

    pub(super) fn estimate(&self) -> Estimate {
        let lookups = self.lookups.load(Relaxed);
        let Some(inner) = &self.inner else { return Estimate::default() };
        let inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = BTreeMap::<usize, u64>::new();
        for (_, ghost) in inner.caches[1].iter() {
            *bytes.entry(ghost.data_type).or_default() += ghost.weight;
        }
        let seconds = inner.since.elapsed().as_secs_f64().max(1.0);
        let worth = |(data_type, bytes): (&usize, &u64)| {
            let hits = inner.real.get(data_type).copied().unwrap_or_default();
            (*data_type, hits as f64 / seconds / (*bytes as f64 / f64::from(1 << 20)))
        };
        Estimate { lookups, hits: inner.hits, worth: bytes.iter().map(worth).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beside caches that have half of the memory, and twice as much.
    #[test]
    fn it_tells_what_other_sizes_would_do() {
        const ENTRY: u64 = 1_000;
        const CAPACITY: u64 = 16 << 20;
        let cache = |capacity: u64| {
            let mut options = OptionsBuilder::new();
            options.estimated_items_capacity(65_536).weight_capacity(capacity);
            let hasher = DefaultHashBuilder::default();
            Ghosts::with_options(options.build().unwrap(), Weigh, hasher, Default::default())
        };
        for skew in [0.7, 0.9, 1.1] {
            let shadow = Shadow::new(CAPACITY);
            let mut caches = [cache(CAPACITY / 2), cache(CAPACITY), cache(2 * CAPACITY)];
            let mut hits = [0_u64; 3];
            let mut sum = 0.0;
            let ranks: Vec<f64> = (1..=60_000)
                .map(|rank| {
                    sum += f64::from(rank).powf(-skew);
                    sum
                })
                .collect();
            let all = 600_000;
            for _ in 0..all {
                let at = rand::random::<f64>() * sum;
                let id = ranks.partition_point(|sum| *sum < at) as u64;
                let key = id.to_be_bytes();
                let had = caches.each_ref().map(|cache| cache.get(&id).is_some());
                shadow.looked(&key, 0, had[1]);
                for (i, cache) in caches.iter_mut().enumerate().filter(|(i, _)| !had[*i]) {
                    cache.insert(id, Ghost { data_type: 0, weight: ENTRY });
                    if i == 1 {
                        shadow.stored(&key, 0, ENTRY);
                    }
                }
                hits.iter_mut().zip(had).for_each(|(hits, had)| *hits += u64::from(had));
            }
            let estimate = shadow.estimate();
            for ((hits, told), (_, size)) in hits.iter().zip(estimate.hits).zip(SIZES) {
                let (real, told) = (*hits as f64 / f64::from(all), told as f64 / estimate.lookups as f64);
                println!("zipf {skew}, {size}: {real:.3}, estimated {told:.3} of one key in {}", 1 << shadow.rate);
                assert!((real - told).abs() < 0.05, "{size} at {skew}: {told} instead of {real}");
            }
        }
    }

    #[test]
    fn what_a_write_has_dropped_is_missing_with_any_memory() {
        let shadow = Shadow::new(1 << 20);
        for _ in 0..10 {
            shadow.looked(b"key", 3, false);
            shadow.stored(b"key", 3, 1 << 10);
        }
        assert_eq!(shadow.estimate().hits, [0; 3]);
        (0..10).for_each(|_| shadow.looked(b"key", 3, true));
        let estimate = shadow.estimate();
        assert_eq!((estimate.lookups, estimate.hits), (20, [10; 3]));
        assert!(estimate.worth[&3] > 1.0);
        assert_eq!(Shadow::new(0).estimate().lookups, 0);
    }
}
