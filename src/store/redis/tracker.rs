//! How a process learns which generations others drop: Redis' server-assisted client tracking, broadcast on the prefix of
//! the generations, over a connection of its own.
//!
//! What is held in process may only be answered from while that connection is provably alive. Pushes and replies share
//! it and keep their order, so the answer to a `PING` proves that every drop before the `PING` has been heard of; that
//! proof is good for two heartbeats. After every interruption the process begins with nothing.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use redis::{PushInfo, PushKind, RedisError, Value};
use tokio::time::timeout;

use super::link::{Link, RECONNECT, push_config};
use crate::{key::Tag, store::MemoryStore};

/// What is held in process, and whether it may be answered from.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) memory: MemoryStore,
    /// Carried by everything that is held: dropped when nothing held can be trusted any more.
    pub(super) era: Tag,
    start: Instant,
    /// Milliseconds after `start` until which drops are known to have been heard of; 0 while not tracking.
    alive_until: AtomicU64,
}

impl Held {
    pub(super) fn new(memory: MemoryStore) -> Self {
        Self { memory, era: Tag(Bytes::from_static(b"{}:era")), start: Instant::now(), alive_until: AtomicU64::new(0) }
    }

    pub(super) fn is_alive(&self) -> bool {
        let until = self.alive_until.load(Ordering::Acquire);
        until > 0 && self.now() < until
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Trusts nothing that is held now.
    pub(super) fn lose(&self) {
        self.alive_until.store(0, Ordering::Release);
        self.memory.drop_local(&self.era);
    }

    /// Every drop before `since` has been heard of, which is good for so long.
    pub(super) fn prove(&self, since: Instant, good_for: Duration) {
        let since = since.saturating_duration_since(self.start);
        self.alive_until.store((since + good_for).as_millis() as u64, Ordering::Release);
    }

    /// Takes one push. It runs on the connection's own task, before any reply that came after it is handed out.
    pub(super) fn hear(&self, push: &PushInfo, prefix: &[u8]) {
        match push.kind {
            PushKind::Disconnection => self.lose(),
            PushKind::Invalidate => match push.data.first() {
                Some(Value::Array(keys)) => {
                    for key in keys {
                        let Value::BulkString(key) = key else { continue };
                        match key.strip_prefix(prefix) {
                            Some(tag) => self.memory.drop_local(&Tag(Bytes::copy_from_slice(tag))),
                            None => self.lose(),
                        }
                    }
                }
                // Everything: the database was flushed.
                _ => self.memory.drop_local(&self.era),
            },
            _ => {}
        }
    }
}

/// Tracks for as long as the store is used.
pub(super) async fn track(held: Weak<Held>, link: Weak<Link>, heartbeat: Duration) {
    loop {
        {
            let (Some(held), Some(link)) = (held.upgrade(), link.upgrade()) else { return };
            if let Ok(tracking) = Tracking::begin(&held, &link).await {
                drop((held, link));
                tracking.watch(heartbeat).await;
            }
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

struct Tracking {
    connection: redis::aio::MultiplexedConnection,
    space: Arc<str>,
    held: Weak<Held>,
    link: Weak<Link>,
}

impl Tracking {
    async fn begin(held: &Arc<Held>, link: &Arc<Link>) -> Result<Self, RedisError> {
        let refused = |what| RedisError::from((redis::ErrorKind::Client, what));
        let session = link.session().ok_or_else(|| refused("no connection yet"))?;
        let client = link.address.client().await?;
        let prefix = format!("{}g:", session.space);
        let ears = Arc::downgrade(held);
        let heard = prefix.clone().into_bytes();
        let config = push_config(move |push: PushInfo| {
            if let Some(held) = ears.upgrade() {
                held.hear(&push, &heard);
            }
            Ok::<_, std::convert::Infallible>(())
        });
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let space = link.space(&mut connection).await?;
        if space != session.space {
            return Err(refused("another server than the one in use"));
        }
        let mut tracking = redis::cmd("CLIENT");
        tracking.arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(&prefix);
        tracking.query_async::<Value>(&mut connection).await?;
        held.memory.drop_local(&held.era);
        Ok(Self { connection, space, held: Arc::downgrade(held), link: Arc::downgrade(link) })
    }

    /// Beats until the connection is silent, or the link has gone elsewhere.
    async fn watch(mut self, heartbeat: Duration) {
        while let Some(held) = self.held.upgrade() {
            let sent = Instant::now();
            let ping = redis::cmd("PING");
            let answered = timeout(heartbeat, ping.query_async::<Value>(&mut self.connection)).await;
            let session = self.link.upgrade().and_then(|link| link.session());
            if !matches!(answered, Ok(Ok(_))) || session.is_none_or(|s| s.space != self.space) {
                held.lose();
                return;
            }
            held.prove(sent, heartbeat * 2);
            drop(held);
            tokio::time::sleep(heartbeat.saturating_sub(sent.elapsed())).await;
        }
    }
}
