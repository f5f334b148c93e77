//! Redis as the shared store of a fleet, with a coherent tier in each process. (Feature `redis`.)
//!
//! What is guaranteed, and what a hit costs, by the [`Tier`] of the data type:
//!
//! | tier | a hit costs | after a write was acknowledged elsewhere, a stale response is |
//! | --- | --- | --- |
//! | `Off` | one `MGET` of the entry and its generations | impossible |
//! | `Validated` | one `MGET` of generations (16 bytes each); the entry is in process | impossible |
//! | `On`, `Capped` | nothing leaves the process | possible for as long as a push takes (well under a millisecond); should the tracking connection die silently, for two heartbeats (500 ms) |
//!
//! A write in the same process takes effect at once in every tier. All this holds while Redis answers. When a write's
//! invalidation cannot reach it for a second, the write is acknowledged all the same, the invalidation goes to a journal,
//! and this process stays away from Redis until it is delivered; other processes that reach Redis all the while may then
//! serve what is stale until it is. Where that must not be, [fence](crate::Cascade::fenced) the cascade or
//! [refuse](crate::CacheBuilder::on_unreachable) writes that cannot be invalidated.
//!
//! After an outage, every process waits a second ([`settle`](RedisBuilder::settle)) before it reads Redis again, so that
//! others can deliver. A server that was restarted, or was a replica until now, has another run id: what it holds is not
//! read, since it may have forgotten invalidations ([`trust_restarted`](RedisBuilder::trust_restarted)). In a cluster
//! every master is watched, and such a change is noticed within two heartbeats: until then, reads of its tenants may find
//! what the failed server had not yet replicated a drop of. While it is not known who serves a slot, its tenants are
//! served from the origin.
//!
//! Needs Redis 7.0 or later, for `SET NX GET`.

mod address;
#[cfg(feature = "redis-cluster")]
mod cluster;
mod link;
mod remote;
mod tracker;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Deserialize;
use tokio::runtime::Handle;

use super::{Entry, Fence, Generation, Lookup, Mark, MemoryStore, Opened, Store, StoreFuture, TagGroup, guard::Guard};
use crate::{
    catalog::Tier,
    clock::Millis,
    error::ConfigError,
    key::{Key, Tag},
    units::{bytes, duration},
};
use address::Address;
use link::{Link, LinkOptions};
pub use remote::RedisStats;
use remote::{Counters, Remote};
use tracker::Held;

/// What all keys begin with.
const PREFIX: &str = "cas";

/// 64 MiB.
const IN_PROCESS: u64 = 64 << 20;

const HEARTBEAT: Duration = Duration::from_millis(250);
const GENERATION_TTL: Duration = Duration::from_secs(7 * 86_400);
const SETTLE: Duration = Duration::from_secs(1);

/// Redis, with a tier in this process. Cheap to clone.
#[derive(Clone)]
pub struct RedisStore(Arc<Shared>);

struct Shared {
    remote: Guard<Remote>,
    link: Arc<Link>,
    counters: Arc<Counters>,
    held: Option<Arc<Held>>,
    heartbeat: Duration,
    tracking: AtomicBool,
}

/// Configures a [`RedisStore`].
///
/// In a file: the table `[redis]`, with the same names.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[must_use]
pub struct RedisBuilder {
    urls: Vec<String>,
    #[serde(default)]
    prefix: Option<String>,
    #[serde(default, deserialize_with = "bytes")]
    in_process: Option<u64>,
    #[serde(default, deserialize_with = "duration")]
    heartbeat: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    budget: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    invalidate_budget: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    generation_ttl: Option<Duration>,
    #[serde(default)]
    trust_restarted: bool,
    #[serde(default, deserialize_with = "duration")]
    settle: Option<Duration>,
}

impl RedisStore {
    /// A store at this address: `redis://host:6379/0`, `rediss://…` (feature `redis-tls`), `unix:///path`,
    /// `redis+sentinel://host:26379,host:26379/master`, or `redis+cluster://host:7000,host:7001` (feature
    /// `redis-cluster`; several addresses mean a cluster as well).
    pub fn builder<U: Into<String>>(urls: impl IntoIterator<Item = U>) -> RedisBuilder {
        RedisBuilder {
            urls: urls.into_iter().map(Into::into).collect(),
            prefix: None,
            in_process: None,
            heartbeat: None,
            budget: None,
            invalidate_budget: None,
            generation_ttl: None,
            trust_restarted: false,
            settle: None,
        }
    }

    /// What was counted since it was made.
    pub fn stats(&self) -> RedisStats {
        self.0.counters.stats()
    }

    /// Starts the tasks that connect and track, once there is a runtime for them.
    fn start(&self) {
        self.0.link.start();
        if self.0.tracking.load(Ordering::Relaxed) {
            return;
        }
        let (Some(held), Ok(runtime)) = (&self.0.held, Handle::try_current()) else { return };
        // A cluster is tracked by the watch over its masters.
        if !self.0.tracking.swap(true, Ordering::AcqRel) && !self.0.link.address.is_cluster() {
            runtime.spawn(tracker::track(Arc::downgrade(held), Arc::downgrade(&self.0.link), self.0.heartbeat));
        }
    }

    /// What is held in process, if it may be used now.
    fn held(&self) -> Option<&Arc<Held>> {
        self.0.held.as_ref().filter(|held| held.is_alive())
    }
}

impl RedisBuilder {
    /// What all keys begin with; by default `cas`. Services that share a Redis need different ones, unless they are to
    /// share entries.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// How many bytes the tier in this process may take; by default 64 MiB. 0 turns it off.
    pub fn in_process(mut self, bytes: u64) -> Self {
        self.in_process = Some(bytes);
        self
    }

    /// How often the tracking connection is checked; by default 250 ms. What is held in process is trusted for two
    /// heartbeats.
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = Some(heartbeat);
        self
    }

    /// How long a call to Redis may take before its request goes to the origin; by default 50 ms.
    pub fn budget(mut self, budget: Duration) -> Self {
        self.budget = Some(budget);
        self
    }

    /// How long a write waits for its invalidation to be acknowledged before it goes on without; by default 1 s.
    pub fn invalidate_budget(mut self, budget: Duration) -> Self {
        self.invalidate_budget = Some(budget);
        self
    }

    /// How long a generation lives, and so at most an entry, `permanent` ones included; by default 7 days.
    pub fn generation_ttl(mut self, ttl: Duration) -> Self {
        self.generation_ttl = Some(ttl);
        self
    }

    /// Whether what a restarted or failed-over server holds is believed; by default not, since it may have forgotten
    /// invalidations.
    pub fn trust_restarted(mut self, trust: bool) -> Self {
        self.trust_restarted = trust;
        self
    }

    /// How long nothing is read after an outage, so that other processes can deliver what they could not; by default 1 s.
    pub fn settle(mut self, settle: Duration) -> Self {
        self.settle = Some(settle);
        self
    }

    /// Checks the addresses and makes the store. It connects in the background, and serves from the origin until it has.
    ///
    /// # Errors
    /// An address that cannot be read, or needs a feature that is not turned on.
    pub fn build(self) -> Result<RedisStore, ConfigError> {
        let address = Address::parse(self.urls.iter().map(String::as_str))?;
        let heartbeat = self.heartbeat.unwrap_or(HEARTBEAT);
        let options = LinkOptions {
            prefix: self.prefix.unwrap_or_else(|| PREFIX.to_owned()),
            trust_restarted: self.trust_restarted,
            settle: self.settle.unwrap_or(SETTLE),
            #[cfg(feature = "redis-cluster")]
            heartbeat,
        };
        let in_process = self.in_process.unwrap_or(IN_PROCESS);
        let held = (in_process > 0).then(|| Arc::new(Held::new(MemoryStore::new(in_process))));
        let link = Link::new(address, options, held.as_ref());
        let remote = Remote::new(link.clone(), self.generation_ttl.unwrap_or(GENERATION_TTL));
        let counters = remote.counters.clone();
        let mut remote = Guard::new(remote);
        if let Some(budget) = self.budget {
            remote = remote.budget(budget);
        }
        if let Some(budget) = self.invalidate_budget {
            remote = remote.invalidate_budget(budget);
        }
        let tracking = AtomicBool::new(false);
        let store = RedisStore(Arc::new(Shared { counters, remote, link, held, heartbeat, tracking }));
        store.start();
        Ok(store)
    }
}

/// Whether an entry is valid under these generations of these tags.
fn is_current(entry: &Entry, tags: &[Tag], generations: &[Option<Generation>]) -> bool {
    entry.stamps.iter().all(|stamp| {
        let at = tags.iter().position(|tag| *tag == stamp.tag);
        at.is_some_and(|at| generations.get(at) == Some(&Some(stamp.generation)))
    })
}

impl Store for RedisStore {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        self.held()?.memory.peek(key, now)
    }

    fn lookup<'a>(&'a self, key: &'a Key, tags: &'a [Tag], tier: Tier) -> StoreFuture<'a, Lookup> {
        self.start();
        Box::pin(async move {
            let remote = &self.0.remote;
            let held = self.held().filter(|_| tier != Tier::Off);
            // Captured before the command: a drop whose push overtakes the reply is then not missed.
            let captured = held.map(|held| (held, held.memory.capture(tags.iter().chain([&held.era]))));
            if tier == Tier::Validated
                && let Some(entry) = held.and_then(|held| held.memory.raw(key))
            {
                let generations = remote.guarded(|remote| remote.generations(tags)).await?;
                if is_current(&entry, tags, &generations) {
                    return Ok(Lookup::new(Some(entry), generations));
                }
            }
            let found = remote.lookup(key, tags, tier).await?;
            if let (Some(entry), Some((held, captured))) = (&found.entry, captured)
                && is_current(entry, tags, &found.generations)
            {
                let now = remote.inner().clock.now();
                let until = match tier {
                    Tier::On => entry.keep_until,
                    Tier::Capped(cap) => entry.keep_until.min(now + cap.as_millis() as Millis),
                    // Held, but never answered from without being asked for.
                    Tier::Validated | Tier::Off => 0,
                };
                held.memory.insert(key, entry.clone(), captured, until);
            }
            Ok(found)
        })
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        self.0.remote.open(tags)
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        self.0.remote.extend(mark, tags)
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier) -> StoreFuture<'a, ()> {
        self.0.remote.fill(key, entry, tier)
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        self.start();
        // After the command, whatever came of it: before it, a look-up could bring back what is about to be dropped.
        let after = DropLocally { held: self.0.held.as_deref(), groups };
        Box::pin(async move {
            let result = self.0.remote.invalidate(groups, fence).await;
            drop(after);
            result
        })
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.start();
        let after = DropLocally { held: self.0.held.as_deref(), groups };
        Box::pin(async move {
            let result = self.0.remote.fence(groups, fence).await;
            drop(after);
            result
        })
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        self.0.remote.claim(key, lease)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.0.remote.release(key)
    }

    fn is_reachable(&self) -> bool {
        self.start();
        self.0.remote.is_reachable()
    }
}

struct DropLocally<'a> {
    held: Option<&'a Held>,
    groups: &'a [TagGroup],
}

impl Drop for DropLocally<'_> {
    fn drop(&mut self) {
        if let Some(held) = self.held {
            self.groups.iter().flat_map(|g| &g.tags).for_each(|tag| held.memory.drop_local(tag));
        }
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore").field("remote", &self.0.remote).field("held", &self.0.held).finish_non_exhaustive()
    }
}

/// Without the passwords in its addresses.
impl fmt::Debug for RedisBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<_> = self.urls.iter().map(|url| address::redacted(url)).collect();
        f.debug_struct("RedisBuilder").field("urls", &urls).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}
