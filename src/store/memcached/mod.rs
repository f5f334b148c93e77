//! memcached as the shared store of a fleet. (Feature `memcached`.)
//!
//! [`docs::memcached`](crate::docs::memcached) has what is guaranteed and what is not, how servers are chosen, and what each
//! fault comes to.
//!
//! Needs the meta commands of memcached 1.6.9 or later.

mod commands;
mod frames;
mod remote;
mod server;

use std::{collections::BTreeSet, fmt, future::ready, sync::Arc, time::Duration};

use futures_util::future::join_all;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    Entry, Exchange, Fence, Generation, Guard, Health, Inquiry, Lookup, Mark, MemoryStore, Opened, Store, StoreError,
    StoreFuture, TagGroup, Usage,
    wire::{Counters, WireStats, check_times, still_current, validated},
};
use crate::{
    catalog::Tier,
    clock::Millis,
    error::ConfigError,
    key::{Key, Tag, tenant_of},
    units::{bytes, duration},
};
#[cfg(any(test, fuzzing))]
pub(crate) use frames::{Frames, Kind, Reply};
use remote::Remote;
use server::{Server, Terms};

/// What all names begin with.
const PREFIX: &str = "cas";

/// 64 MiB.
const IN_PROCESS: u64 = 64 << 20;

const PORT: &str = "11211";
const HEARTBEAT: Duration = Duration::from_millis(250);
const GENERATION_TTL: Duration = Duration::from_secs(7 * 86_400);
const SETTLE: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(86_400);

/// memcached, on as many servers as there are. Cheap to clone.
///
/// All that belongs to a tenant is on one server, always the same, also while that is gone: then the tenant is served from the
/// origin. (On another one its writes would not be seen by those who still reach the first, and what it held would be back
/// when it is.) The list of servers is a part of all names, so processes with different lists share nothing.
#[derive(Clone)]
pub struct MemcachedStore(Arc<Shared>);

struct Shared {
    /// Ordered by address.
    servers: Vec<Guard<Remote>>,
    counters: Arc<Counters>,
    /// What this process holds of them, for tier `validated`.
    memory: Option<MemoryStore>,
}

/// Configures a [`MemcachedStore`].
///
/// In a file: the table `[memcached]`, with the same names.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[must_use]
pub struct MemcachedBuilder {
    servers: Vec<String>,
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
    #[serde(default, deserialize_with = "duration")]
    settle: Option<Duration>,
}

impl MemcachedStore {
    /// A store on these servers, each `host:port` or `host` (port 11211), in any order.
    pub fn builder<S: Into<String>>(servers: impl IntoIterator<Item = S>) -> MemcachedBuilder {
        MemcachedBuilder {
            servers: servers.into_iter().map(Into::into).collect(),
            prefix: None,
            in_process: None,
            heartbeat: None,
            budget: None,
            invalidate_budget: None,
            generation_ttl: None,
            settle: None,
        }
    }

    /// What was counted since it was made.
    pub fn stats(&self) -> WireStats {
        self.0.counters.stats()
    }

    /// Where all that belongs to a tenant is.
    fn of(&self, tenant: &[u8]) -> &Guard<Remote> {
        let servers = &self.0.servers;
        let at = match servers.len() {
            1 => 0,
            // The same also where a `usize` has 32 bits.
            count => (hash(tenant) % count as u64) as usize,
        };
        let server = &servers[at];
        server.inner().server.start();
        server
    }

    fn of_tags(&self, tags: &[Tag]) -> &Guard<Remote> {
        self.of(tags.first().map_or(b"{}", Tag::tenant))
    }

    /// The groups by server, and what each server's part of a group's number is.
    fn parts(&self, groups: &[TagGroup]) -> Vec<(&Guard<Remote>, Vec<TagGroup>)> {
        let with = |at: usize| -> Vec<TagGroup> {
            let is_its = |tag: &&Tag| std::ptr::eq(self.of(tag.tenant()), &self.0.servers[at]);
            let part = |group: &TagGroup| {
                TagGroup::new(group.data_type.clone(), group.tags.iter().filter(is_its).cloned().collect())
            };
            groups.iter().map(part).collect()
        };
        let parts = (0..self.0.servers.len()).map(|at| (&self.0.servers[at], with(at)));
        parts.filter(|(_, groups)| groups.iter().any(|group| !group.tags.is_empty())).collect()
    }

    /// The same on all servers at once; the first error, when all are done.
    async fn on_all<'a, T, F: Future<Output = Result<T, StoreError>>>(
        &'a self,
        call: impl Fn(&'a Guard<Remote>) -> F,
    ) -> Result<Vec<T>, StoreError> {
        let all = self.0.servers.iter().map(|server| {
            server.inner().server.start();
            call(server)
        });
        join_all(all).await.into_iter().collect()
    }
}

/// The same in every process, and with every compiler.
fn hash(bytes: &[u8]) -> u64 {
    Sha256::digest(bytes).iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}

impl MemcachedBuilder {
    /// What all names begin with; by default `cas`. The name of the service follows, so services that share a server share
    /// nothing else.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// How many bytes tier `validated` may take in this process; by default 64 MiB. 0 turns it off.
    pub fn in_process(mut self, bytes: u64) -> Self {
        self.in_process = Some(bytes);
        self
    }

    /// How often each server is asked for its time, which must be answered within two of these; by default 250 ms, and 15 s at
    /// most.
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = Some(heartbeat);
        self
    }

    /// How long a call may take before its request goes to the origin; by default 50 ms.
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

    /// How long a server is not read after an outage, so that other processes can deliver what they could not; by default 1 s.
    pub fn settle(mut self, settle: Duration) -> Self {
        self.settle = Some(settle);
        self
    }

    /// Checks the addresses and makes the store. It connects when it is first asked, in the background, and serves from the origin until it has.
    ///
    /// # Errors
    /// An address that cannot be read, or is there twice; a time that makes no sense.
    pub fn build(self) -> Result<MemcachedStore, ConfigError> {
        self.check_times()?;
        let addresses = addresses(&self.servers)?;
        let prefix = self.prefix.as_deref().unwrap_or(PREFIX);
        if prefix.is_empty() || prefix.len() > 64 || !prefix.bytes().all(|c| c.is_ascii_graphic()) {
            return Err(ConfigError::new(format!(
                "memcached prefix `{prefix}`: it is to be there, of 64 printable characters at most, without spaces; choose \
                 another, such as {PREFIX}"
            )));
        }
        let list: Vec<_> = addresses.iter().map(String::as_str).collect();
        let list = hash(list.join(",").as_bytes());
        let terms = Terms {
            prefix: format!("{prefix}:{:08x}:", list >> 32).into(),
            heartbeat: self.heartbeat.unwrap_or(HEARTBEAT),
            settle: self.settle.unwrap_or(SETTLE),
        };
        let counters = Arc::new(Counters::default());
        let guarded = |address: String| {
            let server = Arc::new(Server::new(address, terms.clone()));
            let generation_ttl = self.generation_ttl.unwrap_or(GENERATION_TTL);
            let mut guard = Guard::new(Remote { server, generation_ttl, counters: counters.clone() });
            if let Some(budget) = self.budget {
                guard = guard.budget(budget);
            }
            if let Some(budget) = self.invalidate_budget {
                guard = guard.invalidate_budget(budget);
            }
            guard
        };
        let servers = addresses.into_iter().map(guarded).collect();
        let in_process = self.in_process.unwrap_or(IN_PROCESS);
        let memory = (in_process > 0).then(|| MemoryStore::new(in_process));
        Ok(MemcachedStore(Arc::new(Shared { servers, counters, memory })))
    }

    fn check_times(&self) -> Result<(), ConfigError> {
        let times = [
            // Each one keeps the space of the generations, which does not live long without.
            ("heartbeat", self.heartbeat, MILLISECOND, Duration::from_secs(15)),
            ("budget", self.budget, Duration::ZERO, DAY),
            ("invalidate_budget", self.invalidate_budget, Duration::ZERO, DAY),
            ("settle", self.settle, Duration::ZERO, DAY),
            ("generation_ttl", self.generation_ttl, Duration::from_secs(1), 36_500 * DAY),
        ];
        check_times("memcached", times)
    }
}

/// Each with its port, once, in order.
fn addresses(servers: &[String]) -> Result<BTreeSet<String>, ConfigError> {
    let mut addresses = BTreeSet::new();
    for server in servers {
        let error = |what: &str| ConfigError::new(format!("memcached server `{server}`: {what}"));
        let is_v6 = server.matches(':').count() > 1;
        let (host, port) = match server.rsplit_once(':') {
            Some((host, port)) if !is_v6 || host.ends_with(']') => (host, port),
            _ => (server.as_str(), PORT),
        };
        if host.is_empty() || server.contains("://") || !server.bytes().all(|c| c.is_ascii_graphic()) {
            return Err(error("write host:port, such as 127.0.0.1:11211"));
        }
        if is_v6 && !(host.starts_with('[') && host.ends_with(']')) {
            return Err(error("write an IPv6 address in brackets: [::1]:11211"));
        }
        let Some(port) = port.parse::<u16>().ok().filter(|port| *port > 0) else {
            return Err(error("the port is to be a number from 1 to 65535"));
        };
        if !addresses.insert(format!("{}:{port}", host.to_ascii_lowercase())) {
            return Err(error("it is in the list twice"));
        }
    }
    if addresses.is_empty() {
        return Err(ConfigError::new("no memcached server; give one such as 127.0.0.1:11211"));
    }
    Ok(addresses)
}

impl Store for MemcachedStore {
    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        self.0.memory.as_ref().filter(|_| tier == Tier::Validated)?.raw(key)
    }

    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        let Some(memory) = &self.0.memory else { return Box::pin(ready(Ok(false))) };
        Box::pin(still_current(self.of(tenant_of(key)), memory, key, entry))
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        match &self.0.memory {
            Some(memory) if inquiry.tier != Tier::Off => {
                Box::pin(validated(self.of(inquiry.key.tenant()), memory, inquiry))
            }
            _ => self.of(inquiry.key.tenant()).lookup(inquiry),
        }
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        self.of_tags(tags).open(tags)
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        self.of_tags(tags).extend(mark, tags)
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.of(key.tenant()).fill(key, entry, tier, now).await?;
            // What is held is what was there before.
            if let Some(memory) = &self.0.memory {
                memory.forget(key.as_bytes(), |_| true);
            }
            Ok(())
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        if let [server] = &self.0.servers[..] {
            server.inner().server.start();
            return server.invalidate(groups, fence);
        }
        Box::pin(async move {
            let parts = self.parts(groups);
            let results = join_all(parts.iter().map(|(server, groups)| server.invalidate(groups, fence))).await;
            let mut counts = vec![0; groups.len()];
            for result in results {
                counts.iter_mut().zip(result?).for_each(|(all, count)| *all += count);
            }
            Ok(counts)
        })
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let parts = self.parts(groups);
            let results = join_all(parts.iter().map(|(server, groups)| server.fence(groups, fence))).await;
            results.into_iter().collect()
        })
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        self.of(key.tenant()).claim(key, lease)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.of(key.tenant()).release(key)
    }

    fn refuses(&self, tier: Tier) -> Option<&'static str> {
        let why = "memcached does not say what other processes drop; choose `validated` or `off`";
        (!matches!(tier, Tier::Validated | Tier::Off)).then_some(why)
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let cleared = self.on_all(|server| server.clear()).await.map(drop);
            if let Some(memory) = &self.0.memory {
                memory.clear().await?;
            }
            cleared
        })
    }

    fn health(&self) -> Health {
        let mut worst = Health::Ok;
        for server in &self.0.servers {
            server.inner().server.start();
            match (server.health(), &worst) {
                (Health::Down(why), _) => return Health::Down(why),
                (Health::Degraded(why), Health::Ok) => worst = Health::Degraded(why),
                _ => {}
            }
        }
        worst
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(async move {
            let parts = self.parts(groups);
            let mut counts = vec![0; groups.len()];
            for (server, groups) in &parts {
                counts.iter_mut().zip(server.count(groups).await?).for_each(|(all, count)| *all += count);
            }
            Ok(counts)
        })
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        self.of(exchange.fleet.as_bytes()).exchange(exchange)
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        self.of(name.as_bytes()).note(name, note)
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        self.of(name.as_bytes()).noted(name)
    }

    fn usage(&self) -> Usage {
        let mut all = self.0.memory.as_ref().map(MemoryStore::usage).unwrap_or_default();
        for server in &self.0.servers {
            let Usage { journal_tags, errors, .. } = server.usage();
            all.journal_tags += journal_tags;
            for (kind, count) in errors {
                match all.errors.iter_mut().find(|(known, _)| *known == kind) {
                    Some((_, all)) => *all += count,
                    None => all.errors.push((kind, count)),
                }
            }
        }
        all
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        Box::pin(async move { Ok(self.on_all(|server| server.drain(within)).await?.into_iter().sum()) })
    }
}

impl fmt::Debug for MemcachedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers = self.0.servers.iter().map(Guard::inner);
        f.debug_list().entries(servers.map(|remote| &remote.server)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ports that nobody listens on.
    #[tokio::test]
    async fn what_was_in_vain_is_counted_over_all_servers() {
        let store = MemcachedStore::builder(["127.0.0.1:1", "127.0.0.1:2"]).build().unwrap();
        for tenant in 0..8 {
            let tags = [Tag::entity(format!("s{{{tenant}}}").as_bytes(), "doc", "doc", b"1")];
            assert!(store.open(&tags).await.is_err());
            assert!(store.invalidate(&[TagGroup::new("doc", tags.to_vec())], None).await.is_err());
        }
        let Usage { journal_tags, errors, .. } = store.usage();
        assert_eq!(journal_tags, 8);
        assert_eq!(errors.iter().map(|(_, count)| count).sum::<u64>(), 8, "{errors:?}");
        let kinds: std::collections::BTreeSet<_> = errors.iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds.len(), errors.len(), "each kind once");
        // What a store cannot do, its guard cannot.
        assert!(Guard::new(store).refuses(Tier::On).is_some());
        assert!(!Guard::new(MemoryStore::new(1 << 20)).is_shared());
    }
}
