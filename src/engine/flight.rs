//! Single flight: concurrent misses of one key make one call.
//!
//! A request may only share a flight whose generations equal those that it has itself just read, or which has read, under the same
//! mark, that the same are absent. Else a read that began after a write could be given the response of a load that began before it.

use std::{
    collections::HashMap,
    hash::BuildHasher,
    sync::{Arc, PoisonError},
};

use tokio::time::Instant;

use super::capture::Capture;
use crate::{
    clock::Millis,
    key::{Key, Tag},
    store::{Entry, Stamp, Store},
    sync::{
        Mutex, MutexGuard, Notify,
        atomic::{AtomicBool, Ordering},
        timeout_at,
    },
};

#[cfg(all(test, shuttle))]
mod interleavings;

const SHARDS: usize = 16;

/// How a flight ended.
#[derive(Clone)]
pub(crate) enum Landed {
    Done(Arc<Entry>),
    /// The response belongs to the leader's request alone.
    Unshareable,
    /// The leader failed, panicked or vanished, or its result cannot be proven to be fresh.
    Failed,
    /// It takes too long: who has waited goes on alone, if there is nothing stale to serve.
    Overdue,
    /// It is no good to wait for: whoever comes goes on alone.
    Alone,
}

/// A load under way, and the generations it began under.
pub(crate) struct Flight {
    tags: Vec<Tag>,
    capture: Capture,
    /// What it loads is as old as this.
    began: Millis,
    /// Nobody waits longer.
    until: Instant,
    /// Those that its own call waits for.
    awaits: Mutex<Vec<Arc<Flight>>>,
    is_overdue: AtomicBool,
    landed: Mutex<Option<Landed>>,
    /// Who waits is woken in the order of their coming, so that a simulated run is the same each time.
    is_over: Notify,
}

impl Flight {
    pub(crate) fn new(tags: Vec<Tag>, capture: Capture, began: Millis, until: Instant) -> Self {
        let (awaits, is_overdue) = (Mutex::default(), AtomicBool::new(false));
        Self { tags, capture, began, until, awaits, is_overdue, landed: Mutex::default(), is_over: Notify::new() }
    }

    fn awaits(&self) -> MutexGuard<'_, Vec<Arc<Self>>> {
        self.awaits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it comes to an end only after one of these, as far as is known.
    fn needs(&self, others: &[Arc<Self>]) -> bool {
        let (mut seen, mut next) = (vec![], self.awaits().clone());
        while let Some(flight) = next.pop() {
            if others.iter().any(|other| Arc::ptr_eq(other, &flight)) {
                return true;
            }
            if !seen.iter().any(|other| Arc::ptr_eq(other, &flight)) {
                next.extend(flight.awaits().iter().cloned());
                seen.push(flight);
            }
        }
        false
    }

    pub(crate) fn tags(&self) -> &[Tag] {
        &self.tags
    }

    pub(crate) fn began(&self) -> Millis {
        self.began
    }

    pub(super) fn capture(&self) -> &Capture {
        &self.capture
    }

    /// What its result is stored under, if that is known.
    pub(crate) fn stamps(&self) -> Option<impl Iterator<Item = Stamp>> {
        let generations = self.capture.generations()?;
        Some(self.tags.iter().zip(generations).map(|(tag, g)| Stamp { tag: tag.clone(), generation: *g }))
    }

    /// Whether a write of any of its tags is under way.
    pub(crate) fn is_fenced(&self) -> bool {
        self.capture.generations().is_some_and(|all| all.iter().any(|generation| generation.is_fenced()))
    }

    /// Makes the generations that there were none of.
    pub(super) async fn make_absent(&self, store: &dyn Store) {
        let absent = self.tags.iter().zip(self.capture.absent()).filter(|(_, is_absent)| *is_absent);
        let absent: Vec<_> = absent.map(|(tag, _)| tag.clone()).collect();
        let opened = store.open(&absent).await;
        let opened = opened.inspect_err(|error| tracing::debug!(%error, "what is loaded will not be stored"));
        self.capture.settle(opened.ok());
        // Those for whom it turns out to be no good need not wait for it.
        self.is_over.notify_waiters();
    }

    /// Whether a request that has read the generations of `own` may share this flight.
    fn is_equal(&self, own: &Self) -> bool {
        self.tags == own.tags && self.capture.is_equal(&own.capture)
    }

    /// Whether that is not known yet.
    fn may_become(&self, own: &Self) -> bool {
        self.tags == own.tags && self.capture.may_become(&own.capture)
    }

    /// Not one that takes too long, nor one that came to nothing: who meets that before it is off the table leads the next.
    fn is_worth_joining(&self) -> bool {
        match *self.landed() {
            None => Instant::now() < self.until,
            Some(Landed::Failed | Landed::Unshareable) => false,
            Some(_) => true,
        }
    }

    fn landed(&self) -> MutexGuard<'_, Option<Landed>> {
        self.landed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first word counts.
    pub(crate) fn land(&self, how: Landed) {
        self.landed().get_or_insert(how);
        self.is_over.notify_waiters();
    }
}

/// The flights of this process, by key.
#[derive(Default)]
pub(crate) struct Flights([Mutex<HashMap<Key, Arc<Flight>>>; SHARDS]);

impl Flights {
    fn shard(&self, key: &Key) -> MutexGuard<'_, HashMap<Key, Arc<Flight>>> {
        let at = foldhash::fast::FixedState::default().hash_one(key.as_bytes()) as usize;
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
        let current = flights.get(key).cloned();
        let is_good = |other: &&Arc<Flight>| other.is_equal(own) && other.is_worth_joining();
        if let Some(other) = [&current, &seen].into_iter().flatten().find(is_good) {
            return Some(Follower { flight: other.clone(), own: None });
        }
        // Nobody loads twice what turns out to be the same.
        if let Some(other) = current.filter(|other| other.may_become(own) && other.is_worth_joining()) {
            return Some(Follower { flight: other, own: Some(own.clone()) });
        }
        flights.insert(key.clone(), own.clone());
        None
    }

    pub(crate) fn remove(&self, key: &Key, own: &Arc<Flight>) {
        let mut flights = self.shard(key);
        if flights.get(key).is_some_and(|f| Arc::ptr_eq(f, own)) {
            flights.remove(key);
        }
    }
}

/// A seat in another's flight, which it keeps from being forgotten.
pub(crate) struct Follower {
    flight: Arc<Flight>,
    /// Its own, to which the other has yet to turn out to be equal.
    own: Option<Arc<Flight>>,
}

impl Follower {
    pub(super) fn tags(&self) -> &[Tag] {
        self.flight.tags()
    }

    /// How it has landed. What turns out not to be equal is no good, however it lands.
    pub(super) fn landed(&self) -> Option<Landed> {
        let is_open = || self.flight.capture.is_open();
        let is_good = self.own.as_ref().is_none_or(|own| is_open() || self.flight.is_equal(own));
        if is_good { self.flight.landed().clone() } else { Some(Landed::Unshareable) }
    }

    /// Whether it is one of these, or comes to an end only after one of them.
    pub(super) fn is_needed_by(&self, inside: &[Arc<Flight>]) -> bool {
        inside.iter().any(|own| Arc::ptr_eq(own, &self.flight)) || self.flight.needs(inside)
    }

    /// Waits until it has landed, and no longer than anybody should. `inside` are the flights whose calls the caller is a part
    /// of: one of them, or one that waits for them, it must not wait for.
    pub(super) async fn wait(&self, inside: &[Arc<Flight>]) -> Landed {
        // Said before it is asked: of two that begin to wait for each other, one sees it.
        let waiting = Waiting::new(inside, &self.flight);
        if self.is_needed_by(inside) {
            return Landed::Alone;
        }
        loop {
            // What lands from here on is heard.
            let is_over = self.flight.is_over.notified();
            if self.landed().is_some() || timeout_at(self.flight.until, is_over).await.is_err() {
                break;
            }
        }
        drop(waiting);
        self.landed().unwrap_or_else(|| {
            if !self.flight.is_overdue.swap(true, Ordering::Relaxed) {
                tracing::warn!("a call takes longer than its `coalesce_timeout`: who waited for it calls alone");
            }
            Landed::Overdue
        })
    }
}

/// That the calls of some flights wait for another, until it is dropped.
struct Waiting<'a> {
    own: &'a [Arc<Flight>],
    other: &'a Arc<Flight>,
}

impl<'a> Waiting<'a> {
    fn new(own: &'a [Arc<Flight>], other: &'a Arc<Flight>) -> Self {
        own.iter().for_each(|own| own.awaits().push(other.clone()));
        Self { own, other }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        for own in self.own {
            let mut awaits = own.awaits();
            if let Some(at) = awaits.iter().position(|flight| Arc::ptr_eq(flight, self.other)) {
                awaits.swap_remove(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::{Mark, Opened};

    fn flight() -> Arc<Flight> {
        let until = Instant::now() + Duration::from_secs(60);
        let capture = Capture::opened(Opened::new(vec![], Mark(0)));
        Arc::new(Flight::new(vec![], capture, 0, until))
    }

    /// It is landed before it is taken off the table: those whom it has failed may meet it there.
    #[test]
    fn who_meets_a_flight_that_came_to_nothing_leads_the_next() {
        for nothing in [Landed::Failed, Landed::Unshareable] {
            let (flights, key, first) = (Flights::default(), Key::new(b"key".to_vec()), flight());
            assert!(flights.join_or_lead(&key, &first, None).is_none());
            first.land(nothing);
            assert!(flights.join_or_lead(&key, &flight(), Some(first.clone())).is_none());
            let other = flights.join_or_lead(&key, &flight(), Some(first)).unwrap();
            assert!(other.landed().is_none(), "all others wait for that one");
        }
    }

    /// Through others, and in circles, and no longer than anybody waits.
    #[test]
    fn who_waits_for_whom_is_known() {
        let [a, b, c, d]: [_; 4] = std::array::from_fn(|_| [flight()]);
        let first = Waiting::new(&a, &b[0]);
        let others = [Waiting::new(&b, &c[0]), Waiting::new(&c, &b[0])];
        assert!(a[0].needs(&b) && a[0].needs(&c) && !a[0].needs(&d) && !a[0].needs(&a));
        drop(first);
        assert!(!a[0].needs(&b) && b[0].needs(&c));
        drop(others);
        assert!(!b[0].needs(&c));
    }
}
