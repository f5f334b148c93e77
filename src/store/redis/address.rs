//! Where Redis is: one server, a cluster, or whichever server the sentinels call the master.

use std::time::Duration;

use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisError,
    aio::AsyncPushSender, io::tcp::TcpSettings,
};
use tokio::time::timeout;

use crate::error::ConfigError;

/// How long one attempt to connect may take.
pub(super) const CONNECT: Duration = Duration::from_secs(1);

/// A parsed address.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Single(Box<ConnectionInfo>),
    Sentinel {
        sentinels: Vec<ConnectionInfo>,
        master: String,
        /// How to log in to the master, and its database.
        template: Box<ConnectionInfo>,
    },
    #[cfg(feature = "redis-cluster")]
    Cluster(Vec<ConnectionInfo>),
}

impl Address {
    /// `redis://`, `rediss://`, `unix://`; `redis+cluster://host:port,host:port` or several addresses for a cluster;
    /// `redis+sentinel://user:password@host:port,host:port/master` for sentinels.
    pub(super) fn parse<'a>(urls: impl IntoIterator<Item = &'a str>) -> Result<Self, ConfigError> {
        let mut singles = vec![];
        for url in urls {
            let error = |what: &str| ConfigError::new(format!("Redis address `{}`: {what}", redacted(url)));
            if let Some(rest) = url.strip_prefix("redis+sentinel://") {
                return sentinel(rest).map_err(|e| error(&e));
            }
            if let Some(hosts) = url.strip_prefix("redis+cluster://") {
                let (login, hosts) = hosts.rsplit_once('@').map_or(("", hosts), |(login, hosts)| (login, hosts));
                let login = if login.is_empty() { String::new() } else { format!("{login}@") };
                let nodes = hosts.split(',').map(|host| parse(&format!("redis://{login}{host}")));
                return cluster(nodes.collect::<Result<_, _>>().map_err(|e| error(&e))?).map_err(|e| error(&e));
            }
            singles.push(parse(url).map_err(|e| error(&e))?);
        }
        match (singles.len(), singles.pop()) {
            (1, Some(single)) => Ok(Self::Single(Box::new(single))),
            (_, None) => Err(ConfigError::new("no Redis address; give one such as redis://127.0.0.1:6379")),
            (_, Some(last)) => {
                singles.push(last);
                cluster(singles).map_err(|e| ConfigError::new(format!("several Redis addresses: {e}")))
            }
        }
    }

    /// The one server to connect to now; `None` for a cluster, which is connected to node by node.
    pub(super) async fn server(&self) -> Result<Option<ConnectionInfo>, RedisError> {
        match self {
            Self::Single(info) => Ok(Some((**info).clone())),
            #[cfg(feature = "redis-cluster")]
            Self::Cluster(_) => Ok(None),
            Self::Sentinel { sentinels, master, template } => {
                let mut last = None;
                for sentinel in sentinels {
                    match timeout(CONNECT / 2, ask(sentinel, master, template)).await {
                        Ok(Ok(info)) => return Ok(Some(info)),
                        Ok(Err(error)) => last = Some(error),
                        Err(_) => {}
                    }
                }
                Err(last.unwrap_or_else(|| std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
            }
        }
    }
}

/// An address as it may be shown: without what may be a password.
pub(super) fn redacted(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = rest.rsplit_once('@').map_or(rest.to_owned(), |(_, hosts)| format!("***@{hosts}"));
    if scheme.is_empty() { rest } else { format!("{scheme}://{rest}") }
}

fn parse(url: &str) -> Result<ConnectionInfo, String> {
    if url.starts_with("rediss://") && cfg!(not(feature = "redis-tls")) {
        return Err("turn on the feature `redis-tls` of tower-cache-aside".to_owned());
    }
    url.into_connection_info().map(info).map_err(|e| e.to_string())
}

fn sentinel(rest: &str) -> Result<Address, String> {
    let (login, rest) = rest.rsplit_once('@').map_or(("", rest), |(login, rest)| (login, rest));
    let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (master, db) = path.split_once('/').unwrap_or((path, ""));
    let master = if master.is_empty() { "mymaster" } else { master }.to_owned();
    let sentinels = hosts.split(',').map(|host| parse(&format!("redis://{host}"))).collect::<Result<_, _>>()?;
    let login = if login.is_empty() { String::new() } else { format!("{login}@") };
    let template = Box::new(parse(&format!("redis://{login}127.0.0.1/{db}"))?);
    Ok(Address::Sentinel { sentinels, master, template })
}

/// The settings of every connection of ours.
fn info(info: ConnectionInfo) -> ConnectionInfo {
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let tcp = TcpSettings::default().set_nodelay(true);
    info.set_redis_settings(redis).set_tcp_settings(tcp)
}

pub(super) fn config() -> AsyncConnectionConfig {
    // Every call has a budget of its own; this one only keeps dead requests from piling up.
    AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(Some(CONNECT * 2))
}

pub(super) fn config_with(sender: impl AsyncPushSender) -> AsyncConnectionConfig {
    config().set_push_sender(sender)
}

#[cfg(feature = "redis-cluster")]
fn cluster(nodes: Vec<ConnectionInfo>) -> Result<Address, String> {
    Ok(Address::Cluster(nodes))
}

#[cfg(not(feature = "redis-cluster"))]
fn cluster(_: Vec<ConnectionInfo>) -> Result<Address, String> {
    Err("for a cluster turn on the feature `redis-cluster` of tower-cache-aside".to_owned())
}

/// Asks one sentinel for the master. Whether it is one is seen when it is connected to: a sentinel may not have noticed
/// yet.
async fn ask(sentinel: &ConnectionInfo, master: &str, template: &ConnectionInfo) -> Result<ConnectionInfo, RedisError> {
    let mut connection =
        Client::open(sentinel.clone())?.get_multiplexed_async_connection_with_config(&config()).await?;
    let mut ask = redis::cmd("SENTINEL");
    let found: Option<(String, u16)> =
        ask.arg("get-master-addr-by-name").arg(master).query_async(&mut connection).await?;
    let unknown = || (redis::ErrorKind::MasterNameNotFoundBySentinel, "the sentinels know no master of that name");
    let (host, port) = found.ok_or_else(unknown)?;
    Ok(template.clone().set_addr(redis::ConnectionAddr::Tcp(host, port)))
}
