//! The body of a response of gRPC, whose trailers wait.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::status::{is_refusal, is_success};
use crate::layer::{
    body::CacheBody,
    core::Core,
    writing::{Due, Writing},
};

pin_project! {
    /// The response body of [`Grpc`](crate::Grpc). That of a mutation holds its trailers, which say whether it was a
    /// success, until the invalidation is done.
    pub struct GrpcResponseBody<R: Body> {
        #[pin]
        body: CacheBody<R>,
        write: Option<Write>,
        // What the body of a mutation broke with.
        error: Option<R::Error>,
    }
}

/// A mutation whose trailers are still to come.
struct Write {
    core: Arc<Core>,
    due: Due,
    held: Option<HeaderMap>,
    refused: bool,
}

/// An empty body: what other layers (tower-http's time-out) answer with.
impl<R: Body> Default for GrpcResponseBody<R> {
    fn default() -> Self {
        Self { body: CacheBody::default(), write: None, error: None }
    }
}

impl<R: Body> GrpcResponseBody<R> {
    pub(super) fn untouched(body: CacheBody<R>) -> Self {
        Self { body, write: None, error: None }
    }

    /// Invalidates when the trailers say that it was a success, or don't say that it was none.
    pub(super) fn until_trailers(body: CacheBody<R>, core: Arc<Core>, writing: Writing) -> Self {
        let write = Write { core, due: Due::arm(writing), held: None, refused: false };
        Self { body, write: Some(write), error: None }
    }
}

impl Write {
    /// Takes the trailers; whether they may go at once, since nothing is to be invalidated.
    fn hold(&mut self, trailers: HeaderMap) -> Option<HeaderMap> {
        self.refused = is_refusal(&trailers);
        let is_idle = self.due.writing().is_none_or(|writing| {
            let stays = self.refused || is_success(&trailers) && writing.changes.says_nothing();
            let stays = stays && writing.is_silent() || writing.is_idle();
            stays && !writing.is_fenced()
        });
        if is_idle {
            self.due.take();
            return Some(trailers);
        }
        self.held = Some(trailers);
        self.due.fire();
        None
    }

    /// Until the invalidation is done: the trailers, with its report.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<Option<HeaderMap>> {
        let report = ready!(self.due.poll_done(cx));
        let mut trailers = self.held.take();
        if let (Some(report), Some(trailers), false) = (report, &mut trailers, self.refused) {
            Writing::report(&self.core, &report, trailers);
        }
        Poll::Ready(trailers)
    }
}

impl<R: Body<Data = Bytes>> Body for GrpcResponseBody<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.project();
        let Some(write) = this.write else { return this.body.poll_frame(cx) };
        if write.due.is_running() {
            let trailers = ready!(write.poll_held(cx)).map(|trailers| Ok(Frame::trailers(trailers)));
            return Poll::Ready(trailers.or_else(|| this.error.take().map(Err)));
        }
        match ready!(this.body.poll_frame(cx)) {
            Some(Ok(frame)) if frame.is_trailers() => {
                let Ok(trailers) = frame.into_trailers() else { return Poll::Ready(None) };
                if let Some(trailers) = write.hold(trailers) {
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                write.poll_held(cx).map(|trailers| trailers.map(|t| Ok(Frame::trailers(t))))
            }
            None => {
                write.due.fire();
                write.poll_held(cx).map(|_| None)
            }
            Some(Err(error)) => {
                write.due.fire();
                *this.error = Some(error);
                ready!(write.poll_held(cx));
                Poll::Ready(this.error.take().map(Err))
            }
            frame => Poll::Ready(frame),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.write.as_ref().is_none_or(|write| write.due.is_done()) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.write {
            // An exact size would become a `content-length`, after which there is no room for trailers.
            Some(_) => SizeHint::new(),
            None => self.body.size_hint(),
        }
    }
}
