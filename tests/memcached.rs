//! Several processes of the agent service on one SQLite file and memcached: what they promise together, under load and under
//! every fault.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/load.rs"]
mod load;
#[path = "support/memcached.rs"]
mod memcached;
mod support;

use std::{
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use load::Load;
use memcached::Memcached;
use serde_json::json;
use support::{Fleet, Http, until_hit};

/// Slower than this would be waiting for memcached.
const PATIENCE: Duration = Duration::from_secs(8);

async fn seconds(n: f64) {
    tokio::time::sleep(Duration::from_secs_f64(n)).await;
}

fn fleet(count: usize, servers: &[&Memcached], args: &[&str]) -> Fleet {
    let addresses: Vec<_> = servers.iter().map(|server| server.address()).collect();
    let store: Vec<_> = addresses.iter().flat_map(|address| ["--memcached", address]).collect();
    Fleet::over(count, &store, args)
}

/// Until there are so many entries with this prefix.
async fn until_stored(server: &Memcached, prefix: &str, count: usize) {
    let start = Instant::now();
    let is_entry = |name: &&String| name.starts_with(prefix) && name.contains(":e:");
    while server.keys().iter().filter(is_entry).count() < count {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", server.keys());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_shared_and_fall_everywhere() {
    let server = Memcached::start(&[]);
    for l1 in ["validated", "off"] {
        let fleet = fleet(3, &[&server], &["--l1", l1, "--prefix", l1]);
        let clients = fleet.clients();
        let paths = ["/agents/agent-1", "/agents/agent-1/config", "/agents/agent-1/tools", "/agents?limit=5"];
        clients[0].post("/agents/agent-1/conversations", json!({"id": "c"})).await;
        let more = ["/conversations/c", "/conversations/c/memory", "/conversations/c/messages"];
        for (i, path) in paths.iter().chain(&more).enumerate() {
            assert!(clients[0].get(path).await.is_miss(), "{path}");
            // Who comes before it is stored loads it for himself, and fills are counted.
            until_stored(&server, l1, i + 1).await;
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
        assert_eq!(clients[2].delete("/agents/agent-1").await.status, 204);
        for client in &clients {
            for path in ["/agents/agent-1", "/conversations/c", "/conversations/c/memory", "/agents/agent-1/config"] {
                assert_eq!(client.get(path).await.status, 404, "{path}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_is_stale() {
    for l1 in ["validated", "off"] {
        let servers = [(); 3].map(|()| Memcached::start(&[]));
        let fleet = fleet(3, &servers.each_ref(), &["--l1", l1, "--origin-delay-ms", "2"]);
        let load = Load::start(&fleet.urls(), Duration::ZERO).await;
        seconds(10.0).await;
        let history = load.stop().await;
        history.assert_good();
        assert!(history.hits > history.reads / 8, "{history:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_writes_are_fresh_too() {
    let server = Memcached::start(&[]);
    let fleet = fleet(2, &[&server], &["--fence-ms", "5000", "--origin-delay-ms", "5"]);
    let load = Load::start(&fleet.urls(), Duration::ZERO).await;
    seconds(8.0).await;
    load.stop().await.assert_good();
    let fences: Vec<_> = server.keys().into_iter().filter(|key| key.contains(":f:")).collect();
    assert!(fences.is_empty(), "every writer has lifted its fences: {fences:?}");
    let client = &fleet.clients()[0];
    until_hit(client, "/agents/agent-1").await;
    assert_eq!(client.put("/agents/none", json!({"name": "x"})).await.status, 404);
    until_hit(client, "/agents/agent-1").await;
}

/// Runs a fault under load: nothing fails, nothing waits, nothing is stale, and hits return.
async fn survives<F: AsyncFnOnce(&mut [Memcached])>(count: usize, server_args: &[&str], args: &[&str], fault: F) {
    let mut servers: Vec<_> = (0..count).map(|_| Memcached::start(server_args)).collect();
    let fleet = fleet(2, &servers.iter().collect::<Vec<_>>(), args);
    // What one process could not tell the others, these may not have heard of before it was delivered.
    let load = Load::start(&fleet.urls()[..1], Duration::ZERO).await;
    load.until_hits(20).await;
    fault(&mut servers).await;
    load.until_hits(50).await;
    let history = load.stop().await;
    history.assert_good();
    assert!(history.slowest < PATIENCE, "somebody waited {:?}", history.slowest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_server_is_survived() {
    survives(1, &[], &[], async |servers| {
        for freeze in [0.1, 0.4, 2.5] {
            servers[0].signal("-STOP");
            seconds(freeze).await;
            servers[0].signal("-CONT");
            seconds(2.0).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_and_restarted_server_is_survived() {
    survives(1, &[], &["--l1", "off"], async |servers| {
        for away in [0.0, 1.0] {
            servers[0].kill();
            seconds(away).await;
            servers[0].restart();
            seconds(2.0).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_servers_may_flap() {
    survives(3, &[], &[], async |servers| {
        for round in 0..9 {
            servers[round % 3].kill();
            seconds(0.3).await;
            servers[round % 3].restart();
            seconds(0.3).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_may_flush() {
    survives(1, &[], &[], async |servers| {
        for flush in ["flush_all", "flush_all 1", "flush_all"] {
            servers[0].command(flush);
            seconds(1.2).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eviction_costs_hits_and_nothing_else() {
    survives(1, &["-m", "2"], &["--l1", "off"], async |servers| {
        let ballast = "x".repeat(5_000);
        for i in 0..2_000 {
            servers[0].command(&format!("set ballast{i} 0 0 5000 noreply\r\n{ballast}"));
        }
        assert!(servers[0].stat("evictions") > 100);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memcached_may_come_after_the_service() {
    let mut server = Memcached::start(&[]);
    server.kill();
    let fleet = fleet(1, &[&server], &[]);
    let client = &fleet.clients()[0];
    assert_eq!(client.get("/agents/agent-1").await.status, 200);
    assert_eq!(client.get("/healthz").await.json()["store"], "degraded");
    assert_eq!(client.put("/agents/agent-1", json!({"name": "x"})).await.status, 200);
    server.restart();
    until_hit(client, "/agents/agent-1").await;
    assert_eq!(client.get("/agents/agent-1").await.json()["version"], 2);
    assert_eq!(client.get("/healthz").await.json()["store"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stampede_on_a_fleet_is_one_read() {
    let server = Memcached::start(&[]);
    let fleet = fleet(3, &[&server], &["--coalesce", "fleet", "--origin-delay-ms", "300"]);
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

/// A tenant's data are on one server; another's go on while that is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_is_the_origin_of_its_tenants_alone() {
    let mut servers = [(); 3].map(|()| Memcached::start(&[]));
    let fleet = fleet(1, &servers.each_ref(), &[]);
    let url = &fleet.urls()[0];
    let clients: Vec<_> = (0..12).map(|i| Http::new(url, &format!("tenant-{i}"))).collect();
    for client in &clients {
        assert_eq!(client.post("/agents", json!({"id": "a", "name": "n"})).await.status, 201);
        until_hit(client, "/agents/a").await;
    }
    servers[0].kill();
    let mut away = vec![];
    for client in &clients {
        let reply = client.get("/agents/a").await;
        assert_eq!(reply.status, 200);
        if !reply.is_hit() {
            away.push(client);
            assert_eq!(client.put("/agents/a", json!({"name": "m"})).await.status, 200);
            assert_eq!(client.get("/agents/a").await.json()["version"], 2);
        }
    }
    assert!(!away.is_empty() && away.len() < clients.len(), "{} of them", away.len());
    servers[0].restart();
    for client in away {
        until_hit(client, "/agents/a").await;
        assert_eq!(client.get("/agents/a").await.json()["version"], 2);
    }
}

#[test]
fn what_cannot_be_is_said_at_the_start() {
    for (args, said) in [
        (&["--memcached", "127.0.0.1:1", "--l1", "on"][..], "--l1: memcached does not say what other processes drop"),
        (&["--memcached", "memcached://x"], "--memcached: memcached server `memcached://x`: write host:port"),
        (&["--memcached", "x:0"], "--memcached: memcached server `x:0`: the port"),
        (
            &["--memcached", "x", "--memcached", "X:11211"],
            "--memcached: memcached server `X:11211`: it is in the list twice",
        ),
        (&["--memcached", "x", "--redis", "redis://x"], "--redis, --memcached: two stores"),
    ] {
        let output =
            Command::new(support::example("agent_service")).args(["--listen", "127.0.0.1:0"]).args(args).output();
        let output = output.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(said) && stderr.lines().count() == 1, "{args:?}: {stderr}");
    }
}
