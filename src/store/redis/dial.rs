//! The way to a server: the network, or in tests whatever carries bytes.

use std::fmt;
#[cfg(feature = "testing")]
use std::{io, pin::Pin, sync::Arc};

use redis::{AsyncConnectionConfig, Client, RedisError, aio::MultiplexedConnection};
#[cfg(feature = "testing")]
use tokio::io::{AsyncRead, AsyncWrite};

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

#[cfg(feature = "testing")]
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

#[cfg(feature = "testing")]
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
