//! The layer that makes writes visible: after a mutation, and before its response, everything that it has made stale is
//! dropped.
//!
//! *Unknown is a write.* Whatever is not a clear refusal (most of 4xx) may have committed: a 408, a 5xx, an error, a panic and
//! a broken response body invalidate as well. The handler and the invalidation run in a task of their own, so a client that hangs
//! up, or an outer time-out, can neither cancel the write half-way nor come between it and the invalidation.

mod body;

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    core::Core,
    future::{self, ResponseFuture},
    write::{Answered, Write},
    writing::Refused,
};
pub use body::InvalidateBody;

/// Wraps services in [`Invalidate`]; made by [`Cache::invalidate_layer`](crate::Cache::invalidate_layer).
///
/// A [`CacheAsideLayer`](crate::CacheAsideLayer) does the same for the unsafe requests that come through it; whichever layer
/// of a cache is the outermost one takes care of a write. This one is for routes that are not cached.
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
    core: Arc<Core>,
    mount: Option<Arc<str>>,
}

impl InvalidateLayer {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core, mount: None }
    }

    /// The prefix that a router around this layer takes away from every path; see
    /// [`CacheAsideLayer::mounted_at`](crate::CacheAsideLayer::mounted_at).
    #[must_use]
    pub fn mounted_at(mut self, prefix: impl Into<Arc<str>>) -> Self {
        self.mount = Some(mount(&prefix.into()));
        self
    }
}

impl<S> Layer<S> for InvalidateLayer {
    type Service = Invalidate<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Invalidate { inner, core: self.core.clone(), mount: self.mount.clone() }
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
    mount: Option<Arc<str>>,
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
    type Future = ResponseFuture<S, B, R, InvalidateBody<R>>;

    /// Always: each request waits for the inner service in its own future.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let Some(write) = Write::of(&self.core, &mut request, self.mount.as_deref()) else {
            return ResponseFuture::pass(self.inner.clone(), request, None, InvalidateBody::untouched);
        };
        let mut inner = self.inner.clone();
        ResponseFuture::boxed(Box::pin(async move {
            // Until then its client may still change its mind.
            future::ready(&mut inner).await?;
            Ok(future::joined(write.spawn(inner, request)).await?.map_or_else(unavailable, answer))
        }))
    }
}

/// A prefix as paths begin with it.
pub(super) fn mount(prefix: &str) -> Arc<str> {
    match prefix.trim_matches('/') {
        "" => "".into(),
        prefix => format!("/{prefix}").into(),
    }
}

pub(super) fn answer<R: Body>(Answered { response, again }: Answered<R>) -> Response<InvalidateBody<R>> {
    response.map(|body| match again {
        Some(due) => InvalidateBody::watched(body, due),
        None => InvalidateBody::untouched(body),
    })
}

/// The answer to a write that the store could not be told about.
pub(super) fn unavailable<B: Default>(_: Refused) -> Response<B> {
    let mut response = Response::new(B::default());
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}
