//! Sources of events that are followed: when each is acknowledged, what is fenced, and what is not answered while nothing is proven.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use http::Method;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, advance, sleep, timeout},
};
use tower_cache_aside::{
    Batch, Cache, CacheBuilder, DataType, Event, EventChange, EventPolicy, EventSource, Notes, Received, Route, Source,
    SourceError, SourceFuture, Ttl,
    store::{Guard, MemoryStore},
    testing::{Faults, Faulty},
};
use web::{Web, ok, with};

type Given = Result<Received, SourceError>;

/// A source that gives what it is told. What it has given is given again until it is acknowledged.
struct Told {
    name: &'static str,
    rx: mpsc::UnboundedReceiver<(Given, oneshot::Sender<()>)>,
    unacknowledged: Option<oneshot::Sender<()>>,
    visible: Arc<Gate>,
}

/// Whether changes can be seen.
#[derive(Default)]
struct Gate {
    open: AtomicBool,
    opened: Notify,
    asked: AtomicU64,
}

/// Who tells it.
#[derive(Clone)]
struct Teller(mpsc::UnboundedSender<(Given, oneshot::Sender<()>)>, Arc<Gate>);

fn source(name: &'static str) -> (Teller, Told) {
    let (tx, rx) = mpsc::unbounded_channel();
    let visible = Arc::new(Gate::default());
    (Teller(tx, visible.clone()), Told { name, rx, unacknowledged: None, visible })
}

impl EventSource for Told {
    fn name(&self) -> &str {
        self.name
    }

    fn next(&mut self) -> SourceFuture<'_, Received> {
        Box::pin(async move {
            let Some((given, done)) = self.rx.recv().await else { std::future::pending().await };
            match given {
                Ok(Received::Events(_) | Received::Gap(_)) => self.unacknowledged = Some(done),
                // That it has come is all there is to know.
                _ => _ = done.send(()),
            }
            given
        })
    }

    fn visible(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(async move {
            self.visible.asked.fetch_add(1, SeqCst);
            while !self.visible.open.load(SeqCst) {
                self.visible.opened.notified().await;
            }
            Ok(())
        })
    }

    fn ack(&mut self) -> SourceFuture<'_, ()> {
        self.unacknowledged.take().map(|done| done.send(()));
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Teller {
    fn give(&self, given: Given) -> oneshot::Receiver<()> {
        let (done, is_done) = oneshot::channel();
        assert!(self.0.send((given, done)).is_ok(), "nobody follows");
        is_done
    }

    /// Returns when it is acknowledged.
    async fn events(&self, events: &[Event]) {
        self.give(Ok(Received::Events(Batch::new(events.to_vec())))).await.unwrap();
    }

    async fn prove(&self, at: Instant) {
        self.give(Ok(Received::Proof(at))).await.unwrap();
        // It is counted after it was given.
        tokio::task::yield_now().await;
    }

    fn see(&self) {
        self.1.open.store(true, SeqCst);
        self.1.opened.notify_waiters();
        self.1.opened.notify_one();
    }
}

fn builder() -> CacheBuilder {
    Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", Ttl::Standard))
        .route(Route::new("/agents/{agent_id}", "agent"))
        .event(EventPolicy::on("agents").mutated("agent", "id"))
}

fn changed(id: impl ToString) -> Event {
    Event::new("agents").tenant("acme").field("id", id)
}

/// A service that answers with the version of its row.
struct Row(Arc<AtomicU64>, Web);

impl Row {
    fn behind(cache: &Cache) -> Self {
        let version = Arc::new(AtomicU64::new(1));
        let row = version.clone();
        let web = Web::new(cache, move |_| {
            let text = row.load(SeqCst).to_string();
            async move { Ok(ok(text)) }
        });
        Self(version, web)
    }

    async fn get(&self) -> web::Reply {
        self.1.send(with(Method::GET, "/agents/1", &[("x-tenant-id", "acme")])).await
    }

    async fn until_hit(&self) {
        while !self.get().await.is_hit() {
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn write(&self) {
        self.0.fetch_add(1, SeqCst);
    }
}

fn faulty() -> (Faults, CacheBuilder) {
    let store = Faulty::new(MemoryStore::new(64 << 20));
    let faults = store.faults();
    let guard = Guard::new(store).invalidate_budget(Duration::from_millis(20));
    (faults, builder().store(guard))
}

#[tokio::test]
async fn an_event_is_acknowledged_when_what_it_makes_stale_is_dropped() {
    let cache = builder().build().unwrap();
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    let row = Row::behind(&cache);
    for version in 2..20 {
        row.until_hit().await;
        row.write();
        teller.events(&[changed(1), Event::new("other")]).await;
        assert_eq!(row.get().await.text(), version.to_string());
    }
    let unreadable = Batch::new(vec![Event::new("agents").field("id", 1)]).unreadable("no JSON").unreadable("no JSON");
    teller.give(Ok(Received::Events(unreadable))).await.unwrap();
    let stats = &cache.stats().sources["told"];
    assert_eq!((stats.applied, stats.ignored, stats.refused, stats.unreadable, stats.gaps), (18, 18, 1, 2, 0));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_acknowledged_that_the_store_has_not() {
    let (faults, builder) = faulty();
    let cache = builder.build().unwrap();
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    faults.gone();
    for given in [Received::Events(Batch::new(vec![changed(1)])), Received::Gap("trimmed".to_owned())] {
        let mut acknowledged = teller.give(Ok(given));
        assert!(
            timeout(Duration::from_secs(60), &mut acknowledged).await.is_err(),
            "acknowledged while the store is gone"
        );
        assert!(cache.stats().sources["told"].trouble.is_some());
        faults.heal();
        acknowledged.await.unwrap();
        faults.gone();
    }
}

/// An event that comes before its change can be read: who misses then reads the old row, and must not leave it behind.
#[tokio::test]
async fn what_is_early_is_fenced_until_it_is_visible() {
    for is_fenced in [true, false] {
        let cache = builder().build().unwrap();
        let (teller, source) = source("told");
        cache.follow(source).unwrap();
        let row = Row::behind(&cache);
        row.until_hit().await;
        let batch = Batch::new(vec![changed(1)]);
        let acknowledged = teller.give(Ok(Received::Events(if is_fenced { batch.early() } else { batch })));
        while is_fenced && teller.1.asked.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let mut acknowledged = Some(acknowledged);
        if !is_fenced {
            acknowledged.take().unwrap().await.unwrap();
        }
        for _ in 0..5 {
            assert_eq!(row.get().await.text(), "1");
        }
        row.write();
        teller.see();
        if let Some(acknowledged) = acknowledged {
            acknowledged.await.unwrap();
        }
        let now = row.get().await;
        assert_eq!(
            now.text(),
            if is_fenced { "2" } else { "1" },
            "without the fence it is stale: the test would notice"
        );
        if is_fenced {
            row.until_hit().await;
        }
    }
}

/// However long it takes: the fence is raised again before its lease ends.
#[tokio::test(start_paused = true)]
async fn what_is_not_visible_for_long_stays_fenced() {
    let cache = builder().build().unwrap();
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    let row = Row::behind(&cache);
    let mut acknowledged = teller.give(Ok(Received::Events(Batch::new(vec![changed(1)]).early())));
    for _ in 0..100 {
        sleep(Duration::from_secs(1)).await;
        assert!(!row.get().await.is_hit() && !row.get().await.is_hit(), "stored while it may be stale");
    }
    assert!(acknowledged.try_recv().is_err());
    teller.see();
    acknowledged.await.unwrap();
    row.until_hit().await;
}

#[tokio::test]
async fn a_gap_drops_everything_of_everybody() {
    let cache = builder().build().unwrap();
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    let row = Row::behind(&cache);
    row.until_hit().await;
    row.write();
    teller.prove(Instant::now()).await;
    teller.give(Ok(Received::Gap("the stream was trimmed".to_owned()))).await.unwrap();
    assert_eq!(row.get().await.text(), "2");
    let stats = &cache.stats().sources["told"];
    assert_eq!((stats.gaps, stats.behind_ms), (1, None));
}

/// A type with a bound is answered only while everything up to it is proven.
#[tokio::test(start_paused = true)]
async fn what_has_a_bound_bypasses_the_cache_while_nothing_is_proven() {
    let bounded = DataType::new("agent", Ttl::Standard).max_lag(Duration::from_secs(5));
    let types = Cache::builder("test").tenant_header("x-tenant-id").data_type(bounded);
    let types = types.data_type(DataType::new("note", Ttl::Standard));
    let routes = types.route(Route::new("/agents/{agent_id}", "agent")).route(Route::new("/notes/{note_id}", "note"));
    let cache = routes.event(EventPolicy::on("agents").mutated("agent", "id")).build().unwrap();
    let row = Row::behind(&cache);
    let note = async || row.1.send(with(Method::GET, "/notes/1", &[("x-tenant-id", "acme")])).await;
    let is_behind = async || row.get().await.cache_status() == "fwd=bypass; detail=events-behind";
    assert!(is_behind().await, "nobody is followed");
    let (first, one) = source("first");
    let (second, two) = source("second");
    let following = cache.follow(one).unwrap();
    assert!(is_behind().await);
    first.prove(Instant::now()).await;
    assert!(!is_behind().await);
    cache.follow(two).unwrap();
    assert!(is_behind().await, "the second has proven nothing");
    second.prove(Instant::now()).await;
    row.until_hit().await;
    // Nothing is heard any more.
    let bound = Instant::now();
    advance(Duration::from_secs(5)).await;
    assert!(row.get().await.is_hit());
    advance(Duration::from_millis(2)).await;
    assert!(is_behind().await);
    assert!(!note().await.cache_status().contains("bypass"), "a type without a bound is not concerned");
    row.write();
    assert_eq!(row.get().await.text(), "2");
    // What is behind has said what it missed before it proves anything.
    first.prove(Instant::now()).await;
    assert!(is_behind().await);
    second.events(&[changed(1)]).await;
    second.prove(bound + Duration::from_secs(1)).await;
    assert_eq!(row.get().await.text(), "2");
    assert!(!is_behind().await);
    row.until_hit().await;
    // A gap proves nothing, until something is proven again.
    first.give(Ok(Received::Gap("lost".to_owned()))).await.unwrap();
    assert!(is_behind().await);
    first.prove(Instant::now()).await;
    assert!(!is_behind().await);
    following.stop().await;
    assert!(is_behind().await, "it is not followed any more");
}

/// Values have the same bound, as it is when they are awaited.
#[tokio::test(start_paused = true)]
async fn values_have_the_same_bound() {
    let bounded = DataType::new("agent", Ttl::Standard).max_lag(Duration::from_secs(5));
    let cache = Cache::builder("test").data_type(bounded).event(EventPolicy::on("agents").mutated("agent", "id"));
    let cache = cache.build().unwrap();
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    let fetch = || {
        let entry = cache.entry::<u32>("agent", "1").tenant("acme");
        entry.fetch(|| async { Ok::<_, SourceError>(Some(7)) }).unwrap()
    };
    let from_cache = async || fetch().await.unwrap().1.source == Source::Cache;
    assert!(!from_cache().await && !from_cache().await, "nothing is proven");
    teller.prove(Instant::now()).await;
    assert!(!from_cache().await && from_cache().await);
    let early = fetch();
    advance(Duration::from_secs(6)).await;
    assert_eq!(
        early.await.unwrap().1.source,
        Source::Origin,
        "asked before, and awaited when nothing is proven any more"
    );
    teller.prove(Instant::now()).await;
    assert!(from_cache().await);
}

/// An error is no end, and neither is silence.
#[tokio::test(start_paused = true)]
async fn a_source_that_fails_is_asked_again() {
    let cache = builder().build().unwrap();
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    let row = Row::behind(&cache);
    for _ in 0..20 {
        teller.give(Err(SourceError::new("connection refused"))).await.unwrap();
    }
    tokio::task::yield_now().await;
    assert_eq!(cache.stats().sources["told"].trouble.as_deref(), Some("connection refused"));
    sleep(Duration::from_secs(600)).await;
    row.until_hit().await;
    row.write();
    teller.events(&[changed(1)]).await;
    assert_eq!(row.get().await.text(), "2");
    teller.prove(Instant::now()).await;
    assert_eq!(cache.stats().sources["told"].trouble, None);
}

/// A source, or a policy, that panics: others go on, and nothing is proven by it.
#[tokio::test]
async fn a_panic_proves_nothing() {
    struct Panics;
    impl EventSource for Panics {
        fn name(&self) -> &str {
            "panics"
        }
        fn next(&mut self) -> SourceFuture<'_, Received> {
            panic!("a source that panics")
        }
        fn ack(&mut self) -> SourceFuture<'_, ()> {
            Box::pin(std::future::ready(Ok(())))
        }
    }
    let cache = builder().event(EventPolicy::from_fn("bad", |_| panic!("a policy that panics"))).build().unwrap();
    cache.follow(Panics).unwrap();
    while cache.stats().sources["panics"].trouble.is_none() {
        sleep(Duration::from_millis(1)).await;
    }
    let (teller, source) = source("told");
    cache.follow(source).unwrap();
    teller.events(&[Event::new("bad"), changed(1)]).await;
    let stats = &cache.stats().sources["told"];
    assert_eq!((stats.applied, stats.refused), (1, 1));
}

#[tokio::test]
async fn a_closure_says_what_has_changed() {
    let policy = EventPolicy::from_fn("prices", |event| {
        let upper = event.values("skus").iter().map(|sku| EventChange::new().mutated("agent", sku.to_lowercase()));
        let everybody = event.values("everybody").iter().map(|who| EventChange::new().tenant(who).all("agent"));
        upper.chain(everybody).chain(event.values("typo").iter().map(|_| EventChange::new().all("agnet"))).collect()
    });
    let cache = builder().event(policy).build().unwrap();
    let row = Row::behind(&cache);
    row.until_hit().await;
    let prices = || Event::new("prices");
    let applied = cache.apply(&[prices().tenant("other").field("skus", "1")]).await;
    assert!(applied.refused.is_empty() && row.get().await.is_hit());
    for event in [prices().tenant("acme").field("skus", "7").field("skus", "1"), prices().field("everybody", "acme")] {
        row.until_hit().await;
        assert_eq!(cache.apply(&[event]).await.dropped.total(), 1);
    }
    row.until_hit().await;
    let applied = cache.apply(&[prices(), prices().tenant("acme").field("typo", 1), prices().field("skus", 1)]).await;
    let refused: Vec<_> = applied.refused.iter().map(|(at, why)| (*at, why.to_string())).collect();
    assert!(matches!(&refused[..], [(1, a), (2, b)] if a.contains("agnet") && b.contains("no tenant")), "{refused:?}");
    assert!(row.get().await.is_hit());
}

/// What it remembers is in the store, under its name and the service's.
#[tokio::test]
async fn notes_outlive_the_process_where_the_store_does() {
    struct Remembers(Arc<Mutex<Option<Notes>>>);
    impl EventSource for Remembers {
        fn name(&self) -> &str {
            "remembers"
        }
        fn start(&mut self, notes: Notes) {
            *self.0.lock().unwrap() = Some(notes);
        }
        fn next(&mut self) -> SourceFuture<'_, Received> {
            Box::pin(std::future::pending())
        }
        fn ack(&mut self) -> SourceFuture<'_, ()> {
            Box::pin(std::future::ready(Ok(())))
        }
    }
    let store = Arc::new(MemoryStore::new(8 << 20));
    let mut noted = vec![];
    for _ in 0..2 {
        let cache = builder().store(store.clone()).build().unwrap();
        let slot = Arc::new(Mutex::default());
        cache.follow(Remembers(slot.clone())).unwrap();
        tokio::task::yield_now().await;
        let notes: Notes = slot.lock().unwrap().clone().unwrap();
        noted.push(notes.read().await.unwrap());
        notes.write(b"0/16B3748").await.unwrap();
    }
    assert_eq!(noted, [None, Some(b"0/16B3748".to_vec())]);
}

#[test]
fn mistakes_are_found_when_a_source_is_followed() {
    let says = |cache: &Cache, name: &'static str, what: &str| {
        let error = cache.follow(source(name).1).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let cache = builder().build().unwrap();
    says(&cache, "a", "event source `a`: there is no runtime");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _within = runtime.enter();
    let none = Cache::builder("test").data_type(DataType::new("agent", Ttl::Standard)).build().unwrap();
    says(&none, "a", "event source `a`: nothing says what an event makes stale");
    cache.follow(source("a").1).unwrap();
    says(&cache, "a", "event source `a` is followed already");
    let zero = builder().data_type(DataType::new("note", Ttl::Standard).max_lag(Duration::ZERO)).build();
    assert!(zero.unwrap_err().to_string().contains("data type `note`: a max_lag of zero"));
}

/// With its cache it is gone.
#[tokio::test]
async fn a_source_is_followed_as_long_as_there_is_a_cache() {
    let (teller, source) = source("told");
    let cache = builder().build().unwrap();
    let following = cache.follow(source).unwrap();
    teller.events(&[changed(1)]).await;
    drop(cache);
    let _ = teller.give(Ok(Received::Events(Batch::new(vec![changed(1)])))).await;
    following.stop().await;
    assert!(teller.0.is_closed());
}
