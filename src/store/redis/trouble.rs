//! What is wrong with a server, in its own words, and the mend.

use std::{fmt, sync::Arc};

use redis::{RedisError, ServerError};

/// What a server, or the way to it, answers instead of what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// What begins the server's answer, or names what is known by other means: one line is logged for each.
    pub(super) code: Arc<str>,
    text: Arc<str>,
}

/// Nobody answers, or not in time.
pub(super) const SILENT: &str = "SILENT";
/// What it holds is another's: it was restarted, or promoted.
pub(super) const CHANGED: &str = "CHANGED";
/// It does not say which server it is.
pub(super) const HIDDEN: &str = "HIDDEN";
pub(super) const REPLICA: &str = "READONLY";

impl Trouble {
    pub(super) fn new(code: &str, text: impl Into<Arc<str>>) -> Self {
        Self { code: code.into(), text: text.into() }
    }

    pub(super) fn silent(what: &str) -> Self {
        Self::new(SILENT, what)
    }

    /// Whether the connection is good, and it is the server that does not want to.
    pub(super) fn is_refusal(&self) -> bool {
        ![SILENT, CHANGED, REPLICA, "MOVED", "CLUSTER", "LOADING", "MASTERDOWN"].contains(&&*self.code)
    }

    fn mend(&self) -> &'static str {
        match &*self.code {
            "READONLY" => "it is a replica: give the address of the master, or `redis+sentinel://`",
            "NOREPLICAS" => "too few replicas follow: bring them back, or lower min-replicas-to-write",
            "MISCONF" => "it cannot save to disk: make room there, or set stop-writes-on-bgsave-error to no",
            "OOM" => "its memory is full: raise maxmemory, or set maxmemory-policy to allkeys-lru",
            "NOPERM" => "the user lacks a right: docs/redis.md has the ACL that is needed",
            "NOAUTH" | "WRONGPASS" => "check user and password in the address",
            "MOVED" | "ASK" | "CROSSSLOT" | "CLUSTER" => "it is a node of a cluster: write redis+cluster://host:port",
            "CLUSTERDOWN" | "TRYAGAIN" => "the cluster is changing: wait",
            "LOADING" | "MASTERDOWN" => "it is starting: wait",
            HIDDEN => "let it answer INFO, or say that it is one server which never forgets (assume_one_server)",
            "HELLO" => "it does not speak RESP3: Redis 7.0 or later is needed",
            _ => "",
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mend() {
            "" => f.write_str(&self.text),
            mend => write!(f, "{} ({mend})", self.text),
        }
    }
}

impl From<&ServerError> for Trouble {
    fn from(error: &ServerError) -> Self {
        let text = error.to_string();
        let is_hello = text.to_ascii_uppercase().contains("HELLO");
        Self::new(if is_hello { "HELLO" } else { error.code() }, text)
    }
}

impl From<RedisError> for Trouble {
    fn from(error: RedisError) -> Self {
        let text = error.to_string();
        let code = match error.code() {
            _ if error.kind() == redis::ErrorKind::RESP3NotSupported => "HELLO",
            _ if text.to_ascii_uppercase().contains("HELLO") => "HELLO",
            _ if error.kind() == redis::ErrorKind::AuthenticationFailed => "WRONGPASS",
            Some(code) => code,
            None => SILENT,
        };
        Self::new(code, text)
    }
}
