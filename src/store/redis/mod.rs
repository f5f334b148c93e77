//! Redis as the shared store of a fleet, with a coherent tier in each process. (Feature `redis`.)
//!
//! [`docs::redis`](crate::docs::redis) has what is guaranteed in which mode and tier, fault by fault, the rights that are
//! needed, and what each log line means.
//!
//! Needs Redis 6.2 or later, or a server like it; what a server lacks is done without where that is sound, and said where it
//! is not.

mod address;
mod dial;
mod ends;
mod held;
mod identity;
mod lane;
mod link;
mod refusals;
mod remote;
mod resp;
mod server;
#[cfg(feature = "redis-cluster")]
mod slot;
mod slots;
mod stream;
mod trouble;
mod watch;

use std::{
    fmt,
    future::ready,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Deserialize;
use tokio::{runtime::Handle, time::timeout};

use super::{
    Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, MemoryStore, Opened, Search, Store, StoreError,
    StoreFuture, TagGroup, Usage,
    guard::Guard,
    wire::{Counters, WireStats, check_times, is_current, still_current, validated},
};
use crate::{
    catalog::Tier,
    clock::{Clock, Millis},
    error::ConfigError,
    key::{Key, Tag},
    units::{bytes, duration},
};
use address::Address;
use dial::Dial;
use held::Held;
use link::Link;
use remote::{Remote, Tells};
use server::Terms;
use watch::watch;

pub(crate) use stream::{StreamEntry, StreamRead, StreamReader};

/// What is made of a server's replies, for fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::{
        held::Held,
        identity::Identity,
        remote::parse_generation,
        resp::Resp,
        server::{claim, node, time},
        slot::{name_in, slot},
        stream::entry,
        trouble::Trouble,
    };
}

/// What all keys begin with.
const PREFIX: &str = "cas";

/// 64 MiB.
const IN_PROCESS: u64 = 64 << 20;

const HEARTBEAT: Duration = Duration::from_millis(250);
const GENERATION_TTL: Duration = Duration::from_secs(7 * 86_400);
const SETTLE: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(86_400);

/// How long one step of a region's relay may take, and one that drops everything.
const HERE: Duration = Duration::from_secs(2);
const CLEARING: Duration = Duration::from_secs(60);

/// Redis, with a tier in this process. Cheap to clone.
#[derive(Clone)]
pub struct RedisStore(Arc<Shared>);

struct Shared {
    remote: Guard<Remote>,
    link: Arc<Link>,
    counters: Arc<Counters>,
    held: Option<Arc<Held>>,
    /// Whether a task watches the servers.
    watched: Arc<AtomicBool>,
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
    assume_one_server: bool,
    #[serde(default)]
    replicas: u32,
    #[serde(default, deserialize_with = "duration")]
    settle: Option<Duration>,
    #[serde(skip)]
    clock: Clock,
    #[serde(skip)]
    dial: Dial,
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
            assume_one_server: false,
            replicas: 0,
            settle: None,
            clock: Clock::default(),
            dial: Dial::default(),
        }
    }

    /// What was counted since it was made.
    pub fn stats(&self) -> WireStats {
        self.0.counters.stats()
    }

    /// It connects with the first call.
    fn remote(&self) -> &Guard<Remote> {
        self.start();
        &self.0.remote
    }

    /// Starts the task that watches the servers, once there is a runtime for it; and again, when that one is gone.
    fn start(&self) {
        let Shared { watched, link, .. } = &*self.0;
        if watched.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !watched.swap(true, Ordering::AcqRel) {
            let watch = watch(Arc::downgrade(link));
            let ended = Ended { watched: watched.clone(), link: Arc::downgrade(link) };
            runtime.spawn(async move {
                let _ended = ended;
                watch.await;
            });
        }
    }
}

/// The end of the task that watches: with its runtime went all connections.
struct Ended {
    watched: Arc<AtomicBool>,
    link: Weak<Link>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(link) = self.link.upgrade() {
            link.forget_all();
        }
        self.watched.store(false, Ordering::Release);
    }
}

impl RedisBuilder {
    /// What all keys begin with; by default `cas`. The name of the service follows, so services that share a Redis share
    /// nothing else.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// How many bytes the tier in this process may take; by default 64 MiB. 0 turns it off.
    pub fn in_process(mut self, bytes: u64) -> Self {
        self.in_process = Some(bytes);
        self
    }

    /// How often each server is asked whether it still is the master it was, and takes writes; by default 250 ms. Each
    /// answer is good for two heartbeats.
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

    /// Believes a server that does not answer `INFO`, and so cannot be told from another that took over from it, to be one
    /// which never forgets an invalidation; by default such a server is not read.
    pub fn assume_one_server(mut self, assume: bool) -> Self {
        self.assume_one_server = assume;
        self
    }

    /// How many replicas must have an invalidation before its write is acknowledged (`WAIT`); by default none, so that a
    /// failover may lose the last drops. (What was filled before it is not read after it in any case. What is left is a
    /// master that is cut off and does not know it: its own side goes on reading it until it refuses writes, for which Redis
    /// has `min-replicas-to-write`.)
    pub fn replicas(mut self, count: u32) -> Self {
        self.replicas = count;
        self
    }

    /// How long nothing is read after an outage, so that other processes can deliver what they could not; by default 1 s.
    pub fn settle(mut self, settle: Duration) -> Self {
        self.settle = Some(settle);
        self
    }

    /// What the answers of servers and the tier in this process are timed by; by default the monotonic clock, which goes on
    /// while the machine sleeps. (Feature `testing`.)
    #[cfg(feature = "testing")]
    pub fn clock(mut self, source: impl crate::TimeSource) -> Self {
        self.clock = Clock::Custom(Arc::new(source));
        self
    }

    /// Connects by this instead of the network: to a server that a test plays. (Feature `testing`.)
    #[cfg(feature = "testing")]
    pub fn connect_by<F, Fut, S>(mut self, connect: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = std::io::Result<S>> + Send + 'static,
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        self.dial = Dial::by(connect);
        self
    }

    /// The same for a region, whose stream tells others what it drops.
    pub(in crate::store) fn build_region(self, region: &str) -> Result<RedisStore, ConfigError> {
        self.make(Some(region))
    }

    /// Checks the addresses and makes the store. It connects when it is first asked, in the background, and serves
    /// from the origin until it has.
    ///
    /// # Errors
    /// An address that cannot be read, or needs a feature that is not turned on; a time that makes no sense.
    pub fn build(self) -> Result<RedisStore, ConfigError> {
        self.make(None)
    }

    fn make(self, region: Option<&str>) -> Result<RedisStore, ConfigError> {
        self.check_times()?;
        let address = Address::parse(self.urls.iter().map(String::as_str))?;
        #[cfg(feature = "redis-cluster")]
        if let (Some(region), Address::Cluster(_)) = (region, &address) {
            return Err(ConfigError::new(format!(
                "region `{region}`: what it drops is told by one stream, which a cluster has on one of its servers only; give the \
                 address of one server, or of its sentinels"
            )));
        }
        let prefix = self.prefix.unwrap_or_else(|| PREFIX.to_owned());
        if prefix.is_empty()
            || prefix.contains(['{', '}', '*', '?', '[', ']', '\\', '^'])
            || prefix.chars().any(char::is_whitespace)
        {
            return Err(ConfigError::new(format!(
                "Redis prefix `{prefix}`: it is to be there, without braces, spaces and `*?[]^\\`; choose another, such as {PREFIX}"
            )));
        }
        let terms = Terms {
            prefix: format!("{prefix}:").into(),
            heartbeat: self.heartbeat.unwrap_or(HEARTBEAT),
            assume_one_server: self.assume_one_server,
            replicas: self.replicas,
            clock: self.clock,
            dial: self.dial,
        };
        let in_process = self.in_process.unwrap_or(IN_PROCESS);
        let held = (in_process > 0).then(|| Arc::new(Held::new(MemoryStore::new(in_process), terms.clock.clone())));
        let link = Arc::new(Link::new(address, terms, self.settle.unwrap_or(SETTLE), held.clone()));
        let tells = region.map(|region| Tells::new(stream_of(&link.terms.prefix, region)));
        let remote = Remote::new(link.clone(), self.generation_ttl.unwrap_or(GENERATION_TTL), tells);
        let counters = remote.counters.clone();
        let mut remote = Guard::new(remote);
        if let Some(budget) = self.budget {
            remote = remote.budget(budget);
        }
        if let Some(budget) = self.invalidate_budget {
            remote = remote.invalidate_budget(budget);
        }
        Ok(RedisStore(Arc::new(Shared { remote, link, counters, held, watched: Arc::default() })))
    }

    /// With a heartbeat of nothing no server would ever be up, and times without end cannot be added to others.
    fn check_times(&self) -> Result<(), ConfigError> {
        let times = [
            ("heartbeat", self.heartbeat, MILLISECOND, DAY),
            ("budget", self.budget, Duration::ZERO, DAY),
            ("invalidate_budget", self.invalidate_budget, Duration::ZERO, DAY),
            ("settle", self.settle, Duration::ZERO, DAY),
            ("generation_ttl", self.generation_ttl, MILLISECOND, 36_500 * DAY),
        ];
        check_times("Redis", times)
    }
}

impl RedisStore {
    /// What is current is held, to be answered from without asking while it is said what others drop.
    async fn tracked(&self, held: &Held, inquiry: Inquiry<'_>, cap: Option<Duration>) -> Result<Lookup, StoreError> {
        // Captured before the command: a drop whose push overtakes the reply is then not missed.
        let captured = held.memory.capture(inquiry.tags.iter().chain([&held.era]));
        let is_alive = held.is_alive();
        let found = self.0.remote.lookup(inquiry).await?;
        if let Some(entry) = found.entry.as_ref().filter(|_| is_alive)
            && is_current(entry, &inquiry, &found.generations)
        {
            let until = cap.map_or(Millis::MAX, |cap| inquiry.now.saturating_add(cap.as_millis() as Millis));
            held.memory.insert(inquiry.key, entry.clone(), captured, entry.keep_until.min(until));
        }
        Ok(found)
    }
}

impl Store for RedisStore {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        let held = self.0.held.as_ref().filter(|held| held.is_alive())?;
        held.memory.peek(key, now)
    }

    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        self.0.held.as_ref().filter(|_| tier == Tier::Validated)?.memory.raw(key)
    }

    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        let Some(held) = &self.0.held else { return Box::pin(ready(Ok(false))) };
        Box::pin(still_current(self.remote(), &held.memory, key, entry))
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        let remote = self.remote();
        // In one box, and not in one for each that passes it on.
        let plain = move || Box::pin(remote.call(move |remote| remote.find(inquiry)));
        let Some(held) = &self.0.held else { return plain() };
        let cap = match inquiry.tier {
            Tier::Off => return plain(),
            Tier::Validated => return Box::pin(validated(remote, &held.memory, inquiry)),
            Tier::On => None,
            Tier::Capped(cap) => Some(cap),
        };
        held.memory.sought(inquiry.key);
        if held.want() {
            self.0.link.slots().servers().iter().for_each(|server| server.look_again());
        }
        if !held.is_alive() {
            return Box::pin(validated(remote, &held.memory, inquiry));
        }
        Box::pin(self.tracked(held, inquiry, cap))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        self.remote().open(tags)
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        self.remote().extend(mark, tags)
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.remote().fill(key, entry, tier, now).await?;
            // What is held is what was there before.
            if let Some(held) = &self.0.held {
                held.memory.forget(key.as_bytes(), |_| true);
            }
            Ok(())
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        // After the command, whatever came of it: before it, a look-up could bring back what is about to be dropped.
        let after = DropLocally { held: self.0.held.as_deref(), groups };
        Box::pin(async move {
            let result = self.remote().invalidate(groups, fence).await;
            drop(after);
            result
        })
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        let after = DropLocally { held: self.0.held.as_deref(), groups };
        Box::pin(async move {
            let result = self.remote().fence(groups, fence).await;
            drop(after);
            result
        })
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        self.remote().claim(key, lease)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.remote().release(key)
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let result = self.remote().clear().await;
            if let Some(held) = &self.0.held {
                held.memory.clear().await?;
            }
            result
        })
    }

    fn health(&self) -> Health {
        self.remote().health()
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        self.remote().count(groups)
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        self.remote().search(search)
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        self.remote().exchange(exchange)
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        self.remote().note(name, note)
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        self.remote().noted(name)
    }

    fn usage(&self) -> Usage {
        let held = self.0.held.as_ref().map(|held| held.memory.usage()).unwrap_or_default();
        let Usage { journal_tags, errors, .. } = self.remote().usage();
        Usage { journal_tags, errors, ..held }
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        self.remote().drain(within)
    }
}

/// The stream of a region. (The prefix is the same in all of them.)
fn stream_of(prefix: &str, region: &str) -> String {
    format!("{prefix}r:{{{region}}}")
}

/// For regions: what one of them does that another tells it, and what it tells the others.
impl RedisStore {
    pub(in crate::store) fn stream_of(&self, region: &str) -> String {
        stream_of(&self.0.link.terms.prefix, region)
    }

    /// Drops what another region has dropped. It is not told to others, and not kept for later: who follows tries again.
    pub(in crate::store) async fn drop_here(&self, groups: &[TagGroup], fence: &Fence) -> Result<(), StoreError> {
        let after = DropLocally { held: self.0.held.as_deref(), groups };
        let dropped = timeout(HERE, self.remote().inner().drop_here(groups, fence)).await;
        drop(after);
        dropped.unwrap_or_else(|_| Err(StoreError::unreachable("no answer")))
    }

    pub(in crate::store) async fn fence_here(&self, groups: &[TagGroup], fence: &Fence) -> Result<(), StoreError> {
        let after = DropLocally { held: self.0.held.as_deref(), groups };
        let fenced = timeout(HERE, self.remote().inner().fence_here(groups, fence)).await;
        drop(after);
        fenced.unwrap_or_else(|_| Err(StoreError::unreachable("no answer")))
    }

    pub(in crate::store) async fn clear_here(&self) -> Result<(), StoreError> {
        let cleared = timeout(CLEARING, self.remote().inner().clear_here()).await;
        if let Some(held) = &self.0.held {
            held.memory.clear().await?;
        }
        cleared.unwrap_or_else(|_| Err(StoreError::unreachable("it is not cleared in time")))
    }

    /// Tells the others that this region is alive, unless another process has just done so.
    pub(in crate::store) async fn beat(&self, every: Duration) -> Result<(), StoreError> {
        let told = timeout(HERE, self.remote().inner().beat(every)).await;
        told.unwrap_or_else(|_| Err(StoreError::unreachable("no answer")))
    }

    /// The last that this process has told the others.
    pub(in crate::store) fn told(&self) -> Option<String> {
        self.0.remote.inner().told()
    }

    /// Whether all these groups of readers have acknowledged it.
    pub(in crate::store) async fn is_heard(&self, told: &str, groups: &[&str]) -> Result<bool, StoreError> {
        let heard = timeout(HERE, self.remote().inner().is_heard(told, groups)).await;
        heard.unwrap_or_else(|_| Err(StoreError::unreachable("no answer")))
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
        f.debug_struct("RedisStore").field("remote", &self.0.remote).field("held", &self.0.held).finish()
    }
}

/// Without the passwords in its addresses.
impl fmt::Debug for RedisBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<_> = self.urls.iter().map(|url| address::redacted(url)).collect();
        f.debug_struct("RedisBuilder").field("urls", &urls).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody listens there.
    fn nowhere() -> RedisBuilder {
        RedisStore::builder(["redis://127.0.0.1:1"])
    }

    #[tokio::test]
    async fn what_was_in_vain_is_counted() {
        let store = nowhere().build().unwrap();
        let tags = [Tag::entity(b"s{t}", "doc", "doc", b"1")];
        assert!(store.open(&tags).await.is_err());
        assert!(store.invalidate(&[TagGroup::new("doc", tags.to_vec())], None).await.is_err());
        let Usage { journal_tags, errors, .. } = store.usage();
        assert!(journal_tags == 1 && errors.iter().map(|(_, count)| count).sum::<u64>() >= 1, "{errors:?}");
        // A region that has missed something is not read before all of this has happened.
        assert!(store.clear_here().await.is_err());
    }

    #[test]
    fn a_prefix_is_there_and_plain() {
        for bad in ["", "a{", "a}", "a*", "a?", "a[", "a]", "a\\", "a^", "a b", "a\t"] {
            let error = nowhere().prefix(bad).build().unwrap_err().to_string();
            assert!(error.contains(&format!("Redis prefix `{bad}`")), "{error}");
        }
        assert!(nowhere().prefix("a:b-c").build().is_ok());
    }
}
