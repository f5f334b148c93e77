//! What a store holds under a key: a response or a value, the generations it was filled under, and its times.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, StatusCode};

use super::{Generation, Headers, Replay, headers::weight};
use crate::{
    catalog::{Learned, Lifetime},
    clock::Millis,
    key::{Key, Tag},
    sync::RandomState,
};

/// So many tags are looked through sooner than hashed.
const FEW: usize = 16;

/// A tag, and the generation that it has had since before the load began: had it none, nobody dropped it until it was given one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// The tag.
    pub tag: Tag,
    /// Its generation then.
    pub generation: Generation,
}

/// A response as it is stored and replayed.
#[derive(Clone, Debug)]
pub struct StoredResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers, without those that are the connection's or the cache's own.
    pub headers: Headers,
    /// The whole body.
    pub body: Bytes,
    /// The trailers, if there were any.
    pub trailers: Option<Box<HeaderMap>>,
}

#[derive(Clone, Debug)]
pub(crate) enum Payload {
    Response(StoredResponse),
    /// A value of the cache-aside function, as its codec writes it.
    Value(Bytes),
    /// The responses depend on these request headers, and are stored under keys that hold them too.
    Vary(Box<[HeaderName]>),
}

/// A stored response or value.
#[derive(Clone, Debug)]
pub struct Entry {
    pub(crate) payload: Payload,
    pub(crate) stamps: Box<[Stamp]>,
    pub(crate) created: Millis,
    /// Fresh until then; `Millis::MAX` means for ever.
    pub(crate) expires: Millis,
    /// Served until then while it is refreshed.
    pub(crate) refresh_until: Millis,
    /// Served until then when the origin fails.
    pub(crate) on_error_until: Millis,
    /// Kept until then.
    pub(crate) keep_until: Millis,
    /// How long it took to load, in milliseconds.
    pub(crate) load: u32,
    /// What reloads have told of its key, where its type's TTL is learned.
    pub(crate) learned: Option<Learned>,
    /// The request headers it is the answer to, and the key they give. Known to those who waited for it, until it is
    /// stored under that key.
    pub(crate) varied: Option<Box<(Box<[HeaderName]>, Key)>>,
    /// Where its headers are kept ready, if they are. It is of this very entry: who changes a copy of it gives that another.
    pub(crate) replay: Replay,
    /// Which cache of this process it has been found to suit, if one.
    pub(crate) suits: Suits,
}

/// A number of a cache.
#[derive(Debug, Default)]
pub(crate) struct Suits(AtomicU64);

impl Clone for Suits {
    fn clone(&self) -> Self {
        Self(AtomicU64::new(self.0.load(Relaxed)))
    }
}

impl Entry {
    pub(crate) fn new(payload: Payload, stamps: Box<[Stamp]>, now: Millis, life: Lifetime) -> Self {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(Millis::MAX);
        let created = now.saturating_sub(millis(life.age));
        let expires = life.fresh.map_or(Millis::MAX, |fresh| created.saturating_add(millis(fresh)));
        let (refresh_until, on_error_until) =
            (expires.saturating_add(millis(life.refresh)), expires.saturating_add(millis(life.on_error)));
        Self {
            payload,
            stamps,
            created,
            expires,
            refresh_until,
            on_error_until,
            keep_until: refresh_until.max(on_error_until).max(expires.saturating_add(millis(life.validate))),
            load: u32::try_from(life.load.as_millis()).unwrap_or(u32::MAX),
            learned: None,
            varied: None,
            replay: Replay::default(),
            suits: Suits::default(),
        }
    }

    /// Whether it has been found to suit this cache.
    pub(crate) fn suits(&self, cache: u64) -> bool {
        self.suits.0.load(Relaxed) == cache
    }

    /// It has been found to suit this cache, whose number is not 0.
    pub(crate) fn note_suits(&self, cache: u64) {
        self.suits.0.store(cache, Relaxed);
    }

    /// What a cache may answer with whose mapping gives these tags, and a TTL of so much at most: what has all of them, and no longer.
    pub(crate) fn suited(self: Arc<Self>, tags: &[Tag], longest: Option<Duration>) -> Option<Arc<Self>> {
        self.has(tags).then(|| self.capped(longest))
    }

    /// Fresh for so long at most, and served stale for no longer after that than was meant. (What was to be fresh for ever was to be
    /// served stale never.)
    pub(super) fn cap(&mut self, longest: Option<Duration>) {
        let over = self.over(longest);
        for time in [&mut self.expires, &mut self.refresh_until, &mut self.on_error_until] {
            *time = time.saturating_sub(over);
        }
    }

    /// The same, of one that others may have.
    pub(crate) fn capped(self: Arc<Self>, longest: Option<Duration>) -> Arc<Self> {
        if self.over(longest) == 0 {
            return self;
        }
        let mut own = self.with(self.payload.clone());
        own.cap(longest);
        Arc::new(own)
    }

    /// When it ends, if it is fresh for so long at most.
    #[cfg(any(feature = "redis", feature = "memcached"))]
    pub(super) fn ends(&self, longest: Option<Duration>) -> Millis {
        self.expires.saturating_sub(self.over(longest))
    }

    /// For how much longer it is fresh than that. What leads to variants, which say so themselves, stays for as long as any of them.
    fn over(&self, longest: Option<Duration>) -> Millis {
        if let Payload::Vary(_) = self.payload {
            return 0;
        }
        let longest = longest.map_or(Millis::MAX, |longest| longest.as_millis() as Millis);
        self.expires.saturating_sub(self.created.saturating_add(longest))
    }

    /// Whether it has all of these tags.
    pub(crate) fn has(&self, tags: &[Tag]) -> bool {
        let is_at = |i: usize, tag: &Tag| self.stamps.get(i).is_some_and(|stamp| stamp.tag == *tag);
        tags.iter().enumerate().all(|(i, tag)| is_at(i, tag) || self.stamps.iter().any(|stamp| stamp.tag == *tag))
    }

    /// Each stamp, with the place of its tag among these. Who looks up asks for tags in their entry's order, but for what has
    /// changed; a thousand are not looked through for each of a thousand.
    pub(crate) fn places<'a>(&'a self, tags: &'a [Tag]) -> impl Iterator<Item = (&'a Stamp, Option<usize>)> {
        let mut index = None;
        self.stamps.iter().enumerate().map(move |(i, stamp)| {
            let place = match tags.get(i) {
                Some(tag) if *tag == stamp.tag => Some(i),
                _ if tags.len() <= FEW => tags.iter().position(|tag| *tag == stamp.tag),
                _ => {
                    let index =
                        index.get_or_insert_with(|| tags.iter().zip(0..).collect::<HashMap<_, _, RandomState>>());
                    index.get(&stamp.tag).copied()
                }
            };
            (stamp, place)
        })
    }

    /// What is stored under the key without request headers, to lead to a response that varies by these.
    /// It stays for as long as any of those does that it leads to; but what a response does not say again is forgotten when
    /// it would have been.
    pub(crate) fn marker(&self, names: &[HeaderName], known: Option<(Millis, bool)>) -> Self {
        let until = match known {
            None => self.keep_until,
            Some((until, true)) => self.keep_until.max(until),
            Some((until, false)) => until,
        };
        Self {
            expires: until,
            refresh_until: until,
            on_error_until: until,
            keep_until: until,
            learned: None,
            varied: None,
            ..self.with(Payload::Vary(names.into()))
        }
    }

    /// The generations it was filled under: it is valid only while all of them are current.
    pub fn stamps(&self) -> &[Stamp] {
        &self.stamps
    }

    /// The response, if it is one: an entry may also be a value of [`Cache::entry`](crate::Cache::entry), or say by which
    /// request headers the responses vary.
    ///
    /// What a hit fills in (`age`, `cache-status`) may be there already, and empty.
    pub fn response(&self) -> Option<&StoredResponse> {
        match &self.payload {
            Payload::Response(response) => Some(response),
            Payload::Value(_) | Payload::Vary(_) => None,
        }
    }

    /// An entry to test a store with: this response, loaded now under these generations, and fresh for so long. (Feature
    /// `testing`.)
    #[cfg(feature = "testing")]
    pub fn of_response(response: StoredResponse, stamps: Vec<Stamp>, now: Millis, fresh: Duration) -> Self {
        Self::new(Payload::Response(response), stamps.into(), now, Lifetime::fresh_for(Some(fresh)))
    }

    /// The same with its headers packed, if they are not: what is held in this process takes less room so.
    pub(super) fn packed(mut entry: Arc<Self>) -> Arc<Self> {
        let Payload::Response(stored) = &entry.payload else { return entry };
        let Some(headers) = stored.headers.packed() else { return entry };
        let StoredResponse { status, body, trailers, .. } = stored;
        let (status, body, trailers) = (*status, body.clone(), trailers.clone());
        let replay = Replay::of(&headers);
        let payload = Payload::Response(StoredResponse { status, headers, body, trailers });
        match Arc::get_mut(&mut entry) {
            Some(own) => (own.payload, own.replay) = (payload, replay),
            None => entry = Arc::new(Self { replay, ..entry.with(payload) }),
        }
        entry
    }

    /// The same, with its headers kept ready.
    pub(super) fn replayed(self) -> Self {
        let replay = match &self.payload {
            Payload::Response(stored) => Replay::of(&stored.headers),
            _ => Replay::default(),
        };
        Self { replay, ..self }
    }

    /// The same, but for what it holds.
    pub(super) fn with(&self, payload: Payload) -> Self {
        let (stamps, varied) = (self.stamps.clone(), self.varied.clone());
        Self { payload, stamps, varied, replay: Replay::default(), suits: self.suits.clone(), ..*self }
    }

    /// When the store may forget it; `Millis::MAX` means never.
    pub fn keep_until(&self) -> Millis {
        self.keep_until
    }

    /// About how many bytes of memory it takes.
    pub fn weight(&self) -> usize {
        let stamps: usize = self.stamps.iter().map(|s| s.tag.0.len() + 48).sum();
        let payload = match &self.payload {
            Payload::Value(bytes) => bytes.len(),
            Payload::Vary(names) => names.iter().map(|n| n.as_str().len() + 32).sum(),
            Payload::Response(r) => {
                r.body.len() + r.headers.weight() + r.trailers.as_ref().map_or(0, |trailers| weight(trailers))
            }
        };
        size_of::<Self>() + stamps + payload
    }

    pub(crate) fn is_fresh(&self, now: Millis) -> bool {
        now < self.expires
    }

    /// For how many more seconds it is fresh, which is less than none when it is stale; `None` means for ever.
    pub(crate) fn ttl(&self, now: Millis) -> Option<i64> {
        let [expires, now] = [self.expires, now].map(|time| i64::try_from(time).unwrap_or(i64::MAX));
        (self.expires != Millis::MAX).then(|| (expires - now).div_euclid(1_000))
    }

    /// Whether to refresh it although it is fresh: with the probability that XFetch gives (Vattani et al., VLDB 2015).
    pub(crate) fn is_due(&self, now: Millis, beta: f64) -> bool {
        if beta <= 0.0 || self.expires == Millis::MAX {
            return false;
        }
        // At least a millisecond: what is measured as nothing would never be refreshed early.
        let ahead = f64::from(self.load.max(1)) * beta * -(1.0 - rand::random::<f64>()).ln();
        now as f64 + ahead >= self.expires as f64
    }

    /// Whether it ends within this time, or within a quarter of its own, if that is less.
    pub(crate) fn ends_within(&self, ahead: Millis, now: Millis) -> bool {
        let life = self.expires.saturating_sub(self.created);
        self.expires != Millis::MAX && self.expires.saturating_sub(now) < ahead.min(life / 4)
    }

    pub(crate) fn age(&self, now: Millis) -> Duration {
        Duration::from_millis(now.saturating_sub(self.created))
    }
}

#[cfg(test)]
mod tests {
    use http::header;

    use super::*;

    fn entry(life: Lifetime) -> Entry {
        Entry::new(Payload::Value(Default::default()), [].into(), 1_000, life)
    }

    /// In whatever order they were asked for, few or many, with others among them.
    #[test]
    fn tags_are_found_where_they_are() {
        let tag = |i: usize| Tag::entity(b"s{t}", "doc", "doc", i.to_string().as_bytes());
        for count in [0, 1, 5, FEW, FEW + 1, 100] {
            let stamps = (0..count).map(|i| Stamp { tag: tag(i), generation: Generation(i as u128) }).collect();
            let entry = Entry { stamps, ..entry(Lifetime::default()) };
            let orders: [Vec<usize>; 5] = [
                (0..count).collect(),
                (0..count).rev().collect(),
                (0..count / 2).collect(),
                (0..2 * count).map(|i| (i * 7) % (2 * count)).collect(),
                [1_000].into_iter().chain(0..count).collect(),
            ];
            for asked in orders {
                let tags: Vec<_> = asked.iter().map(|i| tag(*i)).collect();
                let expected: Vec<_> = (0..count).map(|i| asked.iter().position(|asked| *asked == i)).collect();
                let found: Vec<_> = entry.places(&tags).map(|(_, at)| at).collect();
                assert_eq!(found, expected, "{asked:?}");
                assert_eq!(entry.has(&tags), asked.iter().all(|i| *i < count), "{asked:?}");
            }
        }
    }

    /// A short one is not replaced all of its time.
    #[test]
    fn the_end_is_near_in_a_quarter_of_the_time_at_most() {
        let ends = |seconds, ahead, now| {
            entry(Lifetime::fresh_for(Some(Duration::from_secs(seconds)))).ends_within(ahead, now)
        };
        assert!(ends(100, 10_000, 91_001) && !ends(100, 10_000, 91_000));
        assert!(ends(20, 10_000, 16_001) && !ends(20, 10_000, 16_000));
        assert!(!entry(Lifetime::fresh_for(None)).ends_within(10_000, 91_001));
    }

    /// What was to be served stale for a while is so after that, and what was not, is not.
    #[test]
    fn what_is_fresh_for_too_long_ends_sooner() {
        let second = Duration::from_secs(1);
        let life = Lifetime { fresh: Some(second * 9), refresh: second, on_error: second * 2, ..Lifetime::default() };
        let [bounded, endless] =
            [entry(life), entry(Lifetime { refresh: second, ..Lifetime::default() })].map(Arc::new);
        let times = |entry: &Entry| [entry.expires, entry.refresh_until, entry.on_error_until];
        assert_eq!(times(&bounded.clone().capped(Some(second))), [2_000, 3_000, 4_000]);
        assert_eq!(times(&endless.clone().capped(Some(second))), [2_000; 3]);
        let marker = Arc::new(bounded.marker(&[header::ACCEPT], None));
        for (entry, longest) in
            [(&marker, Some(second)), (&bounded, None), (&bounded, Some(second * 9)), (&endless, None)]
        {
            assert!(Arc::ptr_eq(&entry.clone().capped(longest), entry), "{longest:?}");
        }
    }

    #[test]
    fn a_marker_ends_with_what_it_leads_to() {
        let second = Duration::from_secs(1);
        let life = Lifetime { fresh: Some(second), refresh: second * 2, on_error: second * 3, ..Lifetime::default() };
        let learned = Some(Learned::default());
        let varied = Some(Box::new(([header::ACCEPT].into(), Key::new(b"other".to_vec()))));
        let entry = Entry { learned, varied, ..entry(life) };
        for (known, until) in
            [(None, 5_000), (Some((4_000, true)), 5_000), (Some((9_000, true)), 9_000), (Some((4_000, false)), 4_000)]
        {
            let marker = entry.marker(&[header::ACCEPT], known);
            let times = [marker.expires, marker.refresh_until, marker.on_error_until, marker.keep_until];
            assert_eq!(times, [until; 4], "{known:?}");
            assert!(marker.learned.is_none() && marker.varied.is_none());
        }
    }

    /// With the probability that the paper gives: e to the power of −(what is left) / (beta × what a load takes).
    #[test]
    fn an_early_refresh_is_as_likely_as_the_paper_says() {
        let life =
            Lifetime { fresh: Some(Duration::from_secs(1)), load: Duration::from_millis(100), ..Lifetime::default() };
        let entry = entry(life);
        let of_10_000 = |now, beta| (0..10_000).filter(|_| entry.is_due(now, beta)).count();
        for (left, beta, expected) in [(200, 1.0, 1_353), (200, 2.0, 3_679), (50, 0.5, 3_679), (10, 0.0, 0)] {
            let found = of_10_000(2_000 - left, beta);
            assert!(found.abs_diff(expected) <= expected / 5, "{left} ms left, beta {beta}: {found}");
        }
    }
}
