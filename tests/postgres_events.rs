//! `postgres_events` as real processes on a real PostgreSQL: rows that psql and other programs change, and whatever becomes of the
//! service, the server and the network meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;
#[path = "support/postgres.rs"]
mod server;
mod support;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use proxy::{Mode, Proxy};
use redis::Redis;
use serde_json::json;
use server::Postgres;
use support::{Http, Reply, Service, example, until_hit};
use tokio_postgres::NoTls;

const LISTEN: [&str; 2] = ["--listen", "127.0.0.1:0"];

fn serve(database: &str, more: &[&str]) -> Service {
    Service::of("postgres_events", &[&LISTEN[..], &["--database", database], more].concat())
}

/// A service, and the agents `a` to `e` of `demo`.
fn start(more: &[&str]) -> (Postgres, Service, Http) {
    let server = Postgres::start(&[]);
    let service = serve(&server.url(), more);
    server.sql("INSERT INTO agents SELECT 'demo', chr(96 + i), 'old' FROM generate_series(1, 5) AS i");
    let client = Http::new(&service.url, "demo");
    (server, service, client)
}

/// Another program, which knows of no cache.
async fn program(server: &Postgres) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Until it answers like this.
async fn until(client: &Http, path: &str, what: &str, is: impl Fn(&Reply) -> bool) {
    let start = Instant::now();
    loop {
        let reply = client.get(path).await;
        if is(&reply) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{what}: {path} is still {reply:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn until_version(client: &Http, path: &str, version: i64) {
    until(client, path, "changed elsewhere", |reply| reply.status == 200 && reply.json()["version"] == version).await;
}

fn is_behind(reply: &Reply) -> bool {
    reply.header("cache-status").contains("fwd=bypass; detail=events-behind")
}

/// What has changed `a`, so that it has this version.
fn change(server: &Postgres, version: i64) {
    server.sql(&format!("UPDATE agents SET version = {version} WHERE id = 'a'"));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_other_programs_change_is_fresh() {
    let (server, _service, client) = start(&[]);
    let program = program(&server).await;
    type Is = fn(&Reply) -> bool;
    let changes: [(&str, &str, Is); 7] = [
        ("/agents/a", "UPDATE agents SET name = 'new', version = 2 WHERE id = 'a'", |r| r.json()["version"] == 2),
        ("/agents", "INSERT INTO agents VALUES ('demo', 'x', 'x')", |r| r.json().as_array().unwrap().len() == 6),
        (
            "/agents/b",
            "BEGIN; SAVEPOINT s; DELETE FROM agents; ROLLBACK TO s; UPDATE agents SET version = 3; COMMIT",
            |r| r.json()["version"] == 3,
        ),
        ("/agents/b", "UPDATE agents SET id = 'b2' WHERE id = 'b'", |r| r.status == 404),
        ("/agents/c", "UPDATE agents SET tenant = 'other' WHERE id = 'c'", |r| r.status == 404),
        ("/agents/d", "DELETE FROM agents WHERE id = 'd'", |r| r.status == 404),
        ("/agents/e", "TRUNCATE agents", |r| r.status == 404),
    ];
    for by_psql in [true, false] {
        for (path, sql, is) in changes {
            until_hit(&client, path).await;
            assert!(!is(&client.get(path).await), "{sql}: is so already");
            if by_psql {
                server.sql(sql);
            } else {
                program.batch_execute(sql).await.unwrap();
            }
            until(&client, path, sql, is).await;
        }
        server.sql("INSERT INTO agents SELECT 'demo', chr(96 + i), 'old' FROM generate_series(1, 5) AS i");
    }
    // The service's own write is fresh when it is answered.
    until_hit(&client, "/agents/a").await;
    assert_eq!(client.put("/agents/a", json!({"name": "mine"})).await.json()["version"], 2);
    assert_eq!(client.get("/agents/a").await.json()["name"], "mine");
}

/// What was rolled back has never been; what is no event is skipped; and a hundred thousand rows are as one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_change_drops_nothing() {
    let (server, _service, client) = start(&[]);
    for nothing in [
        "BEGIN; UPDATE agents SET name = 'never'; ROLLBACK",
        "UPDATE agents SET name = 'never' WHERE false",
        "SELECT pg_logical_emit_message(true, 'tower-cache-aside', 'no JSON')",
        r"SELECT pg_logical_emit_message(true, 'tower-cache-aside', '\xff00'::bytea)",
        r#"SELECT pg_logical_emit_message(true, 'tower-cache-aside', '{"name": "agents", "fields": {"id": {}}}')"#,
        r#"SELECT pg_logical_emit_message(true, 'tower-cache-aside', '{"name": "agents", "fields": {"id": "b"}}')"#,
        "SELECT pg_logical_emit_message(true, 'other', 'of another')",
    ] {
        until_hit(&client, "/agents/a").await;
        until_hit(&client, "/agents/b").await;
        let now = client.get("/agents/a").await.json()["version"].as_i64().unwrap();
        server.sql(nothing);
        change(&server, now + 1);
        until_version(&client, "/agents/a", now + 1).await;
        assert!(client.get("/agents/b").await.is_hit(), "{nothing}");
    }
    server.sql("INSERT INTO agents SELECT 'demo', i, 'many' FROM generate_series(1, 100000) AS i");
    for path in ["/agents/1", "/agents/50000", "/agents/100000"] {
        until_hit(&client, path).await;
    }
    server
        .sql("BEGIN; UPDATE agents SET version = 2 WHERE name = 'many'; UPDATE agents SET name = 'all of it'; COMMIT");
    for path in ["/agents/1", "/agents/50000", "/agents/100000", "/agents/b"] {
        until(&client, path, "one of many", |reply| reply.json()["name"] == "all of it").await;
    }
}

/// Processes that share a store share the slot.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_before_a_process_was_killed_is_fresh() {
    let redis = Redis::start(&[]);
    let url = redis.url();
    let (server, first, client) = start(&["--redis", &url]);
    let again = || {
        let service = serve(&server.url(), &["--redis", &url]);
        let client = Http::new(&service.url, "demo");
        (service, client)
    };
    let mut processes = [(first, client), again()];
    let mut version = 1;
    for round in 0..4 {
        for (_, client) in &processes {
            until_hit(client, "/agents/a").await;
            until_hit(client, "/agents/b").await;
        }
        assert_eq!(server.sql("SELECT count(*) FROM pg_replication_slots"), "1");
        version += 1;
        change(&server, version);
        for (_, client) in &processes {
            until_version(client, "/agents/a", version).await;
        }
        // One of the two reads, and either may be frozen, and killed then.
        until_hit(&processes[0].1, "/agents/a").await;
        processes[round % 2].0.signal("-STOP");
        version += 1;
        change(&server, version);
        processes[round % 2] = again();
        for (_, client) in &processes {
            until_version(client, "/agents/a", version).await;
        }
    }
    // And nobody is there.
    for (_, client) in &processes {
        until_hit(client, "/agents/a").await;
        until_hit(client, "/agents/b").await;
    }
    for (service, _) in &processes {
        service.signal("-STOP");
    }
    version += 1;
    change(&server, version);
    drop(processes);
    let (_service, client) = again();
    until_version(&client, "/agents/a", version).await;
    until(&client, "/agents/b", "proven", |reply| !is_behind(reply)).await;
    assert!(client.get("/agents/b").await.is_hit(), "it was known how far the log was read: no gap");
}

/// Its own write is in the log, and it is killed before it can drop anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_killed_between_commit_and_drop_leaves_nothing_stale() {
    let redis = Redis::start(&[]);
    let url = redis.url();
    for is_alone in [false, true] {
        redis.command(&["FLUSHALL"]);
        let (server, writer, writing) = start(&["--redis", &url]);
        let again = || {
            let service = serve(&server.url(), &["--redis", &url]);
            let client = Http::new(&service.url, "demo");
            (service, client)
        };
        let other = (!is_alone).then(again);
        until_hit(&writing, "/agents/a").await;
        // A standby that is missing: the commit is in the log, and nobody sees it.
        let standby = |names: &str| {
            server.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
            server.sql("SELECT pg_reload_conf()");
        };
        standby("missing");
        server.wait_for("SHOW synchronous_standby_names", "missing");
        let written = tokio::spawn(async move {
            writing.try_send(http::Method::PUT, "/agents/a", Some(json!({"name": "new"}))).await
        });
        server.wait_for("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'", "1");
        if let Some((_, client)) = &other {
            // Read, and read again, while it is neither old nor new.
            for _ in 0..20 {
                assert_eq!(client.get("/agents/a").await.json()["name"], "old");
            }
        }
        drop(writer);
        assert!(written.await.unwrap().is_none(), "it was answered");
        standby("");
        let (_next, client) = other.unwrap_or_else(again);
        until_version(&client, "/agents/a", 2).await;
        until_hit(&client, "/agents/a").await;
        assert_eq!(client.get("/agents/a").await.json()["name"], "new");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_told_to_stop_can_and_nothing_is_stale_meanwhile() {
    let (mut server, _service, client) = start(&["--max-lag-ms", "1500"]);
    for version in [2, 3] {
        until_hit(&client, "/agents/a").await;
        let stopping = tokio::task::spawn_blocking(move || {
            let has_ended = server.stops();
            (server, has_ended)
        });
        let (stopped, has_ended) = stopping.await.unwrap();
        server = stopped;
        assert!(has_ended, "it waits for who reads its log");
        until(&client, "/agents/a", "behind", |reply| is_behind(reply) && reply.status == 503).await;
        server.restart();
        change(&server, version);
        until_version(&client, "/agents/a", version).await;
        until_hit(&client, "/agents/a").await;
        assert_eq!(client.get("/agents/a").await.json()["version"], version);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_a_network_that_swallows_everything_is_not_stale() {
    let server = Postgres::start(&[]);
    let proxy = Proxy::start(server.port).await;
    let service = serve(&format!("postgres://postgres@{}/postgres", proxy.address), &["--max-lag-ms", "1500"]);
    server.sql("INSERT INTO agents VALUES ('demo', 'a', 'old')");
    let client = Http::new(&service.url, "demo");
    until_hit(&client, "/agents/a").await;
    proxy.set(Mode::Swallow);
    change(&server, 2);
    until(&client, "/agents/a", "behind", |reply| is_behind(reply) && reply.status == 503).await;
    proxy.set(Mode::Pass);
    until_version(&client, "/agents/a", 2).await;
    until_hit(&client, "/agents/a").await;
}

/// Without events it is stale: else the tests above would show nothing.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_triggers_it_would_be_stale() {
    let (server, _service, client) = start(&[]);
    until_hit(&client, "/agents/a").await;
    server.sql("ALTER TABLE agents DISABLE TRIGGER ALL");
    change(&server, 2);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let reply = client.get("/agents/a").await;
    assert!(reply.is_hit() && reply.json()["version"] == 1, "{reply:?}");
}

#[test]
fn mistakes_of_the_command_line_are_one_line() {
    let cases: [(&[&str], &str); 6] = [
        (&[], "--database is missing"),
        (&["--database", "postgres://a@127.0.0.1:1/a"], "--database: error connecting to server"),
        (&["--database", "nonsense"], "--database: invalid"),
        (&["--max-lag-ms", "-1"], "--max-lag-ms: \"-1\" is not accepted"),
        (&["--tables", "a"], "unknown flag --tables"),
        (&["a"], "unexpected argument"),
    ];
    for (args, says) in cases {
        let output = Command::new(example("postgres_events")).args(args).args(LISTEN).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{stderr}");
    }
}
