//! The response future of both layers: ready at once, the inner service's own, or boxed when there is more to do.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderName, Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::task::{JoinError, JoinHandle};
use tower_service::Service;

use super::{changes::Reads, extensions::CacheTags};
use crate::{
    http::cache_status::Handled,
    observe::{Teller, Watch},
};

/// What is done to a response that passes through.
pub(crate) struct Finish {
    /// What is said of it, if its route is cacheable.
    pub(crate) told: Option<(Handled, Teller, Option<Watch>)>,
    /// Declared tags are for the cache alone.
    pub(crate) tag_header: HeaderName,
    /// What it becomes a part of.
    pub(crate) whole: Option<Reads>,
}

pub(crate) type Boxed<T, E> = Pin<Box<dyn Future<Output = Result<Response<T>, E>> + Send>>;

/// A service whose calls may go on in tasks of their own: asked with bodies `B`, it answers with bodies `R`.
pub(crate) trait Origin<B, R>:
    Service<Request<B>, Response = Response<R>, Future: Send, Error: Send> + Send + 'static
{
}

impl<S, B, R> Origin<B, R> for S where
    S: Service<Request<B>, Response = Response<R>, Future: Send, Error: Send> + Send + 'static
{
}

/// What a task comes to; its panic goes on here.
pub(crate) async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await.map_err(JoinError::try_into_panic) {
        Ok(value) => value,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down, and this task with it.
        Err(Err(_)) => std::future::pending().await,
    }
}

/// Waits until the service is ready, and calls it.
pub(crate) async fn call<S: Service<Q>, Q>(service: &mut S, request: Q) -> Result<S::Response, S::Error> {
    ready(service).await?;
    service.call(request).await
}

/// Waits until the service is ready.
pub(crate) async fn ready<S: Service<Q>, Q>(service: &mut S) -> Result<(), S::Error> {
    poll_fn(|cx| service.poll_ready(cx)).await
}

pin_project! {
    /// Counts a request when it has its response.
    pub(crate) struct Watched<F> {
        watch: Option<Watch>,
        #[pin]
        response: F,
    }
}

pub(crate) fn watched<F>(watch: Option<Watch>, response: F) -> Watched<F> {
    Watched { watch, response }
}

impl<F, T, E> Future for Watched<F>
where
    F: Future<Output = Result<Response<T>, E>>,
    T: Body,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let response = ready!(this.response.poll(cx));
        if let Some(watch) = this.watch.take() {
            watch.end(response.as_ref().ok().map(|response| (response.extensions(), response.body().size_hint())));
        }
        Poll::Ready(response)
    }
}

pin_project! {
    /// The future of [`CacheAside`](crate::CacheAside) and [`Invalidate`](crate::Invalidate). `S` is the inner service, `B` the
    /// body of its requests, `R` that of its responses, `T` the body it becomes.
    pub struct ResponseFuture<S, B, R, T>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        kind: Kind<S, B, R, T, S::Future, S::Error>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<S, B, R, T, F, E> {
        Ready { response: Option<Response<T>> },
        // The layer was ready, for a hit needs nobody: what passes through waits here.
        Waiting { service: S, request: Option<Request<B>>, pass: Option<Pass<R, T>> },
        Called { #[pin] future: F, pass: Option<Pass<R, T>> },
        Boxed { future: Boxed<T, E> },
    }
}

/// What is done to a response that passes through.
struct Pass<R, T> {
    finish: Option<Finish>,
    body: fn(R) -> T,
}

impl Finish {
    pub(crate) fn finish<R: Body>(self, response: Response<R>) -> Response<R> {
        let (mut parts, body) = response.into_parts();
        let has_tags = parts.headers.remove(&self.tag_header).is_some();
        // What they are is not read here.
        if let Some(whole) = self.whole.filter(|_| has_tags || parts.extensions.get::<CacheTags>().is_some()) {
            whole.spoil();
        }
        if let Some((handled, teller, watch)) = self.told {
            teller.tell(handled, None, &mut parts);
            if let Some(watch) = watch {
                watch.end(Some((&parts.extensions, body.size_hint())));
            }
        }
        Response::from_parts(parts, body)
    }
}

impl<R: Body, T> Pass<R, T> {
    fn finish(self, response: Response<R>) -> Response<T> {
        let response = match self.finish {
            Some(finish) => finish.finish(response),
            None => response,
        };
        response.map(self.body)
    }
}

impl<S: Service<Request<B>>, B, R, T> ResponseFuture<S, B, R, T> {
    pub(crate) fn ready(response: Response<T>) -> Self {
        Self { kind: Kind::Ready { response: Some(response) } }
    }

    pub(crate) fn pass(service: S, request: Request<B>, finish: Option<Finish>, body: fn(R) -> T) -> Self {
        Self { kind: Kind::Waiting { service, request: Some(request), pass: Some(Pass { finish, body }) } }
    }

    pub(crate) fn boxed(future: Boxed<T, S::Error>) -> Self {
        Self { kind: Kind::Boxed { future } }
    }
}

impl<S, B, R, T> Future for ResponseFuture<S, B, R, T>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    type Output = Result<Response<T>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut kind = self.project().kind;
        loop {
            let called = match kind.as_mut().project() {
                KindProj::Ready { response } => return response.take().map_or(Poll::Pending, |r| Poll::Ready(Ok(r))),
                KindProj::Waiting { service, request, pass } => {
                    ready!(service.poll_ready(cx))?;
                    let Some(request) = request.take() else { return Poll::Pending };
                    Kind::Called { future: service.call(request), pass: pass.take() }
                }
                KindProj::Called { future, pass } => {
                    let response = ready!(future.poll(cx))?;
                    return pass.take().map_or(Poll::Pending, |pass| Poll::Ready(Ok(pass.finish(response))));
                }
                KindProj::Boxed { future } => return future.as_mut().poll(cx),
            };
            kind.set(called);
        }
    }
}
