//! Where entries live: the [`Store`] trait, what it stores, and its implementations.
//!
//! A store is dumb on purpose. It reads an entry together with the generations of tags, creates generations that are
//! absent, writes entries and drops generations; whether an entry is *valid* is decided by the engine. That is
//! multi-get, add, set and delete, which the in-process store, Redis and memcached all have without scripts.
//!
//! `docs::stores` (feature `testing`) says how to write one of one's own.

pub(crate) mod codec;
#[cfg(feature = "testing")]
pub mod conformance;
#[cfg(any(feature = "redis", feature = "memcached"))]
mod decoded;
mod entry;
#[cfg(any(feature = "redis", feature = "memcached", feature = "testing"))]
mod guard;
mod headers;
#[cfg(feature = "memcached")]
mod memcached;
mod memory;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "redis")]
mod regional;
mod replay;
mod shared;
#[cfg(any(feature = "redis", feature = "memcached"))]
mod wire;

use std::{error::Error as StdError, fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

pub use codec::{Clocks, TooLarge, Unreadable};
pub(crate) use entry::Payload;
pub use entry::{Entry, Stamp, StoredResponse};
#[cfg(any(feature = "redis", feature = "memcached", feature = "testing"))]
pub use guard::Guard;
pub use headers::Headers;
#[cfg(any(test, fuzzing))]
pub(crate) use memcached::{Frames, Kind as FrameKind, Reply as Frame};
#[cfg(feature = "memcached")]
pub use memcached::{MemcachedBuilder, MemcachedStore};
pub use memory::MemoryStore;
#[cfg(any(test, fuzzing))]
pub(crate) use redis::fuzzed;
#[cfg(feature = "redis")]
pub use redis::{RedisBuilder, RedisStore};
#[cfg(feature = "redis")]
pub(crate) use redis::{StreamEntry, StreamRead, StreamReader};
#[cfg(any(test, fuzzing))]
pub(crate) use regional::fuzzed as region;
#[cfg(feature = "redis")]
pub use regional::{Regional, RegionalBuilder, Wait};
pub(crate) use replay::Replay;
#[cfg(any(feature = "redis", feature = "memcached"))]
pub use wire::WireStats;

pub use crate::clock::Millis;
use crate::{
    catalog::Tier,
    key::{Key, Tag},
};

/// The unique value a tag has now. Never reused: dropping it invalidates everything stored under it, for good.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Generation(pub u128);

impl Generation {
    const FENCED: u128 = 1 << 127;

    /// A new one.
    pub fn unique() -> Self {
        Self(rand::random::<u128>() & !Self::FENCED)
    }

    /// Whether the tag is fenced: a write is under way, and nothing may be stored. The generations of a fenced tag
    /// are as unique as others, so that reads that began under different ones don't share a flight.
    pub fn is_fenced(self) -> bool {
        self.0 & Self::FENCED != 0
    }

    /// The same as one that is not fenced.
    #[must_use]
    pub fn unfenced(self) -> Self {
        Self(self.0 & !Self::FENCED)
    }

    /// The same as a fenced one.
    #[must_use]
    pub fn fenced(self) -> Self {
        Self(self.0 | Self::FENCED)
    }
}

/// A point in a store's history of invalidations, taken by [`Store::open`] or a look-up before a load begins; its meaning is the
/// store's own. Two marks are the same only if nothing that was read with either was dropped in between, and no fence of it
/// raised or ended: who drops, drops the mark first, or in one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark(pub u128);

/// What [`Store::lookup`] found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Lookup {
    /// The entry, valid or not.
    pub entry: Option<Arc<Entry>>,
    /// The current generation of each tag that was asked for, in that order.
    pub generations: Vec<Option<Generation>>,
    /// The same point in time, as [`Store::open`] marks it, where the store has it at hand: then a load begins without, and those
    /// generations that were absent are opened while it is under way. If they have another mark, what is loaded is not stored. Only
    /// for a store whose look-ups show which tags are fenced, and which reads the mark after the generations, or with them.
    pub mark: Option<Mark>,
}

impl Lookup {
    /// An entry, and the generation of each tag that was asked for.
    pub fn new(entry: Option<Arc<Entry>>, generations: Vec<Option<Generation>>) -> Self {
        Self { entry, generations, mark: None }
    }

    /// The mark that was read in one step with the generations.
    #[must_use]
    pub fn marked(mut self, mark: Option<Mark>) -> Self {
        self.mark = mark;
        self
    }
}

/// What [`Store::open`] captured.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Opened {
    /// The current generation of each tag that was asked for, in that order.
    pub generations: Vec<Generation>,
    /// Proves later that a tag unknown now was not dropped since.
    pub mark: Mark,
}

impl Opened {
    /// The generation of each tag that was asked for, and this point in time.
    pub fn new(generations: Vec<Generation>, mark: Mark) -> Self {
        Self { generations, mark }
    }
}

/// The tags of one data type that an invalidation drops; entries are counted once per group.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TagGroup {
    /// The data type of all the tags.
    pub data_type: Arc<str>,
    /// The tags to drop.
    pub tags: Vec<Tag>,
}

impl TagGroup {
    /// These tags of this data type.
    pub fn new(data_type: impl Into<Arc<str>>, tags: Vec<Tag>) -> Self {
        Self { data_type: data_type.into(), tags }
    }
}

/// A writer's claim that what it is about to change must not be stored meanwhile.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fence {
    /// The writer: unique, so that each lifts only its own fences.
    pub writer: u128,
    /// How long the fence stands if the writer never comes back.
    pub lease: Duration,
    /// How long it stands after the invalidation.
    pub hold: Duration,
}

impl Fence {
    /// The fence of a new writer.
    pub fn new(lease: Duration, hold: Duration) -> Self {
        Self { writer: Generation::unique().0, lease, hold }
    }

    /// Raises and lifts nothing, and leaves the fences of others standing.
    pub(crate) const NOBODY: Self = Self { writer: 0, lease: Duration::ZERO, hold: Duration::ZERO };
}

/// Whether a store does what it is there for, and why not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// It does.
    #[default]
    Ok,
    /// Invalidations arrive, but something else is missing: why, and the mend.
    Degraded(Arc<str>),
    /// Invalidations do not arrive, and nothing is read: why, and the mend.
    Down(Arc<str>),
}

impl Health {
    /// Whether a write that begins now can be made known.
    pub fn takes_invalidations(&self) -> bool {
        !matches!(self, Self::Down(_))
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Degraded(why) => write!(f, "degraded: {why}"),
            Self::Down(why) => write!(f, "down: {why}"),
        }
    }
}

/// What a process of a fleet says of itself.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Exchange<'a> {
    /// The fleet.
    pub fleet: &'a str,
    /// The process, by a name of its own.
    pub member: &'a str,
    /// What it says, for a minute.
    pub said: &'a [u8],
    /// Processes that have said nothing for a while, and whose words are taken away.
    pub gone: &'a [String],
    /// Whether it wants to know what all of them have said.
    pub hears: bool,
}

/// Which keys are searched for, by those who look on.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Search<'a> {
    /// What they begin with.
    pub prefix: &'a [u8],
    /// What they hold besides, each somewhere.
    pub words: &'a [Vec<u8>],
    /// How many are wanted at most.
    pub most: usize,
}

impl Search<'_> {
    /// Whether this is one of them.
    pub fn accepts(&self, key: &[u8]) -> bool {
        let has = |word: &Vec<u8>| word.is_empty() || key.windows(word.len()).any(|part| part == word);
        key.starts_with(self.prefix) && self.words.iter().all(has)
    }
}

/// What a store takes, and what it had to give up, as far as this process knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Bytes that entries take in this process.
    pub bytes: u64,
    /// How many they may take; 0 if there are none.
    pub capacity: u64,
    /// How many entries there are in this process.
    pub entries: u64,
    /// How many of them had to go for others, while they were valid.
    pub evictions: u64,
    /// How often something was looked up that had been evicted not long before.
    pub evicted_misses: u64,
    /// How long those were there, of late. When that is shorter than a TTL, the store is too small.
    pub eviction_age: Duration,
    /// Tags that a shared store has not been told of yet.
    pub journal_tags: u64,
    /// Calls of a shared store that failed, by kind: `refused` (it said no), `silent` (no answer in time), `away` (it was not even
    /// asked).
    pub errors: Vec<(&'static str, u64)>,
    /// The other regions.
    pub regions: Vec<RegionUsage>,
}

/// What is known of another region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionUsage {
    /// Its name.
    pub name: String,
    /// Everything that it had dropped so long ago, at least, is dropped here; `None` if that is not known.
    pub behind: Option<Duration>,
    /// Why it is not heard.
    pub trouble: Option<String>,
    /// What it has dropped, in this process' hearing.
    pub dropped: u64,
    /// How often something may have been missed, and everything was dropped.
    pub gaps: u64,
}

/// What a look-up asks for.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Inquiry<'a> {
    /// The key of the entry.
    pub key: &'a Key,
    /// The tags whose generations are wanted.
    pub tags: &'a [Tag],
    /// How many of them, from the first, an entry must have to be valid: those that the request names. The rest was
    /// declared by an earlier response.
    pub required: usize,
    /// How a tier in this process may hold the entry.
    pub tier: Tier,
    /// How long an entry may be fresh at most, whatever its writer thought; `None` means for ever.
    pub longest: Option<Duration>,
    /// The time, by the clock that the entry's times are told by. It is this process' own: what leaves the process must be
    /// told by one that all share.
    pub now: Millis,
}

impl<'a> Inquiry<'a> {
    /// A look-up of an entry that must have all of these tags.
    pub fn new(key: &'a Key, tags: &'a [Tag], tier: Tier, now: Millis) -> Self {
        Self { key, tags, required: tags.len(), tier, longest: None, now }
    }
}

/// A future returned by a store.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A place for entries and generations.
///
/// The engine relies on this and on nothing else:
/// - a generation that was dropped (or lost: evicted, expired, flushed) never comes back;
/// - [`open`](Store::open) returns generations that are current when it returns;
/// - when [`invalidate`](Store::invalidate) has returned `Ok`, no later call of any method, in any process, sees a
///   dropped generation;
/// - an entry's times, read in another process, are told by that process' clock, and never later than they were meant: see
///   [`Clocks`].
///
/// Key and tags of a call are all of one [tenant](Key::tenant), but for the groups of [`invalidate`](Store::invalidate),
/// [`fence`](Store::fence) and [`count`](Store::count).
///
/// Entries may vanish at any time. `conformance` (feature `testing`) checks all of it. One store may serve several caches of a
/// process, as an [`Arc`] that each has a clone of.
pub trait Store: Send + Sync + 'static {
    /// Answers without waiting: the entry, if the store can tell *now and on its own* that every generation it was
    /// filled under is current. `None` means "ask [`lookup`](Store::lookup)", and is the default.
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        let _ = (key, now);
        None
    }

    /// What it holds in this process under this key, if a look-up of this tier would only ask whether that is still
    /// [current](Store::is_current). By default nothing.
    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        let _ = (key, tier);
        None
    }

    /// Whether all generations that a [held](Store::held) entry was filled under are current, in one round trip. One that is not may
    /// be forgotten. Who wraps a store passes on both of these, or neither.
    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        let _ = (key, entry);
        Box::pin(std::future::ready(Ok(false)))
    }

    /// Reads the entry, valid or not, and the current generations of the tags, in one round trip.
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup>;

    /// Reads the generations of `tags`, creating those that are absent, and marks this point in time. Called
    /// before the origin is; or beside it, if the [look-up](Lookup::mark) has marked what it saw.
    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened>;

    /// The generations of `tags`, which were not known at `mark`, if the store can prove that none of them was
    /// dropped since, nor fenced, be it that the fence has ended; creates those that are absent.
    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>>;

    /// Stores the entry until [`Entry::keep_until`]; `now` is as in [`Inquiry`]. No check is needed: an entry whose
    /// generations are gone is never valid.
    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()>;

    /// Drops the generations of all tags of all groups at once. Returns how many live entries each group had: for the
    /// report only, an estimate will do.
    ///
    /// With a fence it also lifts that writer's fences from the tags, or holds them for [`Fence::hold`], and leaves those of
    /// others standing. Without one they may fall with the generations: where fences are used, the engine always gives one.
    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>>;

    /// Drops the generations of all tags, and until the writer invalidates them or its lease runs out,
    /// [opens](Store::open) them with [fenced](Generation::is_fenced) generations only, under which nothing is stored.
    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()>;

    /// Whether the caller is to load this key for the whole fleet: at most one process is, until it
    /// [releases](Store::release) the key or the lease runs out. By default everybody is.
    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        let _ = (key, lease);
        Box::pin(std::future::ready(Ok(true)))
    }

    /// Ends a claim.
    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        let _ = key;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Why it cannot hold entries like this in the process; by default it can. Types that say otherwise are refused when the
    /// cache is built, and those that say nothing are [validated](Tier::Validated) where they cannot be held on their own.
    fn refuses(&self, tier: Tier) -> Option<&'static str> {
        let _ = tier;
        None
    }

    /// Whether other processes see what is stored here; by default they do.
    fn is_shared(&self) -> bool {
        true
    }

    /// Drops the generations of all tags of all tenants: nothing that is stored now is valid when it has returned.
    fn clear(&self) -> StoreFuture<'_, ()>;

    /// How it is, as far as this process knows.
    fn health(&self) -> Health {
        Health::Ok
    }

    /// How many live entries each group has, which [`invalidate`](Self::invalidate) would drop: an estimate will do. By default
    /// nobody knows.
    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        let _ = groups;
        Box::pin(std::future::ready(Ok(vec![])))
    }

    /// The keys of entries, valid or not, as far as they can be told without much work; by default none.
    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        let _ = search;
        Box::pin(std::future::ready(Ok(vec![])))
    }

    /// Leaves what a member of a fleet says of itself, and gives what all have said, if it hears; by default there are no others.
    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        let _ = exchange;
        Box::pin(std::future::ready(Ok(vec![])))
    }

    /// How far behind it may be in hearing what is dropped elsewhere, at most: everything that was dropped before has been dropped
    /// here. [`Duration::MAX`] if that is not known; by default `None`: what is dropped anywhere is dropped here at once.
    fn behind(&self) -> Option<Duration> {
        None
    }

    /// Keeps a note of the fleet's under this name, instead of the one that was there, for as long as it can; by default it keeps
    /// none. The names are few.
    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        let _ = (name, note);
        Box::pin(std::future::ready(Ok(())))
    }

    /// The note of this name, if it is still kept.
    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        let _ = name;
        Box::pin(std::future::ready(Ok(None)))
    }

    /// What it takes; by default it does not say.
    fn usage(&self) -> Usage {
        Usage::default()
    }

    /// Delivers what has been acknowledged to writers and not yet to the store, for so long at most; how many tags are
    /// left undelivered.
    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        let _ = within;
        Box::pin(std::future::ready(Ok(0)))
    }
}

/// Why a store could not do what it was asked.
#[derive(Debug)]
pub struct StoreError {
    cause: Box<dyn StdError + Send + Sync>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Refused,
    Silent,
    Away,
}

impl StoreError {
    /// The store answered that it can't.
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { cause: cause.into(), kind: Kind::Refused }
    }

    /// The store did not answer.
    pub fn unreachable(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { cause: cause.into(), kind: Kind::Silent }
    }

    /// The store is known to be away: it was not even asked.
    pub fn away(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { cause: cause.into(), kind: Kind::Away }
    }

    /// Whether it was not even asked.
    #[cfg(any(feature = "redis", feature = "memcached", feature = "testing"))]
    pub(crate) fn is_away(&self) -> bool {
        self.kind == Kind::Away
    }

    /// Whether somebody waited for an answer that did not come: what a circuit breaker counts.
    pub fn is_silence(&self) -> bool {
        self.kind == Kind::Silent
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "store: {}", self.cause)
    }
}

impl StdError for StoreError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}
