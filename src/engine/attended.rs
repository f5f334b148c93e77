//! A load that is polled by the request that it is for, or an invalidation by the code that wants it: no task is made of it, and
//! no other thread woken, while its client is there and waits. When he goes, or has his reply, what is left of it goes on in a
//! task of its own.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{runtime::Handle, sync::oneshot};
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{Instrument, Span};

use super::Engine;

/// Ends with the reply of a load. Dropped before, it lets the load go on.
pub(crate) struct Attended<T> {
    load: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    reply: oneshot::Receiver<T>,
    engine: Arc<Engine>,
    /// Where it goes on; who drops it may be elsewhere.
    runtime: Option<Handle>,
    span: Span,
    /// A drain waits for it.
    _counted: TaskTrackerToken,
}

impl Engine {
    /// Polls this load for whoever waits for its reply.
    pub(crate) fn attend<T>(
        self: &Arc<Self>,
        load: impl Future<Output = ()> + Send + 'static,
        reply: oneshot::Receiver<T>,
    ) -> Attended<T> {
        Attended {
            load: Some(Box::pin(load)),
            reply,
            engine: self.clone(),
            runtime: Handle::try_current().ok(),
            span: Span::current(),
            _counted: self.tasks.token(),
        }
    }

    /// Does this for whoever waits for it, and once begun also when nobody does any more.
    pub(crate) async fn anyway<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let (reply, replied) = oneshot::channel();
        let work = async move {
            // Who has gone does not want it.
            let _ = reply.send(work.await);
        };
        self.attend(work, replied).await
    }
}

impl<T> Attended<T> {
    /// Leaves what is left of it to a task.
    fn let_go(&mut self) {
        if let (Some(load), Some(runtime)) = (self.load.take(), &self.runtime) {
            self.engine.spawn_on(load.instrument(self.span.clone()), runtime);
        }
    }
}

impl<T> Future for Attended<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // Taken out: what panics is not polled again by anybody.
        if let Some(mut load) = self.load.take()
            && load.as_mut().poll(cx).is_pending()
        {
            self.load = Some(load);
        }
        match Pin::new(&mut self.reply).poll(cx) {
            Poll::Ready(Ok(reply)) => {
                self.let_go();
                Poll::Ready(reply)
            }
            // It went down with its runtime.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

impl<T> Drop for Attended<T> {
    fn drop(&mut self) {
        self.let_go();
    }
}
