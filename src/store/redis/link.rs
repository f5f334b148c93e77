//! The connection to Redis: one multiplexed connection (or one to each master of a cluster), watched and replaced when it
//! dies.
//!
//! The client library waits for lost connections beyond its own time-outs and keeps blackholed ones for ever, so this
//! does neither. While there is no connection, calls fail at once; a connection that was dropped, or that answered three
//! calls in a row with silence, or that misses a heartbeat, is given up, and a task makes a new one.
//!
//! Each connection has a *space*: a prefix of all keys that holds the server's run id. A server that was restarted, or
//! taken over from, may have forgotten invalidations; what it held is in another space then, and is never read again.

use std::{
    fmt,
    sync::{
        Arc, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use redis::{
    AsyncConnectionConfig, RedisError, Value,
    aio::{AsyncPushSender, MultiplexedConnection},
};
use tokio::{runtime::Handle, sync::Notify, time::timeout};

use super::{address::Address, tracker::Held};
use crate::store::StoreError;

/// How long one attempt to connect may take.
pub(super) const CONNECT: Duration = Duration::from_millis(500);

/// Pauses between attempts.
pub(super) const RECONNECT: Duration = Duration::from_millis(100);

/// The heartbeat of the connection; one that is not answered within the next is the last.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// After this many calls in a row without an answer, the connection is given up.
const MAX_SILENT: u32 = 3;

/// Where the keys of a tenant are.
#[derive(Clone)]
pub(super) struct Line {
    pub(super) connection: MultiplexedConnection,
    /// What tells the generations of this server from the same bytes on another that took over from it; 0 where the
    /// space does that.
    pub(super) run: u128,
}

enum Lines {
    Single(Line),
    #[cfg(feature = "redis-cluster")]
    Cluster(RwLock<Arc<super::cluster::Slots>>),
}

/// A connection in use, and the space its keys are in.
pub(super) struct Session {
    lines: Lines,
    /// `prefix:run:`.
    pub(super) space: Arc<str>,
    /// Before this, nothing is read: processes that could not deliver invalidations have this long to do so now.
    settled: Instant,
    silent: AtomicU32,
    wrong: Notify,
}

impl Session {
    /// Where the keys of a tenant are; `tenant` as it is in keys, with its braces.
    pub(super) fn line(&self, tenant: &[u8]) -> Result<Line, StoreError> {
        let _ = tenant;
        match &self.lines {
            Lines::Single(line) => Ok(line.clone()),
            #[cfg(feature = "redis-cluster")]
            Lines::Cluster(slots) => {
                let slots = slots.read().unwrap_or_else(PoisonError::into_inner).clone();
                slots.line(tenant).ok_or_else(|| StoreError::unreachable("no node is known to serve this slot"))
            }
        }
    }

    /// Tells the watch that it is wrong about who serves what.
    pub(super) fn look_again(&self) {
        self.wrong.notify_one();
    }

    /// Until somebody has found the watch wrong.
    #[cfg(feature = "redis-cluster")]
    pub(super) async fn wrong(&self) {
        self.wrong.notified().await;
    }

    /// Whether that changes anything.
    #[cfg(feature = "redis-cluster")]
    pub(super) fn publish(&self, new: super::cluster::Slots) -> bool {
        let Lines::Cluster(slots) = &self.lines else { return false };
        let mut slots = slots.write().unwrap_or_else(PoisonError::into_inner);
        let changed = **slots != new;
        *slots = Arc::new(new);
        changed
    }
}

/// The link to one Redis, shared by everything that talks to it.
pub(super) struct Link {
    pub(super) address: Address,
    pub(super) options: LinkOptions,
    session: RwLock<Option<Arc<Session>>>,
    started: AtomicBool,
    /// Wakes the task that connects, and whoever waits for the first connection.
    lost: Notify,
    found: Notify,
    ever: AtomicBool,
    /// What this process holds, which the watch over a cluster's masters keeps coherent.
    #[cfg(feature = "redis-cluster")]
    pub(super) held: Option<Weak<Held>>,
}

#[derive(Clone, Debug)]
pub(super) struct LinkOptions {
    pub(super) prefix: String,
    /// Whether what a restarted server holds is trusted.
    pub(super) trust_restarted: bool,
    /// How long nothing is read after an outage.
    pub(super) settle: Duration,
    /// How often the masters of a cluster are asked.
    #[cfg(feature = "redis-cluster")]
    pub(super) heartbeat: Duration,
}

impl Link {
    pub(super) fn new(address: Address, options: LinkOptions, held: Option<&Arc<Held>>) -> Arc<Self> {
        #[cfg(not(feature = "redis-cluster"))]
        let _ = held;
        Arc::new(Self {
            address,
            options,
            session: RwLock::new(None),
            started: AtomicBool::new(false),
            lost: Notify::new(),
            found: Notify::new(),
            ever: AtomicBool::new(false),
            #[cfg(feature = "redis-cluster")]
            held: held.map(Arc::downgrade),
        })
    }

    /// Starts the task that connects, once there is a runtime for it.
    pub(super) fn start(self: &Arc<Self>) {
        if self.started.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.started.swap(true, Ordering::AcqRel) {
            runtime.spawn(supervise(Arc::downgrade(self)));
        }
    }

    pub(super) fn session(&self) -> Option<Arc<Session>> {
        self.session.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The session to read with; fails at once when there is none, but waits for the very first.
    pub(super) async fn connected(self: &Arc<Self>) -> Result<Arc<Session>, StoreError> {
        self.start();
        if let Some(session) = self.session() {
            return Ok(session);
        }
        if !self.ever.load(Ordering::Acquire) {
            let found = self.found.notified();
            if self.session().is_none() && !self.ever.load(Ordering::Acquire) {
                found.await;
            }
        }
        self.session().ok_or_else(|| StoreError::unreachable("no connection to Redis"))
    }

    /// The same, once an outage is long enough over to believe what is read.
    pub(super) async fn settled(self: &Arc<Self>) -> Result<Arc<Session>, StoreError> {
        let session = self.connected().await?;
        if session.settled > Instant::now() {
            return Err(StoreError::unreachable("Redis has only just come back"));
        }
        Ok(session)
    }

    /// Makes one call, and learns from its outcome whether the connection lives. Should the future be dropped, by a time
    /// budget for instance, that counts as silence.
    pub(super) async fn call<T>(
        &self,
        session: &Arc<Session>,
        call: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, StoreError> {
        let mut watch = Watch { link: self, session, answered: false };
        let result = call.await;
        watch.answered = !matches!(&result, Err(error) if error.is_timeout());
        drop(watch);
        match result {
            Ok(value) => Ok(value),
            Err(error) if error.is_io_error() || error.is_unrecoverable_error() || error.is_connection_dropped() => {
                self.give_up(session, &error);
                Err(StoreError::unreachable(error))
            }
            Err(error) if error.is_cluster_error() => {
                session.look_again();
                Err(StoreError::unreachable(error))
            }
            Err(error) => Err(StoreError::new(error)),
        }
    }

    fn give_up(&self, session: &Arc<Session>, why: &dyn fmt::Display) {
        // A cluster's nodes are watched one by one.
        #[cfg(feature = "redis-cluster")]
        if matches!(session.lines, Lines::Cluster(_)) {
            return;
        }
        let mut current = self.session.write().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|s| Arc::ptr_eq(s, session)) {
            tracing::warn!(%why, "lost the connection to Redis: serving from the origin");
            *current = None;
            self.lost.notify_one();
        }
    }

    async fn connect(&self) -> Result<(Lines, Arc<str>), RedisError> {
        #[cfg(feature = "redis-cluster")]
        if self.address.is_cluster() {
            // Any node may serve a slot, now or later: there the run is part of each generation.
            let space = format!("{}:0:", self.options.prefix).into();
            return Ok((Lines::Cluster(RwLock::default()), space));
        }
        let client = self.address.client().await?;
        // Every call over it has a time budget already, and one timer is enough.
        let config = connection_config().set_response_timeout(None);
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let space = self.space(&mut connection).await?;
        Ok((Lines::Single(Line { connection, run: 0 }), space))
    }

    /// The prefix of all keys on this server.
    pub(super) async fn space(&self, connection: &mut MultiplexedConnection) -> Result<Arc<str>, RedisError> {
        let run = if self.options.trust_restarted { None } else { run_id(connection).await? };
        Ok(format!("{}:{}:", self.options.prefix, run.as_deref().unwrap_or("0")).into())
    }
}

/// The first digits of the server's run id; `None` if it does not say.
pub(super) async fn run_id(connection: &mut MultiplexedConnection) -> Result<Option<String>, RedisError> {
    let info: Result<String, _> = redis::cmd("INFO").arg("server").query_async(connection).await;
    match info {
        Ok(info) => Ok(info
            .lines()
            .find_map(|line| line.strip_prefix("run_id:"))
            .map(|id| id.trim().chars().take(12).collect())),
        Err(error) if error.is_io_error() || error.is_timeout() || error.is_unrecoverable_error() => Err(error),
        Err(error) => {
            tracing::warn!(%error, "Redis does not tell its run id: restarts go unnoticed");
            Ok(None)
        }
    }
}

pub(super) fn connection_config() -> AsyncConnectionConfig {
    // Every call has a budget of its own; this one only keeps dead requests from piling up.
    AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(Some(CONNECT * 4))
}

pub(super) fn push_config(sender: impl AsyncPushSender) -> AsyncConnectionConfig {
    connection_config().set_push_sender(sender)
}

/// Counts a call that got no answer, however it ended.
struct Watch<'a> {
    link: &'a Link,
    session: &'a Arc<Session>,
    answered: bool,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if self.answered {
            self.session.silent.store(0, Ordering::Relaxed);
        } else if self.session.silent.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_SILENT {
            self.link.give_up(self.session, &"three calls in a row were not answered");
        }
    }
}

/// Connects, watches, and connects anew, for as long as anybody holds the link.
async fn supervise(link: Weak<Link>) {
    let mut failed = false;
    loop {
        let Some(strong) = link.upgrade() else { return };
        let result = timeout(CONNECT, strong.connect()).await;
        match result {
            Ok(Ok((lines, space))) => {
                let outage = failed || strong.ever.load(Ordering::Acquire);
                let settle = if outage { strong.options.settle } else { Duration::ZERO };
                let settled = Instant::now() + settle;
                let session =
                    Arc::new(Session { lines, space, settled, silent: AtomicU32::new(0), wrong: Notify::new() });
                *strong.session.write().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
                strong.ever.store(true, Ordering::Release);
                strong.found.notify_waiters();
                if outage {
                    tracing::info!("connected to Redis again");
                }
                failed = false;
                drop(strong);
                if !watch(&link, &session).await {
                    return;
                }
            }
            other => {
                if !failed {
                    match other {
                        Ok(Err(error)) => tracing::warn!(%error, "cannot connect to Redis: serving from the origin"),
                        _ => tracing::warn!("cannot connect to Redis in time: serving from the origin"),
                    }
                }
                failed = true;
                strong.ever.store(true, Ordering::Release);
                strong.found.notify_waiters();
                drop(strong);
                tokio::time::sleep(RECONNECT).await;
            }
        }
    }
}

/// Beats until the session is lost (true) or nobody needs it (false).
async fn watch(link: &Weak<Link>, session: &Arc<Session>) -> bool {
    #[cfg(feature = "redis-cluster")]
    if let Some(Address::Cluster(seeds)) = link.upgrade().map(|link| link.address.clone()) {
        super::cluster::watch(link, session, &seeds).await;
        return false;
    }
    loop {
        let Some(strong) = link.upgrade() else { return false };
        if !strong.session().is_some_and(|s| Arc::ptr_eq(&s, session)) {
            return true;
        }
        let Ok(Line { mut connection, .. }) = session.line(b"") else { return true };
        let ping = redis::cmd("PING");
        let beat = async { strong.call(session, ping.query_async::<Value>(&mut connection)).await };
        if timeout(HEARTBEAT, beat).await.is_err() {
            strong.give_up(session, &"a heartbeat was not answered");
        }
        let lost = strong.lost.notified();
        let _ = timeout(HEARTBEAT, lost).await;
    }
}
