//! Ports for servers of a test's own.
#![allow(dead_code, clippy::unwrap_used)]

use std::net::TcpListener;

/// A free port that no outgoing connection is given while nobody listens there: so a server that is killed can come back.
pub fn lasting_port() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let first = range.split_whitespace().next().unwrap().parse::<u16>().unwrap();
    std::iter::repeat_with(|| rand::random_range(first / 2..first))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap()
}
