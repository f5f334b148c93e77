//! The layer that makes writes visible: after a mutation, and before its response, everything that it has made stale is
//! dropped.
//!
//! *Unknown is a write.* Whatever is not a clear refusal (4xx) may have committed: a 5xx, an error, a panic and a broken
//! response body invalidate as well. The handler and the invalidation run in a task of their own, so a client that hangs
//! up, or an outer time-out, can neither cancel the write half-way nor come between it and the invalidation.

mod body;
mod locations;

use std::{
    fmt,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    core::Core,
    future::{self, ResponseFuture, take_ready},
    writing::{Refused, Writing},
};
use crate::{catalog::Drops, key::Tenant, route::Mutated};
pub use body::InvalidateBody;
use locations::located;

/// Wraps services in [`Invalidate`]; made by [`Cache::invalidate_layer`](crate::Cache::invalidate_layer).
///
/// ```
/// use http::{Request, Response};
/// use http_body_util::Full;
/// use tower::{Layer, ServiceExt, service_fn};
/// use tower_cache_aside::{Cache, Cascade, DataType, Mutation, Route, Ttl};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cache = Cache::builder("docs")
///     .single_tenant("all")
///     .data_type(DataType::new("agent", Ttl::Standard))
///     .data_type(DataType::new("agents_list", Ttl::Short))
///     .route(Route::new("/agents/{agent_id}", "agent"))
///     .route(Route::new("/agents", "agents_list"))
///     .mutation(Mutation::put("/agents/{agent_id}", "agent"))
///     .cascade(Cascade::new("agent").all(["agents_list"]))
///     .report_header(true)
///     .build()?;
/// let database = service_fn(|_: Request<Full<bytes::Bytes>>| async {
///     Ok::<_, std::io::Error>(Response::new(Full::<bytes::Bytes>::from("rows")))
/// });
/// let service = cache.invalidate_layer().layer(cache.layer().layer(database));
///
/// for path in ["/agents", "/agents/42"] {
///     service.clone().oneshot(Request::get(path).body(Full::default())?).await?; // a miss, which is stored
/// }
/// let response = service.clone().oneshot(Request::put("/agents/42").body(Full::default())?).await?;
/// assert_eq!(response.headers()["cache-invalidated"], "agent=1, agents_list=1, total=2");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct InvalidateLayer {
    pub(crate) core: Arc<Core>,
}

impl<S> Layer<S> for InvalidateLayer {
    type Service = Invalidate<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Invalidate { inner, core: self.core.clone() }
    }
}

impl fmt::Debug for InvalidateLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InvalidateLayer")
    }
}

/// Invalidates after the cache's mutations.
#[derive(Clone)]
pub struct Invalidate<S> {
    inner: S,
    core: Arc<Core>,
}

impl<S: fmt::Debug> fmt::Debug for Invalidate<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidate").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S, B, R> Service<Request<B>> for Invalidate<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Send + 'static,
    R: Body<Data = Bytes> + Send + 'static,
{
    type Response = Response<InvalidateBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, R, InvalidateBody<R>, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Some(mutated) = self.core.routes.write(request.method(), request.uri()) else {
            return ResponseFuture::pass(self.inner.call(request), None, InvalidateBody::untouched);
        };
        let (parts, body) = request.into_parts();
        let write = Write {
            tenants: self.core.tenants.tenants(&parts, &self.core.space),
            target: mutated.follows_locations().then(|| (parts.uri.clone(), parts.headers.get(header::HOST).cloned())),
            mutated,
            core: self.core.clone(),
        };
        let inner = take_ready(&mut self.inner);
        let write = write.run(inner, Request::from_parts(parts, body)).in_current_span();
        let task = self.core.engine.spawn(write);
        ResponseFuture::boxed(Box::pin(future::joined(task)))
    }
}

/// The answer to a write that the store could not be told about.
fn unavailable<R>(_: Refused) -> Response<InvalidateBody<R>> {
    let mut response = Response::new(InvalidateBody::default());
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// A mutation under way.
struct Write {
    tenants: Vec<Tenant>,
    mutated: Mutated,
    /// The URI and host of the request, if what the response locates falls too.
    target: Option<(Uri, Option<HeaderValue>)>,
    core: Arc<Core>,
}

impl Write {
    async fn run<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Response<InvalidateBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body,
    {
        let mut writing = match self.begin().await {
            Ok(writing) => writing,
            Err(refused) => return Ok(unavailable(refused)),
        };
        let result = match AssertUnwindSafe(async { inner.call(request).await }).catch_unwind().await {
            Ok(Ok(response)) if response.status().is_client_error() => {
                writing.cancel().await;
                return Ok(response.map(InvalidateBody::untouched));
            }
            other => other,
        };
        let headers = result.as_ref().ok().and_then(|result| result.as_ref().ok()).map(Response::headers);
        self.add_changed(&mut writing.drops, headers).await;
        let again = writing.drops.clone();
        let report = writing.end().await;
        let mut response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
        Writing::report(&self.core, &report, response.headers_mut());
        response.extensions_mut().insert(report);
        let is_whole = response.body().is_end_stream() || response.body().size_hint().exact().is_some();
        if is_whole {
            return Ok(response.map(InvalidateBody::untouched));
        }
        let again = Writing::unfenced(&self.core, again);
        Ok(response.map(|body| InvalidateBody::watched(body, again)))
    }

    /// Before the handler: it may remove the rows that name the children.
    async fn begin(&self) -> Result<Writing, Refused> {
        Writing::check(&self.core)?;
        let mut drops = Drops::default();
        self.core.add_change(&mut drops, &self.tenants, self.mutated.change()).await;
        Writing::begin(&self.core, drops, self.mutated.types()).await
    }

    /// After it: it may have moved a child here, and the response may say what else it is about.
    async fn add_changed(&self, drops: &mut Drops, response: Option<&HeaderMap>) {
        self.core.add_change(drops, &self.tenants, self.mutated.change()).await;
        let location = response.and_then(|headers| headers.get(header::LOCATION)?.to_str().ok());
        self.core.drop_created(drops, &self.tenants, &self.mutated, location).await;
        if let (Some((uri, host)), Some(response)) = (&self.target, response) {
            let paths = located(uri, host.as_ref(), response);
            self.core.drop_located(drops, &self.tenants, &paths, self.mutated.include()).await;
        }
    }
}
