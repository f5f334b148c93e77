//! The one who loads a key: what came of it is given to those who wait, and stored.

use std::sync::Arc;

use http::HeaderName;
use tokio::runtime::Handle;

use super::{
    Engine, Inside,
    flight::{Flight, Landed},
    stale::Stale,
};
use crate::{
    catalog::{Lifetime, Policy},
    clock::Millis,
    key::{Key, Tag},
    store::{Entry, Mark, Payload, Stamp},
};

/// The right and the duty to load a key. Dropped unfinished (an error, a panic), it lets its followers try again.
pub(crate) struct Leader {
    pub(super) engine: Arc<Engine>,
    pub(super) key: Key,
    /// The key without request headers that responses turned out to vary by.
    pub(crate) primary: Key,
    pub(super) flight: Arc<Flight>,
    /// The flights whose calls this one is a part of.
    pub(super) inside: Inside,
    /// Under which generations the values were valid that the result is made of.
    pub(super) parts: Vec<Stamp>,
    /// How many of the flight's tags the request names; the rest an earlier response declared.
    pub(super) named: usize,
    pub(super) mark: Mark,
    pub(super) policy: Box<Policy>,
    /// What was stored when it began, if anything was.
    pub(super) stale: Option<Stale>,
    /// Its responses have turned out to be for nobody else.
    pub(crate) unshared: bool,
    /// Until when it is remembered by which headers its responses vary, and whether this one says all of that again.
    pub(crate) known: Option<(Millis, bool)>,
    pub(super) landed: bool,
    /// Whether other processes wait for it.
    pub(super) claimed: bool,
}

impl Leader {
    /// What was stored when it began, and was not fresh or not wanted.
    pub(crate) fn stale(&self) -> Option<&Stale> {
        self.stale.as_ref()
    }

    /// The tags that the request names.
    pub(crate) fn tags(&self) -> impl Iterator<Item = &Tag> {
        self.flight.tags()[..self.named].iter()
    }

    /// The result is made of values that were stored under these generations.
    pub(crate) fn made_of(mut self, parts: Vec<Stamp>) -> Self {
        self.parts = parts;
        self
    }

    /// Makes an entry of what was loaded and gives it to the followers. `late` are tags that only the response
    /// declares, and `varied` says which request headers it depends on, and under which key it is stored for it. `None`
    /// if one of the tags may have been dropped since the load began: then the response is good for nobody but its own
    /// request.
    pub(crate) async fn seal(
        self,
        payload: Payload,
        late: Vec<Tag>,
        life: Lifetime,
        varied: Option<(Box<[HeaderName]>, Key)>,
    ) -> Option<Sealed> {
        let tags = self.flight.tags();
        let mut declared: Vec<Tag> = vec![];
        for tag in late {
            if !tags[..self.named].contains(&tag) && !declared.contains(&tag) {
                declared.push(tag);
            }
        }
        if declared != tags[self.named..] {
            self.engine.remember_late(&self.key, &declared);
        }
        // What an earlier response declared and this one does not is none of its tags.
        let of_entry = self.flight.stamps().enumerate().filter(|(i, s)| *i < self.named || declared.contains(&s.tag));
        let mut stamps: Vec<_> = of_entry.map(|(_, stamp)| stamp).collect();
        declared.retain(|tag| !tags.contains(tag));
        if !declared.is_empty() {
            let proven = self.engine.store.extend(self.mark, &declared).await.ok().flatten();
            let generations = proven?;
            stamps.extend(declared.into_iter().zip(generations).map(|(tag, generation)| Stamp { tag, generation }));
        }
        // A part may be older than its tag's generation: of a tier that has not heard of the write yet.
        let is_older = |part: &Stamp| stamps.iter().any(|s| s.tag == part.tag && s.generation != part.generation);
        if self.parts.iter().any(is_older) {
            return None;
        }
        let entry = Entry::new(payload, stamps.into(), self.flight.began(), life);
        let entry = Arc::new(Entry { varied, ..entry });
        self.flight.land(Landed::Done(entry.clone()));
        Some(Sealed { entry, leader: self })
    }

    /// The response is its own request's alone: the followers call the origin at once, each for itself.
    pub(crate) fn unshareable(mut self) {
        self.engine.remember_unshared(&self.key);
        self.land(Landed::Unshareable);
    }

    /// Those who wait need not wait for the end of it: each calls the origin for itself. What comes of it is stored all the same.
    pub(crate) fn let_go(&mut self) {
        self.land(Landed::Alone);
    }

    /// The same, but the next one may be another: who waits tries again, together.
    pub(crate) fn decline(mut self) {
        self.land(Landed::Unshareable);
    }

    pub(super) fn land(&mut self, how: Landed) {
        if !std::mem::replace(&mut self.landed, true) {
            self.flight.land(how);
            self.engine.flights.remove(&self.key, &self.flight);
            if let (true, Ok(runtime)) = (self.claimed, Handle::try_current()) {
                let (engine, key) = (self.engine.clone(), self.key.clone());
                self.engine.spawn_on(async move { engine.store.release(&key).await }, &runtime);
            }
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.land(Landed::Failed);
    }
}

/// An entry that has been shared and not yet stored. The flight goes on until it is, so that nobody falls between.
pub(crate) struct Sealed {
    pub(crate) entry: Arc<Entry>,
    leader: Leader,
}

impl Sealed {
    /// Under which it is stored.
    pub(crate) fn key(&self) -> &[u8] {
        let varied = self.entry.varied.as_ref().map(|(_, key)| key);
        varied.unwrap_or(&self.leader.key).as_bytes()
    }

    /// Whether it will be stored: not while a write is under way, nor when it took longer to load than it may be kept.
    pub(crate) fn is_kept(&self) -> bool {
        let is_fenced = self.entry.stamps.iter().any(|stamp| stamp.generation.is_fenced());
        !is_fenced && self.entry.keep_until > self.leader.engine.now()
    }

    pub(crate) async fn store(mut self) {
        if !self.is_kept() {
            return;
        }
        let Leader { engine, policy, .. } = &self.leader;
        let (tier, now) = (policy.tier(), engine.now());
        let mut filled = Ok(());
        match &self.entry.varied {
            None => filled = engine.store.fill(&self.leader.key, self.entry.clone(), tier, now).await,
            // First the response, then what leads to it.
            Some((names, key)) => {
                for (key, entry) in [
                    (key, self.entry.clone()),
                    (&self.leader.primary, Arc::new(self.entry.marker(names, self.leader.known))),
                ] {
                    filled = filled.and(engine.store.fill(key, entry, tier, now).await);
                }
            }
        }
        if let Err(error) = filled {
            tracing::debug!(%error, "entry not stored");
        }
        self.leader.land(Landed::Done(self.entry));
    }
}
