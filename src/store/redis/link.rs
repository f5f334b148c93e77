//! What is known of the servers: who serves what, and how they are. Everything that talks to Redis asks here first.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use redis::RedisError;
use tokio::sync::Notify;

use super::{
    address::Address,
    held::Held,
    lane::Lane,
    refusals::Step,
    resp::Reply,
    server::{Beat, Claim, Server, Terms},
    slots::Slots,
    trouble::{Trouble, UNKNOWN},
};
use crate::{
    mux::Broken,
    store::{Health, StoreError},
};

/// Shared by everything that talks to the servers.
pub(super) struct Link {
    pub(super) address: Address,
    pub(super) terms: Terms,
    /// How long nothing is read after an outage.
    pub(super) settle: Duration,
    /// What this process holds, where there is such a tier.
    pub(super) held: Option<Arc<Held>>,
    slots: RwLock<Slots>,
    nodes: Mutex<BTreeMap<String, Node>>,
    /// The masters of a cluster, as a node said that is none itself.
    #[cfg(feature = "redis-cluster")]
    discovered: Mutex<Vec<String>>,
    /// Whether anything was ever fenced.
    fences: AtomicBool,
    /// The first attempt to connect has come to an end.
    tried: AtomicBool,
    found: Notify,
}

/// A server by its address.
#[derive(Default)]
struct Node {
    server: Option<Arc<Server>>,
    claim: Claim,
    /// What is wrong; it was said when that began.
    lost: Option<Trouble>,
    unreadable: Option<Trouble>,
    degraded: Option<Trouble>,
    untracked: Option<Trouble>,
    refused: Option<Trouble>,
    unfenced: Option<Trouble>,
    was_up: bool,
}

impl Link {
    pub(super) fn new(address: Address, terms: Terms, settle: Duration, held: Option<Arc<Held>>) -> Self {
        Self {
            address,
            terms,
            settle,
            held,
            slots: RwLock::default(),
            nodes: Mutex::default(),
            #[cfg(feature = "redis-cluster")]
            discovered: Mutex::default(),
            fences: AtomicBool::new(false),
            tried: AtomicBool::new(false),
            found: Notify::new(),
        }
    }

    pub(super) fn slots(&self) -> Slots {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<String, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the keys of a tenant are; fails at once when nobody serves them, but waits for the very first attempt.
    async fn server(&self, tenant: &[u8]) -> Result<Arc<Server>, StoreError> {
        if !self.tried.load(Ordering::Acquire) {
            let found = self.found.notified();
            if !self.tried.load(Ordering::Acquire) {
                found.await;
            }
        }
        // The lock is given back before another is taken.
        let server = self.slots.read().unwrap_or_else(PoisonError::into_inner).of(tenant).cloned();
        server.ok_or_else(|| StoreError::away(self.trouble()))
    }

    /// The server to invalidate with.
    pub(super) async fn writing(&self, tenant: &[u8]) -> Result<Arc<Server>, StoreError> {
        let server = self.server(tenant).await?;
        if server.is_proven() {
            return Ok(server);
        }
        server.look_again();
        Err(StoreError::away(self.trouble()))
    }

    /// The server to read from.
    pub(super) async fn reading(&self, tenant: &[u8]) -> Result<Arc<Server>, StoreError> {
        let server = self.server(tenant).await?;
        if server.is_readable() {
            return Ok(server);
        }
        Err(StoreError::away("Redis is not to be read now"))
    }

    /// Makes one call. That its caller goes away says nothing about the server: only heartbeats do.
    pub(super) async fn call<T>(
        &self,
        server: &Server,
        step: Step,
        call: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, StoreError> {
        match call.await {
            Ok(value) => Ok(value),
            Err(error) if error.is_timeout() => Err(StoreError::unreachable(error)),
            Err(error) if error.is_io_error() || error.is_unrecoverable_error() || error.is_connection_dropped() => {
                server.lose();
                Err(StoreError::unreachable(error))
            }
            Err(error) => Err(self.refused(server, step, Trouble::from(error))),
        }
    }

    /// The same of what was asked over the connection for look-ups.
    pub(super) fn asked(
        &self,
        server: &Server,
        lane: &Lane,
        answer: Result<Reply, Broken>,
    ) -> Result<Reply, StoreError> {
        answer.map_err(|broken| {
            if lane.is_over() {
                server.lose();
            }
            match broken {
                Broken::Unsent(_) => StoreError::away(broken.to_string()),
                Broken::Unanswered(_) => StoreError::unreachable(broken.to_string()),
            }
        })
    }

    /// Something was answered that nobody asked.
    pub(super) fn confused(&self, server: &Server, lane: &Lane) -> StoreError {
        lane.end("an answer to another question");
        server.lose();
        StoreError::unreachable("an answer to another question")
    }

    /// What a server's refusal means: at any rate that what was asked did not happen.
    pub(super) fn refused(&self, server: &Server, step: Step, trouble: Trouble) -> StoreError {
        if trouble.is_without("EVAL") {
            server.miss_scripts();
        }
        server.refusals.refused(step, &trouble, self.terms.clock.now());
        server.look_again();
        StoreError::new(trouble.to_string())
    }

    /// Something is fenced.
    pub(super) fn fence(&self) {
        self.fences.store(true, Ordering::Release);
    }

    pub(super) fn fences(&self) -> bool {
        self.fences.load(Ordering::Acquire)
    }

    /// How the servers are, together.
    pub(super) fn health(&self) -> Health {
        if !self.tried.load(Ordering::Acquire) {
            return Health::Down("not connected to Redis yet".into());
        }
        let nodes = self.nodes();
        if let Some(trouble) = nodes.values().find_map(|node| node.lost.as_ref()) {
            return Health::Down(trouble.to_string().into());
        }
        let slots = self.slots();
        if !slots.is_whole() {
            return Health::Down("nobody is known to serve some of the cluster's slots".into());
        }
        if !slots.servers().iter().all(|server| server.is_proven()) {
            return Health::Down("the last heartbeat is too long ago".into());
        }
        let missing = |node: &Node| {
            let all = [&node.unreadable, &node.degraded, &node.refused, &node.unfenced, &node.untracked];
            all.into_iter().flatten().next().cloned()
        };
        match nodes.values().find_map(missing) {
            Some(trouble) => Health::Degraded(trouble.to_string().into()),
            None => Health::Ok,
        }
    }

    /// Why nobody can be asked.
    fn trouble(&self) -> String {
        let nodes = self.nodes();
        let trouble = nodes.values().find_map(|node| node.lost.as_ref()).map(Trouble::to_string);
        trouble.unwrap_or_else(|| "no connection to Redis".to_owned())
    }

    /// Whether a server at this address was up before, or failed to be: then there may be invalidations to be delivered.
    pub(super) fn had_outage(&self, address: &str) -> bool {
        self.nodes().get(address).is_some_and(|node| node.was_up || node.lost.is_some())
    }

    /// A heartbeat was answered.
    pub(super) fn up(&self, address: &str, server: &Arc<Server>, beat: Beat, untracked: Option<Trouble>) {
        let mut nodes = self.nodes();
        let node = nodes.entry(address.to_owned()).or_default();
        let is_new = !node.server.as_ref().is_some_and(|known| Arc::ptr_eq(known, server)) || node.lost.is_some();
        if is_new {
            let (name, without) = (server.name(), server.without());
            tracing::info!(address, server = name, tracks = server.tracks(), without, "connected to Redis");
            // What is held may be answered from after the next heartbeat, which need not wait.
            server.look_again();
        }
        tell(address, &mut node.unreadable, beat.unreadable, "Redis is not read");
        tell(address, &mut node.degraded, beat.degraded, "Redis refuses to store");
        let refused = server.refusals.now(self.terms.clock.now());
        tell(address, &mut node.refused, refused, "Redis refuses what requests ask of it");
        let unfenced = || Trouble::new(UNKNOWN, "the server knows no EVAL, and nothing can be fenced there");
        let unfenced = (self.fences() && server.lacks_scripts()).then(unfenced);
        tell(address, &mut node.unfenced, unfenced, "Redis raises no fences");
        tell(
            address,
            &mut node.untracked,
            untracked,
            "Redis does not say what others drop: tier `on` is like `validated`",
        );
        (node.server, node.claim, node.lost, node.was_up) = (Some(server.clone()), beat.claim, None, true);
        self.publish(&nodes, is_new);
    }

    /// There is no such server, or none that can be used.
    pub(super) fn lost(&self, address: &str, trouble: Trouble) {
        let mut nodes = self.nodes();
        let node = nodes.entry(address.to_owned()).or_default();
        // A server that was promoted or restarted is another, and is connected to at once: no news yet.
        tell(address, &mut node.lost, Some(trouble), "Redis cannot be used: serving from the origin");
        (node.server, node.claim) = (None, Claim::default());
        self.publish(&nodes, true);
    }

    /// Forgets who is no master any more.
    #[cfg(feature = "redis-cluster")]
    pub(super) fn keep(&self, masters: &std::collections::BTreeSet<String>) {
        let mut nodes = self.nodes();
        let known = nodes.len();
        nodes.retain(|address, _| masters.contains(address));
        if nodes.len() < known {
            self.publish(&nodes, true);
        }
    }

    /// All connections are gone.
    pub(super) fn forget_all(&self) {
        let mut nodes = self.nodes();
        nodes.clear();
        self.publish(&nodes, true);
        self.tried.store(false, Ordering::Release);
    }

    /// The addresses of a cluster's masters, as they say themselves.
    #[cfg(feature = "redis-cluster")]
    pub(super) fn masters(&self) -> std::collections::BTreeSet<String> {
        let known: std::collections::BTreeSet<_> =
            self.nodes().values().flat_map(|node| node.claim.masters.iter().cloned()).collect();
        if !known.is_empty() {
            return known;
        }
        // Nobody is up: they may be where they were said to be, or where they were looked for first.
        let mut wanted: std::collections::BTreeSet<_> = self.discovered().iter().cloned().collect();
        if let Address::Cluster(seeds) = &self.address {
            wanted.extend(seeds.iter().map(|seed| seed.addr().to_string()));
        }
        wanted
    }

    #[cfg(feature = "redis-cluster")]
    fn discovered(&self) -> MutexGuard<'_, Vec<String>> {
        self.discovered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a node says of the others, be it a master or not.
    #[cfg(feature = "redis-cluster")]
    pub(super) fn learn(&self, masters: Vec<String>) {
        *self.discovered() = masters;
    }

    fn publish(&self, nodes: &BTreeMap<String, Node>, changed: bool) {
        let new = self.who_serves_what(nodes);
        let proven = {
            let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
            let changed = changed || !slots.is_same(&new);
            if let (true, Some(held)) = (changed, &self.held) {
                // What was heard of before a server was tracked, or under another, proves nothing.
                held.lose();
            }
            *slots = new;
            let servers = slots.servers();
            let all =
                slots.is_whole() && !changed && servers.iter().all(|server| server.tracks() && server.is_readable());
            servers.iter().map(|server| server.proven_until()).min().filter(|_| all)
        };
        if let (Some(held), Some(until)) = (&self.held, proven) {
            held.prove(until);
        }
        self.tried.store(true, Ordering::Release);
        self.found.notify_waiters();
    }

    fn who_serves_what(&self, nodes: &BTreeMap<String, Node>) -> Slots {
        #[cfg(feature = "redis-cluster")]
        if let Address::Cluster(_) = self.address {
            let claims = nodes.values().filter_map(|node| Some((node.server.as_ref()?, &node.claim.own[..])));
            return Slots::claimed(claims);
        }
        let server = nodes.values().find_map(|node| node.server.clone());
        server.map_or(Slots::Nobody, Slots::One)
    }
}

/// Says what is wrong when it begins, and when it is over.
fn tell(address: &str, known: &mut Option<Trouble>, now: Option<Trouble>, what: &str) {
    match (&*known, &now) {
        (Some(old), Some(new)) if old.code == new.code => {}
        (_, Some(new)) => tracing::warn!(address, why = %new, "{what}"),
        (Some(old), None) => tracing::info!(address, was = %old, "over: {what}"),
        (None, None) => {}
    }
    *known = now;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Clock,
        store::{
            MemoryStore,
            redis::server::tests::{Fake, terms},
        },
    };

    fn link(urls: &[String], held: Option<Arc<Held>>) -> Link {
        let address = Address::parse(urls.iter().map(String::as_str)).unwrap();
        Link::new(address, terms(), Duration::ZERO, held)
    }

    fn url(fake: &Fake) -> String {
        format!("redis://{}", fake.address())
    }

    fn error(kind: std::io::ErrorKind) -> Result<(), RedisError> {
        Err(std::io::Error::from(kind).into())
    }

    /// Only what is wrong with the connection costs the connection.
    #[tokio::test]
    async fn a_call_that_fails_says_how() {
        let refused = redis::parse_redis_value(b"-NOPERM no permissions\r\n").unwrap();
        let refused = refused.extract_error().map(drop).unwrap_err();
        for (answer, is_silence, is_lost) in [
            (error(std::io::ErrorKind::TimedOut), true, false),
            (error(std::io::ErrorKind::BrokenPipe), true, true),
            (error(std::io::ErrorKind::ConnectionReset), true, true),
            (error(std::io::ErrorKind::Other), true, true),
            (Err(refused), false, false),
        ] {
            let fake = Fake::new(|_| None).await;
            let link = link(&[url(&fake)], None);
            let (server, _) = fake.connect(&link.terms, false).await;
            let said = format!("{answer:?}");
            let failed = link.call(&server, Step::Read, async { answer }).await.unwrap_err();
            assert_eq!(failed.is_silence(), is_silence, "{said}");
            assert_eq!(server.beat(&link.terms).await.is_err(), is_lost, "{said}");
        }
    }

    /// What is held is answered where every drop is heard of: of all servers, tracked, readable, and the same as before.
    #[tokio::test]
    async fn what_is_held_is_proven_by_all_servers() {
        let held = Arc::new(Held::new(MemoryStore::new(1 << 20), Clock::default()));
        let fake = Fake::new(|_| None).await;
        let link = link(&[url(&fake)], Some(held.clone()));
        assert!(!link.had_outage(&fake.address()) && matches!(link.health(), Health::Down(_)));
        let (server, _) = fake.connect(&link.terms, false).await;
        let up = async |server: &Arc<Server>| {
            let beat = server.beat(&link.terms).await.unwrap();
            link.up(&fake.address(), server, beat, None);
            held.is_alive()
        };
        assert!(!up(&server).await && !up(&server).await, "it is not tracked");
        server.track(&link.terms).await.unwrap();
        assert!(up(&server).await);
        server.settle(Duration::from_secs(60));
        held.lose();
        assert!(!up(&server).await, "it is not to be read");
        server.settle(Duration::ZERO);
        assert!(up(&server).await && link.health() == Health::Ok && link.had_outage(&fake.address()));
        let (other, _) = fake.connect(&link.terms, false).await;
        other.track(&link.terms).await.unwrap();
        assert!(!up(&other).await, "what the one before it did not say is not known");
        assert!(up(&other).await);
        link.lost(&fake.address(), Trouble::silent("it burns"));
        assert!(!held.is_alive() && link.had_outage(&fake.address()));
        assert_eq!(link.health().to_string(), "down: it burns");
        assert!(link.writing(b"{t}").await.is_err_and(|error| error.to_string().contains("it burns")));
        link.forget_all();
        assert!(!link.had_outage(&fake.address()) && link.slots().servers().is_empty());
    }

    /// Slots that nobody is known to serve are told of by nobody.
    #[cfg(feature = "redis-cluster")]
    #[tokio::test]
    async fn a_cluster_is_well_when_all_of_it_is_served() {
        const HALF: u16 = 8_191;
        let held = Arc::new(Held::new(MemoryStore::new(1 << 20), Clock::default()));
        let fakes = [Fake::new(|_| None).await, Fake::new(|_| None).await];
        let link = link(&[url(&fakes[0]), url(&fakes[1])], Some(held.clone()));
        let addresses = fakes.each_ref().map(Fake::address);
        let mut servers = vec![];
        for fake in &fakes {
            let (server, _) = fake.connect(&link.terms, false).await;
            server.track(&link.terms).await.unwrap();
            servers.push(server);
        }
        let up = async |nth: usize, own: (u16, u16)| {
            let beat = servers[nth].beat(&link.terms).await.unwrap();
            let claim = Claim { own: vec![own], masters: addresses.to_vec() };
            link.up(&addresses[nth], &servers[nth], Beat { claim, ..beat }, None);
            held.is_alive()
        };
        assert_eq!(link.masters(), addresses.clone().into());
        link.learn(vec!["elsewhere:1".to_owned()]);
        assert!(link.masters().contains("elsewhere:1"));
        assert!(!up(0, (0, HALF)).await && !up(0, (0, HALF)).await, "half of it is nobody's");
        assert_eq!(link.masters(), addresses.clone().into(), "who is up knows better");
        assert!(link.health().to_string().contains("nobody is known to serve"), "{}", link.health());
        assert!(!up(1, (HALF + 1, 16_383)).await && up(1, (HALF + 1, 16_383)).await && link.health() == Health::Ok);
        // A slot that has moved, two that claim it, and a claim of what is no slot.
        assert!(!up(1, (HALF + 1, 16_382)).await && !up(0, (0, HALF + 1)).await);
        assert!(!up(1, (HALF + 2, 16_384)).await && up(1, (HALF + 2, 16_384)).await);
        link.keep(&std::collections::BTreeSet::from(addresses.clone()));
        assert!(held.is_alive(), "nobody is gone");
        link.keep(&std::collections::BTreeSet::from([addresses[0].clone()]));
        assert!(!held.is_alive() && !link.had_outage(&addresses[1]) && link.had_outage(&addresses[0]));
    }
}
