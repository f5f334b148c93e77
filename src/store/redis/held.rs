//! What is held in process of the entries in Redis, and whether it may be answered from.
//!
//! A tier that answers on its own ([`Tier::On`](crate::Tier::On)) learns which generations others drop by Redis'
//! server-assisted client tracking, broadcast on the prefix of the generations, over the same connections that are read
//! from. Pushes and replies share a connection and keep their order, so the answer to a heartbeat proves that every drop
//! before it has been heard of. After every interruption the process begins with nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use redis::{PushInfo, PushKind, Value};

use crate::{
    clock::{Clock, Millis},
    key::Tag,
    store::MemoryStore,
};

#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) memory: MemoryStore,
    /// Carried by everything that is answered from: dropped when nothing held can be trusted any more.
    pub(crate) era: Tag,
    /// Until when drops are known to have been heard of; 0 while they are not.
    proven_until: AtomicU64,
    clock: Clock,
    /// Whether any type wants to be answered from it at all.
    wanted: AtomicBool,
}

impl Held {
    pub(crate) fn new(memory: MemoryStore, clock: Clock) -> Self {
        Self {
            memory,
            clock,
            era: Tag(Bytes::from_static(b"{}:era")),
            proven_until: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
        }
    }

    /// Whether it may be answered from now.
    pub(crate) fn is_alive(&self) -> bool {
        let until = self.proven_until.load(Ordering::Acquire);
        // Where nothing is proven, as where nobody wants it, nobody looks at the clock.
        until != 0 && self.clock.now() < until
    }

    /// Some type wants it; whether that is new.
    pub(crate) fn want(&self) -> bool {
        !self.wanted.load(Ordering::Relaxed) && !self.wanted.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Trusts nothing that is held now.
    pub(crate) fn lose(&self) {
        self.proven_until.store(0, Ordering::Release);
        self.memory.drop_local(&self.era);
    }

    /// Every drop has been heard of that was made before this was proven, which is good until then.
    pub(crate) fn prove(&self, until: Millis) {
        self.proven_until.store(until, Ordering::Release);
    }

    /// Takes one push. It runs on the connection's own task, before any reply that came after it is handed out.
    pub(crate) fn hear(&self, push: &PushInfo, prefix: &[u8]) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn push(kind: PushKind, key: Option<&str>) -> PushInfo {
        let data = key.map(|key| Value::Array(vec![Value::BulkString(key.into())]));
        PushInfo { kind, data: data.into_iter().collect() }
    }

    #[test]
    fn what_was_held_before_a_gap_is_not_answered() {
        let invalidates = |key| push(PushKind::Invalidate, key);
        for (push, is_alive) in [
            (invalidates(Some("cas:g:tag")), true),
            // Everything was flushed: it is dropped, and what comes now is heard of.
            (invalidates(None), true),
            // Somebody else's, though nothing else was asked for.
            (invalidates(Some("other")), false),
            (push(PushKind::Disconnection, None), false),
            (push(PushKind::Message, Some("cas:g:tag")), true),
        ] {
            let held = Held::new(MemoryStore::new(1 << 20), Clock::default());
            assert!(!held.is_alive());
            held.prove(Millis::MAX);
            held.hear(&push, b"cas:g:");
            assert_eq!(held.is_alive(), is_alive, "{push:?}");
        }
        let held = Held::new(MemoryStore::new(1 << 20), Clock::default());
        held.prove(1);
        assert!(!held.is_alive(), "what proves it has run out");
    }

    #[test]
    fn that_it_is_wanted_is_news_once() {
        let held = Held::new(MemoryStore::new(1 << 20), Clock::default());
        assert!(!held.is_wanted() && held.want());
        assert!(held.is_wanted() && !held.want());
    }
}
