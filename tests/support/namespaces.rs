//! Network namespaces of a test's own, each with two links: one by which the test reaches it whatever happens, and a wide one by which
//! it reaches others, and which can be taken down.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

/// Gone when it is dropped, and its links with it.
pub struct Namespace {
    pub name: String,
    /// Its own address on the near link.
    pub host: String,
    /// On the wide link: the test's address, and its own.
    pub gate: String,
    pub wide: String,
    link: String,
}

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output();
    let output = output.unwrap_or_else(|e| panic!("network namespaces are made by `ip`, of the package iproute2: {e}"));
    let says = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`ip {args}` fails (it needs root, and the right to make namespaces): {says}");
}

impl Namespace {
    /// The `nth` of this test.
    pub fn new(nth: u8) -> Self {
        // Names of links have fifteen letters.
        let id = format!("{:04x}{nth}", std::process::id() & 0xffff);
        let (name, net) = (format!("cas-{id}"), format!("10.{}.{nth}", 64 + std::process::id() % 128));
        ip(&format!("netns add {name}"));
        let this = Self {
            host: format!("{net}.2"),
            gate: format!("{net}.129"),
            wide: format!("{net}.130"),
            link: format!("casw{id}"),
            name,
        };
        let Self { name, host, gate, wide, link } = &this;
        for (own, near, far, inside) in
            [(&format!("casn{id}"), &format!("{net}.1"), host, "near"), (link, gate, wide, "wide")]
        {
            ip(&format!("link add {own} type veth peer name {inside} netns {name}"));
            ip(&format!("addr add {near}/25 dev {own}"));
            ip(&format!("link set {own} up"));
            ip(&format!("netns exec {name} ip addr add {far}/25 dev {inside}"));
            ip(&format!("netns exec {name} ip link set {inside} up"));
        }
        ip(&format!("netns exec {name} ip link set lo up"));
        this
    }

    /// Takes its wide link `up` or `down`.
    pub fn link(&self, state: &str) {
        ip(&format!("link set {} {state}", self.link));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        // Whoever still runs there would keep them.
        for link in [self.link.clone(), self.link.replacen("casw", "casn", 1)] {
            let _ = Command::new("ip").args(["link", "del", &link]).output();
        }
    }
}
