//! Bodies of requests that are read to know what they ask for.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::reading::joined;

/// What a frame takes besides its bytes.
const FRAME_SIZE: usize = 64;

/// The body of a request that was read to know what it asks for: what was read of it, and the rest.
pub struct RequestBody<B: Body> {
    read: VecDeque<Result<Frame<Bytes>, B::Error>>,
    rest: Option<Pin<Box<B>>>,
}

// Nothing in it is pinned but the box.
impl<B: Body> Unpin for RequestBody<B> {}

impl<B: Body<Data = Bytes>> RequestBody<B> {
    pub(crate) fn passing(body: B) -> Self {
        Self { read: VecDeque::new(), rest: Some(Box::pin(body)) }
    }

    /// Reads a body, to its end if that comes before the limit.
    pub(crate) async fn read(body: B, limit: usize) -> Self {
        let mut this = Self::passing(body);
        let mut size = 0;
        while let Some(rest) = &mut this.rest {
            let frame = poll_fn(|cx| rest.as_mut().poll_frame(cx)).await;
            match frame {
                None => this.rest = None,
                Some(frame) => {
                    let is_error = frame.is_err();
                    // Empty ones, and many small ones, take room as well.
                    size += frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, Bytes::len) + FRAME_SIZE;
                    this.read.push_back(frame);
                    if is_error || size > limit {
                        break;
                    }
                }
            }
        }
        this
    }

    /// The whole body, if it was read to its end, and had nothing else.
    pub(crate) fn whole(&self) -> Option<Bytes> {
        if self.rest.is_some() {
            return None;
        }
        let data = self.read.iter().map(|frame| frame.as_ref().ok()?.data_ref().cloned());
        let data = data.collect::<Option<Vec<_>>>()?;
        match &data[..] {
            [one] => Some(one.clone()),
            many => Some(joined(many, many.iter().map(Bytes::len).sum())),
        }
    }
}

impl<B: Body<Data = Bytes>> Body for RequestBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(frame) = self.read.pop_front() {
            return Poll::Ready(Some(frame));
        }
        match &mut self.rest {
            None => Poll::Ready(None),
            Some(rest) => rest.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.rest {
            Some(rest) if self.read.is_empty() => rest.size_hint(),
            _ => SizeHint::default(),
        }
    }
}

/// How a layer reads the bodies of requests. Sealed.
pub trait ReadBody<B>: private::Sealed + Clone + Send + Sync + 'static {
    /// The whole of it, if it has an end before the limit, and a body that says the same.
    #[doc(hidden)]
    fn read(&self, body: B, limit: usize) -> impl Future<Output = (Option<Bytes>, B)> + Send;
}

mod private {
    pub trait Sealed {}
    impl Sealed for super::NoBodies {}
    impl<F> Sealed for super::Bodies<F> {}
}

/// Bodies of requests are not read.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBodies;

impl<B: Send> ReadBody<B> for NoBodies {
    async fn read(&self, body: B, _: usize) -> (Option<Bytes>, B) {
        (None, body)
    }
}

/// Bodies of requests are read, and made anew by this.
#[derive(Clone, Copy)]
pub struct Bodies<F>(pub(crate) F);

impl<F> std::fmt::Debug for Bodies<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bodies")
    }
}

impl<B, F> ReadBody<B> for Bodies<F>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Send,
    F: Fn(RequestBody<B>) -> B + Clone + Send + Sync + 'static,
{
    async fn read(&self, body: B, limit: usize) -> (Option<Bytes>, B) {
        let read = RequestBody::read(body, limit).await;
        (read.whole(), (self.0)(read))
    }
}
