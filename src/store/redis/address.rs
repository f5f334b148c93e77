//! Where Redis is: one server, a cluster, or whichever server the sentinels call the master.

use redis::{Client, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisError, io::tcp::TcpSettings};
use tokio::time::timeout;

use super::link::{CONNECT, connection_config};
use crate::error::ConfigError;

/// A parsed address.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Single(ConnectionInfo),
    Sentinel {
        sentinels: Vec<ConnectionInfo>,
        master: String,
    },
    #[cfg(feature = "redis-cluster")]
    Cluster(Vec<ConnectionInfo>),
}

impl Address {
    /// `redis://`, `rediss://`, `unix://`; `redis+cluster://host:port,host:port` or several addresses for a cluster;
    /// `redis+sentinel://host:port,host:port/master` for sentinels.
    pub(super) fn parse<'a>(urls: impl IntoIterator<Item = &'a str>) -> Result<Self, ConfigError> {
        let mut singles = vec![];
        for url in urls {
            let error = |what: &str| ConfigError::new(format!("Redis address `{}`: {what}", redacted(url)));
            if let Some(rest) = url.strip_prefix("redis+sentinel://") {
                let (hosts, master) = rest.split_once('/').unwrap_or((rest, ""));
                let master = if master.is_empty() { "mymaster" } else { master }.to_owned();
                let sentinels =
                    hosts.split(',').map(|host| parse(&format!("redis://{host}"))).collect::<Result<_, _>>();
                return Ok(Self::Sentinel { sentinels: sentinels.map_err(|e| error(&e))?, master });
            }
            if let Some(hosts) = url.strip_prefix("redis+cluster://") {
                let nodes = hosts.split(',').map(|host| parse(&format!("redis://{host}"))).collect::<Result<_, _>>();
                return cluster(nodes.map_err(|e| error(&e))?);
            }
            singles.push(parse(url).map_err(|e| error(&e))?);
        }
        match (singles.len(), singles.pop()) {
            (1, Some(single)) => Ok(Self::Single(single)),
            (_, None) => Err(ConfigError::new("no Redis address; give one such as redis://127.0.0.1:6379")),
            (_, Some(last)) => {
                singles.push(last);
                cluster(singles)
            }
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        #[cfg(feature = "redis-cluster")]
        return matches!(self, Self::Cluster(_));
        #[cfg(not(feature = "redis-cluster"))]
        false
    }

    /// What to connect to now.
    pub(super) async fn client(&self) -> Result<Client, RedisError> {
        match self {
            Self::Single(info) => Client::open(info.clone()),
            #[cfg(feature = "redis-cluster")]
            Self::Cluster(_) => Err((redis::ErrorKind::Client, "a cluster is connected to node by node").into()),
            Self::Sentinel { sentinels, master } => {
                let mut last = None;
                for sentinel in sentinels {
                    match timeout(CONNECT, ask(sentinel, master)).await {
                        Ok(Ok(client)) => return Ok(client),
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
    url.into_connection_info().map(info).map_err(|e| e.to_string())
}

/// The settings of every connection of ours.
pub(super) fn info(info: ConnectionInfo) -> ConnectionInfo {
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let tcp = TcpSettings::default().set_nodelay(true);
    info.set_redis_settings(redis).set_tcp_settings(tcp)
}

#[cfg(feature = "redis-cluster")]
fn cluster(nodes: Vec<ConnectionInfo>) -> Result<Address, ConfigError> {
    Ok(Address::Cluster(nodes))
}

#[cfg(not(feature = "redis-cluster"))]
fn cluster(_: Vec<ConnectionInfo>) -> Result<Address, ConfigError> {
    Err(ConfigError::new("several Redis addresses mean a cluster: turn on the feature `redis-cluster`"))
}

/// Asks one sentinel for the master, and checks that it is one: a sentinel may not have noticed yet.
async fn ask(sentinel: &ConnectionInfo, master: &str) -> Result<Client, RedisError> {
    let config = connection_config();
    let mut connection = Client::open(sentinel.clone())?.get_multiplexed_async_connection_with_config(&config).await?;
    let mut ask = redis::cmd("SENTINEL");
    let (host, port): (String, u16) =
        ask.arg("get-master-addr-by-name").arg(master).query_async(&mut connection).await?;
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let found = parse(&format!("redis://{host}:{port}"))
        .map_err(|e| RedisError::from((redis::ErrorKind::InvalidClientConfig, "bad address from the sentinel", e)))?;
    let redis = found.redis_settings().clone();
    let client = Client::open(found.set_redis_settings(redis))?;
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    let role: Vec<redis::Value> = redis::cmd("ROLE").query_async(&mut connection).await?;
    match role.first() {
        Some(redis::Value::BulkString(role)) if role == b"master" => Ok(client),
        _ => Err((redis::ErrorKind::Io, "the sentinels' master is none").into()),
    }
}
