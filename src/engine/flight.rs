//! Single flight: concurrent misses of one key make one call.
//!
//! A request may only share a flight whose generations equal those that it has itself just read. Else a read that
//! began after a write could be given the response of a load that began before it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{
    clock::Millis,
    key::{Key, Tag},
    store::{Entry, Generation, Stamp},
};

const SHARDS: usize = 16;

/// How a flight ended.
#[derive(Clone)]
pub(crate) enum Landed {
    Done(Arc<Entry>),
    /// The response belongs to the leader's request alone.
    Unshareable,
    /// The leader failed, panicked or vanished, or its result cannot be proven to be fresh.
    Failed,
}

/// A load under way, and the generations it began under.
pub(crate) struct Flight {
    tags: Vec<Tag>,
    generations: Vec<Generation>,
    /// What it loads is as old as this.
    began: Millis,
    landed: watch::Sender<Option<Landed>>,
}

impl Flight {
    pub(crate) fn new(tags: Vec<Tag>, generations: Vec<Generation>, began: Millis) -> Self {
        Self { tags, generations, began, landed: watch::Sender::new(None) }
    }

    pub(crate) fn tags(&self) -> &[Tag] {
        &self.tags
    }

    pub(crate) fn began(&self) -> Millis {
        self.began
    }

    pub(crate) fn stamps(&self) -> impl Iterator<Item = Stamp> {
        self.tags.iter().zip(&self.generations).map(|(tag, g)| Stamp { tag: tag.clone(), generation: *g })
    }

    /// Whether a write of any of its tags is under way.
    pub(crate) fn is_fenced(&self) -> bool {
        self.generations.iter().any(|generation| generation.is_fenced())
    }

    /// Whether a request that has read the generations of `own` may share this flight.
    fn is_equal(&self, own: &Self) -> bool {
        self.tags == own.tags && self.generations == own.generations
    }

    /// The first word counts.
    pub(crate) fn land(&self, how: Landed) {
        self.landed.send_if_modified(|landed| {
            let first = landed.is_none();
            landed.get_or_insert(how);
            first
        });
    }
}

/// The flights of this process, by key.
#[derive(Default)]
pub(crate) struct Flights([Mutex<HashMap<Key, Arc<Flight>>>; SHARDS]);

impl Flights {
    fn shard(&self, key: &Key) -> MutexGuard<'_, HashMap<Key, Arc<Flight>>> {
        // Keys end in what differs most: the variant and before it the ids.
        let at = key.as_bytes().iter().fold(0usize, |sum, &b| sum.wrapping_mul(31).wrapping_add(b.into()));
        self.0[at % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flight of this key now, which the caller may not be able to share.
    pub(crate) fn current(&self, key: &Key) -> Option<Arc<Flight>> {
        self.shard(key).get(key).cloned()
    }

    /// The flight to wait for, or `None` if `own` has become the flight of this key. `seen` is the flight that there
    /// was before the caller looked the key up: it may have landed and stored its result since, which the caller then
    /// has just missed.
    pub(crate) fn join_or_lead(&self, key: &Key, own: &Arc<Flight>, seen: Option<Arc<Flight>>) -> Option<Follower> {
        let mut flights = self.shard(key);
        let other = flights.get(key).cloned().filter(|f| f.is_equal(own)).or_else(|| seen.filter(|f| f.is_equal(own)));
        if other.is_none() {
            flights.insert(key.clone(), own.clone());
        }
        other.map(|flight| Follower(flight.landed.subscribe(), flight))
    }

    pub(crate) fn remove(&self, key: &Key, own: &Arc<Flight>) {
        let mut flights = self.shard(key);
        if flights.get(key).is_some_and(|f| Arc::ptr_eq(f, own)) {
            flights.remove(key);
        }
    }
}

/// A seat in another's flight, which it keeps from being forgotten.
pub(crate) struct Follower(watch::Receiver<Option<Landed>>, Arc<Flight>);

impl Follower {
    pub(super) fn tags(&self) -> &[Tag] {
        self.1.tags()
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.1.is_fenced()
    }

    pub(super) fn landed(&self) -> Option<Landed> {
        self.0.borrow().clone()
    }

    pub(super) async fn wait(&self) -> Landed {
        match self.0.clone().wait_for(Option::is_some).await {
            Ok(landed) => landed.clone().unwrap_or(Landed::Failed),
            Err(_) => Landed::Failed,
        }
    }
}
