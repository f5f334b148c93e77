//! What becomes of a request that was not answered on the spot: for HTTP, gRPC and the typed function alike.
//!
//! | outcome | when |
//! | --- | --- |
//! | [`Obtained::Answer`] | an entry, or another's call since whose beginning nothing was dropped, answers it; or what is stale does, on purpose |
//! | [`Obtained::AnswerAndReload`] | what is stale answers it, and it is this request that replaces it |
//! | [`Obtained::Absent`] | it wants nothing but what is stored, and nothing is |
//! | [`Obtained::Load`] | the origin has to be asked |

use std::sync::Arc;

use tokio::time::timeout;

use super::{
    Engine, Inside, MAX_ATTEMPTS,
    flight::{Follower, Landed},
    leader::Leader,
    lookup::{Begin, Looked},
    stale::{Attempt, Stale},
};
use crate::{
    catalog::Policy,
    clock::Millis,
    key::{Key, Tag},
    store::Entry,
};

/// Who asks for an entry, and what an entry is to them.
pub(crate) trait Asker {
    type Answer;

    /// What to do with an entry that is valid.
    fn judge(&mut self, entry: Arc<Entry>, source: Source, now: Millis) -> Use<Self::Answer>;

    /// Neither waits for others nor lets them wait.
    fn is_alone(&self) -> bool {
        false
    }

    /// Wants nothing but what is stored.
    fn only_stored(&self) -> bool {
        false
    }

    /// Takes an entry that has expired, and whose type would not serve it.
    fn accepts_expired(&self, entry: &Entry, now: Millis) -> bool {
        let _ = (entry, now);
        false
    }
}

/// Where an entry comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Store,
    /// Another request's call.
    Flight,
    /// It is not fresh, and served on purpose.
    Stale,
}

/// What an entry is to a request that found it.
pub(crate) enum Use<T> {
    Answer(T),
    /// It answers others; this request's is under another key.
    Elsewhere(Key),
    /// It is to be replaced, by this request.
    Useless,
    /// It is to be replaced, by whoever makes a better one.
    Lacking,
}

/// What became of a request.
pub(crate) enum Obtained<T> {
    Answer(T),
    AnswerAndReload(T, Leader),
    Absent,
    /// Without a leader nobody waits, and nothing is stored: the store cannot be asked.
    Load(Option<Leader>),
}

impl<T> Obtained<T> {
    /// What becomes of a request when the store cannot be asked.
    pub(crate) fn unavailable(asker: &impl Asker) -> Self {
        if asker.only_stored() { Self::Absent } else { Self::Load(None) }
    }
}

/// What to do when another's call has ended.
#[derive(Debug)]
enum Landing {
    Use(Arc<Entry>),
    ServeStale(Arc<Entry>),
    TryAgain,
    GoAlone,
}

/// What to do as the one who is to call the origin.
#[derive(Debug, PartialEq, Eq)]
enum Departure {
    ServeStale,
    ServeStaleAndLoad,
    Load,
}

/// A request on its way to an answer.
struct Round {
    key: Key,
    /// Each round that does not end it counts as a failure or asks for a reload; after a few it is a call of its own.
    attempt: Attempt,
}

impl Round {
    fn judge<A: Asker>(&mut self, asker: &mut A, entry: Arc<Entry>, source: Source, now: Millis) -> Option<A::Answer> {
        let created = entry.created;
        match asker.judge(entry, source, now) {
            Use::Answer(answer) => return Some(answer),
            Use::Elsewhere(other) => self.key = other,
            Use::Useless => self.attempt.reload = true,
            Use::Lacking => self.attempt.lacking = Some(created),
        }
        self.attempt.failures += 1;
        // What leads in a circle, or is never good enough, is replaced.
        self.attempt.reload |= self.attempt.failures >= MAX_ATTEMPTS;
        None
    }
}

impl Engine {
    /// Looks the key up, waits for others' calls and tries again, until there is an answer or a call to make. (An async fn would
    /// hold what it is given twice.)
    pub(crate) fn obtain<A: Asker>(
        self: &Arc<Self>,
        key: Key,
        tags: &[Tag],
        policy: &Policy,
        asker: &mut A,
    ) -> impl Future<Output = Obtained<A::Answer>> {
        let mut round = Round { key, attempt: Attempt { alone: asker.is_alone(), ..Attempt::default() } };
        async move {
            let looked = self.look(&round.key, tags, policy).await;
            let now = self.now();
            let looked = match looked.hit(now, round.attempt) {
                Ok(entry) => match round.judge(asker, entry, Source::Store, now) {
                    Some(answer) => return Obtained::Answer(answer),
                    None => None,
                },
                Err(looked) => Some(looked),
            };
            // A hit, which most requests are, does not pay for what it does not need.
            Box::pin(self.go_on(round, looked, tags, policy, asker)).await
        }
    }

    async fn go_on<A: Asker>(
        self: &Arc<Self>,
        mut round: Round,
        mut looked: Option<Looked<'_>>,
        tags: &[Tag],
        policy: &Policy,
        asker: &mut A,
    ) -> Obtained<A::Answer> {
        loop {
            let looked = match looked.take() {
                Some(looked) => looked,
                None => self.look(&round.key, tags, policy).await,
            };
            let (entry, source) = match self.go_on_from(looked, &round.key, tags, policy, round.attempt).await {
                Begin::Lead(leader) => return self.depart(leader, round.attempt, asker),
                Begin::Unavailable => return Obtained::unavailable(asker),
                Begin::Hit(entry) => (entry, Source::Store),
                Begin::Collapsed(entry) => (entry, Source::Flight),
                // What is stale is no answer to who is to replace it.
                Begin::Follow(flight, _) if flight.is_needed_by(Inside::current().flights()) => {
                    (round.attempt.alone, round.attempt.reload) = (true, true);
                    continue;
                }
                Begin::Follow(flight, stale) => {
                    let meanwhile = stale.as_ref().filter(|stale| stale.serves_meanwhile(self.now()));
                    if let Some(answer) = meanwhile.and_then(|stale| serve_stale(asker, &stale.entry, self.now())) {
                        return Obtained::Answer(answer);
                    }
                    if asker.only_stored() {
                        return Obtained::Absent;
                    }
                    match landing(self.follow_patiently(flight, &stale, policy).await, stale, self.now(), policy) {
                        Landing::Use(entry) => (entry, Source::Flight),
                        Landing::ServeStale(entry) => {
                            if let Some(answer) = serve_stale(asker, &entry, self.now()) {
                                return Obtained::Answer(answer);
                            }
                            round.attempt.failures += 1;
                            continue;
                        }
                        Landing::TryAgain => {
                            round.attempt.failures += 1;
                            continue;
                        }
                        Landing::GoAlone => {
                            (round.attempt.alone, round.attempt.reload) = (true, true);
                            continue;
                        }
                    }
                }
            };
            if let Some(answer) = round.judge(asker, entry, source, self.now()) {
                return Obtained::Answer(answer);
            }
        }
    }

    /// Waits for another's call, or for as long as its type has patience with it while there is something else to serve.
    async fn follow_patiently(&self, flight: Follower, stale: &Option<Stale>, policy: &Policy) -> Landed {
        let now = self.now();
        let has_stale = stale.as_ref().is_some_and(|s| !s.invalidated && s.serves_on_error(now, policy));
        match policy.soft_timeout.filter(|_| has_stale) {
            None => self.follow(flight).await,
            Some(patience) => timeout(patience, self.follow(flight)).await.unwrap_or(Landed::Failed),
        }
    }

    fn depart<A: Asker>(&self, leader: Leader, attempt: Attempt, asker: &mut A) -> Obtained<A::Answer> {
        let now = self.now();
        if let Some(stale) = leader.stale().cloned() {
            let accepted = asker.accepts_expired(&stale.entry, now);
            match departure(&stale, accepted, attempt.reload, now) {
                Departure::ServeStale => {
                    if let Some(answer) = serve_stale(asker, &stale.entry, now) {
                        return Obtained::Answer(answer);
                    }
                }
                Departure::ServeStaleAndLoad => {
                    if let Some(answer) = serve_stale(asker, &stale.entry, now) {
                        return Obtained::AnswerAndReload(answer, leader);
                    }
                }
                Departure::Load => {}
            }
        }
        if asker.only_stored() { Obtained::Absent } else { Obtained::Load(Some(leader)) }
    }

    /// Takes the lead in replacing an entry that has been served already, unless somebody else does.
    pub(crate) async fn lead_refresh(self: &Arc<Self>, key: &Key, tags: &[Tag], policy: &Policy) -> Option<Leader> {
        let attempt = Attempt { refresh: true, ..Attempt::default() };
        match self.begin(key, tags, policy, attempt).await {
            Begin::Lead(leader) => Some(leader),
            _ => None,
        }
    }
}

fn serve_stale<A: Asker>(asker: &mut A, entry: &Arc<Entry>, now: Millis) -> Option<A::Answer> {
    match asker.judge(entry.clone(), Source::Stale, now) {
        Use::Answer(answer) => Some(answer),
        Use::Elsewhere(_) | Use::Useless | Use::Lacking => None,
    }
}

fn landing(landed: Landed, stale: Option<Stale>, now: Millis, policy: &Policy) -> Landing {
    match landed {
        Landed::Done(ref entry) => Landing::Use(entry.clone()),
        Landed::Unshareable => Landing::TryAgain,
        Landed::Alone => Landing::GoAlone,
        Landed::Overdue | Landed::Failed => match stale.filter(|stale| stale.serves_on_error(now, policy)) {
            Some(stale) => Landing::ServeStale(stale.entry),
            None if matches!(landed, Landed::Overdue) => Landing::GoAlone,
            None => Landing::TryAgain,
        },
    }
}

fn departure(stale: &Stale, accepted: bool, reload: bool, now: Millis) -> Departure {
    if stale.has_expired(now) && accepted {
        return Departure::ServeStale;
    }
    if stale.serves_meanwhile(now) && !reload {
        return Departure::ServeStaleAndLoad;
    }
    Departure::Load
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::{
        catalog::{DataType, Lifetime, Ttl},
        engine::lookup::tests::{Bench, SECOND, fresh_for, value},
        store::{MemoryStore, Payload},
    };

    type Find = fn(&Bench) -> Use<Source>;

    /// Who takes what is there, or finds something else in it each time.
    #[derive(Default)]
    struct Client {
        /// And how often.
        finds: Option<(Find, u32)>,
        is_alone: bool,
        only_stored: bool,
    }

    /// The same, with what it asks, and how often it has found something.
    struct Asking<'a>(&'a Client, &'a Bench, u32);

    impl Asker for Asking<'_> {
        type Answer = Source;

        fn judge(&mut self, _: Arc<Entry>, source: Source, _: Millis) -> Use<Source> {
            self.2 += 1;
            let finds = self.0.finds.filter(|(_, times)| self.2 <= *times);
            finds.map_or(Use::Answer(source), |(finds, _)| finds(self.1))
        }
        fn is_alone(&self) -> bool {
            self.0.is_alone
        }
        fn only_stored(&self) -> bool {
            self.0.only_stored
        }
    }

    impl Client {
        async fn obtain(&self, bench: &Bench) -> Obtained<Source> {
            bench.engine.obtain(bench.key.clone(), &bench.tags, &bench.policy, &mut Asking(self, bench, 0)).await
        }
    }

    #[tokio::test]
    async fn no_entry_leads_in_a_circle_for_ever() {
        let finds: [Find; 3] = [|bench| Use::Elsewhere(bench.key.clone()), |_| Use::Lacking, |_| Use::Useless];
        for finds in finds {
            let bench = Bench::new();
            bench.lead().await.seal(value(), vec![], fresh_for(SECOND * 60), None).await.unwrap().store().await;
            let client = Client { finds: Some((finds, u32::MAX)), ..Client::default() };
            assert!(matches!(client.obtain(&bench).await, Obtained::Load(Some(_))));
        }
        // As far as any that means something does.
        let bench = Bench::new();
        bench.lead().await.seal(value(), vec![], fresh_for(SECOND * 60), None).await.unwrap().store().await;
        let client = Client { finds: Some((finds[0], 2)), ..Client::default() };
        assert!(matches!(client.obtain(&bench).await, Obtained::Answer(Source::Store)));
    }

    #[tokio::test]
    async fn who_does_not_wait_is_not_made_to() {
        let bench = Bench::new();
        let _leader = bench.lead().await;
        let client = Client { only_stored: true, ..Client::default() };
        assert!(matches!(client.obtain(&bench).await, Obtained::Absent));
        let client = Client { is_alone: true, ..Client::default() };
        assert!(matches!(client.obtain(&bench).await, Obtained::Load(Some(_))));
    }

    /// It is a part of the call that replaces what is stale: that is no answer to it.
    #[tokio::test]
    async fn a_call_reads_nothing_stale_of_what_it_makes() {
        let bench = Bench::new();
        let life = Lifetime { refresh: SECOND * 60, ..fresh_for(Duration::ZERO) };
        bench.lead().await.seal(value(), vec![], life, None).await.unwrap().store().await;
        let (leader, client) = (bench.lead().await, Client::default());
        assert!(matches!(client.obtain(&bench).await, Obtained::Answer(Source::Stale)));
        let inside = Inside::of(Some(&leader)).around(client.obtain(&bench)).await;
        assert!(matches!(inside, Obtained::Load(Some(_))));
    }

    /// Patience is for who has something else to serve.
    #[tokio::test(start_paused = true)]
    async fn another_call_is_waited_for_where_there_is_nothing_else_to_serve() {
        for (falls, is_served) in [(false, true), (true, false), (true, true)] {
            let doc = DataType::new("doc", SECOND).stale_if_error(SECOND * 60).soft_timeout(SECOND);
            let doc = if is_served { doc.serve_invalidated_on_error() } else { doc };
            let bench = Bench::of(doc, MemoryStore::new(1 << 20));
            let life = Lifetime { on_error: SECOND * 60, ..fresh_for(Duration::ZERO) };
            bench.lead().await.seal(value(), vec![], life, None).await.unwrap().store().await;
            if falls {
                bench.drop(bench.tags[0].clone()).await;
            }
            let (leader, client, start) = (bench.lead().await, Client::default(), Instant::now());
            let load = async {
                sleep(SECOND * 5).await;
                leader.seal(value(), vec![], fresh_for(SECOND), None).await.unwrap().store().await;
            };
            let (obtained, ()) = tokio::join!(
                async {
                    let obtained = client.obtain(&bench).await;
                    assert_eq!(start.elapsed().as_secs(), if falls { 5 } else { 1 });
                    obtained
                },
                load
            );
            let expected = if falls { Source::Flight } else { Source::Stale };
            assert!(matches!(obtained, Obtained::Answer(source) if source == expected), "{falls}");
        }
    }

    /// Made at 0; fresh for 10 s, served for 10 s more while it is refreshed, and for 20 s when the origin fails.
    fn stale(invalidated: bool) -> Stale {
        let second = Duration::from_secs(1);
        let life =
            Lifetime { fresh: Some(10 * second), refresh: 10 * second, on_error: 20 * second, ..Lifetime::default() };
        Stale { entry: Arc::new(Entry::new(Payload::Value(Bytes::new()), Box::default(), 0, life)), invalidated }
    }

    #[test]
    fn what_is_stale_is_served_in_its_windows_unless_a_write_made_it_so() {
        for (now, invalidated, accepted, reload, expected) in [
            (5_000, false, false, false, Departure::ServeStaleAndLoad),
            (5_000, false, true, true, Departure::Load),
            (15_000, false, false, false, Departure::ServeStaleAndLoad),
            (15_000, false, false, true, Departure::Load),
            (15_000, false, true, true, Departure::ServeStale),
            (15_000, true, true, false, Departure::Load),
            (20_000, false, false, false, Departure::Load),
            (20_000, false, true, false, Departure::ServeStale),
        ] {
            let found = departure(&stale(invalidated), accepted, reload, now);
            assert_eq!(found, expected, "{now} {invalidated} {accepted} {reload}");
        }
    }

    #[test]
    fn a_failed_call_gives_what_is_stale_or_is_tried_again() {
        let serving = Policy { serve_invalidated_on_error: true, ..Policy::from(Ttl::Short) };
        for (landed, now, invalidated, policy, served) in [
            (Landed::Failed, 29_000, false, Ttl::Short.into(), true),
            (Landed::Failed, 30_000, false, Ttl::Short.into(), false),
            (Landed::Failed, 29_000, true, Ttl::Short.into(), false),
            (Landed::Failed, 29_000, true, serving, true),
            (Landed::Unshareable, 29_000, false, Ttl::Short.into(), false),
            (Landed::Overdue, 29_000, false, Ttl::Short.into(), true),
            (Landed::Overdue, 30_000, false, Ttl::Short.into(), false),
        ] {
            let is_overdue = matches!(landed, Landed::Overdue);
            let landing = landing(landed, Some(stale(invalidated)), now, &policy);
            assert_eq!(matches!(landing, Landing::ServeStale(_)), served, "{now} {invalidated}");
            // Who has waited too long does not wait again.
            assert_eq!(matches!(landing, Landing::TryAgain), !served && !is_overdue);
        }
    }
}
