//! The one who loads a key: what came of it is given to those who wait, and stored.

use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::HeaderName;
use pin_project_lite::pin_project;
use tokio::runtime::Handle;

use super::{
    Engine, Inside,
    flight::{Flight, Landed},
    learned::{self, is_same},
    stale::Stale,
};
use crate::{
    catalog::{Learned, Lifetime, Policy},
    clock::Millis,
    key::{Key, Tag},
    store::{Entry, Payload, Stamp},
    sync::RandomState,
};

/// Gives its flight the generations that there were none of.
pub(super) type Making = Pin<Box<dyn Future<Output = ()> + Send>>;

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
    /// The origin has said that what was stored is still what it would say.
    pub(super) confirmed: bool,
    /// What makes the generations that there were none of, once it has begun.
    pub(super) making: Option<Making>,
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
    /// What only the response declares, if that was not known.
    pub(super) declares: Option<Vec<Tag>>,
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

    /// The origin has confirmed what was stored.
    pub(crate) fn confirmed(mut self) -> Self {
        self.confirmed = true;
        self
    }

    /// Whether the store has yet to say under which generations a result is stored that declares these tags as well.
    pub(crate) fn is_open_with(&self, late: &[Tag]) -> bool {
        let tags = self.flight.tags();
        let any_new = || {
            let known: HashSet<_, RandomState> = tags.iter().collect();
            late.iter().any(|tag| !known.contains(tag))
        };
        // In process it says so at once.
        self.is_open() || self.engine.is_shared() && late != &tags[self.named..] && any_new()
    }

    /// The same without them.
    pub(super) fn is_open(&self) -> bool {
        self.flight.capture().is_open()
    }

    /// What is still to be done for that.
    pub(super) fn making(&mut self) -> Option<&mut Making> {
        if !self.is_open() {
            return None;
        }
        let begin = || -> Making {
            let (store, flight) = (self.engine.store.clone(), self.flight.clone());
            Box::pin(async move { flight.make_absent(&*store).await })
        };
        Some(self.making.get_or_insert_with(begin))
    }

    /// Makes an entry of what was loaded and gives it to the followers. `late` are tags that only the response
    /// declares, and `varied` says which request headers it depends on, and under which key it is stored for it. `None`
    /// if one of the late tags may have been dropped since the load began: then the response is good for nobody but its own
    /// request. If what was absent may have been, it is good for those who wait, and [not kept](Sealed::is_kept).
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    pub(crate) fn seal(
        mut self,
        payload: Payload,
        late: Vec<Tag>,
        life: Lifetime,
        varied: Option<(Box<[HeaderName]>, Key)>,
    ) -> impl Future<Output = Option<Sealed>> + Send {
        async move {
            let stamps = self.stamps(late).await?;
            // A part may be older than its tag's generation: of a tier that has not heard of the write yet.
            if is_older(&self.parts, &stamps) {
                return None;
            }
            let poll = self.poll(&payload, &life, varied.as_ref().map(|(_, key)| key));
            let (life, learned) = self.learn(poll.as_ref(), life);
            let entry = Entry::new(payload, stamps.into(), self.flight.began(), life);
            let entry = Arc::new(Entry { varied: varied.map(Box::new), learned, ..entry });
            self.flight.land(Landed::Done(entry.clone()));
            Some(Sealed { entry, drifted: poll.and_then(|poll| poll.change), leader: self })
        }
    }

    /// What its entry has: the tags that the request names, and those that the response declares, under the generations from before
    /// the load.
    async fn stamps(&mut self, late: Vec<Tag>) -> Option<Vec<Stamp>> {
        if let Some(making) = self.making() {
            making.await;
        }
        let (tags, stamps) = (self.flight.tags(), self.flight.stamps()?);
        if late == tags[self.named..] {
            return Some(stamps.collect());
        }
        let (named, known) = tags.split_at(self.named);
        let mut seen: HashSet<_, RandomState> = named.iter().collect();
        let declared: Vec<_> = late.iter().filter(|tag| seen.insert(tag)).collect();
        if !declared.iter().copied().eq(known) {
            self.declares = Some(declared.iter().copied().cloned().collect());
        }
        // What an earlier response declared and this one does not is none of its tags.
        let mut stamps: Vec<_> = stamps.filter(|stamp| seen.contains(&stamp.tag)).collect();
        let known: HashSet<_, RandomState> = known.iter().collect();
        let new: Vec<_> = declared.into_iter().filter(|tag| !known.contains(tag)).cloned().collect();
        if !new.is_empty() {
            let generations = self.engine.store.extend(self.flight.capture().mark(), &new).await.ok().flatten()?;
            stamps.extend(new.into_iter().zip(generations).map(|(tag, generation)| Stamp { tag, generation }));
        }
        Some(stamps)
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
            if self.claimed
                && let Ok(runtime) = Handle::try_current()
            {
                let (engine, key) = (self.engine.clone(), self.key.clone());
                self.engine.spawn_on(async move { engine.store.release(&key).await }, &runtime);
            }
        }
    }
}

impl Leader {
    /// What this load says of what it replaces, if anything: of the same variant, and not dropped.
    pub(super) fn poll(&self, payload: &Payload, life: &Lifetime, varied: Option<&Key>) -> Option<learned::Poll> {
        let stale = self.stale.as_ref().filter(|stale| life.is_mapped && !stale.invalidated)?;
        if varied.is_some_and(|key| *key != self.key) || self.flight.is_fenced() {
            return None;
        }
        let made = self.flight.began().saturating_sub(u64::try_from(life.age.as_millis()).unwrap_or(Millis::MAX));
        // The same moment, or an earlier one, is no second look.
        let interval = made.checked_sub(stale.entry.created).filter(|interval| *interval > 0)?;
        let is_same = self.confirmed || is_same(&stale.entry.payload, payload, &self.policy.ignored_headers)?;
        let change = (!is_same).then(|| stale.entry.clone());
        Some(learned::Poll { interval: Duration::from_millis(interval), change })
    }

    /// How long to keep what is loaded, and what is known of its key: what was known, and what this load tells. A write that
    /// dropped it says nothing of other changes, and nothing is forgotten for it.
    pub(super) fn learn(&self, poll: Option<&learned::Poll>, life: Lifetime) -> (Lifetime, Option<Learned>) {
        let Some(bounds) = self.policy.ttl.bounds().filter(|_| life.is_mapped) else { return (life, None) };
        let types = &self.engine.types;
        let of = self.tags().find(|tag| tag.is_all());
        let known = self.stale.as_ref().and_then(|stale| stale.entry.learned).filter(|known| known.polls > 0.0);
        let mut learned = known.unwrap_or_else(|| types.seed(of));
        if let Some(poll) = poll {
            learned = learned.polled(poll.change.is_some(), poll.interval, &bounds);
            types.add(of, poll, &bounds);
        }
        let ttl = learned.ttl(&bounds);
        // Else nothing would be learned of what is asked for less often than it expires.
        let kept = bounds.max.saturating_sub(ttl).max(ttl);
        let own = self.policy.shortened(ttl);
        let fresh = Some(life.fresh.map_or(own, |fresh| fresh.min(own)));
        (Lifetime { fresh, validate: life.validate.max(kept), ..life }, Some(learned))
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.land(Landed::Failed);
        // Not before its flight has ended: who comes meanwhile knows as much as it did, and joins it.
        if let Some(late) = self.declares.take() {
            self.engine.remember_late(&self.key, late.iter());
        }
    }
}

pin_project! {
    /// A load, and beside it what makes the generations that there were none of.
    pub(crate) struct Beside<'a, F> {
        leader: Option<&'a mut Leader>,
        #[pin]
        load: F,
    }
}

/// Polls a part of a load, and beside it what is still to be done so that its result can be stored.
pub(crate) fn beside<F: Future>(leader: Option<&mut Leader>, load: F) -> Beside<'_, F> {
    Beside { leader, load }
}

impl<F: Future> Future for Beside<'_, F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let output = this.load.poll(cx);
        // For what is there at once nothing is done before its client has it.
        if output.is_pending()
            && let Some(leader) = this.leader.as_deref_mut()
            && let Some(making) = leader.making()
            && making.as_mut().poll(cx).is_ready()
        {
            leader.making = None;
        }
        output
    }
}

/// An entry that has been shared and not yet stored. The flight goes on until it is, so that nobody falls between.
pub(crate) struct Sealed {
    pub(crate) entry: Arc<Entry>,
    /// What it replaces, if that was another although no write had dropped it.
    #[cfg_attr(not(feature = "stats"), allow(dead_code, reason = "only who counts asks"))]
    drifted: Option<Arc<Entry>>,
    leader: Leader,
}

impl Sealed {
    /// Under which it is stored.
    pub(crate) fn key(&self) -> &[u8] {
        let varied = self.entry.varied.as_deref().map(|(_, key)| key);
        varied.unwrap_or(&self.leader.key).as_bytes()
    }

    /// Where it differs from what it replaces: tells whether that is still so when no news of a write can be on its way any more.
    #[cfg(feature = "stats")]
    pub(crate) fn drift(&self) -> Option<impl Future<Output = bool> + Send + use<>> {
        let (old, engine) = (self.drifted.clone()?, self.leader.engine.clone());
        let stamps = old.stamps.clone();
        Some(async move { engine.stays_current(&stamps).await })
    }

    /// Whether it will be stored: not while a write is under way, nor if one came before there was a generation, nor when it took
    /// longer to load than it may be kept.
    pub(crate) fn is_kept(&self) -> bool {
        let is_fenced = self.entry.stamps.iter().any(|stamp| stamp.generation.is_fenced());
        !is_fenced && self.entry.keep_until > self.leader.engine.now()
    }

    /// Whether it is stored outside this process, which takes a while: it is written, and maybe compressed, and sent.
    pub(crate) fn is_remote(&self) -> bool {
        self.leader.engine.is_shared()
    }

    pub(crate) async fn store(mut self) {
        if !self.is_kept() {
            return;
        }
        let Leader { engine, policy, .. } = &self.leader;
        let (tier, now) = (policy.tier(), engine.now());
        let mut filled = Ok(());
        match self.entry.varied.as_deref() {
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

/// Whether one of the values that something is made of is older than the generation of its tag.
fn is_older(parts: &[Stamp], stamps: &[Stamp]) -> bool {
    if parts.is_empty() {
        return false;
    }
    let now: HashMap<_, _, RandomState> = stamps.iter().map(|stamp| (&stamp.tag, stamp.generation)).collect();
    parts.iter().any(|part| now.get(&part.tag).is_some_and(|now| *now != part.generation))
}
