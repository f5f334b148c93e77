//! Resolvers: how the children of an entity are found that only the database knows.

use std::{
    collections::BTreeMap, error::Error as StdError, fmt, future::Future, panic::AssertUnwindSafe, pin::Pin, sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::time::{Instant, timeout_at};

/// How long resolvers may take, where nothing else is said, before all children of the tenant are dropped instead.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) type ResolverError = Box<dyn StdError + Send + Sync>;
type ResolverFuture = Pin<Box<dyn Future<Output = Result<Vec<String>, ResolverError>> + Send>>;

/// Finds the ids of entities' children: (tenant, parent ids) → ids.
#[derive(Clone)]
pub(crate) struct Resolver(Arc<dyn Fn(String, Vec<String>) -> ResolverFuture + Send + Sync>);

impl Resolver {
    pub(crate) fn new<F, Fut, E>(resolve: F) -> Self
    where
        F: Fn(String, Vec<String>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<String>, E>> + Send + 'static,
        E: Into<ResolverError>,
    {
        Self(Arc::new(move |tenant, ids| {
            let found = resolve(tenant, ids);
            Box::pin(async move { found.await.map_err(Into::into) })
        }))
    }

    pub(super) async fn resolve(
        &self,
        tenant: &[u8],
        ids: &[Vec<u8>],
        deadline: Instant,
    ) -> Result<Vec<String>, ResolverError> {
        if Instant::now() >= deadline {
            return Err("no time is left".into());
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec());
        let (tenant, ids) = (text(tenant)?, ids.iter().map(|id| text(id)).collect::<Result<_, _>>()?);
        // The write is committed already: whatever becomes of the user's code, the invalidation goes on.
        let found = AssertUnwindSafe(async { (self.0)(tenant, ids).await }).catch_unwind();
        match timeout_at(deadline, found).await {
            Ok(Ok(found)) => found,
            Ok(Err(_)) => Err("it panicked".into()),
            Err(_) => Err("no answer in time".into()),
        }
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

/// Resolvers by the name of their relation.
pub(crate) type Resolvers = BTreeMap<String, Resolver>;
