//! The layer that makes writes visible: after a mutation, and before its response, everything that it has made stale is
//! dropped.
//!
//! *Unknown is a write.* Whatever is not a clear refusal (4xx) may have committed: a 5xx, an error, a panic and a broken
//! response body invalidate as well. The handler and the invalidation run in a task of their own, so a client that hangs
//! up, or an outer time-out, can neither cancel the write half-way nor come between it and the invalidation.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header, uri::Authority};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::{runtime::Handle, task::JoinHandle};
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    future::{self, ResponseFuture},
    take_ready,
};
use crate::{Cache, catalog::Drops, engine::Invalidated, route::Mutated, store::Fence};

pub(super) const REPORT: HeaderName = HeaderName::from_static("cache-invalidated");

/// Wraps services in [`Invalidate`].
#[derive(Clone, Debug)]
pub struct InvalidateLayer {
    cache: Cache,
}

impl InvalidateLayer {
    /// A layer over this cache.
    pub fn new(cache: Cache) -> Self {
        Self { cache }
    }
}

impl<S> Layer<S> for InvalidateLayer {
    type Service = Invalidate<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Invalidate { inner, cache: self.cache.clone() }
    }
}

/// Invalidates after the cache's mutations.
#[derive(Clone, Debug)]
pub struct Invalidate<S> {
    inner: S,
    cache: Cache,
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
        let Some(mutated) = self.cache.routes().write(request.method(), request.uri()) else {
            return ResponseFuture::pass(self.inner.call(request), None, InvalidateBody::untouched);
        };
        let (parts, body) = request.into_parts();
        let write = Write {
            tenants: self.cache.tenant_source().tenants(&parts),
            target: mutated.follows_locations().then(|| (parts.uri.clone(), parts.headers.get(header::HOST).cloned())),
            mutated,
            cache: self.cache.clone(),
        };
        let inner = take_ready(&mut self.inner);
        let task = tokio::spawn(write.run(inner, Request::from_parts(parts, body)).in_current_span());
        ResponseFuture::boxed(Box::pin(future::joined(task)))
    }
}

/// The answer to a write that the store could not be told about.
fn unavailable<R>() -> Response<InvalidateBody<R>> {
    let mut response = Response::new(InvalidateBody { body: None, watch: Watch::default() });
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// A mutation under way.
struct Write {
    tenants: Vec<Vec<u8>>,
    mutated: Mutated,
    /// The URI and host of the request, if what the response locates falls too.
    target: Option<(Uri, Option<HeaderValue>)>,
    cache: Cache,
}

impl Write {
    async fn run<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Response<InvalidateBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body,
    {
        let rejects = self.cache.rejects();
        if rejects && !self.cache.is_healthy() {
            return Ok(unavailable());
        }
        // Before the handler: it may remove the rows that name the children.
        let mut drops = Drops::default();
        self.cache.drop_mutated(&mut drops, &self.tenants, &self.mutated).await;
        let fence = self.cache.fence(self.mutated.types());
        if let Some(fence) = &fence
            && self.cache.engine().fence(drops.clone(), fence).await.is_err()
            && rejects
        {
            return Ok(unavailable());
        }
        let result = match AssertUnwindSafe(async { inner.call(request).await }).catch_unwind().await {
            Ok(Ok(response)) if response.status().is_client_error() => {
                // It changed nothing, but its fences are up.
                if fence.is_some() {
                    self.cache.drop_all(drops, fence.as_ref()).await;
                }
                return Ok(response.map(InvalidateBody::untouched));
            }
            other => other,
        };
        // After it: it may have moved a child here.
        self.cache.drop_mutated(&mut drops, &self.tenants, &self.mutated).await;
        let location = match &result {
            Ok(Ok(response)) => response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()),
            _ => None,
        };
        self.cache.drop_created(&mut drops, &self.tenants, &self.mutated, location).await;
        if let (Some((uri, host)), Ok(Ok(response))) = (&self.target, &result) {
            let paths = located(uri, host.as_ref(), response.headers());
            self.cache.drop_located(&mut drops, &self.tenants, &paths, self.mutated.include()).await;
        }
        let again = drops.clone();
        let report = self.cache.drop_all(drops, fence.as_ref()).await;
        tracing::info!(%report, "invalidated");
        let mut response = match result {
            Ok(response) => response?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let value = HeaderValue::try_from(report.to_string());
        if let Some(value) = value.ok().filter(|_| self.cache.report_header()) {
            response.headers_mut().insert(REPORT, value);
        }
        response.extensions_mut().insert(report);
        let body = |body: R| match body.is_end_stream() || body.size_hint().exact().is_some() {
            true => InvalidateBody::untouched(body),
            false => InvalidateBody::watched(body, self.cache.clone(), again),
        };
        Ok(response.map(body))
    }
}

/// The paths that `Location` and `Content-Location` name on the host of the request.
fn located(request: &Uri, host: Option<&HeaderValue>, headers: &HeaderMap) -> Vec<String> {
    let named = [header::LOCATION, header::CONTENT_LOCATION].into_iter().flat_map(|name| headers.get_all(name));
    let own = request.authority().map(Authority::as_str).or_else(|| host.and_then(|host| host.to_str().ok()));
    let path_of = |location: &str| match location.parse::<Uri>() {
        Ok(uri) if uri.authority().is_some() => {
            let other = uri.authority().map(Authority::as_str);
            (other == own).then(|| uri.path().to_owned())
        }
        Ok(uri) if location.starts_with('/') => Some(uri.path().to_owned()),
        // Relative to the folder of the request's path.
        _ => {
            let folder = request.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            let name = location.split(['?', '#']).next().unwrap_or_default();
            Some(format!("{folder}/{name}"))
        }
    };
    named.filter_map(|value| path_of(value.to_str().ok()?)).collect()
}

pin_project! {
    /// The response body of [`Invalidate`]: while a body streams, its handler may still be writing, so when it ends,
    /// breaks or is dropped, the invalidation is repeated, and its end is held back until that is done.
    pub struct InvalidateBody<R> {
        #[pin]
        body: Option<R>,
        watch: Watch,
    }
}

/// What is done when a streaming body is over: first it is armed, then it runs, then nothing is left to do.
#[derive(Default)]
struct Watch {
    armed: Option<Armed>,
    running: Option<JoinHandle<Invalidated>>,
    /// The trailers of a gRPC response, which say whether it was a success, held until the invalidation is done.
    held: Option<HeaderMap>,
    /// Whether trailers are to be held, and get the report.
    holds: bool,
    reports: bool,
}

struct Armed {
    cache: Cache,
    drops: Drops,
    fence: Option<Fence>,
    runtime: Handle,
}

impl Watch {
    fn of(armed: Option<Armed>, holds: bool, reports: bool) -> Self {
        Self { armed, running: None, held: None, holds, reports }
    }

    /// Starts the invalidation, if that has not been done. It is a task, so that it runs to its end in any case.
    fn fire(&mut self) {
        if let Some(Armed { cache, drops, fence, runtime }) = self.armed.take() {
            self.running = Some(runtime.spawn(async move { cache.drop_all(drops, fence.as_ref()).await }));
        }
    }

    fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(task) = &mut self.running {
            // A task that failed was cancelled by a runtime that shuts down.
            let report = ready!(task.poll_unpin(cx));
            self.running = None;
            if let (Ok(report), Some(trailers), true) = (report, &mut self.held, self.reports)
                && let Ok(value) = HeaderValue::try_from(report.to_string())
            {
                trailers.insert(REPORT, value);
            }
        }
        Poll::Ready(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.fire();
    }
}

/// An empty body: what other layers (tower-http's time-out) answer with.
impl<R> Default for InvalidateBody<R> {
    fn default() -> Self {
        Self { body: None, watch: Watch::default() }
    }
}

impl<R> InvalidateBody<R> {
    pub(super) fn untouched(body: R) -> Self {
        Self { body: Some(body), watch: Watch::default() }
    }

    fn watched(body: R, cache: Cache, drops: Drops) -> Self {
        let armed = Some(Armed { cache, drops, fence: None, runtime: Handle::current() });
        Self { body: Some(body), watch: Watch::of(armed, false, false) }
    }

    /// Invalidates when the trailers say that it was a success, or don't say that it was none.
    #[cfg(feature = "grpc")]
    pub(super) fn until_trailers(body: R, cache: Cache, drops: Drops, fence: Option<Fence>) -> Self {
        let reports = cache.report_header();
        let armed = Some(Armed { cache, drops, fence, runtime: Handle::current() });
        Self { body: Some(body), watch: Watch::of(armed, true, reports) }
    }
}

/// Whether these trailers say that nothing was changed.
fn is_refusal(trailers: &HeaderMap) -> bool {
    let _ = trailers;
    #[cfg(feature = "grpc")]
    return super::grpc::is_refusal(trailers);
    #[cfg(not(feature = "grpc"))]
    false
}

impl<R: Body<Data = Bytes>> Body for InvalidateBody<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.project();
        let watch = this.watch;
        if watch.running.is_some() {
            ready!(watch.poll_done(cx));
            return Poll::Ready(watch.held.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let Some(body) = this.body.as_pin_mut() else { return Poll::Ready(None) };
        let frame = match ready!(body.poll_frame(cx)) {
            Some(Ok(frame)) if watch.holds && frame.is_trailers() => match frame.into_trailers() {
                Ok(trailers) => {
                    let fenced = watch.armed.as_ref().is_some_and(|armed| armed.fence.is_some());
                    if is_refusal(&trailers) && !fenced {
                        watch.armed = None;
                        return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                    }
                    watch.reports &= !is_refusal(&trailers);
                    watch.held = Some(trailers);
                    watch.fire();
                    ready!(watch.poll_done(cx));
                    return Poll::Ready(watch.held.take().map(|trailers| Ok(Frame::trailers(trailers))));
                }
                Err(frame) => Some(Ok(frame)),
            },
            frame => frame,
        };
        if !matches!(&frame, Some(Ok(_))) {
            watch.fire();
            if frame.is_none() {
                ready!(watch.poll_done(cx));
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.watch.armed.is_none() && self.watch.running.is_none() && self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            // An exact size would become a `content-length`, after which there is no room for trailers.
            Some(_) if self.watch.holds => SizeHint::new(),
            Some(body) => body.size_hint(),
            None => SizeHint::with_exact(0),
        }
    }
}
