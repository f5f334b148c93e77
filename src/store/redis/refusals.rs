//! What a server refuses of what requests ask of it, although its heartbeats are in order: a right to some keys, say. Nothing
//! is stored then, and nobody would hear of it.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::trouble::Trouble;
use crate::clock::Millis;

/// What was refused is said for so long at least: a server that refuses one request in two is not well again each time.
const CALM: Millis = 1_000;

/// After so long without any request nobody knows.
const FORGOTTEN: Millis = 60_000;

/// What requests ask of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// A look-up.
    Read,
    /// The generations that a load begins under.
    Open,
    /// An entry.
    Fill,
    /// Who loads, for the whole fleet.
    Claim,
    /// What others see to: an invalidation goes to the journal.
    Other,
}

#[derive(Debug)]
struct Refusal {
    trouble: Trouble,
    at: Millis,
    /// The same has been done since.
    is_over: bool,
}

/// What was refused of late, by step.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    any: AtomicBool,
    known: Mutex<BTreeMap<Step, Refusal>>,
}

impl Refusals {
    fn known(&self) -> MutexGuard<'_, BTreeMap<Step, Refusal>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn refused(&self, step: Step, trouble: &Trouble, at: Millis) {
        if step != Step::Other && trouble.is_refusal() && !trouble.passes() {
            self.known().insert(step, Refusal { trouble: trouble.clone(), at, is_over: false });
            self.any.store(true, Ordering::Release);
        }
    }

    /// One relaxed load where nothing was refused.
    pub(super) fn done(&self, step: Step) {
        if self.any.load(Ordering::Relaxed)
            && let Some(refusal) = self.known().get_mut(&step)
        {
            refusal.is_over = true;
        }
    }

    /// A heartbeat has found the same or worse, and will find out when that is over.
    pub(super) fn forget(&self) {
        self.known().clear();
        self.any.store(false, Ordering::Release);
    }

    /// What is refused now.
    pub(super) fn now(&self, now: Millis) -> Option<Trouble> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut known = self.known();
        known.retain(|_, refusal| {
            let since = now.saturating_sub(refusal.at);
            since < CALM || (!refusal.is_over && since < FORGOTTEN)
        });
        self.any.store(!known.is_empty(), Ordering::Release);
        known.values().next().map(|refusal| refusal.trouble.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_known_until_it_is_done() {
        let (refusals, no) = (Refusals::default(), Trouble::new("NOPERM", "no"));
        refusals.refused(Step::Fill, &no, 10);
        refusals.done(Step::Open);
        assert_eq!(refusals.now(FORGOTTEN), Some(no.clone()));
        assert_eq!(refusals.now(FORGOTTEN), Some(no.clone()), "until then");
        refusals.done(Step::Fill);
        assert_eq!(refusals.now(FORGOTTEN), None);
        refusals.refused(Step::Fill, &no, 10);
        refusals.done(Step::Fill);
        assert_eq!((refusals.now(CALM), refusals.now(10 + CALM)), (Some(no.clone()), None));
        refusals.refused(Step::Open, &no, 10);
        assert_eq!(refusals.now(10 + FORGOTTEN), None, "nobody has asked for long");
        refusals.refused(Step::Open, &no, 10);
        refusals.forget();
        assert_eq!(refusals.now(10), None);
    }

    #[test]
    fn what_passes_by_itself_is_no_refusal() {
        let refusals = Refusals::default();
        for code in ["MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "LOADING"] {
            refusals.refused(Step::Open, &Trouble::new(code, ""), 1);
        }
        refusals.refused(Step::Other, &Trouble::new("NOPERM", ""), 1);
        assert_eq!(refusals.now(1), None);
    }
}
