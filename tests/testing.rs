//! The kit for tests of one's own mapping: it finds each mistake that is planted for it, and none where there is none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{Path, RawQuery, State},
    routing::{get, post, put},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use tower::{ServiceExt, service_fn};
use tower_cache_aside::{
    Cache, CacheBuilder, Canonical, Cascade, DataType, Mutation, OnUnreachable, Query, Route, Ttl, assert_fresh,
    assert_hit, assert_miss,
    store::{Guard, MemoryStore},
    testing::{Body, Clock, Difference, Faulty, Requests, Twin},
};

const TENANT: HeaderName = HeaderName::from_static("x-tenant-id");
const AGENT: &str = "/agents/{agent_id}";
const NAME: &str = "/agents/{agent_id}/name";
const SECOND: Duration = Duration::from_secs(1);

/// Agents by tenant and number, and how often each was written.
type Database = Arc<Mutex<BTreeMap<(String, u64), (String, u64)>>>;

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> &'h str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

/// What it says depends on the tenant, the language and the query, and it says so nowhere.
async fn read(
    State(db): State<Database>,
    Path(id): Path<u64>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> String {
    let agent = db.lock().unwrap().get(&(text(&headers, &TENANT).to_owned(), id)).cloned();
    let is_long = query.is_some_and(|query| query.contains("long=1"));
    format!("{} {agent:?}{}", text(&headers, &header::ACCEPT_LANGUAGE), if is_long { " long" } else { "" })
}

async fn list(State(db): State<Database>, headers: HeaderMap) -> String {
    let db = db.lock().unwrap();
    let own: Vec<_> = db.iter().filter(|((tenant, _), _)| tenant == text(&headers, &TENANT)).collect();
    format!("{own:?}")
}

async fn search(State(db): State<Database>, headers: HeaderMap, what: String) -> String {
    let db = db.lock().unwrap();
    let own = db.iter().filter(|((tenant, _), _)| tenant == text(&headers, &TENANT));
    format!("{what}: {}", own.filter(|(_, (name, _))| name.contains(&what)).count())
}

async fn write(State(db): State<Database>, Path(id): Path<u64>, headers: HeaderMap, name: String) -> StatusCode {
    let mut db = db.lock().unwrap();
    let agent = db.entry((text(&headers, &TENANT).to_owned(), id)).or_default();
    *agent = (name, agent.1 + 1);
    StatusCode::NO_CONTENT
}

fn service() -> Router {
    let routes = Router::new().route("/agents", get(list)).route(AGENT, get(read).put(write)).route(NAME, put(write));
    routes.route("/search", post(search)).with_state(Database::default())
}

/// What is said of it.
#[derive(Clone, Copy)]
struct Mapping {
    tenant: bool,
    canonical: bool,
    language: bool,
    query: bool,
    renames: bool,
    lists: bool,
}

const RIGHT: Mapping =
    Mapping { tenant: true, canonical: true, language: true, query: true, renames: true, lists: true };

impl Mapping {
    fn builder(self) -> CacheBuilder {
        let builder = ["agent", "list", "search"]
            .into_iter()
            .fold(Cache::builder("test"), |builder, name| builder.data_type(DataType::new(name, Ttl::Short)));
        let builder = if self.tenant { builder.tenant_header(TENANT.as_str()) } else { builder.single_tenant("all") };
        let builder = if self.canonical { builder.entity("agent", Canonical::Integer) } else { builder };
        let agent = Route::new(AGENT, "agent").query(if self.query { Query::only(["long"]) } else { Query::Ignore });
        let agent = if self.language { agent.vary("accept-language") } else { agent };
        let builder = builder.route(agent).route(Route::new("/agents", "list"));
        let builder = builder.route(Route::new("/search", "search").method(Method::POST));
        let cascade = Cascade::new("agent").all(["search"]);
        let builder = builder.cascade(if self.lists { cascade.all(["list"]) } else { cascade });
        let builder = builder.mutation(Mutation::put(AGENT, "agent"));
        if self.renames { builder.mutation(Mutation::put(NAME, "agent")) } else { builder }
    }

    /// Behind this cache and without it, before one database.
    fn twin(self) -> Twin {
        let (cache, service) = (self.builder().build().unwrap(), service());
        let cached = service.clone().layer(cache.layer().request_bodies(axum::body::Body::new));
        Twin::new(cached.layer(cache.invalidate_layer()), service).settling(&cache)
    }

    fn requests(self) -> Requests {
        let name = |n: u32| format!("name {}", n % 100);
        let tenants = ["acme", "globex"].map(HeaderValue::from_static);
        let requests = Requests::of(&self.builder().build().unwrap()).route(Method::PUT, NAME).header(TENANT, tenants);
        let requests = requests.query(AGENT, "long", ["0", "1"]).body(Method::POST, "/search", |n| (n % 2).to_string());
        requests.body(Method::PUT, AGENT, name).body(Method::PUT, NAME, name)
    }

    /// The first difference that any seed finds, or how many hits there were.
    async fn check(self) -> Result<usize, Difference> {
        let (requests, mut hits) = (self.requests(), 0);
        for seed in 0..20 {
            hits += Twin::check(async || self.twin(), requests.generate(seed, 150)).await?.hits;
        }
        Ok(hits)
    }
}

#[tokio::test]
async fn where_nothing_is_wrong_nothing_is_found() {
    let hits = RIGHT.check().await.unwrap();
    assert!(hits > 300, "{hits}");
    let apart = async || {
        let cache = RIGHT.builder().build().unwrap();
        Twin::new(service().layer(cache.layer()).layer(cache.invalidate_layer()), service()).apart()
    };
    let compared = Twin::check(apart, RIGHT.requests().generate(1, 300)).await.unwrap();
    assert!(compared.answers > 280 && compared.writes == 0 && compared.hits > 20, "{compared:?}");
}

#[tokio::test]
async fn each_planted_mistake_is_found_and_named() {
    let mistakes = [
        ("a mutation is missing", Mapping { renames: false, ..RIGHT }, 3, "`PUT /agents/"),
        ("a write does not say what else it changes", Mapping { lists: false, ..RIGHT }, 3, "`PUT /agents/"),
        ("ids are spelled in several ways", Mapping { canonical: false, ..RIGHT }, 3, "`PUT /agents/"),
        ("a header is forgotten", Mapping { language: false, ..RIGHT }, 2, "depends on the header `accept-language`,"),
        ("a parameter is forgotten", Mapping { query: false, ..RIGHT }, 2, "depends on the query,"),
        ("the tenant is not in the key", Mapping { tenant: false, ..RIGHT }, 3, "depends on the header `x-tenant-id`,"),
    ];
    for (what, mapping, most, says) in mistakes {
        let difference = mapping.check().await.expect_err(what);
        let report = format!("{difference:?}");
        assert!(difference.requests().len() <= most && difference.what() == "body", "{what}: {report}");
        assert!(report.contains("-> hit") && report.contains(says), "{what}: {report}");
        // The same requests say it again, and under the right mapping they don't.
        mapping.twin().run(difference.requests()).await.expect_err(what);
        RIGHT.twin().run(difference.requests()).await.expect(what);
    }
}

/// The report is read by people: what was asked, how the cache handled it, what both said, and what that looks like.
#[tokio::test]
async fn the_report_says_what_leads_there() {
    let mapping = Mapping { renames: false, ..RIGHT };
    let ask = |method: Method, path: &str, body: &'static str| {
        let request = Request::builder().method(method).uri(path).header(TENANT, "acme").header("x-noise", "1");
        request.body(Bytes::from(body)).unwrap()
    };
    let requests = [
        ask(Method::GET, "/agents", ""),
        ask(Method::GET, "/agents/1?long=1", ""),
        ask(Method::GET, "/agents/2", ""),
        ask(Method::PUT, "/agents/1", "Ada"),
        ask(Method::GET, "/agents/2", ""),
        ask(Method::PUT, "/agents/2/name", "Bob"),
        ask(Method::GET, "/agents/2", ""),
        ask(Method::GET, "/agents/1", ""),
    ];
    let difference = Twin::check(async || mapping.twin(), requests).await.unwrap_err();
    let report = "the cached service and its twin without a cache differ in: body

after
   1. GET /agents/2  x-tenant-id: acme  -> miss (uri-miss)
   2. PUT /agents/2/name  x-tenant-id: acme  Bob
   3. GET /agents/2  x-tenant-id: acme  -> hit

cached:   200 OK, age: 0
     None
uncached: 200 OK
     Some((\"Bob\", 1))

It looks as if `PUT /agents/2/name` does not drop what is read here: declare the mutation, what else it changes, or how ids are \
                  spelled (`entity`).";
    assert_eq!(difference.to_string(), report);
}

/// One page, which says what it is told, with an entity tag or without.
fn page(status: u16, headers: &'static [(&'static str, &'static str)], body: &'static str) -> Page {
    Page { status: StatusCode::from_u16(status).unwrap(), headers, body }
}

#[derive(Clone, Copy)]
struct Page {
    status: StatusCode,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
}

impl Page {
    fn service(self) -> Router {
        let headers = self.headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let headers: HeaderMap = headers.collect();
        Router::new().fallback(async move || (self.status, headers, self.body))
    }
}

#[tokio::test]
async fn a_difference_is_what_a_client_would_notice() {
    let cases: [(Page, Page, Option<&str>); 6] = [
        (page(200, &[("date", "now")], "a"), page(200, &[("age", "3"), ("etag", "\"1\"")], "a"), None),
        (page(200, &[("x-request-id", "1")], "a"), page(200, &[("x-request-id", "2")], "a"), None),
        (page(200, &[("x-plan", "1")], "a"), page(200, &[("x-plan", "2")], "a"), Some("header `x-plan`")),
        (page(200, &[("vary", "a")], "a"), page(200, &[], "a"), Some("header `vary`")),
        (page(200, &[], "a"), page(404, &[], "a"), Some("status")),
        (page(200, &[], "a"), page(200, &[], "b"), Some("body")),
    ];
    for (at, (one, other, expected)) in cases.into_iter().enumerate() {
        let id = HeaderName::from_static("x-request-id");
        let mut twin = Twin::new(one.service(), other.service()).ignore_header(id);
        let found = twin.run([Request::new(Bytes::new())]).await.err();
        assert_eq!(found.as_ref().map(Difference::what), expected, "{at}: {found:?}");
    }
}

/// What a cache does for conditions and ranges, the service itself need not do.
#[tokio::test]
async fn a_304_or_a_part_is_no_difference() {
    let builder = Cache::builder("test").single_tenant("all").data_type(DataType::new("page", Ttl::Short));
    let cache = builder.route(Route::new("/page", "page")).build().unwrap();
    let service = page(200, &[("etag", "\"1\"")], "0123456789").service();
    let mut twin = Twin::new(service.clone().layer(cache.layer()), service);
    let conditions = [("x", "y"), ("if-none-match", "\"1\""), ("range", "bytes=2-3"), ("if-none-match", "\"2\"")];
    let asked = conditions.map(|(name, value)| Request::get("/page").header(name, value).body(Bytes::new()).unwrap());
    let compared = twin.run(asked).await.unwrap();
    assert_eq!((compared.answers, compared.hits), (4, 3));
}

#[tokio::test]
async fn a_service_that_fails_fails_on_both_sides() {
    let fails = service_fn(async |_: Request<Body>| Err::<Response<Body>, _>("lost"));
    let works = service_fn(async |_: Request<Body>| Ok::<_, String>(Response::new(Body::default())));
    Twin::new(fails, fails).run([Request::new(Bytes::new())]).await.unwrap();
    let difference = Twin::new(fails, works).run([Request::new(Bytes::new())]).await.unwrap_err();
    assert_eq!(difference.what(), "one of them failed");
}

#[test]
fn a_seed_says_all_of_its_requests() {
    let requests = RIGHT.requests().tenants(["é"]).ids("agent_id", ["a/b", "7"]);
    let show = |seed| format!("{:?}", requests.generate(seed, 50));
    assert_eq!(show(1), show(1));
    assert_ne!(show(1), show(2));
    let all: Vec<_> = (0..20).flat_map(|seed| requests.generate(seed, 50)).collect();
    assert_eq!(all.len(), 1_000);
    let is_there = |is_it: &dyn Fn(&Request<Bytes>) -> bool| all.iter().any(is_it);
    for (method, path) in [
        (Method::GET, "/agents"),
        (Method::GET, "/agents/7"),
        (Method::HEAD, "/agents/7"),
        (Method::GET, "/agents/07"),
        (Method::GET, "/agents/%37"),
        (Method::GET, "/agents/a%2Fb"),
        (Method::PUT, "/agents/7"),
        (Method::PUT, "/agents/7/name"),
        (Method::DELETE, "/agents/7"),
        (Method::POST, "/search"),
    ] {
        assert!(is_there(&|request| *request.method() == method && request.uri().path() == path), "{method} {path}");
    }
    for query in ["long=0", "long=1"] {
        assert!(is_there(&|request| request.uri().query() == Some(query)), "{query}");
    }
}

/// A cache of one type over a page that counts its readings, and how long each takes.
struct Counting {
    cache: Cache,
    calls: Arc<AtomicU64>,
    service: Router,
}

impl Counting {
    fn new(builder: CacheBuilder, takes: Duration) -> Self {
        let builder = builder.single_tenant("all").data_type(DataType::new("page", Ttl::Short));
        let builder = builder.route(Route::new("/pages/{page_id}", "page"));
        let cache = builder.mutation(Mutation::put("/pages/{page_id}", "page")).build().unwrap();
        let calls = Arc::new(AtomicU64::new(0));
        let counted = calls.clone();
        let page = move || {
            let n = counted.fetch_add(1, Ordering::SeqCst);
            async move {
                tokio::time::sleep(takes).await;
                n.to_string()
            }
        };
        let service = Router::new().route("/pages/{page_id}", get(page.clone()).put(page));
        let service = service.layer(cache.layer()).layer(cache.invalidate_layer());
        Self { cache, calls, service }
    }

    async fn ask(&self, method: Method) -> Response<axum::body::Body> {
        let request = Request::builder().method(method).uri("/pages/1").body(Body::default()).unwrap();
        self.service.clone().oneshot(request).await.unwrap()
    }

    async fn get(&self) -> Response<axum::body::Body> {
        self.ask(Method::GET).await
    }
}

#[tokio::test]
async fn a_ttl_is_over_when_the_clock_says_so() {
    let clock = Clock::new();
    let pages = Counting::new(Cache::builder("test").clock(clock.clone()), Duration::ZERO);
    assert_miss!(pages.get().await);
    for _ in 0..2 {
        clock.advance(100 * SECOND);
        assert_hit!(pages.get().await, "of {}", "five minutes");
    }
    clock.advance(101 * SECOND);
    assert_miss!(pages.get().await);
    clock.set(clock.now() - 50 * SECOND);
    assert_hit!(pages.get().await.headers(), "the clock was set back");
}

#[tokio::test]
async fn an_assertion_says_what_it_found() {
    let said =
        |assertion: &dyn Fn()| *catch_unwind(AssertUnwindSafe(assertion)).unwrap_err().downcast::<String>().unwrap();
    let pages = Counting::new(Cache::builder("test"), Duration::ZERO);
    let (miss, hit) = (pages.get().await, pages.get().await);
    let of_miss = "found: miss (uri-miss): `cache-status: tower-cache-aside; fwd=uri-miss; stored; fwd-status=200`";
    assert_eq!(said(&|| assert_hit!(miss)), format!("expected a hit, {of_miss}"));
    assert_eq!(said(&|| assert_hit!(miss, "after {}", 1)), format!("expected a hit, {of_miss}: after 1"));
    assert_eq!(said(&|| assert_hit!(miss.headers())), format!("expected a hit, {of_miss}"));
    assert!(
        said(&|| assert_miss!(hit)).starts_with("expected a miss, found: hit: `cache-status: tower-cache-aside; hit")
    );
    assert_fresh!(hit);
    assert_fresh!(&miss);
    let stale = Response::builder().header("cache-status", "c; hit; ttl=-3").body(()).unwrap();
    assert_eq!(
        said(&|| assert_fresh!(stale)),
        "expected a fresh response, found: stale: `cache-status: c; hit; ttl=-3`"
    );
    assert!(said(&|| assert_miss!(Response::new(()))).contains("no route of the mapping reads this path"));
}

/// What goes on without its clients has come to its end, and no sleep was guessed.
#[tokio::test(start_paused = true)]
async fn settled_is_when_nothing_goes_on() {
    let pages = Counting::new(Cache::builder("test"), 7 * SECOND);
    let hung_up = tokio::time::timeout(SECOND, pages.get()).await;
    assert!(hung_up.is_err());
    pages.cache.settled().await;
    assert_hit!(pages.get().await);
    let hung_up = tokio::time::timeout(SECOND, pages.ask(Method::PUT)).await;
    assert!(hung_up.is_err());
    // Two may wait, and neither is in the way of what begins.
    tokio::join!(pages.cache.settled(), pages.cache.settled());
    assert_miss!(pages.get().await);
    pages.cache.settled().await;
    assert_eq!(pages.calls.load(Ordering::SeqCst), 3);
}

/// Two processes over one store, each with a link of its own.
fn fleet(builder: impl Fn() -> CacheBuilder) -> [(Counting, tower_cache_aside::testing::Faults); 2] {
    let store = Faulty::new(MemoryStore::new(8 << 20));
    let links = [store.link(), store];
    links.map(|link| {
        let faults = link.faults();
        (Counting::new(builder().store(Guard::new(link)), Duration::ZERO), faults)
    })
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_gone_takes_nothing() {
    let [(one, faults), (other, _)] = fleet(|| Cache::builder("test"));
    assert_miss!(one.get().await);
    one.cache.settled().await;
    assert_hit!(one.get().await);
    assert_hit!(other.get().await);
    faults.gone();
    one.ask(Method::PUT).await;
    assert_miss!(one.get().await, "this process reads nothing until the store knows");
    assert_hit!(other.get().await, "nobody has told it");
    faults.heal();
    assert_eq!(one.cache.drain(10 * SECOND).await.undelivered, 0);
    assert_miss!(other.get().await);
}

#[tokio::test(start_paused = true)]
async fn writes_are_refused_where_the_store_must_know() {
    let [(one, faults), _] = fleet(|| Cache::builder("test").on_unreachable(OnUnreachable::Reject));
    assert_eq!(one.ask(Method::PUT).await.status(), 200);
    faults.gone();
    assert_eq!(one.ask(Method::PUT).await.status(), 503);
    faults.heal();
    assert_eq!(one.ask(Method::PUT).await.status(), 200);
    assert_eq!(one.calls.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_slow_store_does_what_it_does_not_answer() {
    let [(one, faults), (other, _)] = fleet(|| Cache::builder("test"));
    faults.slow(Duration::from_millis(20));
    assert_miss!(one.get().await);
    one.cache.settled().await;
    assert_hit!(one.get().await, "slower than usual, within the budget");
    faults.slow(10 * SECOND);
    assert_miss!(one.get().await, "over the budget");
    // Its answer is lost, and the drop is not.
    one.ask(Method::PUT).await;
    assert_miss!(other.get().await);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_behind_hears_of_writes_late() {
    let [(one, faults), (other, _)] = fleet(|| Cache::builder("test"));
    assert_miss!(one.get().await);
    one.cache.settled().await;
    faults.behind(10 * SECOND);
    // It waits its second for the store, and is acknowledged.
    one.ask(Method::PUT).await;
    assert_miss!(one.get().await);
    assert_hit!(other.get().await);
    tokio::time::sleep(10 * SECOND).await;
    assert_miss!(other.get().await);
}
