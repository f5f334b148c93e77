//! Several processes of the agent service on one SQLite file and one Redis: what they promise together, under load and
//! under every fault.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/load.rs"]
mod load;
#[path = "support/redis.rs"]
mod redis;
mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use load::Load;
use redis::Redis;
use serde_json::json;
use support::{Fleet, until_hit};

/// What the docs say of the tier in process: two heartbeats.
const BOUND: Duration = Duration::from_millis(500);

/// Slower than this would be waiting for Redis.
const PATIENCE: Duration = Duration::from_secs(8);

async fn seconds(n: f64) {
    tokio::time::sleep(Duration::from_secs_f64(n)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_shared_and_fall_everywhere() {
    let redis = Redis::start(&[]);
    let fleet = Fleet::start(3, &redis.url(), &[]);
    let clients = fleet.clients();
    let paths = ["/agents/agent-1", "/agents/agent-1/config", "/agents/agent-1/tools", "/agents?limit=5"];
    clients[0].post("/agents/agent-1/conversations", json!({"id": "c"})).await;
    for path in paths.iter().chain(&["/conversations/c", "/conversations/c/memory", "/conversations/c/messages"]) {
        assert!(clients[0].get(path).await.is_miss(), "{path}");
        for client in &clients {
            until_hit(client, path).await;
        }
    }
    let reply = clients[1].put("/agents/agent-1", json!({"name": "new"})).await;
    let report = reply.header("cache-invalidated");
    assert_eq!(report, "agent=1, agent_config=1, agent_tools=1, agents_list=1, conversations=3, total=7");
    for client in &clients {
        assert_eq!(client.get("/agents/agent-1").await.json()["version"], 2);
    }
    let reply = clients[2].delete("/agents/agent-1").await;
    assert_eq!(reply.status, 204);
    for client in &clients {
        for path in ["/agents/agent-1", "/conversations/c", "/conversations/c/memory", "/agents/agent-1/config"] {
            assert_eq!(client.get(path).await.status, 404, "{path}");
        }
    }
}

/// A hit is the same response, from wherever it comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_hit_from_redis_is_the_response_and_its_age() {
    let redis = Redis::start(&[]);
    for l1 in ["on", "off"] {
        let fleet = Fleet::start(2, &redis.url(), &["--l1", l1, "--prefix", l1]);
        let clients = fleet.clients();
        let miss = clients[0].get("/agents/agent-1").await;
        for client in &clients {
            until_hit(client, "/agents/agent-1").await;
            let hit = client.get("/agents/agent-1").await;
            assert_eq!((hit.status, &hit.body), (miss.status, &miss.body));
            let mut names: Vec<_> = hit.headers.keys().map(|name| name.as_str()).collect();
            names.sort_unstable();
            assert_eq!(names, ["age", "cache-status", "content-length", "content-type", "date", "etag"], "l1 {l1}");
            assert!(hit.header("age").parse::<u64>().is_ok(), "{hit:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_tier_no_read_is_stale() {
    let redis = Redis::start(&[]);
    let fleet = Fleet::start(3, &redis.url(), &["--l1", "off"]);
    let load = Load::start(&fleet.urls(), Duration::ZERO).await;
    seconds(20.0).await;
    let history = load.stop().await;
    history.assert_good();
    assert!(history.hits > history.reads / 4, "{history:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_tier_no_read_is_staler_than_the_bound() {
    let redis = Redis::start(&[]);
    let fleet = Fleet::start(2, &redis.url(), &["--l1", "on"]);
    let load = Load::start(&fleet.urls(), BOUND).await;
    seconds(20.0).await;
    load.stop().await.assert_good();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_origin_cannot_bring_back_what_was_written_over() {
    let redis = Redis::start(&[]);
    let fleet = Fleet::start(2, &redis.url(), &["--l1", "off", "--origin-delay-ms", "30"]);
    let load = Load::start(&fleet.urls(), Duration::ZERO).await;
    seconds(10.0).await;
    load.stop().await.assert_good();
}

/// Runs a fault under load: nothing fails, nothing waits, nothing is stale, and hits return.
async fn survives<F: AsyncFnOnce(&mut Redis)>(redis_args: &[&str], args: &[&str], fault: F) {
    let mut redis = Redis::start(redis_args);
    let fleet = Fleet::start(2, &redis.url(), args);
    let bound = if args.contains(&"off") { Duration::ZERO } else { BOUND };
    let load = Load::start(&fleet.urls(), bound).await;
    load.until_hits(20).await;
    fault(&mut redis).await;
    load.until_hits(50).await;
    let history = load.stop().await;
    history.assert_good();
    assert!(history.slowest < PATIENCE, "somebody waited {:?}", history.slowest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_redis_is_survived() {
    for l1 in ["on", "off"] {
        survives(&[], &["--l1", l1], async |redis| {
            for freeze in [0.1, 0.4, 2.5] {
                redis.signal("-STOP");
                seconds(freeze).await;
                redis.signal("-CONT");
                seconds(2.0).await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_and_restarted_redis_is_survived() {
    for l1 in ["on", "off"] {
        survives(&[], &["--l1", l1], async |redis| {
            redis.kill();
            seconds(1.5).await;
            redis.restart();
            seconds(2.0).await;
            redis.restart();
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_from_an_old_snapshot_brings_nothing_back() {
    let mut redis = Redis::start(&["--dbfilename", "old.rdb"]);
    let fleet = Fleet::start(1, &redis.url(), &["--l1", "off"]);
    let client = &fleet.clients()[0];
    client.get("/agents/agent-1").await;
    until_hit(client, "/agents/agent-1").await;
    assert!(redis.command(&["SAVE"]).contains("OK"));
    let written = client.put("/agents/agent-1", json!({"name": "after the snapshot"})).await;
    assert_eq!(written.dropped("agent"), Some(1));
    redis.restart();
    assert!(!redis.keys("*agent-1*").is_empty(), "the snapshot has the old entry");
    let start = Instant::now();
    loop {
        let reply = client.get("/agents/agent-1").await;
        assert_eq!(reply.json()["version"], 2);
        if reply.is_hit() {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        seconds(0.05).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_may_do_what_they_like() {
    survives(&[], &[], async |redis| {
        for _ in 0..10 {
            redis.command(&["FLUSHALL"]);
            seconds(0.1).await;
            redis.command(&["CLIENT", "KILL", "TYPE", "normal"]);
            seconds(0.2).await;
        }
        for round in 0..20 {
            for key in redis.keys("cas:*") {
                match round % 5 {
                    0 => redis.command(&["SET", &key, "garbage"]),
                    1 => redis.command(&["DEL", &key]),
                    2 => redis.command(&["EXPIRE", &key, "1"]),
                    3 => redis.command(&["SETRANGE", &key, "3", "xx"]),
                    _ => {
                        redis.command(&["DEL", &key]);
                        redis.command(&["LPUSH", &key, "a value of the wrong type"])
                    }
                };
            }
            seconds(0.1).await;
        }
        // What is still of the wrong type is replaced when it is next needed.
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eviction_costs_hits_and_nothing_else() {
    for policy in ["allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-ttl", "volatile-random"] {
        survives(&["--maxmemory", "2500kb", "--maxmemory-policy", policy], &["--l1", "off"], async |redis| {
            for i in 0..300 {
                redis.command(&["SET", &format!("ballast:{i}"), &"x".repeat(10_000), "EX", "100"]);
            }
            redis.command(&["CONFIG", "SET", "maxmemory", "100mb"]);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_is_survived() {
    survives(&["--maxmemory-policy", "noeviction"], &[], async |redis| {
        redis.command(&["CONFIG", "SET", "maxmemory", "1mb"]);
        seconds(2.0).await;
        redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_may_come_after_the_service() {
    let port = redis::lasting_port();
    let fleet = Fleet::start(1, &format!("redis://127.0.0.1:{port}"), &[]);
    let client = &fleet.clients()[0];
    assert_eq!(client.get("/agents/agent-1").await.status, 200);
    assert_eq!(client.get("/healthz").await.json()["store"], "degraded");
    assert_eq!(client.put("/agents/agent-1", json!({"name": "x"})).await.status, 200);
    let redis = Redis::start_on(port, &[]);
    until_hit(client, "/agents/agent-1").await;
    assert_eq!(client.get("/agents/agent-1").await.json()["version"], 2);
    assert_eq!(client.get("/healthz").await.json()["store"], "ok");
    drop(redis);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stampede_on_a_fleet_is_one_read() {
    let redis = Redis::start(&[]);
    let fleet = Fleet::start(3, &redis.url(), &["--coalesce", "fleet", "--origin-delay-ms", "300"]);
    let clients = Arc::new(fleet.clients());
    // Connected, so that all can begin at once.
    for client in clients.iter() {
        until_hit(client, "/agents/agent-2").await;
    }
    let calls = async || {
        let mut calls = 0;
        for client in clients.iter() {
            calls += client.origin_calls("agent").await;
        }
        calls
    };
    // A process that is only just connecting asks the database.
    let before = calls().await;
    let mut tasks = vec![];
    for i in 0..120 {
        let client = clients[i % 3].clone();
        tasks.push(tokio::spawn(async move { client.get("/agents/agent-1").await }));
    }
    for task in tasks {
        assert_eq!(task.await.unwrap().json()["version"], 1);
    }
    assert_eq!(calls().await - before, 1, "one for the agent that all asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_writes_are_fresh_too() {
    let redis = Redis::start(&[]);
    let fleet = Fleet::start(2, &redis.url(), &["--fence-ms", "5000", "--l1", "off", "--origin-delay-ms", "5"]);
    let load = Load::start(&fleet.urls(), Duration::ZERO).await;
    seconds(10.0).await;
    let history = load.stop().await;
    history.assert_good();
    assert!(redis.keys("*:f:*").is_empty(), "every writer has lifted its fences");
    let client = &fleet.clients()[0];
    until_hit(client, "/agents/agent-1").await;
    assert_eq!(client.put("/agents/none", json!({"name": "x"})).await.status, 404);
    until_hit(client, "/agents/agent-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_may_be_encrypted() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut authority = rcgen::CertificateParams::new(vec![]).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    std::fs::write(path("ca.pem"), authority.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = rcgen::Issuer::new(authority, key);
    let own_key = rcgen::KeyPair::generate().unwrap();
    let own = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(path("own.pem"), own.signed_by(&own_key, &issuer).unwrap().pem()).unwrap();
    std::fs::write(path("key.pem"), own_key.serialize_pem()).unwrap();
    let (port, cert, key, ca) = (redis::lasting_port().to_string(), path("own.pem"), path("key.pem"), path("ca.pem"));
    let files = ["--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-ca-cert-file", &ca];
    let redis = Redis::start(&[&["--tls-port", &port, "--tls-auth-clients", "no"], &files[..]].concat());
    let url = format!("rediss://127.0.0.1:{port}");
    let service = support::Service::start_with(&["--redis", &url], &[("SSL_CERT_FILE", &ca)]);
    let client = support::Http::new(&service.url, "demo");
    until_hit(&client, "/agents/agent-1").await;
    assert!(!redis.keys("cas:*agent-1*").is_empty());
    assert_eq!(client.get("/healthz").await.json()["store"], "ok");
    // Whose certificate nobody vouches for is not spoken to.
    let stranger = support::Service::start(&["--redis", &url]);
    let client = support::Http::new(&stranger.url, "demo");
    for _ in 0..3 {
        assert!(!client.get("/agents/agent-1").await.is_hit());
    }
    assert_eq!(client.get("/healthz").await.json()["store"], "degraded");
}

/// Deploying during an outage is the ordinary case: what was acknowledged is delivered before the process ends, or said to
/// be lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_told_to_stop_delivers_what_it_has() {
    let mut redis = Redis::start(&[]);
    let mut fleet = Fleet::start(2, &redis.url(), &[]);
    let clients = fleet.clients();
    for client in &clients {
        until_hit(client, "/agents/agent-1").await;
    }
    redis.signal("-STOP");
    let written = clients[0].put("/agents/agent-1", json!({"name": "during the outage"})).await;
    assert!(written.header("cache-invalidated").contains("undelivered="), "{written:?}");
    fleet.signal(0, "-TERM");
    redis.signal("-CONT");
    fleet.wait(0);
    let start = Instant::now();
    // The other reads Redis again after a while, and finds what was dropped gone.
    loop {
        let reply = clients[1].get("/agents/agent-1").await;
        assert_eq!(reply.json()["version"], 2, "{reply:?}");
        if reply.is_hit() {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        seconds(0.05).await;
    }
    redis.kill();
}

/// What a process learned before it was frozen is not believed when it goes on, in any tier.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_frozen_serves_nothing_from_before() {
    let redis = Redis::start(&[]);
    for l1 in ["validated", "on", "off"] {
        let fleet = Fleet::start(2, &redis.url(), &["--l1", l1, "--prefix", l1]);
        let clients = fleet.clients();
        for version in 2..5 {
            until_hit(&clients[0], "/agents/agent-1").await;
            fleet.signal(0, "-STOP");
            clients[1].put("/agents/agent-1", json!({"name": "new"})).await;
            seconds(BOUND.as_secs_f64()).await;
            fleet.signal(0, "-CONT");
            assert_eq!(clients[0].get("/agents/agent-1").await.json()["version"], version, "{l1}");
        }
    }
}

/// One line when it begins and one when it is over, whatever goes on meanwhile; and none with the password.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_logged_when_it_begins_and_when_it_is_over() {
    let mut redis = Redis::start(&["--requirepass", "hunter2"]);
    let (dir, url) = (tempfile::tempdir().unwrap(), format!("redis://:hunter2@127.0.0.1:{}", redis.port));
    let path = dir.path().join("log");
    let service = support::Service::start_logging(&["--redis", &url], &path);
    let client = support::Http::new(&service.url, "demo");
    let log = || std::fs::read_to_string(&path).unwrap();
    let lines = |what: &str| log().lines().filter(|line| line.contains(what) && !line.contains("alert")).count();
    until_hit(&client, "/agents/agent-1").await;
    redis.kill();
    for i in 0..200 {
        let reply = client.put("/agents/agent-1", json!({"name": i.to_string()})).await;
        assert_eq!(reply.status, 200);
        client.get("/agents/agent-1").await;
    }
    seconds(1.0).await;
    assert_eq!(lines("ERROR"), 1, "{}", log());
    assert_eq!(lines("Redis cannot be used"), 1, "{}", log());
    redis.restart();
    until_hit(&client, "/agents/agent-1").await;
    assert_eq!((lines("ERROR"), lines("has been told of all")), (1, 1), "{}", log());
    assert!(log().contains("writes=200"), "{}", log());
    assert_eq!(lines("connected to Redis"), 2, "{}", log());
    assert_eq!(lines("hunter2"), 0);
}
