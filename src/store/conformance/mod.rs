//! Whether a store does what the engine relies on: a suite that any [`Store`] runs in its own tests. (Feature `testing`.)
//!
//! ```
//! use std::sync::Arc;
//! use tower_cache_aside::store::{MemoryStore, conformance};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! let store = Arc::new(MemoryStore::new(64 << 20));
//! conformance::check(async || store.clone()).await;
//! # }
//! ```
//!
//! What it is given makes one more handle to the *same* place, as another process would have it: for a store on a server, a new
//! client of that server. The place is not to be anybody else's: it is [cleared](Store::clear). It takes about ten seconds, for
//! leases have to run out.
//!
//! - A store may lose whatever it holds, so nothing is missed before it is missing again and again. What must never be seen is
//!   a flaw when it is seen once.
//! - A call that fails is made again for some seconds, but a store that is always too slow for its budget fails: give it one
//!   that suits the machine.
//! - No lease is shorter than two seconds, and none is expected to end in time, only some time.
//! - A store that [is not shared](Store::is_shared) is spared the rules of claims and of other processes' clocks.

mod claims;
mod entries;
mod fences;
mod generations;
mod history;
mod marks;
mod scene;
mod times;

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::{Store, StoreError};
use scene::{Flaw, Handle, Scene, Seen};

/// How often is missed what should be there.
const TRIES: usize = 3;

/// No rule is tried again after this.
const TRIED: Duration = Duration::from_secs(8);

/// No rule takes as long as this, if the store answers at all.
const TOO_LONG: Duration = Duration::from_secs(60);

/// A store may have to connect first.
const CONNECTS: Duration = Duration::from_secs(10);

/// A rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Broken {
    /// Its name, which says what it is.
    pub rule: &'static str,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.seen)
    }
}

struct Rule {
    name: &'static str,
    plays: for<'a> fn(&'a Scene) -> Pin<Box<dyn Future<Output = Seen> + 'a>>,
}

macro_rules! rules {
    ($($module:ident: $($name:ident),*;)*) => {
        &[$($(Rule { name: stringify!($name), plays: |scene| Box::pin($module::$name(scene)) },)*)*]
    };
}

/// Those that do not hinder each other.
const RULES: &[Rule] = rules![
    entries: it_hits, every_kind_of_entry_is_found_as_it_was, bodies_are_found_whole,
        a_large_body_is_found_whole_or_not_at_all, odd_headers_are_found_as_they_were, each_key_has_its_own_entry,
        each_tag_has_its_own_generation, what_is_kept_for_long_is_found, what_is_over_is_not_fresh,
        a_peek_tells_only_what_is_current, what_is_held_is_current_until_it_is_dropped,
        a_search_finds_what_is_asked_for;
    generations: an_absent_generation_is_created_for_everybody, opens_at_once_agree, what_is_asked_is_answered_in_order,
        a_dropped_generation_never_comes_back, an_entry_falls_with_each_of_its_tags,
        an_invalidation_drops_all_tags_of_all_groups, many_tags_are_dropped_at_once, counts_are_about_right, members_of_a_fleet_hear_each_other, a_note_is_kept_as_it_was_written_last,
        a_store_that_works_says_so;
    marks: a_mark_proves_what_stands, what_a_mark_proves_falls_with_the_next_drop, a_mark_proves_nothing_of_what_was_dropped, a_mark_proves_nothing_of_what_was_fenced,
        a_mark_proves_nothing_of_a_lease_that_ran_out;
    fences: a_fence_stands_until_its_writer_comes_back, a_writer_lifts_only_its_own_fence,
        a_fence_is_lifted_where_it_was_invalidated, a_fence_may_stand_on_several_tenants, a_lease_runs_out, a_fence_is_held;
    history: no_entry_outlives_the_drop_of_its_tags;
];

/// Those that a store has to keep only if other processes use it, too.
const SHARED: &[Rule] = rules![
    claims: one_claims_at_a_time, a_claim_ends_with_its_lease;
    times: no_other_clock_makes_an_entry_last_longer, for_ever_is_for_ever_by_every_clock,
        a_reader_has_the_last_word_on_how_long;
];

/// Those that are to be alone in the place.
const ALONE: &[Rule] = rules![
    generations: clear_drops_all_tenants;
    marks: a_mark_proves_nothing_after_clear;
    fences: a_fence_outlives_clear;
];

/// Checks every rule.
///
/// # Panics
/// Some do not hold: with their names, and what was seen.
#[allow(clippy::panic, reason = "it is an assertion, for tests")]
pub async fn check<S: Store>(make: impl AsyncFn() -> S) {
    let broken = broken(make).await;
    if !broken.is_empty() {
        let lines: String = broken.iter().map(|broken| format!("\n  {broken}")).collect();
        panic!("the store does not do what the engine relies on:{lines}");
    }
}

/// The rules that do not hold, for those who know why.
pub async fn broken<S: Store>(make: impl AsyncFn() -> S) -> Vec<Broken> {
    let handles = [make().await, make().await, make().await].map(|store| Handle(Arc::new(store)));
    if let Err(error) = answers(&handles).await {
        return vec![Broken { rule: "it_hits", seen: format!("it does not answer within {CONNECTS:?}: {error}") }];
    }
    let shared = if handles[0].0.is_shared() { SHARED } else { &[] };
    let mut broken: Vec<_> = join_all(RULES.iter().chain(shared).map(|rule| rule.holds(&handles))).await;
    for rule in ALONE {
        broken.push(rule.holds(&handles).await);
    }
    broken.into_iter().flatten().collect()
}

/// Waits until the place can be reached by each handle.
async fn answers(handles: &[Handle; 3]) -> Result<(), StoreError> {
    let until = Instant::now() + CONNECTS;
    let tags = [Scene::new(handles).tag("first")];
    for handle in handles {
        while let Err(error) = handle.0.open(&tags).await {
            if Instant::now() >= until {
                return Err(error);
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

impl Rule {
    async fn holds(&self, handles: &[Handle; 3]) -> Option<Broken> {
        let began = Instant::now();
        let mut seen = None;
        for _ in 0..TRIES {
            let scene = Scene::new(handles);
            seen = match timeout(TOO_LONG, (self.plays)(&scene)).await {
                Ok(Ok(())) => return None,
                Ok(Err(Flaw::Wrong(what))) => return Some(Broken { rule: self.name, seen: what }),
                Ok(Err(Flaw::Missing(what))) => Some(what),
                Err(_) => Some(format!("it is not over after {TOO_LONG:?}")),
            };
            if began.elapsed() > TRIED {
                break;
            }
        }
        seen.map(|seen| Broken { rule: self.name, seen })
    }
}
