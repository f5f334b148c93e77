//! Which server it is, by what it says of itself.

use redis::{FromRedisValue, ServerError, Value};
use sha2::{Digest, Sha256};

use super::trouble::Trouble;
use crate::store::Generation;

/// Which server it is, as far as it says.
pub(crate) struct Identity {
    pub(super) is_master: Option<bool>,
    pub(crate) reign: Option<u128>,
    pub(super) is_cluster: bool,
    pub(super) name: String,
}

impl Identity {
    /// From `INFO server` and `INFO replication`, either of which may be refused.
    pub(crate) fn of(replies: &[Value]) -> Result<Self, Trouble> {
        let text = |at: usize| match replies.get(at) {
            Some(Value::ServerError(error)) if is_forbidden(error) => Ok(String::new()),
            Some(Value::ServerError(error)) => Err(Trouble::from(error)),
            Some(value) => Ok(String::from_redis_value_ref(value).unwrap_or_default()),
            None => Ok(String::new()),
        };
        let (server, replication) = (text(0)?, text(1)?);
        let field = |text: &str, name: &str| -> Option<String> {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            Some(value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let reign = field(&replication, "master_replid").map(|replication_id| {
            let run_id = field(&server, "run_id").unwrap_or_default();
            let digest = Sha256::digest(format!("{run_id} {replication_id}"));
            let bytes: [u8; 16] = std::array::from_fn(|i| digest[i]);
            Generation(u128::from_be_bytes(bytes)).unfenced().0
        });
        let mode = field(&server, "redis_mode").or_else(|| field(&server, "server_mode"));
        // Valkey gives the version of Redis that it began as, too.
        let version = |of: &str| field(&server, &format!("{of}_version")).map(|version| format!("{of} {version}"));
        Ok(Self {
            name: version("valkey").or_else(|| version("redis")).unwrap_or_else(|| "unknown".to_owned()),
            is_master: field(&replication, "role").map(|role| role == "master"),
            reign,
            is_cluster: mode.is_some_and(|mode| mode == "cluster"),
        })
    }
}

/// Whether the server does not let us ask, or does not know the command: managed services have many words for it.
fn is_forbidden(error: &ServerError) -> bool {
    ["NOPERM", "ERR"].contains(&error.code())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(text: &str) -> Value {
        redis::parse_redis_value(text.as_bytes()).unwrap()
    }

    /// A server may keep to itself which it is; one that cannot answer now is not asked twice in the same breath.
    #[test]
    fn what_may_not_be_asked_is_unknown_and_what_fails_fails() {
        for (line, is_hidden) in [
            ("-NOPERM no permissions to run the 'info' command\r\n", true),
            ("-ERR unknown command 'INFO'\r\n", true),
            ("-LOADING Redis is loading the dataset in memory\r\n", false),
            ("-NOAUTH Authentication required.\r\n", false),
        ] {
            let role = "$13\r\nrole:master\r\n\r\n";
            for replies in [[info(line), info(role)], [info(role), info(line)]] {
                let identity = Identity::of(&replies);
                assert_eq!(identity.is_ok_and(|identity| identity.reign.is_none()), is_hidden, "{line}");
            }
        }
    }
}
