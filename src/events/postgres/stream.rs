//! The connection that reads the log.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use pgwire_replication::{Lsn, ReplicationClient, ReplicationConfig, ReplicationEvent};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};

use super::{
    control::Control,
    failed::{Failed, within},
    place::Place,
    settings::Settings,
};

const WHAT: &str = "reading the log";

/// Holds the fleet's slot, until it is dropped, or the ordinary connection ends: a server that is told to stop ends that one, and
/// waits for who reads its log, which may be busy elsewhere.
pub(super) struct Stream {
    session: Arc<Mutex<Session>>,
    /// Which server it is, and how far its log went when this began.
    pub(super) place: Place,
    /// When something was last heard of it.
    heard: Instant,
    timeout: Duration,
}

/// The connection, while there is one.
struct Session(Option<ReplicationClient>);

impl Session {
    /// At once: to end in good order, the other side would have to answer.
    fn end(&mut self) {
        if let Some(mut client) = self.0.take() {
            client.abort();
        }
    }

    async fn begin(&mut self, config: ReplicationConfig) -> pgwire_replication::Result<Place> {
        let client = self.0.insert(ReplicationClient::connect_gated(config).await?);
        let system = client.identify_system().await?;
        client.start().await?;
        client.wait_started().await?;
        Ok(Place { system: system.system_id, timeline: system.timeline, lsn: system.xlogpos })
    }

    async fn next(&mut self) -> Result<ReplicationEvent, Failed> {
        let ended = || Failed::new(WHAT, "the connection has ended");
        let received = self.0.as_mut().ok_or_else(ended)?.recv().await;
        received.map_err(|e| Failed::stream(WHAT, &e))?.ok_or_else(ended)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // If it is locked, it is being ended.
        if let Ok(mut session) = self.session.try_lock() {
            session.end();
        }
    }
}

impl Stream {
    /// Begins where the slot does, at the server that the ordinary connection is with.
    pub(super) async fn open(settings: &Settings, control: &Control) -> Result<Self, Failed> {
        const WHAT: &str = "connecting to read the log";
        let mut session = Session(None);
        let place = within(settings.timeout, WHAT, async {
            let begun = session.begin(settings.replication(&control.host, control.port)).await;
            begun.map_err(|e| Failed::stream(WHAT, &e))
        });
        let (place, session) = (place.await?, Arc::new(Mutex::new(session)));
        let (closed, ends) = (control.closed(), session.clone());
        tokio::spawn(async move {
            closed.await;
            ends.lock().await.end();
        });
        Ok(Self { session, place, heard: Instant::now(), timeout: settings.timeout })
    }

    /// What comes next. It may be dropped, and has lost nothing.
    pub(super) async fn next(&mut self) -> Result<ReplicationEvent, Failed> {
        let silent = self.heard + self.timeout;
        // What waits is taken first, however long nobody has asked.
        let received = timeout_at(silent, async { self.session.lock().await.next().await }).await;
        let silence = || Failed::new(WHAT, format!("nothing has come for {:?}", self.timeout));
        let received = received.map_err(|_| silence())?;
        self.heard = Instant::now();
        received
    }

    /// What has come already.
    pub(super) fn ready(&mut self) -> Option<Result<ReplicationEvent, Failed>> {
        let received = self.session.try_lock().ok()?.next().now_or_never()?;
        self.heard = Instant::now();
        Some(received)
    }

    /// Tells the server that nothing up to here is needed any more.
    pub(super) fn acknowledge(&self, to: Lsn) {
        if let Ok(session) = self.session.try_lock()
            && let Some(client) = &session.0
        {
            client.update_applied_lsn(to);
        }
    }
}
