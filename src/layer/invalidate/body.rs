//! A response body that may still be followed by what its handler writes.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::layer::writing::{Due, Writing};

pin_project! {
    /// The response body of [`Invalidate`](crate::Invalidate): while a body streams, its handler may still be writing, so
    /// when it ends, breaks or is dropped, the invalidation is repeated, and its end is held back until that is done.
    pub struct InvalidateBody<R> {
        #[pin]
        body: Option<R>,
        due: Due,
    }
}

/// An empty body: what other layers (tower-http's time-out) answer with.
impl<R> Default for InvalidateBody<R> {
    fn default() -> Self {
        Self { body: None, due: Due::default() }
    }
}

impl<R> InvalidateBody<R> {
    pub(super) fn untouched(body: R) -> Self {
        Self { body: Some(body), due: Due::default() }
    }

    /// Invalidates once more when it is over.
    pub(super) fn watched(body: R, writing: Writing) -> Self {
        Self { body: Some(body), due: Due::arm(writing) }
    }
}

impl<R: Body<Data = Bytes>> Body for InvalidateBody<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let mut this = self.project();
        let Some(body) = this.body.as_mut().as_pin_mut() else {
            ready!(this.due.poll_done(cx));
            return Poll::Ready(None);
        };
        let frame = ready!(body.poll_frame(cx));
        if !matches!(&frame, Some(Ok(_))) {
            this.due.fire();
        }
        if frame.is_none() {
            this.body.set(None);
            ready!(this.due.poll_done(cx));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.due.is_done() && self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}
