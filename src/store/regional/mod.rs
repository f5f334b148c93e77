//! Several regions, each with a Redis of its own: values never travel, what is dropped does. (Feature `redis`.)
//!
//! A drop is appended to the stream of its region in the same round trip as it is made, and so before it is acknowledged. In every
//! other region a relay, one process at a time, reads that stream, drops the same there, and leaves a fence standing for
//! [`hold`](RegionalBuilder::hold). No clock is compared with another. [`docs::regions`](crate::docs::regions) has what is guaranteed.

mod peer;
mod record;
mod relay;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Deserialize;
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

use super::{
    Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, Opened, RedisBuilder, RedisStore, Search, Store,
    StoreError, StoreFuture, StreamReader, TagGroup, Usage, wire::check_times,
};
use crate::{
    catalog::Tier,
    clock::Millis,
    error::ConfigError,
    key::{Key, Tag},
    units::duration,
};
pub use peer::Wait;
use peer::{Peer, Shared};
pub(super) use record::{FIELD, Kind, Record};
use relay::relay;

/// What is made of what another region says, for fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::{
        record::{FIELD, Kind, Record},
        relay::{LONGEST, MOST, Step, steps},
    };
}

/// How long what another region drops is fenced, where nothing else is said.
const HOLD: Duration = Duration::from_secs(1);

/// How often a region says that it is alive.
const BEAT: Duration = Duration::from_millis(250);

/// How long a write waits for the other regions at most, where it does.
const PATIENCE: Duration = Duration::from_secs(1);

/// So often is looked whether they have heard.
const LOOK: Duration = Duration::from_millis(5);

const DAY: Duration = Duration::from_secs(86_400);

/// The Redis of this region, which hears what other regions drop and tells them what is dropped here. Cheap to clone.
#[derive(Clone)]
pub struct Regional(Arc<Shared>);

/// Configures a [`Regional`].
///
/// In a file: the table `[regions]`, beside `[redis]`, which is this region's own.
///
/// ```toml
/// [redis]
/// urls = ["redis://localhost"]
///
/// [regions]
/// name = "eu"
/// peers = { us = "redis://us.example" }
/// hold = "2s"
/// ```
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[must_use]
pub struct RegionalBuilder {
    name: String,
    #[serde(default)]
    peers: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "duration")]
    hold: Option<Duration>,
    #[serde(default)]
    wait: Wait,
}

impl Regional {
    /// The region of this name; its peers know it by the same.
    pub fn builder(name: impl Into<String>) -> RegionalBuilder {
        RegionalBuilder { name: name.into(), peers: BTreeMap::new(), hold: None, wait: Wait::default() }
    }

    /// Its tasks run from the first call on, once there is a runtime for them; and again, when that one is gone.
    fn local(&self) -> &RedisStore {
        let shared = &self.0;
        if shared.runs.load(Ordering::Relaxed) {
            return &shared.local;
        }
        let Ok(runtime) = Handle::try_current() else { return &shared.local };
        if !shared.runs.swap(true, Ordering::AcqRel) {
            let ends = Ends(shared.runs.clone());
            runtime.spawn(beat(Arc::downgrade(shared), ends));
            for (peer, url) in &shared.peers {
                // It was checked when the store was built.
                if let Ok(reader) =
                    StreamReader::new(url, &shared.local.stream_of(&peer.name), Some(&shared.name), true)
                {
                    runtime.spawn(relay(Arc::downgrade(shared), peer.clone(), reader));
                }
            }
        }
        &shared.local
    }

    /// Where reads go, unless it is known that what they find may be stale.
    fn reading(&self) -> Result<&RedisStore, StoreError> {
        let local = self.local();
        match self.0.peers.iter().find(|(peer, _)| peer.is_torn()) {
            None => Ok(local),
            Some((peer, _)) => Err(StoreError::away(format!("what region `{}` drops may have been missed", peer.name))),
        }
    }

    /// Those of others stand, also where nobody fences here: what is held for replicas is.
    fn fence(fence: Option<&Fence>) -> Option<&Fence> {
        fence.or(Some(&Fence::NOBODY))
    }

    /// Until all other regions have heard what was told last, or the patience is over.
    async fn heard(&self) {
        let until = Instant::now() + PATIENCE;
        let groups: Vec<_> = self.0.peers.iter().map(|(peer, _)| peer.name.as_str()).collect();
        let Some(told) = self.0.local.told() else { return };
        while let Ok(false) = self.0.local.is_heard(&told, &groups).await {
            if Instant::now() + LOOK >= until {
                return;
            }
            sleep(LOOK).await;
        }
    }
}

/// The tasks have ended: with their runtime, for instance.
struct Ends(Arc<AtomicBool>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Says that the region is alive, for as long as there is the store.
async fn beat(shared: Weak<Shared>, ends: Ends) {
    let _ends = ends;
    while let Some(shared) = shared.upgrade() {
        if let Err(error) = shared.local.beat(BEAT).await {
            tracing::debug!(%error, "the region cannot say that it is alive");
        }
        drop(shared);
        sleep(BEAT).await;
    }
}

impl RegionalBuilder {
    /// Another region, and its Redis: `redis://…`, `rediss://…` or `redis+sentinel://…`.
    pub fn peer(mut self, name: impl Into<String>, url: impl Into<String>) -> Self {
        self.peers.insert(name.into(), url.into());
        self
    }

    /// How long what another region drops is fenced here, so that what is read meanwhile is not stored: at least as long as this
    /// region's replica of the database is behind the other's; zero where all regions read from one database. By default 1 s.
    pub fn hold(mut self, hold: Duration) -> Self {
        self.hold = Some(hold);
        self
    }

    /// When a write is acknowledged; by default when its own region has dropped what it makes stale.
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Checks the names and addresses, and makes the store over this region's own Redis.
    ///
    /// # Errors
    /// No peer, or one of the region's own name; an address that cannot be read, or is a cluster's: a stream is on one server; what
    /// [`RedisBuilder::build`] finds.
    pub fn build(self, redis: RedisBuilder) -> Result<Regional, ConfigError> {
        let Self { name, peers, hold, wait } = self;
        let wrong = |what: String| Err(ConfigError::new(format!("region `{name}`: {what}")));
        check_times("regions", [("hold", hold, Duration::ZERO, DAY)])?;
        let is_name =
            |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if let Some(bad) = [&name].into_iter().chain(peers.keys()).find(|name| !is_name(name)) {
            return wrong(format!("`{bad}` is no name of a region; use letters, digits and `-_.`"));
        }
        if peers.is_empty() {
            return wrong("it has no peer; name the other regions, or use Redis without regions".to_owned());
        }
        if peers.contains_key(&name) {
            return wrong("it is its own peer; take it out of the peers, or mend its name".to_owned());
        }
        let local = redis.build_region(&name)?;
        let mut known = vec![];
        for (peer, url) in peers {
            StreamReader::new(&url, &local.stream_of(&peer), Some(&name), true)
                .map_err(|error| ConfigError::new(format!("region `{peer}`: {error}")))?;
            known.push((Arc::new(Peer::new(peer)), url));
        }
        let hold = hold.unwrap_or(HOLD);
        Ok(Regional(Arc::new(Shared { local, name, peers: known, hold, wait, runs: Arc::default() })))
    }
}

impl Store for Regional {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        self.reading().ok()?.peek(key, now)
    }

    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        self.reading().ok()?.held(key, tier)
    }

    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        match self.reading() {
            Ok(local) => local.is_current(key, entry),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        match self.reading() {
            Ok(local) => local.lookup(inquiry),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        self.local().open(tags)
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        self.local().extend(mark, tags)
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        self.local().fill(key, entry, tier, now)
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(async move {
            let dropped = self.local().invalidate(groups, Self::fence(fence)).await?;
            if self.0.wait == Wait::All {
                self.heard().await;
            }
            Ok(dropped)
        })
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.local().fence(groups, fence)
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        self.local().claim(key, lease)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.local().release(key)
    }

    fn refuses(&self, tier: Tier) -> Option<&'static str> {
        self.0.local.refuses(tier)
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        self.local().clear()
    }

    fn health(&self) -> Health {
        let health = self.local().health();
        let trouble = |peer: &Peer| Some(format!("region `{}` is not heard: {}", peer.name, peer.why()?));
        match self.0.peers.iter().find_map(|(peer, _)| trouble(peer)) {
            Some(trouble) if health == Health::Ok => Health::Degraded(trouble.into()),
            _ => health,
        }
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        self.local().count(groups)
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        self.local().search(search)
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        self.local().exchange(exchange)
    }

    /// That of the peer that is furthest behind.
    fn behind(&self) -> Option<Duration> {
        self.0.peers.iter().map(|(peer, _)| peer.behind()).max()
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        self.local().note(name, note)
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        self.local().noted(name)
    }

    fn usage(&self) -> Usage {
        Usage { regions: self.0.peers.iter().map(|(peer, _)| peer.usage()).collect(), ..self.0.local.usage() }
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        self.local().drain(within)
    }
}

impl fmt::Debug for Regional {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peers: Vec<_> = self.0.peers.iter().map(|(peer, _)| &peer.name).collect();
        f.debug_struct("Regional")
            .field("name", &self.0.name)
            .field("peers", &peers)
            .field("local", &self.0.local)
            .finish()
    }
}

/// Without its addresses, which may have passwords.
impl fmt::Debug for RegionalBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peers: Vec<_> = self.peers.keys().collect();
        f.debug_struct("RegionalBuilder").field("name", &self.name).field("peers", &peers).finish_non_exhaustive()
    }
}
