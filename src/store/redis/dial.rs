//! The way to a server: the network, or in tests whatever carries bytes.

use std::{fmt, io};
#[cfg(feature = "testing")]
use std::{pin::Pin, sync::Arc};

use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, RedisError, aio::MultiplexedConnection};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// How to connect.
#[derive(Clone, Default)]
pub(super) enum Dial {
    #[default]
    Network,
    #[cfg(feature = "testing")]
    By(Arc<dyn Fn() -> Dialled + Send + Sync>),
}

#[cfg(feature = "testing")]
type Dialled = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send>>;

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl Dial {
    #[cfg(feature = "testing")]
    pub(super) fn by<F, Fut, S>(connect: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Self::By(Arc::new(move || {
            let connected = connect();
            Box::pin(async move { Ok(Box::new(connected.await?) as Box<dyn Stream>) })
        }))
    }

    /// The bare way to the same server; none where it would have to be encrypted.
    pub(super) async fn stream(&self, info: &ConnectionInfo) -> io::Result<Option<Box<dyn Stream>>> {
        match self {
            Self::Network => match info.addr() {
                ConnectionAddr::Tcp(host, port) => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    Ok(Some(Box::new(stream)))
                }
                #[cfg(unix)]
                ConnectionAddr::Unix(path) => Ok(Some(Box::new(tokio::net::UnixStream::connect(path).await?))),
                _ => Ok(None),
            },
            #[cfg(feature = "testing")]
            Self::By(connect) => connect().await.map(Some),
        }
    }

    pub(super) async fn connect(
        &self,
        client: &Client,
        config: &AsyncConnectionConfig,
    ) -> Result<MultiplexedConnection, RedisError> {
        match self {
            Self::Network => client.get_multiplexed_async_connection_with_config(config).await,
            #[cfg(feature = "testing")]
            Self::By(connect) => {
                let (stream, settings) = (connect().await?, client.get_connection_info().redis_settings());
                let (connection, driver) =
                    MultiplexedConnection::new_with_config(settings, stream, config.clone()).await?;
                tokio::spawn(driver);
                Ok(connection)
            }
        }
    }
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dial")
    }
}
