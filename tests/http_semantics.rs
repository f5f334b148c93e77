//! What RFC 9110, 9111, 9211 and 9213 ask of a shared cache, and staleness on purpose: case by case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::{HeaderMap, Method, Request, Response, StatusCode};
use proptest::prelude::*;
use tower_cache_aside::{
    Cache, CacheBuilder, CacheTags, Cascade, DataType, Freshness, Mutation, NoCache, Route, Ttl,
    store::{Guard, MemoryStore},
    testing::Faulty,
};
use web::{Body, Reply, Web, full, ok, request, with};

const SECOND: Duration = Duration::from_secs(1);

/// What the origin answers next.
#[derive(Clone, Default)]
struct Script {
    status: u16,
    headers: Vec<(String, String)>,
    error: bool,
    delay: Duration,
    extension: bool,
}

/// A cache over an origin that answers as it is told, at a time that is told too.
struct Bench {
    web: Web,
    cache: Cache,
    script: Arc<Mutex<Script>>,
    calls: Arc<AtomicU64>,
    now: Arc<AtomicU64>,
    seen: Arc<Mutex<HeaderMap>>,
}

impl Bench {
    fn new(data_type: DataType) -> Self {
        Self::with(data_type, |builder| builder)
    }

    fn with(data_type: DataType, more: impl FnOnce(CacheBuilder) -> CacheBuilder) -> Self {
        let now = Arc::new(AtomicU64::new(784_111_777_000));
        let clock = now.clone();
        let builder = Cache::builder("test")
            .single_tenant("t")
            .data_type(data_type)
            .route(Route::new("/pages/{page_id}", "page"))
            .mutation(Mutation::put("/pages/{page_id}", "page"))
            .clock(move || SystemTime::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)));
        let cache = more(builder).build().unwrap();
        let script = Arc::new(Mutex::new(Script { status: 200, ..Script::default() }));
        let (calls, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(HeaderMap::new())));
        let (s, c, h) = (script.clone(), calls.clone(), seen.clone());
        let web = Web::new(&cache, move |request: Request<_>| {
            let script = s.lock().unwrap().clone();
            *h.lock().unwrap() = request.headers().clone();
            let n = if request.method() == Method::PUT { 0 } else { c.fetch_add(1, Ordering::SeqCst) };
            async move { answer(script, n).await }
        });
        Self { web, cache, script, calls, now, seen }
    }

    fn says(&self, status: u16, headers: &[(&str, &str)]) -> &Self {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        *self.script.lock().unwrap() = Script { status, headers, ..Script::default() };
        self
    }

    fn fails(&self) {
        *self.script.lock().unwrap() = Script { status: 200, error: true, ..Script::default() };
    }

    fn pass(&self, time: Duration) {
        self.now.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }

    async fn get(&self, headers: &[(&str, &str)]) -> Reply {
        self.web.send(with(Method::GET, "/pages/1", headers)).await
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Until a background refresh has been made and stored.
    async fn refreshed(&self, body: &str) {
        for _ in 0..1_000 {
            let reply = self.get(&[]).await;
            if reply.text() == body && reply.is_hit() {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("not refreshed: {:?}", self.get(&[]).await);
    }
}

async fn answer(script: Script, n: u64) -> io::Result<Response<Body>> {
    tokio::time::sleep(script.delay).await;
    if script.error {
        return Err(io::Error::other("origin down"));
    }
    let mut response = Response::builder().status(script.status);
    for (name, value) in &script.headers {
        response = response.header(name, value);
    }
    let mut response = response.body(full(n.to_string())).unwrap();
    if script.extension {
        response.extensions_mut().insert(NoCache);
    }
    Ok(response)
}

fn page() -> DataType {
    DataType::new("page", Ttl::Standard)
}

fn rfc() -> DataType {
    DataType::new("page", Duration::ZERO).freshness(Freshness::Response)
}

/// (response headers, request headers of the second request, seconds between, how the second is handled): RFC 9111,
/// sections 3, 4.2 and 5.2, of a type that takes the response at its word.
#[tokio::test]
async fn responses_are_taken_at_their_word() {
    for (response, request, seconds, handled) in [
        (&[("cache-control", "max-age=60")][..], &[][..], 59, "hit"),
        (&[("cache-control", "max-age=60")], &[], 60, "fwd=stale"),
        (&[("cache-control", "s-maxage=60, max-age=5")], &[], 30, "hit"),
        (&[("cache-control", "max-age=60"), ("age", "30")], &[], 20, "hit"),
        (&[("cache-control", "max-age=60"), ("age", "30")], &[], 30, "fwd=stale"),
        (&[("expires", "Sun, 06 Nov 1994 08:50:37 GMT")], &[], 59, "hit"),
        (&[("expires", "Sun, 06 Nov 1994 08:50:37 GMT")], &[], 60, "fwd=stale"),
        (&[("last-modified", "Sun, 06 Nov 1994 08:32:57 GMT")], &[], 99, "hit"),
        (&[("cache-control", "max-age=60"), ("cdn-cache-control", "max-age=5")], &[], 6, "fwd=stale"),
        (&[("cache-control", "no-store"), ("cdn-cache-control", "max-age=60")], &[], 6, "hit"),
        (&[("cache-control", "max-age=60, no-store")], &[], 0, "fwd=uri-miss"),
        (&[("cache-control", "max-age=60, private")], &[], 0, "fwd=uri-miss"),
        (&[], &[], 0, "fwd=uri-miss"),
        (&[("cache-control", "max-age=60"), ("vary", "x-a")], &[("x-a", "1")], 0, "hit"),
        (&[("cache-control", "max-age=60"), ("vary", "x-a")], &[("x-a", "2")], 0, "fwd=vary-miss"),
        (&[("cache-control", "max-age=60"), ("vary", "x-a")], &[], 0, "fwd=vary-miss"),
        (&[("cache-control", "max-age=60"), ("vary", "x-a")], &[("x-a", " 1 ")], 0, "hit"),
        (&[("cache-control", "max-age=60"), ("vary", "x-b")], &[("x-a", "2")], 0, "hit"),
        (&[("cache-control", "max-age=60"), ("vary", "*")], &[("x-a", "1")], 0, "fwd=uri-miss"),
        (&[("cache-control", "max-age=60")], &[("cache-control", "no-cache")], 0, "fwd=request"),
        (&[("cache-control", "max-age=60")], &[("cache-control", "no-store")], 0, "fwd=request"),
        (&[("cache-control", "max-age=60")], &[("cache-control", "max-age=9")], 10, "fwd=request"),
        (&[("cache-control", "max-age=60")], &[("cache-control", "max-age=10")], 10, "hit"),
        (&[("cache-control", "max-age=60")], &[("cache-control", "min-fresh=51")], 10, "fwd=request"),
        (&[("cache-control", "max-age=60")], &[("cache-control", "min-fresh=50")], 10, "hit"),
        (&[("cache-control", "max-age=60")], &[("pragma", "no-cache")], 10, "hit"),
    ] {
        let bench = Bench::with(rfc(), |b| b.request_directives(true).targeted_header("cdn-cache-control"));
        bench.says(200, response);
        bench.get(&[("x-a", "1")]).await;
        bench.pass(Duration::from_secs(seconds));
        let status = bench.get(request).await.cache_status().to_owned();
        assert!(status.starts_with(handled), "{response:?} {request:?} after {seconds}: {status}, not {handled}");
    }
}

/// RFC 9111, section 5.2.1: off by default, because any client could defeat the cache.
#[tokio::test]
async fn request_directives_are_ignored_unless_switched_on() {
    let bench = Bench::new(page());
    bench.get(&[]).await;
    for directive in ["no-cache", "no-store", "max-age=0", "only-if-cached"] {
        assert!(bench.get(&[("cache-control", directive)]).await.is_hit(), "{directive}");
    }
    let bench = Bench::with(rfc(), |b| b.request_directives(true));
    assert_eq!(bench.get(&[("cache-control", "only-if-cached")]).await.status, 504);
    assert_eq!(bench.calls(), 0);
    bench.says(200, &[("cache-control", "max-age=10"), ("etag", "\"a\"")]);
    bench.get(&[]).await;
    assert!(bench.get(&[("cache-control", "only-if-cached")]).await.is_hit());
    bench.pass(15 * SECOND);
    assert_eq!(bench.get(&[("cache-control", "max-stale=5")]).await.cache_status(), "hit; ttl=-5");
    assert!(!bench.get(&[("cache-control", "max-stale=4")]).await.is_hit());
    assert!(bench.get(&[("cache-control", "no-cache")]).await.cache_status().starts_with("fwd=request; stored"));
}

/// RFC 9111, section 5.2.1.7: what cannot be looked up is not stored.
#[tokio::test]
async fn who_wants_only_what_is_stored_is_not_given_to_the_origin() {
    let store = Faulty::new(MemoryStore::new(1 << 20));
    let faults = store.faults();
    let bench = Bench::with(rfc(), |b| b.request_directives(true).store(Guard::new(store)));
    faults.gone();
    assert_eq!(bench.get(&[("cache-control", "only-if-cached")]).await.status, 504);
    assert_eq!(bench.calls(), 0);
    assert_eq!(bench.get(&[]).await.status, 200);
}

/// RFC 9110, sections 13.1.2, 13.1.3 and 15.4.5; RFC 9111, section 4.3.2.
#[tokio::test]
async fn what_the_client_has_is_not_sent_again() {
    let bench = Bench::new(page());
    let modified = "Sun, 06 Nov 1994 08:00:00 GMT";
    bench.says(
        200,
        &[("last-modified", modified), ("content-type", "text/x"), ("x-a", "1"), ("cache-control", "max-age=60")],
    );
    let miss = bench.get(&[]).await;
    let tag = miss.header("etag").to_owned();
    assert!(tag.starts_with("W/\""), "a weak tag is computed: what is outside may compress it: {tag}");
    assert_eq!(bench.get(&[]).await.header("etag"), tag);
    for condition in [("if-none-match", tag.as_str()), ("if-none-match", "*"), ("if-modified-since", modified)] {
        let reply = bench.get(&[condition]).await;
        assert_eq!((reply.status, reply.body.len()), (StatusCode::NOT_MODIFIED, 0), "{condition:?}");
        assert_eq!(
            (reply.header("etag"), reply.header("cache-control"), reply.header("x-a")),
            (&*tag, "max-age=60", "1")
        );
        assert_eq!((reply.header("content-type"), reply.header("content-length")), ("", ""));
        assert!(reply.is_hit() && reply.headers.contains_key("age"));
    }
    for conditions in [
        &[("if-none-match", "\"other\"")][..],
        &[("if-none-match", "\"other\""), ("if-modified-since", modified)],
        &[("if-modified-since", "Sun, 06 Nov 1994 07:00:00 GMT")],
    ] {
        assert_eq!(bench.get(conditions).await.status, 200, "{conditions:?}");
    }
    // On a miss too: the origin is asked for the whole, which is stored.
    bench.web.put("/pages/1").await;
    let reply = bench.get(&[("if-modified-since", modified)]).await;
    assert_eq!((reply.status.as_u16(), reply.is_hit()), (304, false));
    assert!(!bench.seen.lock().unwrap().contains_key("if-modified-since"));
    assert!(bench.get(&[]).await.is_hit());
    assert!(!Bench::with(page(), |b| b.entity_tags(false)).get(&[]).await.headers.contains_key("etag"));
}

/// RFC 9110, section 14.2: a part of what is stored whole.
#[tokio::test]
async fn ranges_are_cut_from_whole_responses() {
    let web = Web::new(&Bench::new(page()).cache, |_| async { Ok(ok("0123456789")) });
    let get = async |range: &str| web.send(with(Method::GET, "/pages/1", &[("range", range)])).await;
    assert_eq!(get("bytes=0-1").await.cache_status(), "fwd=uri-miss; detail=range", "nothing is stored by a part");
    web.get("/pages/1").await;
    let part = get("bytes=2-4").await;
    assert_eq!((part.status.as_u16(), part.text(), part.header("content-range")), (206, "234", "bytes 2-4/10"));
    assert_eq!((part.header("content-length"), part.is_hit()), ("3", true));
    assert_eq!(get("bytes=-2").await.text(), "89");
    assert_eq!(get("bytes=99-").await.status, 416);
    assert_eq!(get("bytes=0-1,3-4").await.text(), "0123456789");
}

/// RFC 9111, sections 3.2 and 4.3: what is stale is asked for, and a 304 makes it fresh with its own headers.
#[tokio::test]
async fn stale_responses_are_confirmed_by_the_origin() {
    let bench = Bench::new(rfc());
    bench.says(200, &[("cache-control", "max-age=5"), ("etag", "\"a\""), ("x-a", "old"), ("x-b", "kept")]);
    bench.get(&[]).await;
    bench.pass(6 * SECOND);
    bench.says(304, &[("cache-control", "max-age=60"), ("etag", "\"a\""), ("x-a", "new"), ("content-length", "99")]);
    let confirmed = bench.get(&[]).await;
    assert_eq!(bench.seen.lock().unwrap()["if-none-match"], "\"a\"");
    assert_eq!((confirmed.status.as_u16(), confirmed.text()), (200, "0"));
    assert_eq!(confirmed.header("cache-status"), "tower-cache-aside; fwd=stale; stored; fwd-status=304");
    bench.pass(50 * SECOND);
    let hit = bench.get(&[]).await;
    assert_eq!((hit.header("x-a"), hit.header("x-b"), hit.text(), hit.is_hit()), ("new", "kept", "0", true));
    bench.pass(60 * SECOND);
    bench.says(200, &[("cache-control", "max-age=60"), ("etag", "\"b\"")]);
    let changed = bench.get(&[]).await;
    assert_eq!((changed.text(), changed.cache_status()), ("2", "fwd=stale; stored"));
    bench.web.put("/pages/1").await;
    bench.get(&[]).await;
    assert!(!bench.seen.lock().unwrap().contains_key("if-none-match"), "what a write has dropped is not confirmed");
}

/// RFC 9111, section 4.1.
#[tokio::test]
async fn variants_live_side_by_side_and_fall_together() {
    let bench = Bench::new(page());
    bench.says(200, &[("vary", "x-lang"), ("vary", "x-a, x-lang")]);
    let mut bodies = vec![];
    for lang in ["de", "fr", "de", "fr"] {
        bodies.push(bench.get(&[("x-lang", lang)]).await.text().to_owned());
    }
    assert_eq!(bodies, ["0", "1", "0", "1"]);
    assert_eq!(bench.get(&[("x-lang", "it")]).await.cache_status(), "fwd=vary-miss; stored");
    let report = bench.web.put("/pages/1").await.report.unwrap();
    assert!(report.total() >= 3, "{report}");
    for (lang, body) in [("de", "3"), ("fr", "4"), ("de", "3")] {
        assert_eq!(bench.get(&[("x-lang", lang)]).await.text(), body);
    }
}

/// Who waits for a response that turns out to depend on a header gets none that is another's.
#[tokio::test]
async fn a_variant_is_not_given_to_others_who_wait() {
    let bench = Bench::new(page());
    let web = Web::new(&bench.cache, |request: Request<_>| async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let lang = request.headers()["x-lang"].to_str().unwrap().to_owned();
        Ok(Response::builder().header("vary", "x-lang").body(full(lang)).unwrap())
    });
    let tasks = (0..20).map(|i| {
        let (web, lang) = (web.clone(), if i % 2 == 0 { "de" } else { "fr" });
        tokio::spawn(async move { (lang, web.send(with(Method::GET, "/pages/1", &[("x-lang", lang)])).await) })
    });
    for task in tasks.collect::<Vec<_>>() {
        let (lang, reply) = task.await.unwrap();
        assert_eq!(reply.text(), lang);
    }
}

/// RFC 5861, section 3: one refresh in the background, for as long as the window lasts.
#[tokio::test]
async fn stale_while_revalidate() {
    let bench = Bench::new(page().stale_while_revalidate(60 * SECOND));
    bench.says(200, &[("cache-control", "max-age=5")]);
    bench.get(&[]).await;
    bench.pass(10 * SECOND);
    bench.script.lock().unwrap().delay = Duration::from_millis(20);
    for _ in 0..10 {
        let stale = bench.get(&[]).await;
        assert_eq!((stale.text(), stale.cache_status()), ("0", "hit; ttl=-5"));
    }
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(bench.calls(), 2, "one refresh");
    bench.refreshed("1").await;
    bench.pass(66 * SECOND);
    assert_eq!(bench.get(&[]).await.text(), "2", "the window is over");
}

/// A request for less than the whole refreshes nothing: what it gets is no response for others.
#[tokio::test]
async fn a_part_or_a_head_is_never_stored_by_a_refresh() {
    for early in [false, true] {
        let data_type = if early { page().early_refresh(1_000.0) } else { page().stale_while_revalidate(60 * SECOND) };
        let bench = Bench::new(data_type);
        bench.says(200, &[("cache-control", "max-age=5")]);
        bench.script.lock().unwrap().delay = Duration::from_millis(5);
        bench.get(&[]).await;
        bench.pass(if early { 4_999 * SECOND / 1_000 } else { 6 * SECOND });
        for _ in 0..20 {
            let head = bench.web.send(request(Method::HEAD, "/pages/1")).await;
            assert!(head.is_hit(), "{head:?}");
            assert!(bench.get(&[("range", "bytes=0-0")]).await.is_hit());
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(bench.calls(), 1, "early: {early}");
    }
}

/// RFC 5861, section 4: a 5xx, an error, and their maximum age.
#[tokio::test]
async fn stale_if_error() {
    let bench = Bench::new(page().stale_if_error(60 * SECOND));
    bench.says(200, &[("cache-control", "max-age=5")]);
    bench.get(&[]).await;
    bench.pass(10 * SECOND);
    for status in [500, 502, 503, 504] {
        bench.says(status, &[]);
        let stale = bench.get(&[]).await;
        assert_eq!((stale.status.as_u16(), stale.text(), stale.cache_status()), (200, "0", "hit; ttl=-5"), "{status}");
    }
    bench.fails();
    assert_eq!(bench.get(&[]).await.text(), "0");
    bench.says(404, &[]);
    assert_eq!(bench.get(&[]).await.status, 404, "an answer is no error");
    bench.pass(60 * SECOND);
    bench.says(503, &[]);
    assert_eq!(bench.get(&[]).await.status, 503, "too old");
}

/// RFC 9111, sections 4.2.4 and 5.2.2.2.
#[tokio::test]
async fn must_revalidate_forbids_stale() {
    for control in ["max-age=5, must-revalidate", "max-age=5, proxy-revalidate", "s-maxage=5"] {
        let bench = Bench::new(page().stale_if_error(60 * SECOND).stale_while_revalidate(60 * SECOND));
        bench.says(200, &[("cache-control", control)]);
        bench.get(&[]).await;
        bench.pass(6 * SECOND);
        bench.says(503, &[]);
        assert_eq!(bench.get(&[]).await.status, 503, "{control}");
    }
}

/// Stale on purpose is never invalidated, unless the type says so, and then only on error.
#[tokio::test]
async fn what_a_write_dropped_is_never_served() {
    let windows = || page().stale_if_error(600 * SECOND).stale_while_revalidate(600 * SECOND);
    for (data_type, served) in [(windows(), false), (windows().serve_invalidated_on_error(), true)] {
        let bench = Bench::new(data_type);
        bench.get(&[]).await;
        bench.web.put("/pages/1").await;
        bench.says(503, &[]);
        let reply = bench.get(&[]).await;
        assert_eq!((reply.status.as_u16(), reply.text()), if served { (200, "0") } else { (503, "1") });
        bench.says(200, &[]);
        assert_eq!(bench.get(&[]).await.text(), "2", "while the origin answers, nobody gets the old one");
    }
}

#[tokio::test]
async fn a_soft_timeout_serves_stale_and_finishes_in_the_background() {
    let bench = Bench::new(page().stale_if_error(60 * SECOND).soft_timeout(Duration::from_millis(20)));
    bench.says(200, &[("cache-control", "max-age=5")]);
    bench.get(&[]).await;
    bench.pass(10 * SECOND);
    bench.script.lock().unwrap().delay = Duration::from_millis(500);
    assert_eq!(bench.get(&[]).await.text(), "0");
    // Until what goes on in the background is done.
    let mut reply = bench.get(&[]).await;
    while !(reply.is_hit() && reply.text() == "1") {
        tokio::time::sleep(Duration::from_millis(10)).await;
        reply = bench.get(&[]).await;
    }
    assert_eq!(bench.calls(), 2);
}

/// Vattani et al., VLDB 2015: long before the expiry never, right before it nearly always, and once.
#[tokio::test]
async fn early_refresh() {
    let bench = Bench::new(page().early_refresh(1_000.0));
    bench.says(200, &[("cache-control", "max-age=60")]);
    bench.script.lock().unwrap().delay = Duration::from_millis(5);
    bench.get(&[]).await;
    assert_eq!(Bench::new(page()).calls(), 0);
    bench.pass(59_999 * SECOND / 1_000);
    let hit = bench.get(&[]).await;
    assert_eq!((hit.text(), hit.is_hit()), ("0", true), "it is still fresh, so nobody waits");
    for _ in 0..200 {
        if bench.calls() > 1 {
            break;
        }
        bench.get(&[]).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(bench.calls(), 2);
    let without = Bench::new(page());
    without.says(200, &[("cache-control", "max-age=60")]);
    without.get(&[]).await;
    without.pass(59_999 * SECOND / 1_000);
    for _ in 0..50 {
        assert!(without.get(&[]).await.is_hit());
    }
    assert_eq!(without.calls(), 1);
}

#[tokio::test]
async fn jitter_only_shortens() {
    let mut left = vec![];
    for _ in 0..50 {
        let bench = Bench::new(DataType::new("page", 1_000 * SECOND).jitter(0.1));
        bench.get(&[]).await;
        let status = bench.get(&[]).await.cache_status().to_owned();
        left.push(status.rsplit_once("ttl=").unwrap().1.parse::<u64>().unwrap());
    }
    assert!(left.iter().all(|ttl| (900..=1_000).contains(ttl)), "{left:?}");
    left.sort_unstable();
    left.dedup();
    assert!(left.len() > 10, "{left:?}");
}

#[tokio::test]
async fn negative_answers_are_kept_for_a_while() {
    let bench = Bench::new(page().negative([404, 410], 10 * SECOND));
    for status in [404, 410] {
        bench.says(200, &[]);
        bench.web.put("/pages/1").await;
        bench.says(status, &[]);
        bench.get(&[]).await;
        let hit = bench.get(&[]).await;
        assert_eq!((hit.status.as_u16(), hit.cache_status()), (status, "hit; ttl=10"));
        bench.pass(10 * SECOND);
        assert!(!bench.get(&[]).await.is_hit());
        bench.get(&[]).await;
        bench.says(200, &[]);
        bench.web.put("/pages/1").await;
        assert_eq!(bench.get(&[]).await.status, 200, "a write ends it");
    }
    bench.web.put("/pages/1").await;
    bench.says(403, &[]);
    bench.get(&[]).await;
    assert!(!bench.get(&[]).await.is_hit());
}

/// The escape hatches of handlers and outer layers.
#[tokio::test]
async fn no_cache_keeps_the_cache_out() {
    let bench = Bench::new(page());
    bench.script.lock().unwrap().extension = true;
    for _ in 0..2 {
        assert_eq!(bench.get(&[]).await.cache_status(), "fwd=uri-miss; detail=no-cache");
    }
    let bench = Bench::new(page());
    bench.get(&[]).await;
    let mut fresh = request(Method::GET, "/pages/1");
    fresh.extensions_mut().insert(NoCache);
    let reply = bench.web.send(fresh).await;
    assert_eq!((reply.cache_status(), reply.text()), ("fwd=bypass; detail=no-cache", "1"));
    assert_eq!(bench.get(&[]).await.text(), "0");
}

/// RFC 9211: appended after what upstream wrote, and with the key only when asked for.
#[tokio::test]
async fn cache_status_is_complete() {
    let bench = Bench::with(page(), |b| b.show_keys(true));
    bench.says(200, &[("cache-status", "cdn; hit"), ("cache-tag", "page=1")]);
    let miss = bench.get(&[]).await;
    assert!(
        miss.header("cache-status")
            .starts_with("cdn; hit, tower-cache-aside; fwd=uri-miss; stored; fwd-status=200; key=\"")
    );
    let hit = bench.get(&[]).await;
    assert!(
        hit.header("cache-status").starts_with("cdn; hit, tower-cache-aside; hit; ttl=3600; key=\"test{t}:page:"),
        "{hit:?}"
    );
    let bypass = bench.get(&[("authorization", "x")]).await;
    assert_eq!(bypass.header("cache-tag"), "", "declared tags reach nobody");
    assert!(bypass.header("cache-status").ends_with("fwd=bypass; detail=credentials; fwd-status=200"), "{bypass:?}");
}

/// RFC 9111, section 4.4: an unsafe method, and what its response locates.
#[tokio::test]
async fn unsafe_methods_invalidate_what_they_name() {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("page", Ttl::Standard))
        .route(Route::new("/pages/{page_id}", "page"))
        .mutation(Mutation::any("/pages/{page_id}").mutates("page").follows_locations())
        .build()
        .unwrap();
    let web = Web::new(&cache, |request: Request<_>| async move {
        let response =
            Response::builder().header("location", "/pages/2").header("content-location", "http://here/pages/3");
        let response =
            response.header("content-location", "http://elsewhere/pages/4").header("content-location", "5?x=y");
        let status = if request.uri().path() == "/pages/9" { 400 } else { 200 };
        Ok(response.status(status).body(full("text")).unwrap())
    });
    for (method, path, fallen) in
        [("POST", "/pages/1", &[1, 2, 3, 5][..]), ("M-SEARCH", "/pages/1", &[1, 2, 3, 5]), ("POST", "/pages/9", &[])]
    {
        for id in 1..=6 {
            web.get(&format!("/pages/{id}")).await;
        }
        web.send(with(method.parse().unwrap(), path, &[("host", "here")])).await;
        for id in 1..=6 {
            assert_eq!(web.get(&format!("/pages/{id}")).await.is_hit(), !fallen.contains(&id), "{method} {path}: {id}");
        }
    }
    for method in [Method::OPTIONS, Method::TRACE] {
        web.send(request(method, "/pages/1")).await;
        assert!(web.get("/pages/1").await.is_hit());
    }
}

/// The typed function and declared tags meet the same cascade.
#[tokio::test]
async fn a_cascade_reaches_declared_tags_of_variants() {
    let bench = Bench::with(page(), |b| {
        b.data_type(DataType::new("book", Ttl::Standard))
            .route(Route::new("/books/{book_id}", "book"))
            .data_type(DataType::new("leaf", Ttl::Standard))
            .route(Route::new("/leaves/{leaf_id}", "leaf").declares_tags())
            .mutation(Mutation::put("/books/{book_id}", "book"))
            .cascade(Cascade::new("book").drops(["leaf"]))
    });
    let web = Web::new(&bench.cache, |_| async {
        let mut response = Response::builder().header("vary", "x-lang").body(full("text")).unwrap();
        CacheTags::of(response.extensions_mut()).add("book", "7");
        Ok(response)
    });
    let get = async |lang: &str| web.send(with(Method::GET, "/leaves/1", &[("x-lang", lang)])).await.is_hit();
    for _ in 0..2 {
        assert_eq!((get("de").await, get("fr").await), (false, false));
        assert_eq!((get("de").await, get("fr").await), (true, true));
        web.put("/books/7").await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// What is served is never older than the strictest word about it allows.
    #[test]
    fn nothing_is_served_older_than_allowed(
        max_age in proptest::option::of(0u64..100),
        s_maxage in proptest::option::of(0u64..100),
        age in 0u64..50,
        no_cache in proptest::bool::weighted(0.1),
        by_response: bool,
        waits in proptest::collection::vec(0u64..40, 1..6),
    ) {
        let mut control = vec!["public".to_owned()];
        control.extend(max_age.map(|n| format!("max-age={n}")));
        control.extend(s_maxage.map(|n| format!("s-maxage={n}")));
        control.extend(no_cache.then(|| "no-cache".to_owned()));
        // A shared cache goes by `s-maxage` first, and a type that tightens by its own TTL of 60 s as well.
        let own = if by_response { u64::MAX } else { 60 };
        let says = s_maxage.or(max_age).unwrap_or(if by_response { 0 } else { u64::MAX });
        let allowed = if no_cache { 0 } else { own.min(says) };
        let data_type = if by_response { rfc() } else { DataType::new("page", 60 * SECOND) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bench = Bench::new(data_type);
            bench.says(200, &[("cache-control", &control.join(", ")), ("age", &age.to_string())]);
            let mut filled = 0;
            let mut elapsed = 0;
            for wait in std::iter::once(0).chain(waits) {
                elapsed += wait;
                bench.pass(Duration::from_secs(wait));
                let reply = bench.get(&[]).await;
                if reply.is_hit() {
                    let old = age + elapsed - filled;
                    assert!(old < allowed, "{control:?}: {old} s old, {allowed} s allowed");
                    assert_eq!(reply.header("age"), old.to_string());
                } else {
                    filled = elapsed;
                }
            }
        });
    }
}
