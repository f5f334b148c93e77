//! A response body that may still be followed by what its handler writes.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::layer::writing::Due;

type Last<R> = Result<Frame<Bytes>, <R as Body>::Error>;

pin_project! {
    /// The response body of [`Invalidate`](crate::Invalidate): while a body streams, its handler may still be writing, so
    /// when it ends, breaks or is dropped, the invalidation is repeated, and its end is held back until that is done.
    pub struct InvalidateBody<R: Body> {
        #[pin]
        body: Option<R>,
        due: Due,
        // What it ends with: trailers, or an error.
        last: Option<Last<R>>,
    }
}

/// An empty body: what other layers (tower-http's time-out) answer with.
impl<R: Body> Default for InvalidateBody<R> {
    fn default() -> Self {
        Self { body: None, due: Due::default(), last: None }
    }
}

impl<R: Body> InvalidateBody<R> {
    pub(super) fn untouched(body: R) -> Self {
        Self { body: Some(body), due: Due::default(), last: None }
    }

    /// Invalidates once more when it is over.
    pub(super) fn watched(body: R, due: Due) -> Self {
        Self { body: Some(body), due, last: None }
    }
}

impl<R: Body<Data = Bytes>> Body for InvalidateBody<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let mut this = self.project();
        if let Some(body) = this.body.as_mut().as_pin_mut() {
            match ready!(body.poll_frame(cx)) {
                Some(Ok(frame)) if !frame.is_trailers() => return Poll::Ready(Some(Ok(frame))),
                // After any of these nobody may ask again.
                last => *this.last = last,
            }
            this.body.set(None);
            this.due.fire();
        }
        ready!(this.due.poll_done(cx));
        Poll::Ready(this.last.take())
    }

    fn is_end_stream(&self) -> bool {
        self.due.is_done() && self.last.is_none() && self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}
