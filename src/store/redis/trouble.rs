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
/// It does not know the command, or hides it (`rename-command`, managed services).
pub(super) const UNKNOWN: &str = "UNKNOWN";
/// It does not speak RESP3.
pub(super) const HELLO: &str = "HELLO";

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

    /// Whether it is over in a moment, as when slots of a cluster move.
    pub(super) fn passes(&self) -> bool {
        ["ASK", "TRYAGAIN", "CLUSTERDOWN"].contains(&&*self.code)
    }

    /// Whether the server has no such command, in capitals.
    pub(super) fn is_without(&self, command: &str) -> bool {
        let text = self.text.to_ascii_uppercase();
        self.code.as_ref() == UNKNOWN && text.split(['\'', '`', '"']).nth(1).is_some_and(|name| name == command)
    }

    fn mend(&self) -> &'static str {
        match &*self.code {
            "READONLY" => "it is a replica: give the address of the master, or `redis+sentinel://`",
            "NOREPLICAS" => "too few replicas follow: bring them back, or lower min-replicas-to-write",
            "MISCONF" => "it cannot save to disk: make room there, or set stop-writes-on-bgsave-error to no",
            "OOM" => "its memory is full: raise maxmemory, or set maxmemory-policy to allkeys-lru",
            "NOPERM" => {
                "the user lacks a right: docs/redis.md has the ACL that is needed, docs/events.md that of streams"
            }
            "NOAUTH" | "WRONGPASS" => "check user and password in the address",
            "MOVED" | "ASK" | "CROSSSLOT" | "CLUSTER" => "it is a node of a cluster: write redis+cluster://host:port",
            "CLUSTERDOWN" | "TRYAGAIN" => "the cluster is changing: wait",
            "LOADING" | "MASTERDOWN" => "it is starting: wait",
            HIDDEN => "let it answer INFO, or say that it is one server which never forgets (assume_one_server)",
            HELLO => {
                "without RESP3 it cannot tell what others drop: let it answer HELLO, or choose another tier than `on`"
            }
            UNKNOWN => "the server has no such command, or hides it: docs/redis.md has those that are needed",
            "FOREIGN" => "let nobody else write keys with this prefix",
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
        Self::new(code(&text).unwrap_or(error.code()), text)
    }
}

impl From<RedisError> for Trouble {
    fn from(error: RedisError) -> Self {
        let text = error.to_string();
        let code = match error.code() {
            Some("NOAUTH") => "NOAUTH",
            _ if error.kind() == redis::ErrorKind::RESP3NotSupported => HELLO,
            _ if error.kind() == redis::ErrorKind::AuthenticationFailed => "WRONGPASS",
            Some(known) => code(&text).unwrap_or(known),
            None => code(&text).unwrap_or(SILENT),
        };
        Self::new(code, text)
    }
}

/// What the words of an answer say beyond its code. (`NOAUTH` speaks of `HELLO` as well.)
fn code(text: &str) -> Option<&'static str> {
    let text = text.to_ascii_lowercase();
    match () {
        () if text.contains("hello") && !text.contains("noauth") => Some(HELLO),
        () if text.contains("unknown command") => Some(UNKNOWN),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use redis::{ErrorKind, Value};

    use super::*;

    /// As a server says it.
    fn refused(line: &str) -> Trouble {
        match redis::parse_redis_value(format!("-{line}\r\n").as_bytes()).unwrap() {
            Value::ServerError(error) => (&error).into(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_mend() {
        for (line, mend) in [
            ("READONLY You can't write against a read only replica.", "address of the master"),
            ("NOREPLICAS Not enough good replicas to write.", "min-replicas-to-write"),
            ("MISCONF Redis is configured to save RDB snapshots", "make room"),
            ("OOM command not allowed when used memory > 'maxmemory'.", "allkeys-lru"),
            ("NOPERM this user has no permissions to run the 'get' command", "ACL"),
            ("NOAUTH Authentication required.", "user and password"),
            ("WRONGPASS invalid username-password pair", "user and password"),
            ("MOVED 3999 127.0.0.1:6381", "redis+cluster://"),
            ("CROSSSLOT Keys in request don't hash to the same slot", "redis+cluster://"),
            ("CLUSTERDOWN The cluster is down", "the cluster is changing"),
            ("TRYAGAIN Multiple keys request during rehashing of slot", "the cluster is changing"),
            ("LOADING Redis is loading the dataset in memory", "it is starting"),
            ("MASTERDOWN Link with MASTER is down", "it is starting"),
            ("ERR unknown command 'EVAL', with args beginning with:", "no such command"),
            ("ERR unknown command `HELLO`, with args beginning with: `3`,", "RESP3"),
        ] {
            assert!(refused(line).to_string().contains(mend), "{line}: {}", refused(line));
        }
        assert!(Trouble::new("FOREIGN", "another's").to_string().contains("this prefix"));
        assert!(Trouble::new(HIDDEN, "hidden").to_string().contains("assume_one_server"));
        assert_eq!(Trouble::silent("nobody answers").to_string(), "nobody answers");
    }

    /// As old servers, new ones and those of others write it.
    #[test]
    fn a_command_is_missed_only_where_the_server_says_so() {
        for line in
            ["ERR unknown command 'EVAL', with", "ERR unknown command `eval`, with", "ERR unknown command 'EvAl'"]
        {
            assert!(refused(line).is_without("EVAL"), "{line}");
            assert!(!refused(line).is_without("WAIT"), "{line}");
        }
        for line in ["NOPERM no permissions to run the 'EVAL' command", "ERR unknown command", "ERR wrong 'EVAL'"] {
            assert!(!refused(line).is_without("EVAL"), "{line}");
        }
    }

    #[test]
    fn the_client_library_names_what_it_found_out_itself() {
        for (kind, code) in [
            (ErrorKind::RESP3NotSupported, HELLO),
            (ErrorKind::AuthenticationFailed, "WRONGPASS"),
            (ErrorKind::Io, SILENT),
        ] {
            assert_eq!(&*Trouble::from(RedisError::from((kind, "it"))).code, code);
        }
    }
}
