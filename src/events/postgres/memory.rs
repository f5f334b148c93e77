//! What the fleet remembers of how far it has read.

use pgwire_replication::Lsn;

use super::{failed::Failed, place::Place};
use crate::events::Notes;

/// In the fleet's notes, and in this process, in case that those are lost.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) notes: Option<Notes>,
    own: Option<Place>,
}

impl Memory {
    /// All that is known, of the fleet or of this process: each is true.
    pub(super) async fn read(notes: Option<&Notes>) -> Result<Option<Place>, Failed> {
        let Some(notes) = notes else { return Ok(None) };
        let note = notes.read().await.map_err(|e| Failed::new("reading the fleet's note", e.to_string()))?;
        Ok(note.and_then(|note| str::from_utf8(&note).ok()?.parse().ok()))
    }

    pub(super) async fn write(&mut self, place: Place) -> Result<(), Failed> {
        if let Some(notes) = &self.notes {
            let written = notes.write(place.to_string().as_bytes()).await;
            written.map_err(|e| Failed::new("writing the fleet's note", e.to_string()))?;
        }
        self.own = Some(place);
        Ok(())
    }

    pub(super) fn own(&self) -> Option<&Place> {
        self.own.as_ref()
    }
}

/// Why events may have been missed before `start`, where a slot goes on while the log ends at `end`: unless one of those who
/// remember can say that none were.
pub(super) fn gap(remembered: [Option<Place>; 2], start: &Place, end: Lsn) -> Option<&'static str> {
    let mut gap = Some("it is not known how far was read before");
    for place in remembered.into_iter().flatten() {
        gap = Some(place.gap(start, end)?);
    }
    gap
}
