//! Calls of a store that comes back, in every order of their steps.

use std::sync::Arc;

use shuttle::thread;

use super::*;
use crate::sync::{
    atomic::AtomicUsize,
    tried::{advance, breaks, holds},
};

/// One that has opened, and whose time is over.
fn open() -> Arc<Breaker> {
    let breaker = Arc::new(Breaker::new());
    (0..MIN_CALLS).for_each(|_| breaker.permit().unwrap().failed());
    assert!(breaker.is_open());
    advance(MIN_OPEN);
    breaker
}

/// Leave to try, asked for as [`Breaker::permit`] does, or in two steps.
fn permit(breaker: &Breaker, in_one_step: bool) -> Option<Permit<'_>> {
    if in_one_step {
        return breaker.permit();
    }
    let is_free = !breaker.trying.load(Ordering::Acquire);
    is_free.then(|| {
        breaker.trying.store(true, Ordering::Release);
        Permit { breaker, is_trial: true }
    })
}

fn three_callers(in_one_step: bool) {
    let (breaker, trying) = (open(), Arc::new(AtomicUsize::new(0)));
    let threads = [(); 3].map(|()| {
        let (breaker, trying) = (breaker.clone(), trying.clone());
        thread::spawn(move || {
            let Some(permit) = permit(&breaker, in_one_step).filter(|permit| permit.is_trial) else { return };
            assert_eq!(trying.fetch_add(1, Ordering::SeqCst), 0, "two try at once");
            trying.fetch_sub(1, Ordering::SeqCst);
            // Its caller goes away without a word.
            drop(permit);
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(breaker.permit().is_some(), "a trial that nobody makes");
}

#[test]
fn one_call_at_a_time_tries() {
    holds(|| three_callers(true));
}

#[test]
fn leave_taken_in_two_steps_is_found_out() {
    breaks(|| three_callers(false), "two try at once");
}

/// Leave as [`Breaker::permit`] gives it, or without a second look at whether another trial has ended meanwhile.
fn permit_after_one_look(breaker: &Breaker) -> Option<Permit<'_>> {
    let until = breaker.open_until.load(Ordering::Acquire);
    let is_trial = until > 0;
    if is_trial && (breaker.now() < until || breaker.trying.swap(true, Ordering::AcqRel)) {
        return None;
    }
    Some(Permit { breaker, is_trial })
}

/// A trial succeeds, and a call fails.
fn a_store_that_comes_back(permit: fn(&Breaker) -> Option<Permit<'_>>) {
    let breaker = open();
    let failing = {
        let breaker = breaker.clone();
        thread::spawn(move || permit(&breaker).into_iter().for_each(Permit::failed))
    };
    let succeeded = permit(&breaker).is_some_and(|permit| {
        let is_trial = permit.is_trial;
        permit.succeeded();
        is_trial
    });
    failing.join().unwrap();
    assert!(!succeeded || !breaker.is_open(), "one failure has opened it");
}

#[test]
fn one_failure_after_a_trial_that_succeeded_leaves_it_closed() {
    holds(|| a_store_that_comes_back(Breaker::permit));
}

#[test]
fn leave_given_after_one_look_is_found_out() {
    breaks(|| a_store_that_comes_back(permit_after_one_look), "has opened it");
}
