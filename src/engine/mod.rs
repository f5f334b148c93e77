//! The protocol: generation-validated entries, and one flight per key.
//!
//! An entry is valid only while every generation that it was filled under is still current. A load captures the
//! generations of its tags *before* it begins, and stores its result under them; an invalidation drops generations. So
//! a load that read the database before a write can store what it read, at any time later, without anybody ever being
//! served it. Nothing here knows of HTTP or of a particular store.

mod clock;
mod flight;
mod function;
mod invalidated;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub(crate) use clock::Clock;
pub(crate) use flight::Landed;
use flight::{Flight, Flights, Follower};
pub use function::{EntryBuilder, Fetch, Generate, Report, Source};
pub use invalidated::Invalidated;

use http::HeaderName;
use quick_cache::sync::Cache as Memo;
use tokio::runtime::Handle;

use crate::{
    catalog::{Coalesce, Drops, Policy},
    key::{Key, Tag},
    store::{
        Entry, Fence, Generation, Lifetime, Lookup, Mark, Millis, Payload, Stamp, Store, StoreError, TagGroup, Tier,
    },
};

/// How long a key whose response could not be shared is loaded by each request on its own, without waiting.
const UNSHARED_FOR: Duration = Duration::from_secs(10);

/// How long a process may load a key for the fleet before others do as well.
const CLAIM: Duration = Duration::from_secs(3);

/// How many keys the engine remembers something about.
const MEMOS: usize = 65_536;

/// After this many failed flights a request stops waiting for others.
const MAX_ATTEMPTS: u32 = 3;

pub(crate) struct Engine {
    store: Arc<dyn Store>,
    flights: Flights,
    memos: Memo<Key, Arc<KeyMemo>>,
    clock: Clock,
}

/// What earlier loads of a key taught. Lost without harm.
#[derive(Default, Clone)]
struct KeyMemo {
    /// Tags that the response declared, which the request does not name.
    late: Arc<[Tag]>,
    /// Until then its responses are not worth waiting for.
    unshared_until: Millis,
}

/// How often a request has tried.
#[derive(Clone, Copy, Default)]
pub(crate) struct Attempt {
    /// Flights it joined that failed.
    pub(crate) failures: u32,
    /// It neither waits for others nor lets them wait.
    pub(crate) alone: bool,
    /// What is stored is of no use to it, and is to be replaced.
    pub(crate) reload: bool,
    /// What is stored is good, and is to be replaced, unless somebody does so already.
    pub(crate) refresh: bool,
}

/// What is stored and not fresh, and may still be of use.
#[derive(Clone)]
pub(crate) struct Stale {
    pub(crate) entry: Arc<Entry>,
    /// A write has made it stale, not just time.
    pub(crate) invalidated: bool,
}

impl Stale {
    /// Whether to serve it while it is refreshed.
    pub(crate) fn serves_meanwhile(&self, now: Millis) -> bool {
        !self.invalidated && now < self.entry.refresh_until
    }

    /// Whether to serve it when the origin fails.
    pub(crate) fn serves_on_error(&self, now: Millis, policy: &Policy) -> bool {
        now < self.entry.on_error_until && (!self.invalidated || policy.serve_invalidated_on_error)
    }
}

/// What a request has to do.
pub(crate) enum Begin {
    /// Answer with this.
    Hit(Arc<Entry>),
    /// Answer with this, which another process has just loaded.
    Collapsed(Arc<Entry>),
    /// Call the origin, and tell the others.
    Lead(Leader),
    /// Wait for another's call, which began under the generations that are current now.
    Follow(Follower, Option<Stale>),
    /// Call the origin: the store cannot be asked.
    Unavailable,
}

enum Validity {
    Valid,
    Invalid,
    /// It may be valid: these tags of it were not looked up.
    Unknown(Vec<Tag>),
}

impl Engine {
    pub(crate) fn new(store: Arc<dyn Store>, clock: Clock) -> Self {
        Self { store, flights: Flights::default(), memos: Memo::new(MEMOS), clock }
    }

    pub(crate) fn now(&self) -> Millis {
        self.clock.now()
    }

    /// A hit that needs no waiting.
    pub(crate) fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        self.store.peek(key, now).filter(|entry| entry.is_fresh(now))
    }

    /// Looks the key up; on a miss captures the generations and joins the flight that has the same ones, or leads one.
    pub(crate) async fn begin(self: &Arc<Self>, key: &Key, tags: &[Tag], policy: &Policy, attempt: Attempt) -> Begin {
        let memo = self.memos.get(key);
        let seen = self.flights.current(key);
        let mut asked = tags.to_vec();
        asked.extend(memo.iter().flat_map(|m| m.late.iter()).filter(|t| !tags.contains(t)).cloned());
        let mut stale = None;
        for _ in 0..2 {
            let Lookup { entry, generations } = match self.store.lookup(key, &asked, policy.tier).await {
                Ok(found) => found,
                Err(error) => return self.unavailable(&error),
            };
            let Some(entry) = entry else { break };
            match validity(&entry, tags, &asked, &generations) {
                Validity::Valid if entry.is_fresh(self.now()) && !attempt.reload && !attempt.refresh => {
                    return Begin::Hit(entry);
                }
                Validity::Valid => {
                    stale = Some(Stale { entry, invalidated: false });
                    break;
                }
                Validity::Invalid => {
                    stale = Some(Stale { entry, invalidated: true });
                    break;
                }
                Validity::Unknown(late) => {
                    self.remember_late(key, &late);
                    asked.extend(late);
                }
            }
        }
        // Captured before the load: whatever is dropped from now on makes its result useless.
        let opened = match self.store.open(&asked).await {
            Ok(opened) => opened,
            Err(error) => return self.unavailable(&error),
        };
        let unshared = memo.is_some_and(|m| m.unshared_until > self.now());
        let flight = Arc::new(Flight::new(asked, opened.generations));
        let alone = attempt.alone || attempt.reload || attempt.failures >= MAX_ATTEMPTS;
        let shared = !unshared && !alone;
        let leader = |flight| Leader {
            engine: self.clone(),
            key: key.clone(),
            primary: key.clone(),
            flight,
            named: tags.len(),
            mark: opened.mark,
            tier: policy.tier,
            stale: stale.clone(),
            landed: false,
            claimed: false,
        };
        if !shared {
            return Begin::Lead(leader(flight));
        }
        match self.flights.join_or_lead(key, &flight, seen) {
            None => {}
            Some(other) => {
                return match other.landed() {
                    None => Begin::Follow(other, stale),
                    Some(Landed::Done(entry)) if self.is_good_after(&other, &entry, flight.tags()).await => {
                        Begin::Hit(entry)
                    }
                    // It failed before this request came, or is good only for those who waited: no reason to wait.
                    Some(_) => Begin::Lead(leader(flight)),
                };
            }
        }
        let leader = leader(flight);
        // A flight may have begun and landed since the look-up; its entry was stored before it was taken off the table.
        if let Some(entry) = self.peek(key.as_bytes(), self.now()).filter(|_| !attempt.refresh) {
            leader.flight.land(Landed::Done(entry.clone()));
            return Begin::Hit(entry);
        }
        match policy.coalesce {
            Coalesce::Process => Begin::Lead(leader),
            Coalesce::Fleet => self.lead_fleet(leader, tags).await,
        }
    }

    /// Looks the key up, waits for others' calls and tries again, until there is something that `answer` can use (it is
    /// told whether another's call gave it), or a call to make.
    pub(crate) async fn obtain<T>(
        self: &Arc<Self>,
        key: &Key,
        tags: &[Tag],
        policy: &Policy,
        answer: impl Fn(&Entry, bool) -> Option<T>,
    ) -> Result<T, Option<Leader>> {
        let mut attempt = Attempt::default();
        loop {
            let (entry, collapsed) = match self.begin(key, tags, policy, attempt).await {
                Begin::Lead(leader) => return Err(Some(leader)),
                Begin::Unavailable => return Err(None),
                Begin::Hit(entry) => (entry, false),
                Begin::Collapsed(entry) => (entry, true),
                Begin::Follow(flight, _) => match self.follow(flight).await {
                    Landed::Done(entry) => (entry, true),
                    Landed::Unshareable | Landed::Failed => {
                        attempt.failures += 1;
                        continue;
                    }
                },
            };
            match answer(&entry, collapsed) {
                Some(answer) => return Ok(answer),
                // Of no use to this caller: it is replaced.
                None => attempt.reload = true,
            }
        }
    }

    /// Waits for another's call to end.
    pub(crate) async fn follow(&self, flight: Follower) -> Landed {
        match flight.wait().await {
            Landed::Done(entry) if !self.is_proven(&entry, flight.tags()).await => Landed::Failed,
            landed => landed,
        }
    }

    /// Whether the result of a flight that has landed is good for a request that comes now: what is not to be stored, or
    /// was read while a write is under way, is not.
    async fn is_good_after(&self, flight: &Follower, entry: &Entry, joined: &[Tag]) -> bool {
        entry.is_fresh(self.now()) && !flight.is_fenced() && self.is_proven(entry, joined).await
    }

    /// Whether a flight's result is good for a request that joined it by these tags. Those that only the response
    /// declared may have been dropped between its landing and that request, which then could not see it.
    async fn is_proven(&self, entry: &Entry, joined: &[Tag]) -> bool {
        let late: Vec<_> = entry.stamps.iter().filter(|s| !joined.contains(&s.tag)).collect();
        if late.is_empty() {
            return true;
        }
        let tags: Vec<_> = late.iter().map(|s| s.tag.clone()).collect();
        let now = self.store.open(&tags).await;
        now.is_ok_and(|now| now.generations.iter().eq(late.iter().map(|s| &s.generation)))
    }

    /// Leads for the fleet, or waits until the process that does has stored its entry.
    async fn lead_fleet(&self, mut leader: Leader, tags: &[Tag]) -> Begin {
        let flight = leader.flight.clone();
        let asked = flight.tags();
        let start = Instant::now();
        let mut pause = Duration::from_millis(5);
        // With something to serve meanwhile there is no need to wait: whoever has the claim refreshes it.
        let meanwhile = leader.stale.clone().filter(|stale| stale.serves_meanwhile(self.now()));
        loop {
            match self.store.claim(&leader.key, CLAIM).await {
                Ok(true) => leader.claimed = true,
                Ok(false) if meanwhile.is_some() => {
                    if let Some(stale) = meanwhile {
                        return Begin::Hit(stale.entry);
                    }
                }
                Ok(false) if start.elapsed() < CLAIM => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                // Unreachable, or held for too long by a process that may be dead.
                Ok(false) | Err(_) => return Begin::Lead(leader),
            }
            // Also after claiming: the last holder may have stored its entry just before.
            let found = self.store.lookup(&leader.key, asked, leader.tier).await;
            if let Ok(Lookup { entry: Some(entry), generations }) = found {
                let valid = matches!(validity(&entry, tags, asked, &generations), Validity::Valid);
                if valid && entry.is_fresh(self.now()) {
                    leader.land(Landed::Done(entry.clone()));
                    return Begin::Collapsed(entry);
                }
            }
            if leader.claimed {
                return Begin::Lead(leader);
            }
        }
    }

    /// Fences all these tags for a write that is about to begin.
    pub(crate) async fn fence(&self, drops: Drops, fence: &Fence) -> Result<(), StoreError> {
        self.store.fence(&tag_groups(drops), fence).await
    }

    /// Whether an invalidation would reach the store now.
    pub(crate) fn is_reachable(&self) -> bool {
        self.store.is_reachable()
    }

    fn unavailable(&self, error: &StoreError) -> Begin {
        tracing::debug!(%error, "store unavailable: calling the origin");
        Begin::Unavailable
    }

    /// Tags of the entry that the request does not name are looked up with it from now on.
    fn remember_late(&self, key: &Key, late: &[Tag]) {
        let memo = self.memos.get(key).map_or_else(KeyMemo::default, |m| (*m).clone());
        self.memos.insert(key.clone(), Arc::new(KeyMemo { late: late.into(), ..memo }));
    }

    fn remember_unshared(&self, key: &Key) {
        let memo = self.memos.get(key).map_or_else(KeyMemo::default, |m| (*m).clone());
        let unshared_until = self.now() + UNSHARED_FOR.as_millis() as Millis;
        self.memos.insert(key.clone(), Arc::new(KeyMemo { unshared_until, ..memo }));
    }

    /// Drops the generations of all these tags, at once, and says how many entries that made stale.
    pub(crate) async fn invalidate(&self, drops: Drops, fence: Option<&Fence>) -> Invalidated {
        let lines: Vec<_> = drops.groups.iter().map(|g| g.line.clone()).collect();
        let groups = tag_groups(drops);
        let counts = match self.store.invalidate(&groups, fence).await {
            Ok(counts) => counts,
            Err(error) => {
                tracing::error!(%error, "invalidation did not reach the store yet");
                vec![0; groups.len()]
            }
        };
        Invalidated::new(lines.into_iter().zip(groups.into_iter().map(|g| g.data_type)).zip(counts))
    }
}

fn tag_groups(drops: Drops) -> Vec<TagGroup> {
    drops.groups.into_iter().map(|g| TagGroup { data_type: g.data_type, tags: g.tags }).collect()
}

fn validity(entry: &Entry, required: &[Tag], asked: &[Tag], generations: &[Option<Generation>]) -> Validity {
    // An entry of another configuration may lack tags that cascades count on now.
    if required.iter().any(|tag| entry.stamps.iter().all(|s| s.tag != *tag)) {
        return Validity::Invalid;
    }
    let mut unknown = vec![];
    for Stamp { tag, generation } in &entry.stamps {
        match asked.iter().position(|t| t == tag) {
            None => unknown.push(tag.clone()),
            Some(at) if generations.get(at) == Some(&Some(*generation)) => {}
            Some(_) => return Validity::Invalid,
        }
    }
    if unknown.is_empty() { Validity::Valid } else { Validity::Unknown(unknown) }
}

/// The right and the duty to load a key. Dropped unfinished (an error, a panic), it lets its followers try again.
pub(crate) struct Leader {
    engine: Arc<Engine>,
    key: Key,
    /// The key without request headers that responses turned out to vary by.
    pub(crate) primary: Key,
    flight: Arc<Flight>,
    /// How many of the flight's tags the request names; the rest an earlier response declared.
    named: usize,
    mark: Mark,
    tier: Tier,
    /// What was stored when it began, if anything was.
    stale: Option<Stale>,
    landed: bool,
    /// Whether other processes wait for it.
    claimed: bool,
}

impl Leader {
    /// What was stored when it began, and was not fresh or not wanted.
    pub(crate) fn stale(&self) -> Option<&Stale> {
        self.stale.as_ref()
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
        let entry = Entry::new(payload, stamps.into(), self.engine.now(), life);
        let entry = Arc::new(Entry { varied, ..entry });
        self.flight.land(Landed::Done(entry.clone()));
        Some(Sealed { entry, leader: self })
    }

    /// The response is its own request's alone: the followers call the origin at once, each for itself.
    pub(crate) fn unshareable(mut self) {
        self.engine.remember_unshared(&self.key);
        self.land(Landed::Unshareable);
    }

    fn land(&mut self, how: Landed) {
        if !std::mem::replace(&mut self.landed, true) {
            self.flight.land(how);
            self.engine.flights.remove(&self.key, &self.flight);
            if let (true, Ok(runtime)) = (self.claimed, Handle::try_current()) {
                let (engine, key) = (self.engine.clone(), self.key.clone());
                runtime.spawn(async move { engine.store.release(&key).await });
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
    /// Whether a write is under way, so that it will not be stored.
    pub(crate) fn is_fenced(&self) -> bool {
        self.entry.stamps.iter().any(|stamp| stamp.generation.is_fenced())
    }

    pub(crate) async fn store(mut self) {
        if self.is_fenced() {
            return;
        }
        let engine = &self.leader.engine;
        let mut filled = Ok(());
        match &self.entry.varied {
            None => filled = engine.store.fill(&self.leader.key, self.entry.clone(), self.leader.tier).await,
            // First the response, then what leads to it.
            Some((names, key)) => {
                for (key, entry) in
                    [(key, self.entry.clone()), (&self.leader.primary, Arc::new(self.entry.marker(names)))]
                {
                    filled = filled.and(engine.store.fill(key, entry, self.leader.tier).await);
                }
            }
        }
        if let Err(error) = filled {
            tracing::debug!(%error, "entry not stored");
        }
        self.leader.land(Landed::Done(self.entry));
    }
}
