//! Single flight across processes.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Engine,
    flight::Landed,
    leader::Leader,
    lookup::{Begin, Validity, validity},
};
use crate::{key::Tag, store::Lookup};

/// How long a process may load a key for the fleet before others do as well.
const CLAIM: Duration = Duration::from_secs(3);

/// Pauses between two looks at whether the claim is free.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));

impl Engine {
    /// Leads for the fleet, or waits until the process that does has stored its entry.
    pub(super) async fn lead_fleet(&self, mut leader: Leader, tags: &[Tag]) -> Begin {
        let flight = leader.flight.clone();
        let asked = flight.tags();
        let start = Instant::now();
        let mut pause = PAUSES.0;
        // With something to serve meanwhile there is no need to wait: whoever has the claim refreshes it.
        let meanwhile = leader.stale.clone().filter(|stale| stale.serves_meanwhile(self.now()));
        loop {
            match self.store.claim(&leader.key, CLAIM).await {
                Ok(true) => leader.claimed = true,
                Ok(false) if meanwhile.is_some() => {
                    if let Some(stale) = meanwhile {
                        return Begin::Hit(stale.entry);
                    }
                }
                Ok(false) if start.elapsed() < CLAIM => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                // Unreachable, or held for too long by a process that may be dead.
                Ok(false) | Err(_) => return Begin::Lead(leader),
            }
            // Also after claiming: the last holder may have stored its entry just before.
            let found = self.store.lookup(self.inquiry(&leader.key, asked, tags.len(), &leader.policy)).await;
            if let Ok(Lookup { entry: Some(entry), generations, .. }) = found {
                let valid = matches!(validity(&entry, tags, asked, &generations), Validity::Valid);
                if valid && entry.is_fresh(self.now()) {
                    leader.land(Landed::Done(entry.clone()));
                    return Begin::Collapsed(entry);
                }
            }
            if leader.claimed {
                return Begin::Lead(leader);
            }
        }
    }
}
