//! What a region knows of another.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::Deserialize;
use tokio::time::Instant;

use crate::{
    clock::Moment,
    store::{RedisStore, RegionUsage},
};

/// When a write is acknowledged.
///
/// In a file: `wait = "local"` or `"all"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Wait {
    /// When its own region has dropped what it makes stale; the others do so soon after (the default).
    #[default]
    Local,
    /// When all regions have, or a second is over.
    All,
}

pub(super) struct Shared {
    pub(super) local: RedisStore,
    pub(super) name: String,
    pub(super) peers: Vec<(Arc<Peer>, String)>,
    pub(super) hold: Duration,
    pub(super) wait: Wait,
    /// Whether its tasks run.
    pub(super) runs: Arc<AtomicBool>,
}

/// Another region.
pub(super) struct Peer {
    pub(super) name: String,
    known: Mutex<Known>,
    /// What it has dropped may have been missed: nothing is read.
    torn: AtomicBool,
    dropped: AtomicU64,
    gaps: AtomicU64,
}

#[derive(Default)]
struct Known {
    /// Everything that it had dropped before is dropped here.
    proven: Option<Moment>,
    has_begun: bool,
    trouble: Option<String>,
}

impl Peer {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn prove(&self, at: Instant) {
        let mut known = self.known();
        if known.trouble.take().is_some() {
            tracing::info!(region = self.name, "the region is heard again");
        }
        known.has_begun = true;
        known.proven = known.proven.max(Some(Moment::of(at)));
    }

    pub(super) fn trouble(&self, why: String) {
        let mut known = self.known();
        if known.trouble.is_none() {
            tracing::warn!(region = self.name, why, "a region is not heard");
        }
        known.trouble = Some(why);
    }

    /// What it drops may have been missed; whether this process is the one that drops everything then.
    pub(super) fn tear(&self, why: &str, is_ours: bool) {
        self.torn.store(true, Ordering::Release);
        let mut known = self.known();
        known.proven = None;
        if !is_ours {
            return;
        }
        self.gaps.fetch_add(1, Ordering::Relaxed);
        match std::mem::replace(&mut known.has_begun, true) {
            // Nothing was missed that was promised.
            false => tracing::info!(region = self.name, why, "a region is followed: everything is dropped"),
            true => tracing::warn!(
                region = self.name,
                why,
                "what a region drops may have been missed: everything is dropped"
            ),
        }
    }

    pub(super) fn mend(&self) {
        self.torn.store(false, Ordering::Release);
    }

    pub(super) fn count(&self, more: u64) {
        self.dropped.fetch_add(more, Ordering::Relaxed);
    }

    /// By whom is held what it drops: the same in all processes, and nobody else.
    pub(super) fn writer(&self) -> u128 {
        (1 << 64) | u128::from(crc32fast::hash(self.name.as_bytes()))
    }

    pub(super) fn behind(&self) -> Duration {
        self.known().proven.map_or(Duration::MAX, Moment::elapsed)
    }
}

impl Peer {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            known: Mutex::default(),
            torn: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            gaps: AtomicU64::new(0),
        }
    }

    pub(super) fn is_torn(&self) -> bool {
        self.torn.load(Ordering::Acquire)
    }

    /// Why it is not heard.
    pub(super) fn why(&self) -> Option<String> {
        self.known().trouble.clone()
    }

    pub(super) fn usage(&self) -> RegionUsage {
        RegionUsage {
            name: self.name.clone(),
            behind: Some(self.behind()).filter(|behind| *behind < Duration::MAX),
            trouble: self.why(),
            dropped: self.dropped.load(Ordering::Relaxed),
            gaps: self.gaps.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_region_is_told() {
        let peer = Peer::new("us".to_owned());
        assert_eq!((peer.behind(), peer.usage().behind, peer.why()), (Duration::MAX, None, None), "it was never heard");
        peer.trouble("no answer".to_owned());
        assert_eq!((peer.why(), peer.usage().trouble), (Some("no answer".to_owned()), Some("no answer".to_owned())));
        let ago = Duration::from_secs(5);
        peer.prove(Instant::now() - ago);
        assert!(
            peer.why().is_none() && peer.behind() >= ago && peer.usage().behind.is_some_and(|behind| behind >= ago)
        );
        peer.tear("it was trimmed", true);
        assert!(peer.is_torn() && peer.behind() == Duration::MAX && peer.usage().gaps == 1);
        peer.mend();
        assert!(!peer.is_torn());
    }

    /// A fence that one region holds is lifted by no other, nor by a writer of this one.
    #[test]
    fn each_region_holds_for_itself() {
        let [us, ap] = ["us", "ap"].map(|name| Peer::new(name.to_owned()).writer());
        assert!(us != ap && us == Peer::new("us".to_owned()).writer() && us > u128::from(u64::MAX));
    }
}
