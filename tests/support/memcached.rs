//! A memcached of a test's own: started on a free port, stopped when dropped.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

#[allow(clippy::duplicate_mod)] // In each kind of server of one test.
#[path = "ports.rs"]
mod ports;

use ports::lasting_port;

pub struct Memcached {
    child: Child,
    pub port: u16,
    args: Vec<String>,
}

fn spawn(port: u16, args: &[String]) -> Child {
    let mut command = Command::new("memcached");
    // It does not run as root without being told so.
    command.args(["-u", "root", "-l", "127.0.0.1", "-U", "0", "-p", &port.to_string()]).args(args);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("memcached is installed: bash .ci/test")
}

impl Memcached {
    pub fn start(args: &[&str]) -> Self {
        // Somebody else may take the port between finding and using it.
        for _ in 0..10 {
            let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
            let port = lasting_port();
            let mut this = Self { child: spawn(port, &args), port, args };
            if this.answers() {
                return this;
            }
        }
        panic!("memcached does not start");
    }

    fn answers(&mut self) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) && self.child.try_wait().unwrap().is_none() {
            if self.try_command("version").is_some_and(|reply| reply.starts_with("VERSION")) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Again on the same port, and empty.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.port, &self.args);
        assert!(self.answers(), "memcached does not start again");
    }

    /// A command on a connection of its own; the raw reply.
    pub fn command(&self, text: &str) -> String {
        self.try_command(text).expect("memcached answers")
    }

    fn try_command(&self, text: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(format!("{text}\r\nquit\r\n").as_bytes()).ok()?;
        let (mut reply, mut part) = (vec![], [0; 4096]);
        // One that dumps its items does not heed what follows.
        while reply != b"END\r\n" && !reply.ends_with(b"\nEND\r\n") {
            match stream.read(&mut part).ok()? {
                0 => break,
                size => reply.extend_from_slice(&part[..size]),
            }
        }
        Some(String::from_utf8_lossy(&reply).into_owned())
    }

    pub fn stat(&self, name: &str) -> u64 {
        let stats = self.command("stats");
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("STAT {name} ")));
        line.unwrap().trim().parse().unwrap()
    }

    /// The names of items that have not ended: of all of them, sooner or later, for a dump leaves out what is being moved.
    pub fn keys(&self) -> Vec<String> {
        let dump = self.command("lru_crawler metadump all");
        let names = dump.lines().filter_map(|line| line.strip_prefix("key=")?.split(' ').next());
        names.map(|name| percent_encoding::percent_decode_str(name).decode_utf8_lossy().into_owned()).collect()
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        // One that was frozen does not end otherwise.
        let _ = Command::new("kill").args(["-CONT", &self.child.id().to_string()]).stderr(Stdio::null()).status();
        self.kill();
    }
}
