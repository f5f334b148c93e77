//! What several tests need: the agent service as a real process, and a real HTTP client.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, client::legacy::connect::HttpConnector, rt::TokioExecutor};
use serde_json::Value;
use tempfile::TempDir;

/// A running agent service; killed when dropped.
pub struct Service {
    child: Child,
    _temporary: TempDir,
    pub url: String,
}

/// An example as a program. Cargo builds it here: not every way to run a test does so, and none must start an old one.
pub fn example(name: &str) -> PathBuf {
    static BUILT: Once = Once::new();
    // target/debug/deps/test-hash
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().find(|dir| dir.ends_with("debug") || dir.ends_with("release")).unwrap().to_owned();
    BUILT.call_once(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--examples", "--all-features", "--target-dir"]).arg(profile.parent().unwrap());
        build.args(profile.ends_with("release").then_some("--release"));
        // What cargo tells its tests would make some build scripts think that the world has changed, and so would another way to
        // build what those who run the tests have built.
        let is_theirs =
            |name: &str| name == "CARGO_HOME" || name == "CARGO_INCREMENTAL" || name.starts_with("CARGO_PROFILE_");
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_") && !is_theirs(name)) {
            build.env_remove(name);
        }
        assert!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success(), "the examples do not build");
    });
    profile.join("examples").join(name)
}

impl Service {
    pub fn start(args: &[&str]) -> Self {
        Self::start_with(args, &[])
    }

    pub fn start_with(args: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(example("agent_service"));
        command.args(args).envs(environment.iter().copied());
        Self::run(command)
    }

    /// What it logs goes into this file.
    pub fn start_logging(args: &[&str], log: &Path) -> Self {
        let mut command = Command::new(example("agent_service"));
        command.args(args).env("RUST_LOG", "info").env("NO_COLOR", "1").stderr(File::create(log).unwrap());
        Self::run(command)
    }

    /// In a network namespace, where it listens at this address.
    pub fn start_within(namespace: &str, host: &str, args: &[&str]) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(example("agent_service")).args(args);
        command.args(["--listen", &format!("{host}:0")]);
        Self::spawn(command)
    }

    /// Another example that says on its first line where it listens.
    pub fn of(name: &str, args: &[&str]) -> Self {
        let mut command = Command::new(example(name));
        command.args(args);
        Self::spawn(command)
    }

    fn run(mut command: Command) -> Self {
        command.args(["--listen", "127.0.0.1:0"]);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        // Killed, it leaves its temporary files behind.
        let temporary = TempDir::new().unwrap();
        let mut child = command.env("TMPDIR", temporary.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect("the first line names the address").to_owned();
        Self { child, url, _temporary: temporary }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap().success());
    }

    /// How it ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A response, read to its end.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    pub fn is_hit(&self) -> bool {
        self.header("cache-status").contains("; hit")
    }

    pub fn is_miss(&self) -> bool {
        ["; fwd=uri-miss", "; fwd=vary-miss", "; fwd=stale"].iter().any(|why| self.header("cache-status").contains(why))
    }

    /// A number of the `cache-invalidated` report.
    pub fn dropped(&self, line: &str) -> Option<u64> {
        let members = self.header("cache-invalidated").split(", ");
        members.filter_map(|m| m.split_once('=')).find(|(name, _)| *name == line).map(|(_, n)| n.parse().unwrap())
    }
}

/// A client of one tenant (or of none).
#[derive(Clone)]
pub struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    headers: Vec<(String, String)>,
}

impl Http {
    pub fn new(url: &str, tenant: &str) -> Self {
        Self::anonymous(url).with("x-tenant-id", tenant)
    }

    pub fn anonymous(url: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { client, url: url.to_owned(), headers: vec![] }
    }

    /// Adds a header to every request (again, if it is there already).
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `None` if nobody answers.
    pub async fn try_send(&self, method: Method, path: &str, body: Option<Value>) -> Option<Reply> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let body = body.map_or_else(Bytes::new, |b| b.to_string().into());
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        let response = self.client.request(request.body(Full::new(body)).unwrap()).await.ok()?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        Some(Reply { status: parts.status, headers: parts.headers, body })
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Reply {
        self.try_send(method, path, body).await.expect("the server answers")
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, None).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Reply {
        self.send(Method::PUT, path, Some(body)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(Method::POST, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.send(Method::DELETE, path, None).await
    }

    /// Database reads of a data type since the service started.
    pub async fn origin_calls(&self, data_type: &str) -> u64 {
        self.get("/_origin").await.json()["calls"][data_type].as_u64().unwrap()
    }
}

/// Processes of one service: one database, one store.
pub struct Fleet {
    services: Vec<Service>,
    _dir: TempDir,
}

impl Fleet {
    pub fn start(count: usize, redis: &str, args: &[&str]) -> Self {
        Self::over(count, &["--redis", redis], args)
    }

    pub fn over(count: usize, store: &[&str], args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let db = dir.path().join("agents.db");
        let mut all = vec!["--db", db.to_str().unwrap()];
        all.extend(store.iter().chain(args));
        Self { services: (0..count).map(|_| Service::start(&all)).collect(), _dir: dir }
    }

    pub fn urls(&self) -> Vec<String> {
        self.services.iter().map(|s| s.url.clone()).collect()
    }

    pub fn signal(&self, at: usize, signal: &str) {
        self.services[at].signal(signal);
    }

    /// Until it has ended, in good order.
    pub fn wait(&mut self, at: usize) {
        assert!(self.services[at].child.wait().unwrap().success());
    }

    pub fn clients(&self) -> Vec<Http> {
        self.services.iter().map(|s| Http::new(&s.url, "demo")).collect()
    }
}

/// Until `client` answers `path` from the cache.
pub async fn until_hit(client: &Http, path: &str) {
    let start = Instant::now();
    while !client.get(path).await.is_hit() {
        assert!(start.elapsed() < Duration::from_secs(20), "no hit: {:?}", client.get(path).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
