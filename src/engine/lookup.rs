//! From a key to what a request has to do about it: answer, wait, or call the origin.

use std::{
    borrow::Cow,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

#[cfg(feature = "stats")]
use foldhash::fast::RandomState;
use tokio::time::Instant;
#[cfg(feature = "stats")]
use tokio::time::sleep;

use super::{
    Engine, Inside, KeyMemo, MAX_ATTEMPTS,
    capture::Capture,
    flight::{Flight, Follower, Landed},
    leader::Leader,
    stale::{Attempt, Stale},
};
use crate::{
    catalog::{Coalesce, Policy},
    clock::Millis,
    key::{Key, Tag},
    store::{Entry, Generation, Inquiry, Lookup, Stamp, StoreError},
};

/// Nobody waits longer for another's call.
const MAX_WAIT: Duration = Duration::from_secs(86_400);

/// So long after an entry was found not to be what the origin says, and again after that, it must still be valid.
#[cfg(feature = "stats")]
const GRACE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];

/// What a request has to do.
pub(super) enum Begin {
    /// Answer with this.
    Hit(Arc<Entry>),
    /// Answer with this, which another process has just loaded.
    Collapsed(Arc<Entry>),
    /// Call the origin, and tell the others.
    Lead(Leader),
    /// Wait for another's call, since whose beginning nothing has been dropped.
    Follow(Follower, Option<Stale>),
    /// Call the origin: the store cannot be asked.
    Unavailable,
}

/// What an entry is under the generations that were read with it.
pub(super) enum Validity {
    Valid,
    Invalid,
    /// It may be valid: these tags of it were not looked up.
    Unknown(Vec<Tag>),
}

/// What was found under a key, and what is known of it besides.
pub(super) struct Looked<'t> {
    began: Millis,
    memo: Option<Arc<KeyMemo>>,
    /// The flight that was under way before.
    seen: Option<Arc<Flight>>,
    /// The tags that were looked up.
    asked: Cow<'t, [Tag]>,
    found: Result<Option<Stale>, StoreError>,
    /// Their generations.
    now: Lookup,
}

impl Looked<'_> {
    /// The entry, if it is the answer. What is given back is not lent: futures keep room for what was.
    #[expect(clippy::result_large_err, reason = "it is where it is needed")]
    pub(super) fn hit(mut self, now: Millis, attempt: Attempt) -> Result<Arc<Entry>, Self> {
        let found = self.found.as_mut().ok().and_then(|found| found.take_if(|found| found.answers(now, attempt)));
        found.map(|found| found.entry).ok_or(self)
    }
}

impl Engine {
    /// Looks the key up.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    pub(super) fn look<'t>(&self, key: &Key, tags: &'t [Tag], policy: &Policy) -> impl Future<Output = Looked<'t>> {
        async move {
            let began = self.now();
            let memo = self.memos.get(key);
            let seen = self.flights.current(key);
            let mut asked = Cow::Borrowed(tags);
            let late = memo.iter().flat_map(|memo| memo.late.iter());
            late.filter(|tag| !tags.contains(tag)).for_each(|tag| asked.to_mut().push(tag.clone()));
            let (found, now) = match self.find(key, tags, &mut asked, policy, began).await {
                Ok((found, now)) => (Ok(found), now),
                Err(error) => (Err(error), Lookup::default()),
            };
            Looked { began, memo, seen, asked, found, now }
        }
    }

    /// Looks the key up, and goes on from there.
    pub(super) async fn begin(self: &Arc<Self>, key: &Key, tags: &[Tag], policy: &Policy, attempt: Attempt) -> Begin {
        let looked = self.look(key, tags, policy).await;
        self.go_on_from(looked, key, tags, policy, attempt).await
    }

    /// On a miss captures the generations and joins the flight that has [the same](Capture::is_equal), or leads one.
    pub(super) async fn go_on_from(
        self: &Arc<Self>,
        looked: Looked<'_>,
        key: &Key,
        tags: &[Tag],
        policy: &Policy,
        attempt: Attempt,
    ) -> Begin {
        let Looked { began, memo, seen, asked, found, now } = match looked.hit(self.now(), attempt) {
            Ok(entry) => return Begin::Hit(entry),
            Err(looked) => looked,
        };
        let stale = match found {
            Err(error) => return unavailable(&error),
            Ok(found) => found,
        };
        let asked = asked.into_owned();
        // Captured before the load: whatever is dropped from now on makes its result useless.
        // (A load for the fleet waits for its claim anyway.)
        let is_enough = |capture: &Capture| !capture.is_open() || policy.coalesce == Coalesce::Process;
        let capture = match Capture::looked_up(now, asked.len()).filter(is_enough) {
            Some(capture) => capture,
            None => match self.store.open(&asked).await {
                Err(error) => return unavailable(&error),
                Ok(opened) => Capture::opened(opened),
            },
        };
        // A write may have come in between: then what was found is not what is about to be replaced or confirmed.
        let stale = stale.map(|stale| {
            let is_valid = matches!(validity(&stale.entry, tags, &asked, &capture.known()), Validity::Valid);
            Stale { invalidated: stale.invalidated || !is_valid, ..stale }
        });
        let until = Instant::now() + policy.coalesce_timeout().min(MAX_WAIT);
        let flight = Arc::new(Flight::new(asked, capture, began, until));
        let mut leader = self.leader(key, tags, policy, flight, stale);
        let unshared = memo.is_some_and(|m| m.unshared_until > self.now());
        leader.unshared = unshared;
        // Under a fence nobody can tell whether the write has been acknowledged since the other's call began.
        let unshared = unshared || leader.flight.is_fenced();
        if unshared || attempt.alone || attempt.reload || attempt.failures >= MAX_ATTEMPTS {
            return Begin::Lead(leader);
        }
        self.board(leader, seen, tags, policy, attempt).await
    }

    pub(super) fn inquiry<'a>(
        &self,
        key: &'a Key,
        tags: &'a [Tag],
        required: usize,
        policy: &Policy,
        now: Millis,
    ) -> Inquiry<'a> {
        Inquiry { key, tags, required, tier: policy.tier(), longest: policy.longest(), now }
    }

    /// Asks the store. What another mapping has put there is fresh for no longer than this one lets it be.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    pub(super) fn ask<'a>(&'a self, inquiry: Inquiry<'a>) -> impl Future<Output = Result<Lookup, StoreError>> + 'a {
        async move {
            let longest = inquiry.longest;
            let found = self.store.lookup(inquiry).await?;
            Ok(Lookup { entry: found.entry.map(|entry| entry.capped(longest)), ..found })
        }
    }

    /// Reads the entry with the generations of all its tags. What it turns out to have besides is `asked` from then on.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    fn find(
        &self,
        key: &Key,
        tags: &[Tag],
        asked: &mut Cow<'_, [Tag]>,
        policy: &Policy,
        began: Millis,
    ) -> impl Future<Output = Result<(Option<Stale>, Lookup), StoreError>> {
        async move {
            let mut at = began;
            for _ in 0..2 {
                let mut now = self.ask(self.inquiry(key, asked, tags.len(), policy, at)).await?;
                let Some(entry) = now.entry.take() else { return Ok((None, now)) };
                match validity(&entry, tags, asked, &now.generations) {
                    Validity::Valid => return Ok((Some(Stale { entry, invalidated: false }), now)),
                    Validity::Invalid => return Ok((Some(Stale { entry, invalidated: true }), now)),
                    Validity::Unknown(late) => {
                        self.remember_late(key, &late);
                        asked.to_mut().extend(late);
                        at = self.now();
                    }
                }
            }
            Ok((None, Lookup::default()))
        }
    }

    fn leader(
        self: &Arc<Self>,
        key: &Key,
        tags: &[Tag],
        policy: &Policy,
        flight: Arc<Flight>,
        stale: Option<Stale>,
    ) -> Leader {
        Leader {
            engine: self.clone(),
            key: key.clone(),
            primary: key.clone(),
            flight,
            parts: vec![],
            confirmed: false,
            inside: Inside::current(),
            named: tags.len(),
            making: None,
            policy: Box::new(policy.clone()),
            stale,
            unshared: false,
            known: None,
            landed: false,
            claimed: false,
            declares: None,
        }
    }

    /// Joins the flight since whose beginning nothing was dropped, or takes off. `seen` was under way before the look-up.
    async fn board(
        &self,
        leader: Leader,
        seen: Option<Arc<Flight>>,
        tags: &[Tag],
        policy: &Policy,
        attempt: Attempt,
    ) -> Begin {
        if let Some(other) = self.flights.join_or_lead(&leader.key, &leader.flight, seen) {
            return match other.landed() {
                // What came to nothing just now fails those who have joined it, and they try again together.
                None | Some(Landed::Failed | Landed::Unshareable) => Begin::Follow(other, leader.stale.clone()),
                Some(Landed::Done(entry)) if self.is_good_after(&entry, leader.flight.tags()).await => {
                    Begin::Hit(entry)
                }
                // It is good only for those who waited: no reason to wait.
                Some(_) => Begin::Lead(leader),
            };
        }
        // A flight may have begun and landed since the look-up; its entry was stored before it was taken off the table.
        let suited = |entry: Arc<Entry>| entry.suited(tags, policy.longest());
        let there = self.peek(leader.key.as_bytes(), self.now(), suited);
        if let Some(entry) = there.filter(|entry| !attempt.refresh && attempt.takes(entry)) {
            leader.flight.land(Landed::Done(entry.clone()));
            return Begin::Hit(entry);
        }
        match policy.coalesce {
            Coalesce::Process => Begin::Lead(leader),
            Coalesce::Fleet => self.lead_fleet(leader, tags).await,
        }
    }

    /// Waits for another's call to end.
    pub(super) async fn follow(&self, flight: Follower) -> Landed {
        match flight.wait(Inside::current().flights()).await {
            Landed::Done(entry) if !self.is_proven(&entry, flight.tags()).await => Landed::Failed,
            Landed::Overdue => {
                self.overdue.fetch_add(1, Ordering::Relaxed);
                Landed::Overdue
            }
            landed => landed,
        }
    }

    /// Whether the result of a flight that has landed is good for a request that comes now: what is not to be kept is not.
    /// (Nor is what was read while a write is under way: its generations are nobody's who boards.)
    async fn is_good_after(&self, entry: &Entry, joined: &[Tag]) -> bool {
        entry.is_fresh(self.now()) && self.is_proven(entry, joined).await
    }

    /// Whether a flight's result is good for a request that joined it by these tags. Those that only the response
    /// declared may have been dropped between its landing and that request, which then could not see it.
    async fn is_proven(&self, entry: &Entry, joined: &[Tag]) -> bool {
        let late: Vec<_> = entry.places(joined).filter(|(_, at)| at.is_none()).map(|(stamp, _)| stamp).collect();
        if late.is_empty() {
            return true;
        }
        let tags: Vec<_> = late.iter().map(|s| s.tag.clone()).collect();
        let now = self.store.open(&tags).await;
        now.is_ok_and(|now| now.generations.iter().eq(late.iter().map(|s| &s.generation)))
    }
}

/// What is stored under a key.
#[cfg(feature = "stats")]
pub(crate) struct Found {
    pub(crate) entry: Arc<Entry>,
    /// The tags that it should have or has, with their generations.
    pub(crate) now: Vec<(Tag, Option<Generation>)>,
}

#[cfg(feature = "stats")]
impl Found {
    /// The tags that it lacks, or that have been dropped since its load began.
    pub(crate) fn lost(&self) -> impl Iterator<Item = &Tag> {
        let stamps = self.entry.stamps.iter().map(|stamp| (&stamp.tag, stamp.generation));
        let stamps: std::collections::HashMap<_, _, RandomState> = stamps.collect();
        let is_current = move |tag: &Tag, now: Option<Generation>| now.is_some() && stamps.get(tag).copied() == now;
        self.now.iter().filter(move |(tag, now)| !is_current(tag, *now)).map(|(tag, _)| tag)
    }
}

#[cfg(feature = "stats")]
impl Engine {
    /// Whether no tag of an entry has been dropped since its load began, and none is for as long as news of a write, or a write
    /// itself that works on after its commit, may take.
    pub(crate) async fn stays_current(&self, stamps: &[Stamp]) -> bool {
        let tags: Vec<_> = stamps.iter().map(|stamp| stamp.tag.clone()).collect();
        for grace in GRACE {
            sleep(grace).await;
            let now = self.store.open(&tags).await;
            if !now.is_ok_and(|now| now.generations.iter().eq(stamps.iter().map(|stamp| &stamp.generation))) {
                return false;
            }
        }
        true
    }

    /// Of who looks on: what is found is not held in this process for requests, which may need tags that nobody asks for here.
    fn looking_on<'a>(&self, key: &'a Key, tags: &'a [Tag], policy: &Policy) -> Inquiry<'a> {
        Inquiry { tier: crate::catalog::Tier::Off, ..self.inquiry(key, tags, tags.len(), policy, self.now()) }
    }

    /// What is stored under a key, valid or not, with the generations that its tags have now.
    pub(crate) async fn look_at(&self, key: &Key, tags: &[Tag], policy: &Policy) -> Result<Option<Found>, StoreError> {
        let mut asked = tags.to_vec();
        for _ in 0..2 {
            let found = self.ask(self.looking_on(key, &asked, policy)).await?;
            let Some(entry) = found.entry else { return Ok(None) };
            let unknown = entry.places(&asked).filter(|(_, at)| at.is_none());
            let unknown: Vec<_> = unknown.map(|(stamp, _)| stamp.tag.clone()).collect();
            if unknown.is_empty() {
                return Ok(Some(Found { entry, now: asked.into_iter().zip(found.generations).collect() }));
            }
            asked.extend(unknown);
        }
        Ok(None)
    }
}

fn unavailable(error: &StoreError) -> Begin {
    tracing::debug!(%error, "store unavailable: calling the origin");
    Begin::Unavailable
}

pub(super) fn validity(entry: &Entry, required: &[Tag], asked: &[Tag], generations: &[Option<Generation>]) -> Validity {
    // An entry of another configuration may lack tags that cascades count on now.
    if !entry.has(required) {
        return Validity::Invalid;
    }
    let mut unknown = vec![];
    for (Stamp { tag, generation }, at) in entry.places(asked) {
        match at {
            None => unknown.push(tag.clone()),
            Some(at) if generations.get(at) == Some(&Some(*generation)) => {}
            Some(_) => return Validity::Invalid,
        }
    }
    if unknown.is_empty() { Validity::Valid } else { Validity::Unknown(unknown) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        Cache,
        catalog::{DataType, Lifetime, Ttl},
        engine::fleet::tests::Claimed,
        store::{MemoryStore, Payload, Store, TagGroup},
    };

    pub(in crate::engine) const SECOND: Duration = Duration::from_secs(1);

    /// An engine, and what requests for one key bring.
    pub(in crate::engine) struct Bench {
        pub(in crate::engine) engine: Arc<Engine>,
        pub(in crate::engine) key: Key,
        pub(in crate::engine) tags: [Tag; 1],
        pub(in crate::engine) policy: Policy,
    }

    pub(in crate::engine) fn tag(id: &str) -> Tag {
        Tag::entity(b"engine{t}", "doc", "doc", id.as_bytes())
    }

    impl Bench {
        pub(in crate::engine) fn new() -> Self {
            Self::of(DataType::new("doc", SECOND * 60), MemoryStore::new(1 << 20))
        }

        pub(in crate::engine) fn of(doc: DataType, store: impl Store) -> Self {
            let policy = doc.policy.clone();
            let cache = Cache::builder("engine").single_tenant("t").data_type(doc).store(store).build().unwrap();
            Self {
                engine: cache.0.engine.clone(),
                key: Key::new(b"engine{t}:doc:=1".to_vec()),
                tags: [tag("1")],
                policy,
            }
        }

        pub(in crate::engine) async fn begin(&self) -> Begin {
            self.engine.begin(&self.key, &self.tags, &self.policy, Attempt::default()).await
        }

        async fn look(&self) -> Looked<'_> {
            self.engine.look(&self.key, &self.tags, &self.policy).await
        }

        async fn go_on(&self, looked: Looked<'_>) -> Begin {
            self.engine.go_on_from(looked, &self.key, &self.tags, &self.policy, Attempt::default()).await
        }

        pub(in crate::engine) async fn lead(&self) -> Leader {
            let Begin::Lead(leader) = self.begin().await else { panic!("somebody else leads") };
            leader
        }

        pub(in crate::engine) async fn drop(&self, tag: Tag) {
            self.engine.store.invalidate(&[TagGroup::new("doc", vec![tag])], None).await.unwrap();
        }
    }

    pub(in crate::engine) fn value() -> Payload {
        Payload::Value(b"value".as_slice().into())
    }

    pub(in crate::engine) fn fresh_for(time: Duration) -> Lifetime {
        Lifetime::fresh_for(Some(time))
    }

    /// What only the response has declared may have been dropped between its landing and who joined it, and could not see it.
    #[tokio::test]
    async fn a_result_is_shared_for_as_long_as_what_it_declared_stands() {
        for (falls, time) in [(false, SECOND), (true, SECOND), (false, Duration::ZERO), (true, Duration::ZERO)] {
            let bench = Bench::new();
            let leader = bench.lead().await;
            let Begin::Follow(waits, _) = bench.begin().await else { panic!("it is not joined") };
            // Who has looked before it is known what the response declares.
            let late = bench.look().await;
            let sealed = leader.seal(value(), vec![tag("late")], fresh_for(time), None).await.unwrap();
            if falls {
                bench.drop(tag("late")).await;
            }
            assert_eq!(matches!(bench.engine.follow(waits).await, Landed::Done(_)), !falls, "who has waited");
            // Who comes only now has no part in what was good for those who have waited.
            let is_good = !falls && !time.is_zero();
            assert_eq!(matches!(bench.go_on(late).await, Begin::Hit(_)), is_good, "{falls} {time:?}");
            drop(sealed);
        }
    }

    /// One that has landed since the look-up, whose entry that just missed.
    #[tokio::test]
    async fn who_looked_while_another_loaded_has_its_result() {
        let bench = Bench::of(DataType::new("doc", SECOND * 60), Claimed(MemoryStore::new(1 << 20)));
        let leader = bench.lead().await;
        let late = bench.look().await;
        leader.seal(value(), vec![], fresh_for(SECOND), None).await.unwrap().store().await;
        assert!(matches!(bench.go_on(late).await, Begin::Hit(_)));
    }

    /// Else nothing would be learned of what is asked for less often than it expires.
    #[tokio::test]
    async fn what_learns_its_ttl_is_kept_for_the_longest_that_may_be() {
        let doc = DataType::new("doc", Ttl::adaptive(SECOND, SECOND * 60, 0.5));
        let bench = Bench::of(doc, MemoryStore::new(1 << 20));
        let life = Lifetime { is_mapped: true, ..fresh_for(SECOND) };
        let sealed = bench.lead().await.seal(value(), vec![], life, None).await.unwrap();
        assert!(sealed.entry.keep_until - sealed.entry.created >= 60_000);
        assert_eq!(sealed.key(), bench.key.as_bytes());
    }

    /// What does so as it is, is asked once by each cache; what has other tags does not, and what is capped is so each time.
    #[tokio::test]
    async fn what_suits_one_cache_need_not_suit_another() {
        let [long, short] = [60, 1].map(|ttl| Bench::of(DataType::new("doc", SECOND * ttl), MemoryStore::new(1 << 20)));
        let stamps = [Stamp { tag: long.tags[0].clone(), generation: Generation(1) }];
        let entry = Arc::new(Entry::new(value(), stamps.into(), 0, fresh_for(SECOND * 60)));
        let asked = std::cell::Cell::new(0);
        let expires = |bench: &Bench, tags: &[Tag]| {
            let tags = || {
                asked.set(asked.get() + 1);
                tags
            };
            bench.engine.suited(entry.clone(), tags, &bench.policy).map(|entry| entry.expires)
        };
        for (bench, is_own, found, times) in [
            (&long, false, None, 1),
            (&long, true, Some(60_000), 1),
            (&long, true, Some(60_000), 0),
            (&short, true, Some(1_000), 1),
            (&short, true, Some(1_000), 1),
            (&short, false, None, 1),
            (&long, true, Some(60_000), 0),
        ] {
            let tags = [if is_own { long.tags[0].clone() } else { tag("2") }];
            assert_eq!((expires(bench, &tags), asked.take()), (found, times), "{is_own}");
        }
    }

    /// Once each, in the order of the flight; what is not declared again is none of an entry's tags.
    #[tokio::test]
    async fn what_a_response_declares_is_asked_for_with_it_until_it_does_not() {
        let bench = Bench::new();
        let [own, late] = [bench.tags[0].clone(), tag("late")];
        for (declared, tags) in
            [(vec![late.clone(), own.clone(), late.clone()], vec![own.clone(), late]), (vec![], vec![own.clone()])]
        {
            let sealed = bench.lead().await.seal(value(), declared, fresh_for(SECOND), None).await.unwrap();
            assert!(sealed.entry.stamps.iter().map(|stamp| &stamp.tag).eq(&tags));
            sealed.store().await;
            assert_eq!(bench.look().await.asked, tags);
            bench.drop(own.clone()).await;
        }
    }

    /// Who has waited for a response that is its own request's tries again with the others; a failure is another thing.
    #[tokio::test]
    async fn who_has_waited_is_told_why_for_nothing() {
        let bench = Bench::new();
        for declines in [true, false] {
            let leader = bench.lead().await;
            let Begin::Follow(waits, _) = bench.begin().await else { panic!("it is not joined") };
            if declines {
                leader.decline()
            } else {
                drop(leader)
            }
            let landed = bench.engine.follow(waits).await;
            assert_eq!(matches!(landed, Landed::Unshareable), declines);
            assert_eq!(matches!(landed, Landed::Failed), !declines);
        }
    }

    /// A reload tells of changes of the variant that it has loaded, and of none that a write has made.
    #[tokio::test]
    async fn a_poll_is_of_the_same_variant() {
        let doc = DataType::new("doc", Ttl::adaptive(SECOND, SECOND * 60, 0.5));
        let bench = Bench::of(doc, MemoryStore::new(1 << 20));
        let life = Lifetime { validate: SECOND * 3_600, is_mapped: true, ..fresh_for(Duration::ZERO) };
        let entry =
            bench.lead().await.seal(value(), vec![], Lifetime { age: SECOND * 60, ..life }, None).await.unwrap();
        entry.store().await;
        let leader = bench.lead().await;
        let other = Key::new(b"engine{t}:doc:=1 other".to_vec());
        for (varied, is_poll) in [(None, true), (Some(&bench.key), true), (Some(&other), false)] {
            assert_eq!(leader.poll(&value(), &life, varied).is_some(), is_poll, "{varied:?}");
        }
        drop(leader);
        bench.drop(tag("1")).await;
        assert!(bench.lead().await.poll(&value(), &life, None).is_none());
    }

    #[test]
    fn only_what_is_newer_is_better() {
        let entry = |age| Entry::new(value(), [].into(), 10_000, Lifetime { age, ..fresh_for(SECOND) });
        let attempt = Attempt { lacking: Some(9_000), ..Attempt::default() };
        assert!(attempt.takes(&entry(Duration::ZERO)));
        assert!(!attempt.takes(&entry(SECOND)) && !attempt.takes(&entry(SECOND * 2)));
        assert!(Attempt::default().takes(&entry(SECOND * 2)));
    }
}
