//! No interleaving of reads and writes, no fault of the store or of the way to it, and no handler that fails makes a read older
//! than the documentation promises, or fails a request that would not have failed without the cache, or lets one wait beyond its
//! bound: schedules of actions, made from seeds, of processes that share a store, in virtual time. What checks them is itself
//! checked by breaking the protocol on purpose.
//!
//! `SIM_SEED=7 cargo test --all-features --test consistency` runs one schedule, the one that a failure names;
//! `SIM_SCHEDULES=1000000 cargo test --release --all-features --test consistency no_schedule -- --nocapture` as many as one
//! likes (from `SIM_SEED` on).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dice;
mod line;
mod plan;
mod races;
mod redis;
mod run;
mod sabotage;
mod service;
mod world;

use plan::Plan;
use run::{minimised, search};
use sabotage::Sabotage;

/// Enough for every sabotage to be caught.
const SCHEDULES: u64 = 300;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn no_schedule_breaks_a_promise() {
    let (seed, schedules) = (number("SIM_SEED"), number("SIM_SCHEDULES"));
    let schedules = schedules.unwrap_or(if seed.is_some() { 1 } else { SCHEDULES });
    let seeds = seed.unwrap_or(0)..seed.unwrap_or(0) + schedules;
    match search(seeds.clone(), Sabotage::None) {
        Ok(counts) => println!("{} schedules: {counts:?}", seeds.end - seeds.start),
        Err(seed) => {
            let (plan, wrong) = minimised(seed, Sabotage::None);
            panic!("{plan}{}", wrong.join("\n"))
        }
    }
}

/// The checker is worth something: each rule, broken, is caught.
#[test]
fn every_sabotage_is_caught() {
    let mut missed = vec![];
    for sabotage in Sabotage::ALL {
        match search(0..SCHEDULES, sabotage) {
            Ok(_) => missed.push(sabotage),
            Err(seed) => println!("{sabotage:?}: SIM_SEED={seed}"),
        }
    }
    assert_eq!(missed, []);
}

/// What a seed stands for never changes, or a failure could not be seen again.
#[test]
fn a_schedule_is_the_same_each_time() {
    let cascades = service::cascades();
    for seed in 0..SCHEDULES {
        let once = || format!("{:?}", run::run(&Plan::new(seed), Sabotage::None, &cascades));
        assert_eq!(once(), once(), "{seed}");
    }
}

/// What fails is shown as small as it can be.
#[test]
fn a_schedule_that_fails_is_made_smaller() {
    let seed = search(0..SCHEDULES, Sabotage::SkipTheCheck).unwrap_err();
    let (plan, wrong) = minimised(seed, Sabotage::SkipTheCheck);
    // A read that fills, and a write.
    assert!(!wrong.is_empty() && plan.actions.len() <= 2, "{plan}{wrong:?}");
}
