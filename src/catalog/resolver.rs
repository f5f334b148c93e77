//! Resolvers: how the children of an entity are found that only the database knows.

use std::{
    collections::BTreeMap, error::Error as StdError, fmt, future::Future, panic::AssertUnwindSafe, pin::Pin, sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::time::timeout;

/// How long a resolver may take before all children of the tenant are dropped instead.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) type ResolverError = Box<dyn StdError + Send + Sync>;
type ResolverFuture = Pin<Box<dyn Future<Output = Result<Vec<String>, ResolverError>> + Send>>;

/// Finds the ids of an entity's children: (tenant, parent id) → ids.
#[derive(Clone)]
pub(crate) struct Resolver(Arc<dyn Fn(String, String) -> ResolverFuture + Send + Sync>);

impl Resolver {
    pub(crate) fn new<F, Fut, E>(resolve: F) -> Self
    where
        F: Fn(String, String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<String>, E>> + Send + 'static,
        E: Into<ResolverError>,
    {
        Self(Arc::new(move |tenant, id| {
            let found = resolve(tenant, id);
            Box::pin(async move { found.await.map_err(Into::into) })
        }))
    }

    pub(super) async fn resolve(&self, tenant: &[u8], id: &[u8]) -> Result<Vec<String>, ResolverError> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec());
        let (tenant, id) = (text(tenant)?, text(id)?);
        // The write is committed already: whatever becomes of the user's code, the invalidation goes on.
        let found = AssertUnwindSafe(async { (self.0)(tenant, id).await }).catch_unwind();
        match timeout(PATIENCE, found).await {
            Ok(Ok(found)) => found,
            Ok(Err(_)) => Err("it panicked".into()),
            Err(_) => Err(format!("no answer within {PATIENCE:?}").into()),
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
