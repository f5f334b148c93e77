//! The response future of both layers: ready at once, the inner service's own, or boxed when there is more to do.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderName, Response};
use pin_project_lite::pin_project;
use tokio::{
    sync::oneshot,
    task::{JoinError, JoinHandle},
};

use crate::http::cache_status::Handled;

/// What is done to a response that passes through.
pub(crate) struct Finish {
    /// What is said of it, if its route is cacheable.
    pub(crate) handled: Option<Handled>,
    /// Declared tags are for the cache alone.
    pub(crate) tag_header: HeaderName,
}

pub(crate) type Boxed<T, E> = Pin<Box<dyn Future<Output = Result<Response<T>, E>> + Send>>;

/// What a task comes to; its panic goes on here.
pub(crate) async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await.map_err(JoinError::try_into_panic) {
        Ok(value) => value,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down, and this task with it.
        Err(Err(_)) => std::future::pending().await,
    }
}

/// What a task replied; if it ended without a reply, it panicked.
pub(crate) async fn replied<T>(reply: Result<T, oneshot::error::RecvError>, task: JoinHandle<()>) -> T {
    match reply {
        Ok(value) => value,
        Err(_) => {
            joined(task).await;
            std::future::pending().await
        }
    }
}

pin_project! {
    /// The future of [`CacheAside`](crate::CacheAside) and [`Invalidate`](crate::Invalidate). `F` is the inner service's
    /// future, `R` its body, `T` the body it becomes.
    pub struct ResponseFuture<F, R, T, E> {
        #[pin]
        kind: Kind<F, R, T, E>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<F, R, T, E> {
        Ready { response: Option<Response<T>> },
        Pass { #[pin] future: F, finish: Option<Finish>, body: fn(R) -> T },
        Boxed { future: Boxed<T, E> },
    }
}

impl<F, R, T, E> ResponseFuture<F, R, T, E> {
    pub(crate) fn ready(response: Response<T>) -> Self {
        Self { kind: Kind::Ready { response: Some(response) } }
    }

    pub(crate) fn pass(future: F, finish: Option<Finish>, body: fn(R) -> T) -> Self {
        Self { kind: Kind::Pass { future, finish, body } }
    }

    pub(crate) fn boxed(future: Boxed<T, E>) -> Self {
        Self { kind: Kind::Boxed { future } }
    }
}

impl<F, R, T, E> Future for ResponseFuture<F, R, T, E>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<T>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().kind.project() {
            KindProj::Ready { response } => response.take().map_or(Poll::Pending, |r| Poll::Ready(Ok(r))),
            KindProj::Pass { future, finish, body } => {
                let mut response = ready!(future.poll(cx))?;
                if let Some(Finish { handled, tag_header }) = finish {
                    response.headers_mut().remove(&*tag_header);
                    let status = response.status();
                    if let Some(handled) = handled {
                        handled.append(response.headers_mut(), Some(status), None);
                    }
                }
                Poll::Ready(Ok(response.map(*body)))
            }
            KindProj::Boxed { future } => future.as_mut().poll(cx),
        }
    }
}

/// The inner service that was polled ready, to be called; its clone stays behind, and is polled ready before the next call.
pub(crate) fn take_ready<S: Clone>(inner: &mut S) -> S {
    let clone = inner.clone();
    std::mem::replace(inner, clone)
}
