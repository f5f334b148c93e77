//! A request that a test sends: its body, and whether it only reads.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Request;
use http_body::{Frame, SizeHint};

/// The body of a request that [`Twin`](super::Twin) sends: all of it, at once.
#[derive(Clone, Debug, Default)]
pub struct Body(Bytes);

impl Body {
    /// All of it, for a service that takes bodies of another type:
    /// `service.map_request(|request: Request<Body>| request.map(|body| Full::new(body.into_bytes())))`.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(bytes)
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = std::mem::take(&mut self.0);
        Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

/// In the extensions of a request: it only reads, whatever its method, and is sent to both twins. (What [`Requests`](super::Requests)
/// makes of a route has it.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOnly;

/// Whether a request changes nothing.
pub(super) fn is_read(request: &Request<Bytes>) -> bool {
    let by_method = request.method().is_safe() || request.method().as_str() == "QUERY";
    by_method || request.extensions().get::<ReadOnly>().is_some()
}
