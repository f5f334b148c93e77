//! Another process reads the log; this one knows how far, and takes over.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    control::Control,
    failed::{Failed, within},
    memory::Memory,
    place::Place,
    proofs::Proofs,
    settings::Settings,
};
use crate::events::{Notes, Received};

/// How often the fleet's note is read.
const LOOK: Duration = Duration::from_millis(50);

/// After so long without a proof it is said.
const STRANGE: Duration = Duration::from_secs(30);

pub(super) struct Standby {
    settings: Arc<Settings>,
    control: Control,
    notes: Option<Notes>,
    proofs: Proofs,
    /// When the other was last known to read.
    proved: Instant,
    has_warned: bool,
}

impl Standby {
    pub(super) fn new(settings: Arc<Settings>, control: Control, notes: Option<Notes>) -> Self {
        Self { settings, control, notes, proofs: Proofs::new(false), proved: Instant::now(), has_warned: false }
    }

    /// A proof, or nothing if nobody reads the slot any more. It may be dropped.
    ///
    /// What was read is told by the fleet's note and not by the slot, which may have been made anew by whoever reads, and be
    /// ahead of what has been dropped.
    pub(super) async fn next(&mut self) -> Result<Option<Received>, Failed> {
        loop {
            let is_awaited = self.proofs.is_awaited();
            tokio::select! {
                flushed = self.proofs.ask(&self.control) => if !flushed?.is_read {
                    return Ok(None);
                },
                noted = noted(&self.settings, self.notes.as_ref(), is_awaited) => {
                    if let Some(at) = noted?.and_then(|place| self.proofs.reached(&place)) {
                        (self.proved, self.has_warned) = (Instant::now(), false);
                        return Ok(Some(Received::Proof(at)));
                    }
                }
            }
            self.warn();
        }
    }

    fn warn(&mut self) {
        if !self.has_warned && self.proved.elapsed() > STRANGE {
            self.has_warned = true;
            tracing::warn!(
                slot = self.settings.slot,
                "another process reads the slot, and this fleet's notes do not say how far: is it of another service?"
            );
        }
    }
}

/// How far the fleet has read, a moment later; only if somebody waits to know it.
async fn noted(settings: &Settings, notes: Option<&Notes>, is_awaited: bool) -> Result<Option<Place>, Failed> {
    if !is_awaited {
        return std::future::pending().await;
    }
    sleep(LOOK).await;
    within(settings.timeout, "reading the fleet's note", Memory::read(notes)).await
}
