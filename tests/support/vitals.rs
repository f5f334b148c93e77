//! What a process takes, as Linux says.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

/// What it holds in memory, in MiB.
pub fn resident(pid: u32) -> u64 {
    number(pid, "VmRSS:") >> 10
}

pub fn threads(pid: u32) -> u64 {
    number(pid, "Threads:")
}

/// Open file descriptors, connections among them.
pub fn files(pid: u32) -> u64 {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64
}

fn number(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
