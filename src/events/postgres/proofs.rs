//! How it is known that everything up to some time has been read.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{
    control::{Control, Flushed},
    failed::Failed,
    kept::Kept,
    place::Place,
};

/// How often the server is asked how long its log is.
const BEAT: Duration = Duration::from_millis(250);

/// Where the log ended a moment ago: what was committed before is proved to have been read when that is reached.
pub(super) struct Proofs {
    asked: Instant,
    asking: Kept<Flushed>,
    /// The oldest that is not reached yet.
    awaited: Option<Flushed>,
    /// Has the log end behind a whole record, if what is awaited does not come.
    pushes: bool,
}

impl Proofs {
    pub(super) fn new(pushes: bool) -> Self {
        let asked = Instant::now();
        Self { asked: asked.checked_sub(BEAT).unwrap_or(asked), asking: Kept::default(), awaited: None, pushes }
    }

    /// Asks, a beat after it did last, and gives the answer. It may be dropped, and goes on where it was.
    pub(super) async fn ask(&mut self, control: &Control) -> Result<Flushed, Failed> {
        if !self.asking.has_begun() {
            sleep_until(self.asked + BEAT).await;
            self.asked = Instant::now();
            // What has not been reached for a beat may be the middle of a record, which no one ends.
            self.asking.begin(control.clone().flushed(self.pushes && self.is_awaited()));
        }
        let flushed = self.asking.end().await?;
        self.awaited.get_or_insert_with(|| flushed.clone());
        Ok(flushed)
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.is_some()
    }

    /// Whether what is awaited is not after this place.
    pub(super) fn is_reached(&self, place: &Place) -> bool {
        let is_reached = |awaited: &Flushed| awaited.place.is_history_of(place) && awaited.place.lsn <= place.lsn;
        self.awaited.as_ref().is_some_and(is_reached)
    }

    /// At which time all had been committed that is proved by all having been read up to here, and be done with.
    pub(super) fn reached(&mut self, place: &Place) -> Option<Instant> {
        let is_reached = self.is_reached(place);
        self.awaited.take_if(|_| is_reached).map(|flushed| flushed.at)
    }
}
