//! A circuit breaker: while most calls fail, none is made, so that nobody waits for what is not there.
//!
//! A call that succeeds costs one relaxed atomic add and no look at the clock.

use std::time::Duration;

use crate::sync::{
    Instant,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

#[cfg(all(test, shuttle))]
mod interleavings;

/// Failures count for this long.
const WINDOW: Duration = Duration::from_secs(10);

/// With fewer calls than this in a window, their failures prove nothing.
const MIN_CALLS: u32 = 20;

/// How long it stays open at first; twice as long after each trial that fails.
const MIN_OPEN: Duration = Duration::from_secs(1);

/// And at most.
const MAX_OPEN: Duration = Duration::from_secs(5);

/// Opens when at least half of at least [`MIN_CALLS`] calls of a [`WINDOW`] fail; then one call at a time tries.
#[derive(Debug)]
pub(super) struct Breaker {
    start: Instant,
    /// Milliseconds after `start`.
    window: AtomicU64,
    calls: AtomicU32,
    failures: AtomicU32,
    /// Milliseconds after `start` until which it is open; 0 while it is closed.
    open_until: AtomicU64,
    open_for: AtomicU64,
    trying: AtomicBool,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            window: AtomicU64::new(0),
            calls: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            open_until: AtomicU64::new(0),
            open_for: AtomicU64::new(MIN_OPEN.as_millis() as u64),
            trying: AtomicBool::new(false),
        }
    }

    /// Whether calls are refused now. Once one may try, none is: a process that is asked for nothing is not ill for ever.
    pub(super) fn is_open(&self) -> bool {
        self.is_open_at(self.now())
    }

    fn is_open_at(&self, now: u64) -> bool {
        now < self.open_until.load(Ordering::Acquire) || self.trying.load(Ordering::Acquire)
    }

    /// Leave to make a call, unless it is open.
    pub(super) fn permit(&self) -> Option<Permit<'_>> {
        self.permit_at(|| self.now())
    }

    fn now(&self) -> u64 {
        // Never zero, which means closed.
        self.start.elapsed().as_millis() as u64 + 1
    }

    fn permit_at(&self, now: impl Fn() -> u64) -> Option<Permit<'_>> {
        let until = self.open_until.load(Ordering::Acquire);
        if until == 0 {
            return Some(Permit { breaker: self, is_trial: false });
        }
        if now() < until || self.trying.swap(true, Ordering::AcqRel) {
            return None;
        }
        let permit = Permit { breaker: self, is_trial: true };
        // Another trial may have ended since it looked.
        (self.open_until.load(Ordering::Acquire) == until).then_some(permit)
    }

    fn failed(&self, now: u64, is_trial: bool) {
        if is_trial {
            let longer = (self.open_for.load(Ordering::Relaxed) * 2).min(MAX_OPEN.as_millis() as u64);
            self.open_for.store(longer, Ordering::Relaxed);
            self.open_until.store(now + longer, Ordering::Release);
            return;
        }
        if now.saturating_sub(self.window.load(Ordering::Relaxed)) > WINDOW.as_millis() as u64 {
            self.window.store(now, Ordering::Relaxed);
            self.calls.store(0, Ordering::Relaxed);
            self.failures.store(0, Ordering::Relaxed);
        }
        let calls = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if calls >= MIN_CALLS && failures >= calls.div_ceil(2) {
            let until = now + self.open_for.load(Ordering::Relaxed);
            if self.open_until.swap(until, Ordering::AcqRel) == 0 {
                tracing::warn!(
                    calls,
                    failures,
                    "the circuit breaker opens: the store is too slow, serving from the origin"
                );
            }
        }
    }

    fn succeeded(&self, is_trial: bool) {
        if is_trial {
            self.calls.store(0, Ordering::Relaxed);
            self.failures.store(0, Ordering::Relaxed);
            self.open_for.store(MIN_OPEN.as_millis() as u64, Ordering::Relaxed);
            self.open_until.store(0, Ordering::Release);
            tracing::info!("the circuit breaker closes: the store answers in time");
        } else {
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Leave to make one call. Dropped without a word on how it went (its caller is gone), it proves nothing.
pub(super) struct Permit<'a> {
    breaker: &'a Breaker,
    is_trial: bool,
}

impl Permit<'_> {
    pub(super) fn succeeded(self) {
        self.breaker.succeeded(self.is_trial);
    }

    pub(super) fn failed(self) {
        self.breaker.failed(self.breaker.now(), self.is_trial);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.is_trial {
            self.breaker.trying.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Breaker {
        /// Makes a call at this time, if it may.
        fn call(&self, now: u64, works: bool) -> bool {
            let Some(permit) = self.permit_at(|| now) else { return false };
            match works {
                true => permit.succeeded(),
                false => permit.breaker.failed(now, permit.is_trial),
            }
            true
        }
    }

    #[test]
    fn it_opens_when_half_of_enough_calls_fail() {
        let breaker = Breaker::new();
        for i in 0..MIN_CALLS - 1 {
            assert!(breaker.call(100, i % 2 == 0));
        }
        assert!(breaker.call(100, false), "the last that it lets through");
        assert!(!breaker.call(100, true) && !breaker.call(1_099, true));
        assert!(breaker.call(1_100, true), "one tries, and finds that it works");
        assert!(breaker.call(1_100, false) && breaker.call(1_100, true));
    }

    /// By its own clock.
    #[tokio::test(start_paused = true)]
    async fn it_is_tried_again_in_a_second() {
        let breaker = Breaker::new();
        (0..MIN_CALLS).for_each(|_| breaker.permit().unwrap().failed());
        tokio::time::advance(MIN_OPEN - Duration::from_millis(1)).await;
        assert!(breaker.permit().is_none());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(breaker.permit().is_some());
    }

    #[test]
    fn it_is_open_only_while_it_refuses() {
        let breaker = Breaker::new();
        assert!(!breaker.is_open_at(1));
        (0..MIN_CALLS).for_each(|_| assert!(breaker.call(1, false)));
        assert!(breaker.is_open_at(1) && breaker.is_open_at(1_000));
        assert!(!breaker.is_open_at(1_001), "though nobody has tried");
        let trial = breaker.permit_at(|| 1_001);
        assert!(breaker.is_open_at(1_001), "all others are refused");
        drop(trial);
        assert!(breaker.call(1_001, false) && breaker.is_open_at(3_000) && !breaker.is_open_at(3_001));
        assert!(breaker.call(3_001, true) && !breaker.is_open_at(3_001));
    }

    #[test]
    fn few_or_rare_failures_leave_it_closed() {
        let breaker = Breaker::new();
        for i in 0..10_000u64 {
            assert!(breaker.call(1 + i, i % 3 == 0 || i % 3 == 1));
        }
        let breaker = Breaker::new();
        for i in 0..100 {
            let now = 1 + i * 11_000;
            assert!(breaker.call(now, false) && !breaker.is_open_at(now), "each in a window of its own");
        }
    }

    #[test]
    fn trials_come_one_at_a_time_and_more_and_more_rarely() {
        let breaker = Breaker::new();
        (0..MIN_CALLS).for_each(|_| assert!(breaker.call(1, false)));
        let mut now = 1;
        for open_for in [1_000, 2_000, 4_000, 5_000, 5_000] {
            assert!(!breaker.call(now + open_for - 1, false), "{open_for}");
            now += open_for;
            assert!(breaker.call(now, false), "{open_for}");
        }
        let first = breaker.permit_at(|| now + 5_000);
        assert!(first.is_some());
        for _ in 0..2 {
            assert!(breaker.permit_at(|| now + 5_000).is_none(), "who is refused does not end the trial of another");
        }
        drop(first);
        assert!(breaker.permit_at(|| now + 5_000).is_some(), "a trial that is given up is nobody's");
    }
}
