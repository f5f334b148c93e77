//! A Redis cluster: the same commands, each routed by its tenant's slot.

use std::time::Duration;

use redis::{
    ConnectionInfo, ProtocolVersion, RedisError,
    cluster::{ClusterClient, ClusterClientBuilder},
};

use super::link::CONNECT;

/// Few and short retries: what takes longer is a miss. A hung node costs its own tenants that, and others nothing.
pub(super) fn client(nodes: &[ConnectionInfo]) -> Result<ClusterClient, RedisError> {
    ClusterClientBuilder::new(nodes.iter().cloned())
        .use_protocol(ProtocolVersion::RESP3)
        .retries(3)
        .min_retry_wait(5)
        .max_retry_wait(50)
        .connection_timeout(CONNECT)
        .response_timeout(Duration::from_millis(100))
        .overall_response_timeout(Some(Duration::from_millis(250)))
        .tcp_settings(redis::io::tcp::TcpSettings::default().set_nodelay(true))
        .build()
}
