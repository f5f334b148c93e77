//! What is stored and not fresh, or not wanted; and how often a request has tried.

use std::sync::Arc;

use crate::{catalog::Policy, clock::Millis, store::Entry};

/// How often a request has tried.
#[derive(Clone, Copy, Default)]
pub(crate) struct Attempt {
    /// Flights it joined that failed.
    pub(crate) failures: u32,
    /// It neither waits for others nor lets them wait.
    pub(crate) alone: bool,
    /// What is stored is of no use to it, and is to be replaced.
    pub(crate) reload: bool,
    /// What was made then is not good enough.
    pub(crate) lacking: Option<Millis>,
    /// What is stored is good, and is to be replaced, unless somebody does so already.
    pub(crate) refresh: bool,
}

impl Attempt {
    /// Whether an entry is not the one that was not good enough.
    pub(super) fn takes(&self, entry: &Entry) -> bool {
        self.lacking.is_none_or(|made| entry.created > made)
    }
}

/// What is stored and not fresh, and may still be of use.
#[derive(Clone)]
pub(crate) struct Stale {
    pub(crate) entry: Arc<Entry>,
    /// A write has made it stale, not just time.
    pub(crate) invalidated: bool,
}

impl Stale {
    /// Whether to serve it while it is refreshed.
    pub(crate) fn serves_meanwhile(&self, now: Millis) -> bool {
        !self.invalidated && now < self.entry.refresh_until
    }

    /// Whether to serve it when the origin fails.
    pub(crate) fn serves_on_error(&self, now: Millis, policy: &Policy) -> bool {
        now < self.entry.on_error_until && (!self.invalidated || policy.serve_invalidated_on_error)
    }

    /// Whether it was good until its time was over.
    pub(crate) fn has_expired(&self, now: Millis) -> bool {
        !self.invalidated && !self.entry.is_fresh(now)
    }

    /// Whether it is not stale at all, and what the request is after.
    pub(super) fn answers(&self, now: Millis, attempt: Attempt) -> bool {
        let is_wanted = attempt.takes(&self.entry) && !attempt.reload && !attempt.refresh;
        !self.invalidated && self.entry.is_fresh(now) && is_wanted
    }
}
