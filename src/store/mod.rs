//! Where entries live: the [`Store`] trait, what it stores, and its implementations.
//!
//! A store is dumb on purpose. It reads an entry together with the generations of tags, creates generations that are
//! absent, writes entries and drops generations; whether an entry is *valid* is decided by the engine. That is
//! multi-get, add, set and delete, which the in-process store, Redis and memcached all have without scripts.

mod entry;
mod memory;

use std::{error::Error as StdError, fmt, future::Future, pin::Pin, sync::Arc};

pub(crate) use entry::Payload;
pub use entry::{Entry, Stamp, StoredResponse};
pub use memory::MemoryStore;

use crate::key::{Key, Tag};

/// Milliseconds since the Unix epoch, as the engine's clock tells them.
pub type Millis = u64;

/// The unique value a tag has now. Never reused: dropping it invalidates everything stored under it, for good.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Generation(pub u128);

/// A point in a store's history of invalidations, taken by [`Store::open`] before a load begins; its meaning is the
/// store's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark(pub u128);

/// What [`Store::lookup`] found.
#[derive(Clone, Debug, Default)]
pub struct Lookup {
    /// The entry, valid or not.
    pub entry: Option<Arc<Entry>>,
    /// The current generation of each tag that was asked for, in that order.
    pub generations: Vec<Option<Generation>>,
}

/// What [`Store::open`] captured.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The current generation of each tag that was asked for, in that order.
    pub generations: Vec<Generation>,
    /// Proves later that a tag unknown now was not dropped since.
    pub mark: Mark,
}

/// The tags of one data type that an invalidation drops; entries are counted once per group.
#[derive(Clone, Debug)]
pub struct TagGroup {
    /// The data type of all the tags.
    pub data_type: Arc<str>,
    /// The tags to drop.
    pub tags: Vec<Tag>,
}

/// A future returned by a store.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A place for entries and generations.
///
/// The engine relies on this and on nothing else:
/// - a generation that was dropped (or lost: evicted, expired, flushed) never comes back;
/// - [`open`](Store::open) returns generations that are current when it returns;
/// - when [`invalidate`](Store::invalidate) has returned `Ok`, no later call of any method, in any process, sees a
///   dropped generation.
///
/// Entries may vanish at any time.
pub trait Store: Send + Sync + 'static {
    /// Answers without waiting: the entry, if the store can tell *now and on its own* that every generation it was
    /// filled under is current. `None` means "ask [`lookup`](Store::lookup)", and is the default.
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        let _ = (key, now);
        None
    }

    /// Reads the entry, valid or not, and the current generations of `tags`, in one round trip.
    fn lookup<'a>(&'a self, key: &'a Key, tags: &'a [Tag]) -> StoreFuture<'a, Lookup>;

    /// Reads the generations of `tags`, creating those that are absent, and marks this point in time. Called before
    /// the origin is.
    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened>;

    /// The generations of `tags`, which were not known at `mark`, if the store can prove that none of them was
    /// dropped since; creates those that are absent.
    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>>;

    /// Stores the entry until [`Entry::keep_until`]. No check is needed: an entry whose generations are gone is never
    /// valid.
    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()>;

    /// Drops the generations of all tags of all groups at once. Returns how many live entries each group had: for the
    /// report only, an estimate will do.
    fn invalidate<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>>;
}

/// Why a store could not do what it was asked.
#[derive(Debug)]
pub struct StoreError(Box<dyn StdError + Send + Sync>);

impl StoreError {
    /// Wraps the store's own error.
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "store: {}", self.0)
    }
}

impl StdError for StoreError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.0)
    }
}
