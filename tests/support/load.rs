//! A mixed load on several processes of the agent service, and the checker of its history.
//!
//! Every register is the version of an agent, a config or a conversation. A read is stale if it returns less than what a
//! write had acknowledged before the read began. Where a mode guarantees freshness only after a bound, a write counts from
//! that long after its acknowledgement.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    history::{Life, Register},
    support::Http,
};

const AGENTS: usize = 6;
const TENANT: &str = "demo";

#[derive(Debug, Default, Clone)]
pub struct History {
    pub reads: u64,
    pub writes: u64,
    pub hits: u64,
    pub stale: Vec<String>,
    pub failed: Vec<String>,
    pub slowest: Duration,
}

impl History {
    /// What holds in every case.
    pub fn assert_good(&self) {
        println!(
            "{} reads ({} hits), {} writes, {} stale, {} failed, slowest {:?}",
            self.reads,
            self.hits,
            self.writes,
            self.stale.len(),
            self.failed.len(),
            self.slowest
        );
        assert!(self.stale.is_empty(), "stale: {:#?}", &self.stale[..self.stale.len().min(5)]);
        assert!(self.failed.is_empty(), "failed: {:#?}", &self.failed[..self.failed.len().min(5)]);
        assert!(self.reads > 100 && self.writes > 10, "too little happened to prove anything");
    }
}

/// A running load.
pub struct Load {
    stop: Arc<AtomicBool>,
    history: Arc<Mutex<History>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    pub async fn start(urls: &[String], bound: Duration) -> Self {
        let first = Http::new(&urls[0], TENANT);
        for agent in 0..AGENTS {
            let path = format!("/agents/agent-{}/conversations", agent + 1);
            let created = first.post(&path, json!({ "id": format!("c{agent}") })).await;
            assert!(created.status.is_success() || created.status == 409, "{created:?}");
        }
        let registers: Arc<Vec<Register>> = Arc::new((0..AGENTS * 3).map(|_| Register::default()).collect());
        let (stop, history) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(History::default())));
        let (reader, writer) = (Life::new("reader".to_owned(), bound), Life::new("writer".to_owned(), bound));
        let mut tasks = vec![];
        for task in 0..8 {
            let clients: Vec<_> = urls.iter().map(|url| Http::new(url, TENANT)).collect();
            let (stop, history, registers) = (stop.clone(), history.clone(), registers.clone());
            let (reader, writer) = (reader.clone(), writer.clone());
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let pick = rand::random_range(0..registers.len());
                    let client = &clients[rand::random_range(0..clients.len())];
                    if task < 6 {
                        read(client, pick, &registers[pick], &reader, &history).await
                    } else {
                        write(client, pick, &registers[pick], &writer, &history).await
                    }
                }
            }));
        }
        Self { stop, history, tasks }
    }

    pub fn hits(&self) -> u64 {
        self.history.lock().unwrap().hits
    }

    /// Until so many more hits were seen: what was disturbed works again.
    pub async fn until_hits(&self, more: u64) {
        let goal = self.hits() + more;
        let start = Instant::now();
        while self.hits() < goal {
            assert!(start.elapsed() < Duration::from_secs(30), "hits do not return");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn stop(self) -> History {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.history.lock().unwrap().clone()
    }
}

fn path(pick: usize) -> String {
    let (agent, kind) = (pick / 3, pick % 3);
    match kind {
        0 => format!("/agents/agent-{}", agent + 1),
        1 => format!("/agents/agent-{}/config", agent + 1),
        _ => format!("/conversations/c{agent}"),
    }
}

async fn read(client: &Http, pick: usize, register: &Register, reader: &Life, history: &Mutex<History>) {
    let floor = register.floor(reader);
    let start = Instant::now();
    let reply = client.get(&path(pick)).await;
    let took = start.elapsed();
    let mut history = history.lock().unwrap();
    history.reads += 1;
    history.slowest = history.slowest.max(took);
    if !reply.status.is_success() {
        history.failed.push(format!("GET {}: {reply:?}", path(pick)));
        return;
    }
    if reply.is_hit() {
        history.hits += 1;
    }
    let version = reply.json()["version"].as_u64().unwrap();
    if version < floor {
        let status = reply.header("cache-status").to_owned();
        history.stale.push(format!("GET {} gave {version}, not {floor} or later ({status})", path(pick)));
    }
}

async fn write(client: &Http, pick: usize, register: &Register, writer: &Life, history: &Mutex<History>) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let body = match pick % 3 {
        0 => json!({ "name": format!("agent {n}") }),
        1 => json!({ "config": { "n": n } }),
        _ => json!({ "title": format!("conversation {n}") }),
    };
    let start = Instant::now();
    let reply = client.put(&path(pick), body).await;
    let took = start.elapsed();
    {
        let mut history = history.lock().unwrap();
        history.writes += 1;
        history.slowest = history.slowest.max(took);
        if !reply.status.is_success() {
            history.failed.push(format!("PUT {}: {reply:?}", path(pick)));
            return;
        }
    }
    register.acknowledge(reply.json()["version"].as_u64().unwrap(), writer, true);
    tokio::time::sleep(Duration::from_millis(rand::random_range(0..30))).await;
}
