//! Events from outside: which policy reads one, what it drops, and what becomes of one that makes no sense.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
mod support;
#[path = "support/web.rs"]
mod web;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use http::Method;
use serde_json::json;
use tokio::sync::Semaphore;
use tower_cache_aside::{Cache, CacheBuilder, Cascade, Config, DataType, Event, EventPolicy, Query, Route, Ttl};
use web::{Web, ok, with};

/// Agents with their lists and notes.
fn builder() -> CacheBuilder {
    Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("agents", Ttl::Standard))
        .data_type(DataType::new("note", Ttl::Standard))
        .route(Route::new("/agents/{agent_id}", "agent"))
        .route(Route::new("/agents", "agents").query(Query::only(["page"])))
        .route(Route::new("/notes/{note_id}", "note"))
        .cascade(Cascade::new("agent").all(["agents"]).relation("notes", "note"))
        .resolver("notes", |_, agents: Vec<String>| async move {
            Ok::<_, std::io::Error>(agents.into_iter().map(|agent| format!("of-{agent}")).collect())
        })
}

const POLICY: &str = r#"
[[events]]
on = "agents"
when = { op = ["update", "delete"], is_draft = ["false"] }
tenant = "tenant_id"
mutated = [{ type = "agent", id = "id" }]
include = ["notes"]
"#;

fn policy() -> EventPolicy {
    let policy = EventPolicy::on("agents").when("op", ["update", "delete"]).when("is_draft", ["false"]);
    policy.tenant("tenant_id").mutated("agent", "id").include("notes")
}

fn changed(id: impl ToString) -> Event {
    let event = Event::new("agents").field("op", "update").field("is_draft", false).field("tenant_id", "acme");
    event.field("id", id)
}

const PATHS: [&str; 5] = ["/agents/1", "/agents/2", "/agents", "/agents?page=2", "/notes/of-1"];

/// Which of these the tenant still has. All are there again afterwards.
async fn left(web: &Web, tenant: &str) -> Vec<&'static str> {
    let mut left = vec![];
    for path in PATHS {
        if web.send(with(Method::GET, path, &[("x-tenant-id", tenant)])).await.is_hit() {
            left.push(path);
        }
    }
    left
}

#[tokio::test]
async fn an_event_drops_what_its_policies_say_and_nothing_else() {
    let of_file = Cache::builder("test").config(Config::from_toml(POLICY).unwrap());
    assert!(of_file.build().is_err(), "there is no such type");
    let cache = builder().event(policy()).build().unwrap();
    let from_file = builder().config(Config::from_toml(POLICY).unwrap()).build().unwrap();
    for cache in [cache, from_file] {
        let web = Web::new(&cache, |_| async { Ok(ok("text")) });
        for tenant in ["acme", "other"] {
            assert!(left(&web, tenant).await.is_empty());
            assert_eq!(left(&web, tenant).await, PATHS);
        }
        let applied = cache.apply(&[changed(1)]).await;
        assert_eq!((applied.ignored, applied.refused.len()), (0, 0));
        assert_eq!(applied.dropped.to_string(), "agent=1, agents=2, notes=1, total=4");
        assert_eq!(left(&web, "acme").await, ["/agents/2"]);
        assert_eq!(left(&web, "other").await, PATHS);
        // Several in one event, and several events at once.
        cache.apply(&[changed(1).field("id", 2), changed(7)]).await;
        assert_eq!(left(&web, "acme").await, [""; 0]);
        // Of another name, another operation, or without what is asked of it.
        let inserted = Event::new("agents").field("op", "insert").field("tenant_id", "acme").field("id", 1);
        let applied = cache.apply(&[Event::new("other").tenant("acme").field("id", 1), inserted]).await;
        assert_eq!((applied.ignored, applied.dropped.total()), (2, 0));
        assert_eq!(left(&web, "acme").await, PATHS);
    }
}

#[tokio::test]
async fn an_event_that_makes_no_sense_is_refused_and_the_others_are_not() {
    let cache = builder().event(policy()).event(EventPolicy::on("notes").mutated("note", "id")).build().unwrap();
    let web = Web::new(&cache, |_| async { Ok(ok("text")) });
    left(&web, "acme").await;
    let base = || Event::new("agents").field("op", "update").field("is_draft", "false");
    let events = [
        base().field("tenant_id", "acme"),
        base().field("id", 1),
        base().field("tenant_id", "acme").field("tenant_id", "other").field("id", 1),
        base().field("tenant_id", "acme").field("id", 1).field("id", ""),
        Event::new("notes").field("id", "of-1"),
        changed(2),
    ];
    let applied = cache.apply(&events).await;
    let refused: Vec<_> = applied.refused.iter().map(|(at, why)| (*at, why.to_string())).collect();
    assert_eq!(refused.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    for ((_, why), says) in
        refused.iter().zip(["`id` is to name a agent", "`tenant_id`", "`tenant_id`", "`id`", "no tenant is named"])
    {
        assert!(why.contains(says), "{why}");
    }
    assert_eq!(left(&web, "acme").await, ["/agents/1", "/notes/of-1"]);
}

/// A read that was under way when the event came stores nothing of before.
#[tokio::test]
async fn a_slow_read_cannot_bring_back_what_an_event_dropped() {
    let cache = builder().event(policy()).build().unwrap();
    let (row, entered, gate) = (Arc::new(AtomicU64::new(1)), Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (r, e, g) = (row.clone(), entered.clone(), gate.clone());
    let web = Web::new(&cache, move |_| {
        let (text, entered, gate) = (r.load(Ordering::SeqCst).to_string(), e.clone(), g.clone());
        async move {
            entered.add_permits(1);
            gate.acquire().await.unwrap().forget();
            Ok(ok(text))
        }
    });
    let get = || with(Method::GET, "/agents/1", &[("x-tenant-id", "acme")]);
    let reading = tokio::spawn({
        let web = web.clone();
        async move { web.send(get()).await }
    });
    entered.acquire().await.unwrap().forget();
    row.store(2, Ordering::SeqCst);
    cache.apply(&[changed(1)]).await;
    gate.add_permits(10);
    assert_eq!(reading.await.unwrap().text(), "1");
    assert_eq!(web.send(get()).await.text(), "2");
}

#[test]
fn policies_are_checked_when_the_cache_is_built() {
    for (policy, says) in [
        (EventPolicy::on("agents"), "event `agents`: it drops nothing"),
        (EventPolicy::on("").all("agent"), "it has no name"),
        (EventPolicy::on("x").mutated("agnet", "id"), "agnet"),
        (EventPolicy::on("x").mutated("agent", "id").include("nodes"), "nodes"),
        (EventPolicy::on("x").all("agent").when("op", [""; 0]), "event `x`: a field of `when`"),
    ] {
        let error = builder().event(policy).build().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    for (toml, says) in
        [("on = 'x'\nmutates = ['agent']", "mutates"), ("mutated = []", "on"), ("on = 'x'\nwhen = { op = 'a' }", "op")]
    {
        let error = Config::from_toml(&format!("[[events]]\n{toml}")).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// On the page for the review of a mapping.
#[test]
fn policies_are_described() {
    let cache = builder().event(policy()).event(EventPolicy::on("notes").all("note")).build().unwrap();
    let description = cache.describe();
    let dropped_by: Vec<_> = description.reads.iter().map(|read| (&*read.name, read.dropped_by.join(", "))).collect();
    let (agents, all) = ("event `agents`".to_owned(), "event `agents`, event `notes`".to_owned());
    let expected = [("GET /agents/{agent_id}", agents.clone()), ("GET /agents", agents), ("GET /notes/{note_id}", all)];
    assert_eq!(dropped_by, expected);
}

#[test]
fn what_is_said_in_json_is_the_same() {
    let event: Event = serde_json::from_value(json!({
        "name": "agents", "tenant": "acme", "fields": {"op": "update", "id": ["a", 7, -1, true], "n": 18_446_744_073_709_551_615_u64, "none": null}
    }))
    .unwrap();
    let same =
        Event::new("agents").tenant("acme").field("op", "update").field("id", "a").field("id", 7).field("id", -1);
    let same = same.field("id", true).field("n", u64::MAX);
    assert_eq!(format!("{event:?}").replace(", \"none\": []", ""), format!("{same:?}"));
    for bad in [
        "{}",
        "[]",
        "7",
        r#"{"name":"a","x":1}"#,
        r#"{"name":"a","fields":{"id":{"a":1}}}"#,
        r#"{"name":"a","fields":{"id":[[1]]}}"#,
        r#"{"name":"a","fields":{"id":1,"id":2}}"#,
        // As numbers they would be another's id.
        r#"{"name":"a","fields":{"id":18446744073709551617}}"#,
        r#"{"name":"a","fields":{"id":[1e16]}}"#,
    ] {
        assert!(serde_json::from_str::<Event>(bad).is_err(), "{bad}");
    }
}

/// A row that another program has changed, in the agent service.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_service_hears_of_rows_that_others_have_changed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agents.db");
    let service = support::Service::start(&["--db", file.to_str().unwrap(), "--admin-token", "secret"]);
    let client = support::Http::new(&service.url, "demo");
    support::until_hit(&client, "/agents/agent-1").await;
    support::until_hit(&client, "/agents?limit=5").await;
    let database = rusqlite::Connection::open(&file).unwrap();
    database.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
    database
        .execute("UPDATE agents SET name = 'Eve', version = 9 WHERE tenant = 'demo' AND id = 'agent-1'", [])
        .unwrap();
    assert_eq!(client.get("/agents/agent-1").await.json()["version"], 1);

    let admin = support::Http::anonymous(&service.url).with("authorization", "Bearer secret");
    let post = async |body: serde_json::Value| admin.post("/_cache/api/events", body).await;
    let reply = post(json!({"name": "agents", "tenant": "demo", "fields": {"id": "agent-1"}})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let report = reply.json();
    assert_eq!(
        (&report["dropped"]["agent"], &report["dropped"]["agents_list"], &report["total"]),
        (&json!(1), &json!(1), &json!(2))
    );
    assert_eq!(client.get("/agents/agent-1").await.json()["version"], 9);
    // Some of several: each that was refused is named.
    let reply = post(json!([{"name": "agents", "tenant": "demo", "fields": {}}, {"name": "else"}, {"name": "agents", "tenant": "demo", "fields": {"id": 1}}])).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["ignored"], &reply.json()["refused"][0]["event"]),
        (200, &json!(1), &json!(0))
    );
    for (body, says) in [
        (json!({"name": "agents", "tenant": "demo", "fields": {}}), "`id` is to name a agent"),
        (json!({"name": "agents", "fields": {"id": "a"}}), "no tenant"),
        (json!({"nam": "agents"}), "nam"),
        (json!("agents"), "invalid type"),
    ] {
        let reply = post(body).await;
        assert_eq!(reply.status, 400);
        assert!(reply.json()["error"].as_str().unwrap().contains(says), "{reply:?}");
    }
    assert_eq!(client.post("/_cache/api/events", json!({"name": "agents"})).await.status, 401);
    let recent = admin.get("/_cache/api/recent?kind=invalidation").await.json();
    let said = |at: usize| (recent[at]["source"].clone(), recent[at]["what"].clone(), recent[at]["tenant"].clone());
    assert_eq!(said(0), (json!("event"), json!("events"), json!("demo")));
    assert_eq!(said(1), (json!("event"), json!("event agents"), json!("demo")));
    let path = "/_cache/api/explain?path=/agents/agent-1&tenant=demo";
    client.get("/agents/agent-1").await;
    post(json!({"name": "agents", "tenant": "demo", "fields": {"id": "agent-1"}})).await;
    let because = admin.get(path).await.json()["because"].to_string();
    assert!(because.contains("event agents"), "{because}");
}

/// A stream of Redis that others write to: by each process for itself, or by one of a fleet.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_service_follows_a_stream() {
    let (streams, store) = (redis::Redis::start(&[]), redis::Redis::start(&[]));
    let events = format!("{}/changes", streams.url());
    for more in [&[][..], &["--redis", &store.url()]] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agents.db");
        let args = [
            &["--db", file.to_str().unwrap(), "--events", &events, "--max-lag-ms", "5000", "--admin-token", "secret"],
            more,
        ]
        .concat();
        let services = [support::Service::start(&args), support::Service::start(&args)];
        let clients = services.each_ref().map(|service| support::Http::new(&service.url, "demo"));
        let database = rusqlite::Connection::open(&file).unwrap();
        database.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
        for name in ["a", "b", "c"] {
            for client in &clients {
                support::until_hit(client, "/agents/agent-1").await;
            }
            database.execute("UPDATE agents SET name = ?1 WHERE id = 'agent-1'", [name]).unwrap();
            streams.command(&["XADD", "changes", "*", "name", "agents", "tenant", "demo", "id", "agent-1"]);
            for client in &clients {
                let start = std::time::Instant::now();
                while client.get("/agents/agent-1").await.json()["name"] != name {
                    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{name} is not heard of");
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
            }
        }
        // It is counted after it was dropped.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let mut applied = vec![];
        for service in &services {
            let admin = support::Http::anonymous(&service.url).with("authorization", "Bearer secret");
            let stats = admin.get("/_cache/api/stats").await.json();
            applied.push(stats["sources"]["redis:changes"]["applied"].as_u64().unwrap());
        }
        applied.sort_unstable();
        assert_eq!(applied, if more.is_empty() { [3, 3] } else { [0, 3] });
    }
}
