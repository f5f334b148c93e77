//! Whether what was given can be seen yet.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{control::Control, failed::Failed, kept::Kept, place::Place, settings::Settings};

/// How long is waited between two looks, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// Transactions whose changes may not be seen yet, by whoever looks at their server.
pub(super) struct Sight {
    settings: Arc<Settings>,
    place: Place,
    xids: Vec<u32>,
    control: Option<Control>,
    looking: Kept<(Control, bool)>,
}

impl Sight {
    pub(super) fn new(settings: Arc<Settings>, control: Control, place: Place, xids: Vec<u32>) -> Self {
        Self { settings, place, xids, control: Some(control), looking: Kept::default() }
    }

    /// Waits until they are. It may be dropped, or fail, and be called again: it connects anew then.
    pub(super) async fn visible(&mut self) -> Result<(), Failed> {
        let mut pause = PAUSES.0;
        while !self.look().await? {
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
        Ok(())
    }

    async fn look(&mut self) -> Result<bool, Failed> {
        if !self.looking.has_begun() {
            let (control, settings) = (self.control.take(), self.settings.clone());
            self.looking.begin(look(control, settings, self.place.clone(), self.xids.clone()));
        }
        let (control, is_visible) = self.looking.end().await?;
        self.control = Some(control);
        Ok(is_visible)
    }
}

async fn look(
    control: Option<Control>,
    settings: Arc<Settings>,
    place: Place,
    xids: Vec<u32>,
) -> Result<(Control, bool), Failed> {
    let control = match control {
        Some(control) => control,
        None => {
            let control = Control::connect(&settings).await?;
            // Another server's transactions are others: what happened to it is found out by who reads its log.
            if !control.clone().flushed(false).await?.place.is_history_of(&place) {
                return Ok((control, true));
            }
            control
        }
    };
    let snapshot = control.snapshot().await?;
    let is_visible = xids.iter().all(|xid| snapshot.sees(*xid));
    Ok((control, is_visible))
}
