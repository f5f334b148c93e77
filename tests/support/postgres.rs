//! A PostgreSQL server of a test's own: made in a folder of its own, started on a free port, stopped when dropped.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    os::unix::{fs::chown, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

#[allow(clippy::duplicate_mod)] // In each kind of server of one test.
#[path = "ports.rs"]
mod ports;

pub struct Postgres {
    child: Child,
    pub port: u16,
    dir: TempDir,
    settings: Vec<String>,
}

/// A program of the newest version that is there; Debian's are not on the path.
fn program(name: &str) -> PathBuf {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().map(|version| version.unwrap().path());
    let found = versions.map(|version| version.join("bin").join(name)).filter(|path| path.exists()).max();
    found.unwrap_or_else(|| name.into())
}

/// As the user that Debian makes for it: servers refuse to run as root.
fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    if let Some((user, group)) = user() {
        command.uid(user).gid(group);
    }
    command.current_dir("/").stdout(Stdio::null());
    command
}

/// Whom to be instead of root.
fn user() -> Option<(u32, u32)> {
    let id = |args: &[&str]| {
        let output = Command::new("id").args(args).output().unwrap().stdout;
        String::from_utf8(output).unwrap().trim().parse::<u32>().unwrap()
    };
    (id(&["-u"]) == 0).then(|| (id(&["-u", "postgres"]), id(&["-g", "postgres"])))
}

impl Postgres {
    /// With logical replication, and these settings besides.
    pub fn start(settings: &[&str]) -> Self {
        // Somebody else may take the port between finding and using it.
        let mut started = std::iter::repeat_with(|| Self::start_on(ports::lasting_port(), settings)).take(10);
        started.find_map(|started| started).expect("PostgreSQL does not start")
    }

    pub fn start_on(port: u16, settings: &[&str]) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        if let Some((user, group)) = user() {
            chown(dir.path(), Some(user), Some(group)).unwrap();
        }
        let mut initdb = command("initdb");
        initdb.args(["--username", "postgres", "--auth-local", "trust", "--auth-host", "trust", "--no-sync"]);
        let made = initdb.args(["--locale", "C.UTF-8", "--pgdata"]).arg(dir.path().join("data")).status();
        assert!(made.expect("PostgreSQL is installed: run `bash .ci/test`, which does it").success());
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect::<Vec<_>>();
        let mut this = Self { child: spawn(port, &dir, &settings), port, dir, settings };
        this.answers().then_some(this)
    }

    fn answers(&mut self) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            if self.try_sql("SELECT 1").is_ok() {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// A file of the server's.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("data").join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.file(name), text).unwrap();
        if let Some((user, group)) = user() {
            chown(self.file(name), Some(user), Some(group)).unwrap();
        }
    }

    /// What `psql` prints, without decoration.
    pub fn sql(&self, sql: &str) -> String {
        self.try_sql(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    pub fn try_sql(&self, sql: &str) -> Result<String, String> {
        self.sql_as("postgres", sql)
    }

    pub fn sql_as(&self, user: &str, sql: &str) -> Result<String, String> {
        let mut psql = Command::new(program("psql"));
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", user, "-d", "postgres"]);
        let output = psql.args(["-p", &self.port.to_string(), "-c", sql]).output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// Until it says this.
    pub fn wait_for(&self, sql: &str, says: &str) {
        let start = Instant::now();
        while self.sql(sql) != says {
            assert!(start.elapsed() < Duration::from_secs(30), "{sql} does not say {says}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// As `pg_ctl stop -m fast`; whether it has ended after a while.
    pub fn stops(&mut self) -> bool {
        self.signal("-INT");
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// As after a crash.
    pub fn kill(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.signal("-QUIT");
            self.child.wait().unwrap();
        }
    }

    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.port, &self.dir, &self.settings);
        assert!(self.answers(), "PostgreSQL does not start again");
    }
}

fn spawn(port: u16, dir: &TempDir, settings: &[String]) -> Child {
    let mut server = command("postgres");
    server.arg("-D").arg(dir.path().join("data")).args(["-p", &port.to_string(), "-k"]).arg(dir.path());
    let own = ["listen_addresses=127.0.0.1", "wal_level=logical", "fsync=off", "shared_buffers=16MB"];
    for setting in own.into_iter().chain(settings.iter().map(String::as_str)) {
        server.args(["-c", setting]);
    }
    server.stderr(std::fs::File::create(dir.path().join("log")).unwrap()).spawn().unwrap()
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(30).collect();
            eprintln!("{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        self.kill();
    }
}
