//! Rows that another program changes, in the agent service with an outbox: whatever it does to them, and whatever becomes of the
//! service meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
mod support;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use redis::Redis;
use rusqlite::Connection;
use serde_json::{Value, json};
use support::{Http, Service, example, until_hit};
use tempfile::TempDir;

/// A database that others use, too.
struct Shared(TempDir);

impl Shared {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("agents.db")
    }

    fn serve(&self, more: &[&str]) -> Service {
        let file = self.file();
        let args = [&["--db", file.to_str().unwrap(), "--outbox", "on", "--admin-token", "secret"], more].concat();
        Service::start(&args)
    }

    /// Another program, which knows of no cache. (Foreign keys are off, as in the shell.)
    fn program(&self) -> Connection {
        let database = Connection::open(self.file()).unwrap();
        database.busy_timeout(Duration::from_secs(10)).unwrap();
        database.pragma_update(None, "foreign_keys", false).unwrap();
        database
    }
}

/// Until it answers like this.
async fn until(client: &Http, path: &str, what: &str, is: impl Fn(u16, &Value) -> bool) {
    let start = Instant::now();
    loop {
        let reply = client.get(path).await;
        let body = if reply.body.is_empty() { Value::Null } else { reply.json() };
        if is(reply.status.as_u16(), &body) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: {path} is still {body}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn source(service: &Service) -> Value {
    let admin = Http::anonymous(&service.url).with("authorization", "Bearer secret");
    admin.get("/_cache/api/stats").await.json()["sources"]["outbox"].clone()
}

/// Each thing that SQL can do to a row, in each table; each of two processes, which share nothing but the file.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_another_program_changes_falls() {
    let shared = Shared::new();
    let services = [shared.serve(&[]), shared.serve(&[])];
    let clients = services.each_ref().map(|service| Http::new(&service.url, "demo"));
    let program = shared.program();
    for (id, agent) in [("c1", "agent-1"), ("c2", "agent-1"), ("c3", "agent-2")] {
        let body = json!({"id": id, "title": "old"});
        assert_eq!(clients[0].post(&format!("/agents/{agent}/conversations"), body).await.status, 201);
        let path = format!("/conversations/{id}/messages");
        assert_eq!(clients[0].post(&path, json!({"id": "m1", "role": "user", "content": "old"})).await.status, 201);
    }
    clients[0].put("/agents/agent-1/executions/e1", json!({"state": {"step": 1}})).await;
    clients[0].put("/collections/docs", json!({"metadata": {"n": 1}})).await;

    type Is = fn(u16, &Value) -> bool;
    let changes: [(&str, &str, Is); 14] = [
        ("/agents/agent-1", "UPDATE agents SET name = 'new' WHERE id = 'agent-1'", |_, v| v["name"] == "new"),
        ("/agents/agent-1/config", "UPDATE agents SET config = '{\"a\":1}' WHERE id = 'agent-1'", |_, v| {
            v["config"]["a"] == 1
        }),
        ("/agents?limit=50", "INSERT INTO agents (tenant, id, name) VALUES ('demo', 'x', 'x')", |_, v| {
            v["total"] == 11
        }),
        ("/agents/agent-1/executions/e1", "UPDATE executions SET state = '{\"step\":2}'", |_, v| {
            v["state"]["step"] == 2
        }),
        ("/conversations/c1", "UPDATE conversations SET title = 'new' WHERE id = 'c1'", |_, v| v["title"] == "new"),
        (
            "/agents/agent-1/conversations/c2",
            "REPLACE INTO conversations (tenant, id, agent_id, title) VALUES ('demo', 'c2', 'agent-1', 'new')",
            |_, v| v["title"] == "new",
        ),
        (
            "/conversations/c1/memory",
            "UPDATE memories SET content = '{\"messages\":9}' WHERE conversation_id = 'c1'",
            |_, v| v["memory"]["messages"] == 9,
        ),
        (
            "/conversations/c1/messages/m1",
            "UPDATE messages SET content = 'new' WHERE conversation_id = 'c1'",
            |_, v| v["content"] == "new",
        ),
        ("/conversations/c2/messages", "DELETE FROM messages WHERE conversation_id = 'c2'", |_, v| v["total"] == 0),
        // Another's now: both lists have changed.
        (
            "/conversations/c3/messages",
            "UPDATE messages SET conversation_id = 'c2' WHERE conversation_id = 'c3'",
            |_, v| v["total"] == 0,
        ),
        ("/collections/docs", "UPDATE collections SET metadata = '{\"n\":2}'", |_, v| v["metadata"]["n"] == 2),
        // What is replaced is deleted without a trigger.
        (
            "/agents/agent-5",
            "REPLACE INTO agents (seq, tenant, id, name) SELECT seq, 'demo', 'agent-5b', 'y' FROM agents WHERE id = 'agent-5'",
            |status, _| status == 404,
        ),
        ("/agents/agent-6", "UPDATE agents SET tenant = 'other' WHERE id = 'agent-6'", |status, _| status == 404),
        ("/agents/agent-7", "DELETE FROM agents WHERE id = 'agent-7'", |status, _| status == 404),
    ];
    for (path, sql, is) in changes {
        for client in &clients {
            until_hit(client, path).await;
            assert!(!is(200, &client.get(path).await.json()), "{sql}: is so already");
        }
        assert_ne!(program.execute(sql, []).unwrap(), 0, "{sql}");
        for client in &clients {
            until(client, path, sql, is).await;
        }
    }
    until(&clients[1], "/conversations/c2/messages", "moved here", |_, v| v["total"] == 1).await;
    // What was rolled back has never been.
    // All that was before has been counted by then.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let events = source(&services[0]).await["applied"].as_u64().unwrap();
    until_hit(&clients[0], "/agents/agent-2").await;
    program.execute_batch("BEGIN; UPDATE agents SET name = 'never' WHERE id = 'agent-2'; ROLLBACK;").unwrap();
    program.execute("UPDATE agents SET name = 'z' WHERE id = 'agent-3'", []).unwrap();
    until(&clients[0], "/agents/agent-3", "after a rollback", |_, v| v["name"] == "z").await;
    assert!(clients[0].get("/agents/agent-2").await.is_hit());
    // It is counted after it was dropped.
    let start = Instant::now();
    while source(&services[0]).await["applied"].as_u64().unwrap() <= events {
        assert!(start.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(source(&services[0]).await["applied"], events + 1);
}

/// Without an outbox it is stale: else the tests above would show nothing.
#[tokio::test(flavor = "multi_thread")]
async fn without_an_outbox_it_would_be_stale() {
    let shared = Shared::new();
    let service = Service::start(&["--db", shared.file().to_str().unwrap()]);
    let client = Http::new(&service.url, "demo");
    until_hit(&client, "/agents/agent-1").await;
    shared.program().execute("UPDATE agents SET name = 'new'", []).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_ne!(client.get("/agents/agent-1").await.json()["name"], "new");
}

/// Committed by a process that is gone before it could invalidate: others read it, or the next that is started.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_has_committed_before_it_was_killed_is_not_stale() {
    let (shared, redis) = (Shared::new(), Redis::start(&[]));
    let serve = || shared.serve(&["--redis", &redis.url()]);
    let mut version = 1;
    for round in 0..6 {
        let (writer, other) = (serve(), serve());
        let client = Http::new(&other.url, "demo");
        until_hit(&client, "/agents/agent-1").await;
        let writing = Http::new(&writer.url, "demo");
        let writes = tokio::spawn(async move {
            while writing.try_send(http::Method::PUT, "/agents/agent-1", Some(json!({"name": "x"}))).await.is_some() {}
        });
        tokio::time::sleep(Duration::from_millis(30 + 17 * round)).await;
        writer.signal("-KILL");
        writes.await.unwrap();
        // As if it had been killed in between.
        shared.program().execute("UPDATE agents SET version = version + 1 WHERE id = 'agent-1'", []).unwrap();
        let now: i64 = shared
            .program()
            .query_row("SELECT version FROM agents WHERE id = 'agent-1'", [], |row| row.get(0))
            .unwrap();
        assert!(now > version);
        version = now;
        until(&client, "/agents/agent-1", "by the other", |_, v| v["version"] == version).await;
        // And nobody is there.
        until_hit(&client, "/agents/agent-1").await;
        drop(other);
        shared.program().execute("UPDATE agents SET version = version + 1 WHERE id = 'agent-1'", []).unwrap();
        version += 1;
        let next = serve();
        until(&Http::new(&next.url, "demo"), "/agents/agent-1", "by the next", |_, v| v["version"] == version).await;
        assert_eq!(source(&next).await["gaps"], 0, "it was known how far the outbox was read");
    }
}

/// A process that was away for longer than the outbox remembers cannot know what it has missed.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_outbox_has_forgotten_is_a_gap() {
    let shared = Shared::new();
    let service = shared.serve(&[]);
    let client = Http::new(&service.url, "demo");
    let program = shared.program();
    for (round, forget) in
        ["DELETE FROM outbox", "DELETE FROM outbox; DELETE FROM sqlite_sequence WHERE name = 'outbox'"]
            .iter()
            .enumerate()
    {
        program.execute("UPDATE agents SET name = name WHERE id = 'agent-2'", []).unwrap();
        until_hit(&client, "/agents/agent-1").await;
        let gaps = source(&service).await["gaps"].as_u64().unwrap();
        service.signal("-STOP");
        program.execute("UPDATE agents SET name = ?1 WHERE id = 'agent-1'", [round.to_string()]).unwrap();
        program.execute_batch(forget).unwrap();
        service.signal("-CONT");
        let name = round.to_string();
        until(&client, "/agents/agent-1", forget, |_, v| v["name"] == *name).await;
        assert_eq!(source(&service).await["gaps"], gaps + 1);
    }
    // It forgets by itself, and not what is young.
    program.execute_batch("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000) INSERT INTO collections (tenant, id, metadata) SELECT 'bulk', i, '{}' FROM n").unwrap();
    let (count, last): (i64, i64) =
        program.query_row("SELECT count(*), max(seq) FROM outbox", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert!(count == 100_000 && last >= 200_000, "{count} rows up to {last}");
}

/// While nothing tells what others have changed, types with a bound are answered by the database; and then by the cache again.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_a_bound_is_not_answered_while_the_outbox_cannot_be_read() {
    let shared = Shared::new();
    let service = shared.serve(&["--max-lag-ms", "2000"]);
    let client = Http::new(&service.url, "demo");
    until_hit(&client, "/agents/agent-1").await;
    let program = shared.program();
    // (Renamed with its trigger; those of the tables would follow it.)
    program.execute_batch("PRAGMA legacy_alter_table = ON; ALTER TABLE outbox RENAME TO gone").unwrap();
    let start = Instant::now();
    while !client.get("/agents/agent-1").await.header("cache-status").contains("fwd=bypass; detail=events-behind") {
        assert!(start.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let trouble = source(&service).await;
    assert!(trouble["trouble"].as_str().unwrap().contains("no such table"), "{trouble}");
    let metrics = client.get("/metrics").await;
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    assert!(metrics.contains("cache_aside_event_lag_seconds{"), "{metrics}");
    program.execute_batch("ALTER TABLE gone RENAME TO outbox").unwrap();
    until_hit(&client, "/agents/agent-1").await;
}

#[test]
fn mistakes_of_the_command_line_are_one_line() {
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("no-events.toml");
    std::fs::write(&config, "[types]\nagent = '5m'\n[[routes]]\npath = '/agents/{agent_id}'\ntype = 'agent'\n")
        .unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&["--outbox", "maybe"], "--outbox: \"maybe\" is not accepted; accepted: on or off"),
        (
            &["--outbox", "on", "--config", config.to_str().unwrap()],
            "--outbox: event source `outbox`: nothing says what an event makes stale",
        ),
        (&["--max-lag-ms", "100"], "--max-lag-ms: nothing tells of changes; add --outbox on, --events or --region"),
        (&["--outbox", "on", "--max-lag-ms", "0"], "--max-lag-ms: \"0\" is not accepted"),
        (&["--events", "redis://localhost"], "--events: \"redis://localhost\" is not accepted"),
        (&["--events", "redis://localhost:1/"], "--events: \"redis://localhost:1/\" is not accepted"),
    ];
    for (args, says) in cases {
        let output =
            Command::new(example("agent_service")).args(args).args(["--listen", "127.0.0.1:0"]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{stderr}");
    }
}
