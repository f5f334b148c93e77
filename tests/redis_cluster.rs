//! The agent service on a Redis cluster and on a master that sentinels watch: hits and cascades, and no stale read and no
//! failed request while slots migrate and servers fail over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/load.rs"]
mod load;
#[path = "support/redis.rs"]
mod redis;
mod support;

use std::time::{Duration, Instant};

use load::Load;
use redis::{RedisCluster, Sentinels};
use serde_json::json;
use support::{Fleet, Http, until_hit};
use tower_cache_aside::store::{Health, RedisStore, Store as _};

/// What the docs say: two heartbeats.
const BOUND: Duration = Duration::from_millis(500);

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_serves_tenants_from_all_its_nodes() {
    let cluster = RedisCluster::start();
    let fleet = Fleet::start(2, &cluster.url(), &[]);
    // Enough tenants for every node to have some.
    for tenant in (0..9).map(|i| format!("tenant-{i}")) {
        let [one, other] = [0, 1].map(|i| Http::new(&fleet.urls()[i], &tenant));
        assert_eq!(one.post("/agents", json!({"id": "a", "name": "first"})).await.status, 201);
        for path in ["/agents/a", "/agents/a/config", "/agents"] {
            until_hit(&one, path).await;
            until_hit(&other, path).await;
        }
        let reply = other.put("/agents/a", json!({"name": "second"})).await;
        let report = reply.header("cache-invalidated");
        assert_eq!(report, "agent=1, agent_config=1, agent_tools=0, agents_list=1, conversations=0, total=3");
        // What is in process may be as old as a push takes.
        let start = Instant::now();
        while one.get("/agents/a").await.json()["version"] != 2 {
            assert!(start.elapsed() < BOUND * 4);
        }
        assert_eq!(other.get("/agents/a").await.json()["version"], 2, "the writer's own process");
    }
    let used = cluster.nodes.iter().filter(|node| !node.keys("cas:e:agent_service*").is_empty()).count();
    assert!(used >= 3, "all masters hold something");
}

/// Each asks all nodes first, replicas too, and forgets those in the midst of their answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_connects_to_a_cluster_is_well_soon() {
    let cluster = RedisCluster::start();
    // Their heartbeats are rare: so many are more than a busy machine has time for.
    let store = || RedisStore::builder([cluster.url()]).heartbeat(Duration::from_secs(1)).build().unwrap();
    for _ in 0..3 {
        let stores: Vec<_> = (0..50).map(|_| store()).collect();
        let start = Instant::now();
        while let Some(ill) = stores.iter().find(|store| store.health() != Health::Ok) {
            assert!(start.elapsed() < Duration::from_secs(60), "{}", ill.health());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_may_migrate_and_fail_over() {
    for l1 in ["on", "off"] {
        let mut cluster = RedisCluster::start();
        let fleet = Fleet::start(2, &cluster.url(), &["--l1", l1]);
        let load = Load::start(&fleet.urls(), BOUND).await;
        load.until_hits(50).await;
        for _ in 0..3 {
            cluster.migrate("{demo}");
            load.until_hits(50).await;
        }
        let (master, _) = cluster.master_of("{demo}");
        cluster.nodes[master].kill();
        let witness = if master == 0 { 1 } else { 0 };
        until("the failover", || {
            let nodes = cluster.nodes[witness].command(&["CLUSTER", "NODES"]);
            let masters =
                |failed| nodes.lines().filter(|l| l.contains("master") && l.contains("fail") == failed).count();
            masters(true) == 1 && masters(false) == 3
        })
        .await;
        load.until_hits(100).await;
        load.stop().await.assert_good();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_may_fail_over() {
    let mut sentinels = Sentinels::start();
    let fleet = Fleet::start(2, &sentinels.url(), &[]);
    let load = Load::start(&fleet.urls(), BOUND).await;
    load.until_hits(50).await;
    sentinels.master.kill();
    // A sentinel kills every client of the server that it promotes, this question's as well.
    until("the failover", || sentinels.replica.try_command(&["ROLE"]).is_some_and(|role| role.contains("master")))
        .await;
    load.until_hits(100).await;
    load.stop().await.assert_good();
}
