//! A world of tenants with agents, conversations, messages and collections, in which many clients read and write at once
//! by way of several processes of the agent service; and the checks of what they are answered.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::Method;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    history::{GONE, History, Life, Register, count},
    strangers::Stranger,
    support::{Http, Reply},
};

/// Whatever the load writes begins with the name of its tenant.
const TENANTS: [&str; 3] = ["tenant-a", "tenant-b", "tenant-c"];
const AGENTS: usize = 3;
const COLLECTIONS: usize = 2;
/// After so many messages another conversation begins.
const MESSAGES: u64 = 20;

const READERS: usize = 6;
const WRITERS: usize = 4;
const STRANGERS: usize = 2;

/// Nothing takes longer but what has been forgotten: an invalidation is waited for for a second, and a database that is
/// locked for ten.
const PATIENCE: Duration = Duration::from_secs(15);

/// A process that can be asked.
pub struct Process {
    pub life: Arc<Life>,
    pub url: String,
    /// As each tenant.
    clients: Vec<Http>,
    /// The same, and no cache is asked.
    uncached: Vec<Http>,
    pub nobody: Http,
}

impl Process {
    pub fn new(name: String, url: &str, lag: Duration) -> Arc<Self> {
        let clients: Vec<_> = TENANTS.iter().map(|tenant| Http::new(url, tenant)).collect();
        let uncached = clients.iter().map(|client| client.clone().with("authorization", "Bearer x")).collect();
        let (life, nobody) = (Life::new(name, lag), Http::anonymous(url));
        Arc::new(Self { life, url: url.to_owned(), clients, uncached, nobody })
    }
}

/// What an agent and all that is its own have come to.
struct Agent {
    id: String,
    itself: Arc<Register>,
    config: Arc<Register>,
    tools: Arc<Register>,
    execution: Arc<Register>,
    /// The one that goes on, and the one before it, which is gone.
    talks: Mutex<Vec<Arc<Talk>>>,
}

/// A conversation. Each message says which it is; one is posted at a time.
#[derive(Default)]
struct Talk {
    id: String,
    itself: Arc<Register>,
    messages: Arc<Register>,
    first: Arc<Register>,
    posted: tokio::sync::Mutex<u64>,
}

#[derive(Default)]
struct Tenant {
    agents: Mutex<Vec<Arc<Agent>>>,
    /// The last that was deleted.
    grave: Mutex<Option<Arc<Agent>>>,
    collections: [Arc<Register>; COLLECTIONS],
}

/// A path, what its answer names, and what it has to show.
struct Look {
    path: String,
    names: String,
    shows: Vec<(Arc<Register>, Shows)>,
}

enum Shows {
    Version,
    /// The version of an item of a list.
    Item(String),
    /// The number of the last message.
    Last,
    Remembered,
}

impl Look {
    fn new(path: String, names: &str, register: &Arc<Register>, shows: Shows) -> Self {
        Self { path, names: names.to_owned(), shows: vec![(register.clone(), shows)] }
    }

    fn is_doomed(&self) -> bool {
        self.shows.iter().all(|(register, _)| register.is_doomed())
    }

    /// What a reply shows: 0 of what is not there, unless it may be gone.
    fn found(&self, reply: &Reply) -> Vec<u64> {
        let body = if reply.status == 404 { Value::Null } else { reply.json() };
        let found = self
            .shows
            .iter()
            .map(|(register, shows)| shows.found(&body).unwrap_or(if register.is_doomed() { GONE } else { 0 }));
        found.collect()
    }
}

impl Shows {
    fn found(&self, body: &Value) -> Option<u64> {
        let number = |text: &Value| text.as_str().map_or(0, |text| text.rsplit(' ').next().unwrap().parse().unwrap());
        match self {
            Self::Version => body["version"].as_u64(),
            Self::Item(id) => body["items"].as_array()?.iter().find(|item| item["id"] == **id)?["version"].as_u64(),
            Self::Last => Some(body["items"].as_array()?.last().map_or(0, |message| number(&message["content"]))),
            Self::Remembered => body.get("memory").map(|memory| number(&memory["last"])),
        }
    }
}

impl Talk {
    fn registers(&self) -> [&Register; 3] {
        [&self.itself, &self.messages, &self.first]
    }

    fn looks(&self, agent: &str, looks: &mut Vec<Look>) {
        let path = format!("/conversations/{}", self.id);
        looks.push(Look::new(format!("/agents/{agent}{path}"), &self.id, &self.itself, Shows::Version));
        looks.push(Look::new(format!("{path}/memory"), &self.id, &self.messages, Shows::Remembered));
        looks.push(Look::new(format!("{path}/messages"), "items", &self.messages, Shows::Last));
        let first = format!("{}-1", self.id);
        looks.push(Look::new(format!("{path}/messages/{first}"), &first, &self.first, Shows::Version));
        looks.push(Look::new(path, &self.id, &self.itself, Shows::Version));
    }
}

impl Agent {
    fn talk(&self) -> Arc<Talk> {
        self.talks.lock().unwrap().last().unwrap().clone()
    }

    fn registers(&self) -> [&Register; 4] {
        [&self.itself, &self.config, &self.tools, &self.execution]
    }

    fn looks(&self, looks: &mut Vec<Look>) {
        let path = format!("/agents/{}", self.id);
        looks.push(Look::new(format!("{path}/config"), &self.id, &self.config, Shows::Version));
        looks.push(Look::new(format!("{path}/tools"), &self.id, &self.tools, Shows::Version));
        looks.push(Look::new(format!("{path}/executions/e"), "e", &self.execution, Shows::Version));
        looks.push(Look::new(path, &self.id, &self.itself, Shows::Version));
        self.talks.lock().unwrap().iter().for_each(|talk| talk.looks(&self.id, looks));
    }
}

impl Tenant {
    fn looks(&self) -> Vec<Look> {
        let agents: Vec<_> = {
            let (agents, grave) = (self.agents.lock().unwrap(), self.grave.lock().unwrap());
            agents.iter().chain(&*grave).cloned().collect()
        };
        let mut looks = vec![];
        for path in ["/agents", "/agents?limit=50"] {
            let items = agents.iter().map(|agent| (agent.itself.clone(), Shows::Item(agent.id.clone())));
            looks.push(Look { path: path.to_owned(), names: "items".to_owned(), shows: items.collect() });
        }
        agents.iter().for_each(|agent| agent.looks(&mut looks));
        for (nth, register) in self.collections.iter().enumerate() {
            let id = format!("c{nth}");
            looks.push(Look::new(format!("/collections/{id}"), &id, register, Shows::Version));
        }
        looks
    }
}

pub struct World {
    pub history: History,
    pub crew: RwLock<Vec<Arc<Process>>>,
    /// What cannot be told is refused, or nobody reads it: then nothing but a tier of its own may lag.
    is_fenced: bool,
    tenants: [Tenant; TENANTS.len()],
    names: AtomicU64,
    stop: AtomicBool,
}

impl World {
    pub async fn new(crew: Vec<Arc<Process>>, is_fenced: bool) -> Arc<Self> {
        let this = Self {
            history: History::default(),
            crew: RwLock::new(crew),
            is_fenced,
            tenants: Default::default(),
            names: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        };
        for tenant in 0..TENANTS.len() {
            for _ in 0..AGENTS {
                let agent = this.make_agent(tenant).await;
                this.tenants[tenant].agents.lock().unwrap().push(agent);
            }
        }
        Arc::new(this)
    }

    /// While clients read and write, strangers ask for anything, and all are asked how they are.
    pub async fn during<T>(self: &Arc<Self>, what: impl Future<Output = T>) -> T {
        self.stop.store(false, Ordering::Relaxed);
        let mut tasks = JoinSet::new();
        (0..READERS).for_each(|_| _ = tasks.spawn(self.clone().keep_reading()));
        (0..WRITERS).for_each(|_| _ = tasks.spawn(self.clone().keep_writing()));
        (0..STRANGERS).for_each(|_| _ = tasks.spawn(self.clone().keep_asking()));
        let slots = self.crew.read().unwrap().len();
        (0..slots).for_each(|slot| _ = tasks.spawn(self.clone().keep_watching(slot)));
        let result = what.await;
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        result
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// One that is not being killed.
    fn any(&self) -> Arc<Process> {
        let crew = self.crew.read().unwrap();
        let living: Vec<_> = crew.iter().filter(|process| !process.life.is_ending()).collect();
        living[rand::random_range(0..living.len())].clone()
    }

    /// `None` where it was being killed or refuses the write, and where something went wrong, which is then noted.
    async fn ask(
        &self,
        process: &Process,
        http: &Http,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Option<Reply> {
        let (begin, is_write) = (Instant::now(), method != Method::GET);
        let what = format!("{method} {path} at {}", process.life.name);
        let reply = timeout(PATIENCE, http.try_send(method, path, body)).await;
        match reply {
            Ok(Some(reply)) if self.is_refusal(is_write, reply.status.as_u16()) => count(&self.history.refused),
            Ok(Some(reply)) if reply.status.is_server_error() => self.history.fail(format!("{what}: {reply:?}")),
            Ok(Some(reply)) => {
                self.history.took(is_write, begin.elapsed());
                return Some(reply);
            }
            _ if process.life.is_ending() => count(&self.history.unanswered),
            Ok(None) => self.history.fail(format!("{what}: the connection failed after {:?}", begin.elapsed())),
            Err(_) => self.history.fail(format!("{what}: no answer within {PATIENCE:?}")),
        }
        None
    }

    fn is_refusal(&self, is_write: bool, status: u16) -> bool {
        self.is_fenced && is_write && status == 503
    }

    // Reading

    async fn keep_reading(self: Arc<Self>) {
        while self.goes_on() {
            let tenant = rand::random_range(0..TENANTS.len());
            let mut looks = self.tenants[tenant].looks();
            if rand::random_bool(0.85) {
                looks.retain(|look| !look.is_doomed());
            }
            let look = looks.swap_remove(rand::random_range(0..looks.len()));
            self.read(&self.any(), tenant, &look).await;
            pause(4).await;
        }
    }

    async fn read(&self, process: &Process, tenant: usize, look: &Look) -> Option<Reply> {
        let expected: Vec<_> = look.shows.iter().map(|(r, _)| (r.floor(&process.life), r.newest())).collect();
        let reply = self.ask(process, &process.clients[tenant], Method::GET, &look.path, None).await?;
        count(&self.history.reads);
        if reply.is_hit() {
            count(&self.history.hits);
        }
        let what = || {
            let (tenant, name) = (TENANTS[tenant], &process.life.name);
            format!("GET {} of {tenant} at {name}: {} ({})", look.path, reply.status, reply.header("cache-status"))
        };
        let body = String::from_utf8_lossy(&reply.body);
        let is_foreign = TENANTS.iter().enumerate().any(|(other, name)| other != tenant && body.contains(name));
        let is_another = reply.status == 200 && !body.contains(&format!("\"{}\"", look.names));
        if !matches!(reply.status.as_u16(), 200 | 404) || is_foreign || is_another {
            self.history.fail(format!("{}: {body}", what()));
            return Some(reply);
        }
        for (found, (floor, newest)) in look.found(&reply).into_iter().zip(expected) {
            self.history.read(found, floor, newest, what);
        }
        Some(reply)
    }

    /// Everything, at every process, beside what the database says. Only while nothing is written.
    pub async fn compare(&self) {
        let crew = self.crew.read().unwrap().clone();
        for (tenant, process) in (0..TENANTS.len()).flat_map(|tenant| crew.iter().map(move |p| (tenant, p))) {
            for look in self.tenants[tenant].looks() {
                let Some(cached) = self.read(process, tenant, &look).await else { continue };
                let uncached = &process.uncached[tenant];
                let Some(truth) = self.ask(process, uncached, Method::GET, &look.path, None).await else { continue };
                count(&self.history.compared);
                // What no living process has acknowledged, or could tell the others, need not be seen; behind a fence it is.
                let floors = look.shows.iter().map(|(register, _)| register.floor(&process.life));
                let is_known = look.found(&truth).into_iter().zip(floors).all(|(found, floor)| found <= floor);
                let differs = (cached.status, &cached.body) != (truth.status, &truth.body);
                if differs && (is_known || self.is_fenced) {
                    self.history.fail(format!("{} differs from the database: {cached:?}, {truth:?}", look.path));
                }
            }
        }
    }

    // Writing

    async fn keep_writing(self: Arc<Self>) {
        while self.goes_on() {
            let (tenant, slot) = (rand::random_range(0..TENANTS.len()), rand::random_range(0..AGENTS));
            let agent = self.tenants[tenant].agents.lock().unwrap()[slot].clone();
            let path = format!("/agents/{}", agent.id);
            let name = self.name(TENANTS[tenant]);
            match rand::random_range(0..100) {
                0..20 => self.put(tenant, &path, json!({ "name": name }), &agent.itself).await,
                20..33 => self.put(tenant, &format!("{path}/config"), json!({ "by": name }), &agent.config).await,
                33..45 => self.put(tenant, &format!("{path}/tools"), json!([name]), &agent.tools).await,
                45..55 => {
                    self.put(tenant, &format!("{path}/executions/e"), json!({ "by": name }), &agent.execution).await
                }
                55..65 => {
                    let talk = agent.talk();
                    self.put(tenant, &format!("/conversations/{}", talk.id), json!({ "title": name }), &talk.itself)
                        .await;
                }
                65..85 => self.post(tenant, &agent).await,
                85..97 => {
                    let nth = rand::random_range(0..COLLECTIONS);
                    let register = &self.tenants[tenant].collections[nth];
                    self.put(tenant, &format!("/collections/c{nth}"), json!({ "by": name }), register).await;
                }
                97 => self.replace_talk(tenant, &agent).await,
                _ => self.replace_agent(tenant, slot, agent).await,
            }
            pause(60).await;
        }
    }

    fn name(&self, of: &str) -> String {
        format!("{of} {}", self.names.fetch_add(1, Ordering::Relaxed))
    }

    fn acknowledge(&self, process: &Process, reply: &Reply, version: u64, registers: &[&Register]) {
        count(&self.history.writes);
        let is_told = !reply.header("cache-invalidated").contains("undelivered=");
        if !is_told {
            count(&self.history.undelivered);
        }
        let is_told = is_told || self.is_fenced;
        registers.iter().for_each(|register| register.acknowledge(version, &process.life, is_told));
    }

    async fn put(&self, tenant: usize, path: &str, body: Value, register: &Register) {
        let process = self.any();
        let reply = self.ask(&process, &process.clients[tenant], Method::PUT, path, Some(body)).await;
        match reply {
            Some(reply) if reply.status.is_success() => {
                self.acknowledge(&process, &reply, reply.json()["version"].as_u64().unwrap(), &[register]);
            }
            Some(reply) if reply.status != 404 || !register.is_doomed() => {
                self.history.fail(format!("PUT {path} at {}: {reply:?}", process.life.name));
            }
            _ => {}
        }
    }

    async fn post(&self, tenant: usize, agent: &Agent) {
        let talk = agent.talk();
        let mut posted = talk.posted.lock().await;
        if *posted == MESSAGES {
            drop(posted);
            return self.replace_talk(tenant, agent).await;
        }
        *posted += 1;
        let message =
            json!({ "id": format!("{}-{posted}", talk.id), "content": format!("{} {posted}", TENANTS[tenant]) });
        let (process, path) = (self.any(), format!("/conversations/{}/messages", talk.id));
        let reply = self.ask(&process, &process.clients[tenant], Method::POST, &path, Some(message)).await;
        match reply {
            Some(reply) if reply.status == 201 => {
                self.acknowledge(&process, &reply, *posted, &[&talk.messages]);
                if *posted == 1 {
                    self.acknowledge(&process, &reply, 1, &[&talk.first]);
                }
            }
            Some(reply) if reply.status != 404 || !talk.itself.is_doomed() => {
                self.history.fail(format!("POST {path} at {}: {reply:?}", process.life.name));
            }
            _ => {}
        }
    }

    /// Until somebody answers. It may have been done before that, by a process that was killed then.
    async fn insist(&self, tenant: usize, method: Method, path: &str, body: Value) -> (Arc<Process>, Reply) {
        loop {
            let process = self.any();
            let body = (!body.is_null()).then(|| body.clone());
            let reply = self.ask(&process, &process.clients[tenant], method.clone(), path, body).await;
            if let Some(reply) = reply {
                return (process, reply);
            }
            pause(100).await;
        }
    }

    async fn make_agent(&self, tenant: usize) -> Arc<Agent> {
        let id = self.name("agent").replace(' ', "-");
        let body = json!({ "id": id, "name": TENANTS[tenant] });
        let (process, reply) = self.insist(tenant, Method::POST, "/agents", body).await;
        let agent = Agent {
            id,
            itself: Arc::default(),
            config: Arc::default(),
            tools: Arc::default(),
            execution: Arc::default(),
            talks: Mutex::default(),
        };
        match reply.status.as_u16() {
            201 => self.acknowledge(&process, &reply, 1, &[&agent.itself, &agent.config, &agent.tools]),
            409 => {}
            _ => self.history.fail(format!("POST /agents: {reply:?}")),
        }
        let talk = self.make_talk(tenant, &agent).await;
        agent.talks.lock().unwrap().push(talk);
        Arc::new(agent)
    }

    async fn make_talk(&self, tenant: usize, agent: &Agent) -> Arc<Talk> {
        let talk = Talk { id: self.name("talk").replace(' ', "-"), ..Talk::default() };
        let path = format!("/agents/{}/conversations", agent.id);
        let body = json!({ "id": talk.id, "title": TENANTS[tenant] });
        let (process, reply) = self.insist(tenant, Method::POST, &path, body).await;
        match reply.status.as_u16() {
            201 => self.acknowledge(&process, &reply, 1, &[&talk.itself]),
            409 => {}
            404 if agent.itself.is_doomed() => {}
            _ => self.history.fail(format!("POST {path}: {reply:?}")),
        }
        Arc::new(talk)
    }

    async fn replace_talk(&self, tenant: usize, agent: &Agent) {
        let old = agent.talk();
        if !old.itself.doom() {
            return;
        }
        self.delete(tenant, &format!("/conversations/{}", old.id), &old.registers()).await;
        let new = self.make_talk(tenant, agent).await;
        let mut talks = agent.talks.lock().unwrap();
        // Its agent may have been deleted meanwhile.
        if agent.itself.is_doomed() {
            new.registers().iter().for_each(|register| _ = register.doom());
        }
        talks.push(new);
        if talks.len() > 2 {
            talks.remove(0);
        }
    }

    async fn replace_agent(&self, tenant: usize, slot: usize, agent: Arc<Agent>) {
        let talks = {
            let talks = agent.talks.lock().unwrap();
            if !agent.itself.doom() {
                return;
            }
            talks.clone()
        };
        let registers = talks.iter().flat_map(|talk| talk.registers()).chain(agent.registers());
        self.delete(tenant, &format!("/agents/{}", agent.id), &registers.collect::<Vec<_>>()).await;
        let new = self.make_agent(tenant).await;
        let (mut agents, mut grave) =
            (self.tenants[tenant].agents.lock().unwrap(), self.tenants[tenant].grave.lock().unwrap());
        agents[slot] = new;
        *grave = Some(agent);
    }

    async fn delete(&self, tenant: usize, path: &str, registers: &[&Register]) {
        registers.iter().for_each(|register| _ = register.doom());
        let (process, reply) = self.insist(tenant, Method::DELETE, path, Value::Null).await;
        match reply.status.as_u16() {
            204 => self.acknowledge(&process, &reply, GONE, registers),
            404 => {}
            _ => self.history.fail(format!("DELETE {path}: {reply:?}")),
        }
    }

    // The others

    async fn keep_asking(self: Arc<Self>) {
        let mut stranger = Stranger::new(rand::random());
        while self.goes_on() {
            let process = self.any();
            match timeout(PATIENCE, stranger.ask(&process.url)).await {
                Ok(Some(status)) if self.is_refusal(true, status.as_u16()) || !status.is_server_error() => {
                    count(&self.history.strange);
                }
                Ok(Some(status)) => self.history.fail(format!("a stranger at {}: {status}", process.life.name)),
                _ if process.life.is_ending() => count(&self.history.unanswered),
                _ => self.history.fail(format!("a stranger at {}: no answer", process.life.name)),
            }
            pause(10).await;
        }
    }

    async fn keep_watching(self: Arc<Self>, slot: usize) {
        while self.goes_on() {
            let process = self.crew.read().unwrap()[slot].clone();
            if !process.life.is_ending() {
                self.is_well(&process).await;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether it says so; then it has delivered everything.
    pub async fn is_well(&self, process: &Process) -> bool {
        let asked = Instant::now();
        let reply = self.ask(process, &process.nobody, Method::GET, "/healthz", None).await;
        let is_well = reply.is_some_and(|reply| reply.json()["store"] == "ok");
        if is_well {
            process.life.has_told(asked);
        }
        is_well
    }
}

/// Up to so many milliseconds.
async fn pause(most: u64) {
    sleep(Duration::from_millis(rand::random_range(0..=most))).await;
}
