//! What is popular is loaded before it is asked for: at start, before it ends, and after a write has dropped it. (Feature `warm`.)

mod job;
mod list;
mod options;

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tower_service::Service;

use crate::{Cache, error::ConfigError, layer::Sampler};
use job::{Command, Job, MINUTE, asker};
pub use options::Warm;

/// A cache that is [warmed](Cache::warm), until it is [stopped](Self::stop); also when this is dropped.
#[derive(Clone, Debug)]
pub struct Warming(mpsc::Sender<Command>);

impl Warming {
    /// Writes the list down now: to be awaited at shutdown, for the process that is started next.
    pub async fn save(&self) {
        let (done, is_done) = oneshot::channel();
        if self.0.send(Command::Save(done)).await.is_ok() {
            let _ = is_done.await;
        }
    }

    /// Warms it no longer. The job holds the service, and so the cache: without this it goes on for as long as its runtime.
    pub async fn stop(&self) {
        let _ = self.0.send(Command::Stop).await;
        self.0.closed().await;
    }
}

impl Cache {
    /// Keeps what is popular warm, from now on and until it is [stopped](Warming::stop): asks it of `service` before anybody does. That is the
    /// whole service, with the cache's layers around it, so that all that is true of other requests is true of these; `body` makes the
    /// body of a request. (Feature `warm`.)
    ///
    /// - What is popular is found in a sample of requests. Never any with credentials, nor what is a user's own.
    /// - At start what was popular before is loaded, from the list that the fleet keeps ([`warmed`](Self::warmed) waits for that);
    ///   then what is about to end is replaced, as by [`early_refresh`](crate::DataType::early_refresh); and what a write of this
    ///   process has dropped is loaded at once, so that its next reader need not.
    /// - They are not counted as requests.
    ///
    /// # Errors
    /// What makes no sense; it is warmed already; there is no runtime.
    pub fn warm<S, B, R, F>(&self, service: S, body: F, warm: Warm) -> Result<Warming, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        S::Future: Send,
        F: Fn(Bytes) -> B + Send + Sync + 'static,
        B: Send + 'static,
        R: Body<Data: Send> + Send + 'static,
    {
        warm.check()?;
        let no_runtime = |_| ConfigError::new("warm: there is no runtime to do it in; call it within one");
        let runtime = Handle::try_current().map_err(no_runtime)?;
        let (sampler, sightings) = Sampler::new(warm.sample);
        if self.0.sampler.set(sampler).is_err() {
            return Err(ConfigError::new("warm: this cache is warmed already; call it once"));
        }
        let (tx, commands) = mpsc::channel(4);
        let asks = asker(service, body);
        runtime.spawn(Job::new(Arc::downgrade(&self.0), warm, asks).run(sightings, commands));
        Ok(Warming(tx))
    }

    /// Waits until what was popular before has been loaded, or was tried, for a minute at most: for a deployment's readiness. Without
    /// [`warm`](Self::warm) it does not wait. (Feature `warm`.)
    pub async fn warmed(&self) {
        let Some(sampler) = self.0.sampler.get() else { return };
        let mut warmed = sampler.state.warmed.subscribe();
        // Nobody waits longer, as in the job: its runtime may have ended before it began.
        let _ = tokio::time::timeout(MINUTE, warmed.wait_for(|warmed| *warmed)).await;
    }
}
