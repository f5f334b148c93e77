//! Threads that count while another reads, in every order of their steps.

use std::sync::Arc;

use shuttle::thread;

use super::*;
use crate::sync::tried::{breaks, holds};

const WHY: (Handling, &str) = (Handling::Miss, "uri-miss");

fn requests(read: &OfType) -> u64 {
    read.handled[Handling::Miss as usize].counts.iter().sum()
}

fn reasons(read: &OfType) -> u64 {
    read.reasons.values().flat_map(|of_handling| of_handling.values()).sum()
}

/// As [`Counts::request`] does, or the wrong way round.
fn count(counts: &Counts, reason_first: bool) {
    if reason_first {
        return counts.request(
            (WHY.0, Some(WHY.1)),
            None,
            Duration::ZERO,
            Served { bytes: 1, saved: 1, ..Served::default() },
        );
    }
    counts.shard().handled[WHY.0 as usize].record(0);
    counts.reasons.add(WHY);
}

fn three_requests(reason_first: bool) {
    let counts = Arc::new(Counts::new(1));
    let threads = [(); 3].map(|()| {
        let counts = counts.clone();
        thread::spawn(move || count(&counts, reason_first))
    });
    let read = counts.read();
    assert!(reasons(&read) >= requests(&read), "a request without its reason");
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let read = counts.read();
    assert_eq!((requests(&read), reasons(&read)), (3, 3));
}

#[test]
fn no_count_is_lost_and_no_request_is_without_its_reason() {
    holds(|| three_requests(true));
}

#[test]
fn a_reason_counted_after_its_request_is_found_out() {
    breaks(|| three_requests(false), "without its reason");
}

/// What happens at once to one counter.
fn add(to: &AtomicU64, in_one_step: bool) {
    match in_one_step {
        true => _ = to.fetch_add(1, Relaxed),
        false => to.store(to.load(Relaxed) + 1, Relaxed),
    }
}

fn hits_and_reasons(in_one_step: bool) {
    let counts = Arc::new(Counts::new(1));
    let threads = ["uri-miss", "vary-miss", "stale"].map(|why| {
        let counts = counts.clone();
        thread::spawn(move || {
            counts.reasons.add((Handling::Miss, why));
            counts.load(true, Duration::from_secs(1));
            add(&counts.invalidations, in_one_step);
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let read = counts.read();
    assert_eq!(reasons(&read), 3);
    assert_eq!((read.loads[0].counts.iter().sum::<u64>(), read.loads[0].sum), (3, 3_000_000_000));
    assert_eq!(read.invalidations, 3, "a count is lost");
}

#[test]
fn counts_of_many_threads_add_up() {
    holds(|| hits_and_reasons(true));
}

#[test]
fn a_count_that_is_read_and_then_written_is_found_out() {
    breaks(|| hits_and_reasons(false), "a count is lost");
}
