//! Work that goes on where it was, when whoever waited for it has gone.

use std::{future::poll_fn, pin::Pin};

use super::failed::Failed;

type Work<T> = Pin<Box<dyn Future<Output = Result<T, Failed>> + Send>>;

/// Work that has begun, if any has.
pub(super) struct Kept<T>(Option<Work<T>>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Kept<T> {
    pub(super) fn has_begun(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn begin(&mut self, work: impl Future<Output = Result<T, Failed>> + Send + 'static) {
        self.0 = Some(Box::pin(work));
    }

    /// Waits for its end; without any it never comes.
    pub(super) async fn end(&mut self) -> Result<T, Failed> {
        let result = poll_fn(|cx| match &mut self.0 {
            Some(work) => work.as_mut().poll(cx),
            None => std::task::Poll::Pending,
        })
        .await;
        self.0 = None;
        result
    }
}
