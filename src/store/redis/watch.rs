//! The tasks that connect to the servers and keep asking them whether they still are what they were.
//!
//! The client library waits for lost connections beyond its own time-outs and keeps blackholed ones for ever, so this
//! does neither: a connection whose heartbeat is not answered within two is given up, and a new one is made. Between
//! heartbeats nothing counts as evidence, least of all callers that go away.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

#[cfg(feature = "redis-cluster")]
use redis::ConnectionInfo;
use tokio::time::{Instant, sleep, timeout};

#[cfg(feature = "redis-cluster")]
use super::address::Address;
use super::{
    address::CONNECT,
    link::Link,
    server::{Claim, Server},
    trouble::Trouble,
};

/// Pauses between attempts to connect: at first, and at most. Together with a retry of the journal they are well within the
/// second in which others do not read yet what this process may still have to invalidate.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(200));

/// Between two looks at a server that was found wrong: it may be wrong for a while.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often a server is asked to track that has refused to.
const TRACK_AGAIN: Duration = Duration::from_secs(30);

/// How often a connection for look-ups is tried to be opened where there is none.
const LANE_AGAIN: Duration = Duration::from_secs(30);

/// Whom a task follows.
enum Whom {
    /// The one server that there is, wherever it is now.
    TheServer,
    /// A node of a cluster, to be reached like this seed.
    #[cfg(feature = "redis-cluster")]
    Node(String, Box<ConnectionInfo>),
}

impl Whom {
    fn name(&self) -> &str {
        match self {
            Self::TheServer => "redis",
            #[cfg(feature = "redis-cluster")]
            Self::Node(address, _) => address,
        }
    }

    async fn connect(&self, link: &Link) -> Result<(Server, Claim), Trouble> {
        let (info, is_cluster) = match self {
            Self::TheServer => (link.address.server().await?, false),
            #[cfg(feature = "redis-cluster")]
            Self::Node(address, seed) => (Some(super::server::node(address, seed)?), true),
        };
        let info = info.ok_or_else(|| Trouble::silent("no address"))?;
        Server::connect(info, &link.terms, is_cluster, link.held.as_ref()).await
    }
}

/// Watches the servers, for as long as anybody holds the link.
pub(super) async fn watch(link: Weak<Link>) {
    #[cfg(feature = "redis-cluster")]
    if let Some(Address::Cluster(seeds)) = link.upgrade().map(|link| link.address.clone()) {
        return cluster(link, seeds).await;
    }
    follow(link, Whom::TheServer).await;
}

/// A task for each master of a cluster, as the masters themselves say which there are.
#[cfg(feature = "redis-cluster")]
async fn cluster(link: Weak<Link>, seeds: Vec<ConnectionInfo>) {
    use std::collections::BTreeMap;

    let mut tasks: BTreeMap<String, tokio::task::AbortHandle> = BTreeMap::new();
    let mut all = tokio::task::JoinSet::new();
    while let Some(strong) = link.upgrade() {
        let wanted = strong.masters();
        for address in &wanted {
            if !tasks.contains_key(address) {
                let node = Whom::Node(address.clone(), Box::new(seeds[0].clone()));
                tasks.insert(address.clone(), all.spawn(follow(link.clone(), node)));
            }
        }
        tasks.retain(|address, task| {
            let is_wanted = wanted.contains(address);
            if !is_wanted {
                task.abort();
            }
            is_wanted
        });
        // Each time: a task that is stopped in the midst of something may still tell of its node afterwards.
        strong.keep(&wanted);
        while all.try_join_next().is_some() {}
        let pause = strong.terms.heartbeat.min(RECONNECT.0);
        drop(strong);
        sleep(pause).await;
    }
}

/// Connects to one server, again and again.
async fn follow(link: Weak<Link>, whom: Whom) {
    let name = whom.name();
    let mut pause = Duration::ZERO;
    while let Some(strong) = link.upgrade() {
        let connected = timeout(CONNECT * 2, whom.connect(&strong)).await;
        let connected = connected.unwrap_or_else(|_| Err(Trouble::silent("cannot connect in time")));
        let outage = strong.had_outage(name);
        if let (true, Ok((server, _))) = (outage, &connected) {
            server.settle(strong.settle);
        }
        drop(strong);
        let trouble = match connected {
            Ok((server, claim)) => {
                let trouble = tend(&link, name, &Arc::new(server), claim).await;
                // Whoever was up a moment ago is looked for at once.
                pause = Duration::ZERO;
                trouble
            }
            Err(trouble) => Some(trouble),
        };
        let (Some(strong), Some(trouble)) = (link.upgrade(), trouble) else { return };
        strong.lost(name, trouble);
        drop(strong);
        sleep(pause).await;
        pause = (pause * 2).clamp(RECONNECT.0, RECONNECT.1);
    }
}

/// Beats until the server is lost, and says why; or until nobody needs it.
async fn tend(link: &Weak<Link>, name: &str, server: &Arc<Server>, claim: Claim) -> Option<Trouble> {
    #[cfg(feature = "redis-cluster")]
    link.upgrade()?.learn(claim.masters);
    #[cfg(not(feature = "redis-cluster"))]
    drop(claim);
    if link.upgrade()?.fences() {
        let _ = timeout(CONNECT, server.try_scripts()).await;
    }
    let mut untracked: Option<(Trouble, Instant)> = None;
    let (mut refuses, mut sought) = (false, None);
    loop {
        let strong = link.upgrade()?;
        let begin = Instant::now();
        let beat = timeout(strong.terms.heartbeat * 2, server.beat(&strong.terms)).await;
        match beat.unwrap_or_else(|_| Err(Trouble::silent("a heartbeat was not answered"))) {
            Ok(beat) => {
                if std::mem::take(&mut refuses) {
                    server.settle(strong.settle);
                }
                if beat.unreadable.is_some() || beat.degraded.is_some() {
                    server.refusals.forget();
                }
                track(&strong, server, &mut untracked).await;
                open_lane(&strong, server, &mut sought).await;
                strong.up(name, server, beat, untracked.as_ref().map(|(trouble, _)| trouble.clone()));
            }
            Err(trouble) => {
                server.doubt();
                if !trouble.is_refusal() {
                    return Some(trouble);
                }
                refuses = true;
                server.refusals.forget();
                strong.lost(name, trouble);
            }
        }
        let heartbeat = strong.terms.heartbeat;
        drop(strong);
        let _ = timeout(heartbeat.saturating_sub(begin.elapsed()), server.wrong()).await;
        sleep(LOOK_AGAIN.min(heartbeat)).await;
    }
}

/// Lets the server tell what others drop, once some type wants to know.
async fn track(link: &Link, server: &Server, untracked: &mut Option<(Trouble, Instant)>) {
    let is_wanted = link.held.as_ref().is_some_and(|held| held.is_wanted());
    let waits = untracked.as_ref().is_some_and(|(_, since)| since.elapsed() < TRACK_AGAIN);
    if !is_wanted || server.tracks() || waits {
        return;
    }
    let tracked = timeout(link.terms.heartbeat * 2, server.track(&link.terms)).await;
    *untracked = match tracked.unwrap_or_else(|_| Err(Trouble::silent("CLIENT TRACKING was not answered"))) {
        Ok(()) => None,
        Err(trouble) => Some((trouble, Instant::now())),
    };
}

/// Opens a connection for look-ups: before anything is asked, and later, if it was not to be had, without holding up
/// heartbeats.
async fn open_lane(link: &Link, server: &Server, sought: &mut Option<Instant>) {
    let is_due = sought.is_none_or(|at| at.elapsed() >= LANE_AGAIN);
    if is_due && server.lane().is_none() {
        let within = if sought.is_none() { CONNECT / 2 } else { link.terms.heartbeat.min(CONNECT) / 2 };
        server.open_lane(&link.terms, within).await;
        *sought = Some(Instant::now());
    }
}
