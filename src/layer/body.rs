//! The body of a response that went through the cache: stored bytes, the inner body untouched, or a copy of a body that
//! is being stored while it streams.

use std::{
    any::Any,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::sync::mpsc::UnboundedReceiver;

use super::invalidate::InvalidateBody;

pin_project! {
    /// The response body of [`CacheAside`](crate::CacheAside).
    pub struct CacheBody<B: Body> {
        #[pin]
        kind: Kind<B>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<B: Body> {
        Full { data: Option<Bytes>, trailers: Option<Box<HeaderMap>>, counted: bool },
        Inner { #[pin] body: B },
        /// Of a write, after which something may be due. In a box: what most requests get is moved about as well.
        Written { body: Pin<Box<InvalidateBody<B>>> },
        /// What another task reads, and keeps a copy of. It never holds more than the body limit: then it gives the
        /// rest away.
        Tee { pieces: UnboundedReceiver<Piece<B>>, rest: Option<Pin<Box<B>>>, left: Option<u64>, done: bool },
    }
}

/// What a [`CacheBody`] is told by the task that reads the body for it.
pub(crate) enum Piece<B: Body> {
    Frame(Frame<Bytes>),
    Error(B::Error),
    /// The task is done with it: go on yourself.
    Rest(Pin<Box<B>>),
    End,
    Panic(Box<dyn Any + Send>),
}

/// An empty body: what other layers (tower-http's time-out) answer with.
impl<B: Body> Default for CacheBody<B> {
    fn default() -> Self {
        Self::full(Bytes::new(), None)
    }
}

impl<B: Body> CacheBody<B> {
    pub(crate) fn full(data: Bytes, trailers: Option<HeaderMap>) -> Self {
        let (data, trailers) = (Some(data).filter(|d| !d.is_empty()), trailers.map(Box::new));
        Self { kind: Kind::Full { data, trailers, counted: true } }
    }

    /// The same, where the response says another length: the server is to find out, as without the cache.
    pub(crate) fn uncounted(mut self) -> Self {
        if let Kind::Full { counted, .. } = &mut self.kind {
            *counted = false;
        }
        self
    }

    /// How long it is, if it is here.
    pub(crate) fn held(&self) -> u64 {
        match &self.kind {
            Kind::Full { data: Some(data), .. } => data.len() as u64,
            _ => 0,
        }
    }

    pub(crate) fn inner(body: B) -> Self {
        Self { kind: Kind::Inner { body } }
    }

    pub(crate) fn written(body: InvalidateBody<B>) -> Self {
        Self { kind: Kind::Written { body: Box::pin(body) } }
    }

    pub(crate) fn tee(pieces: UnboundedReceiver<Piece<B>>, size: &SizeHint) -> Self {
        Self { kind: Kind::Tee { pieces, rest: None, left: size.exact(), done: false } }
    }
}

impl<B: Body<Data = Bytes>> Body for CacheBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.project().kind.project() {
            KindProj::Full { data, trailers, .. } => Poll::Ready(match data.take() {
                Some(data) => Some(Ok(Frame::data(data))),
                None => trailers.take().map(|t| Ok(Frame::trailers(*t))),
            }),
            KindProj::Inner { body } => body.poll_frame(cx),
            KindProj::Written { body } => body.as_mut().poll_frame(cx),
            KindProj::Tee { pieces, rest, left, done } => {
                if let Some(rest) = rest {
                    return rest.as_mut().poll_frame(cx);
                }
                if *done {
                    return Poll::Ready(None);
                }
                match ready!(pieces.poll_recv(cx)) {
                    Some(Piece::Frame(frame)) => {
                        if let (Some(left), Some(data)) = (left, frame.data_ref()) {
                            *left = left.saturating_sub(data.len() as u64);
                        }
                        Poll::Ready(Some(Ok(frame)))
                    }
                    Some(Piece::Error(error)) => {
                        *done = true;
                        Poll::Ready(Some(Err(error)))
                    }
                    Some(Piece::Rest(body)) => rest.insert(body).as_mut().poll_frame(cx),
                    Some(Piece::End) => {
                        *done = true;
                        Poll::Ready(None)
                    }
                    Some(Piece::Panic(panic)) => std::panic::resume_unwind(panic),
                    // The task was cancelled, which only a runtime does that shuts down: never pretend that a body
                    // cut short is complete.
                    None => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Full { data, trailers, counted } => *counted && data.is_none() && trailers.is_none(),
            Kind::Inner { body } => body.is_end_stream(),
            Kind::Written { body } => body.is_end_stream(),
            Kind::Tee { rest, done, .. } => *done || rest.as_ref().is_some_and(|b| b.is_end_stream()),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            // An exact size would become a `content-length`, after which there is no room for trailers.
            Kind::Full { trailers: Some(_), .. } | Kind::Full { counted: false, .. } => SizeHint::new(),
            Kind::Full { data, .. } => SizeHint::with_exact(data.as_ref().map_or(0, Bytes::len) as u64),
            Kind::Inner { body } => body.size_hint(),
            Kind::Written { body } => body.size_hint(),
            Kind::Tee { rest: Some(rest), .. } => rest.size_hint(),
            Kind::Tee { left, .. } => left.map_or_else(SizeHint::new, SizeHint::with_exact),
        }
    }
}
