//! Until when generations live, and what counts entries, as far as the server has been told: telling it costs it as much as storing
//! an entry.

use std::{
    collections::HashMap,
    hash::BuildHasher,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use foldhash::fast::{FixedState, RandomState};

use crate::{clock::Millis, store::Stamp};

/// So many generations are known to live for as long as what is stored under them: those of the last fills, about.
const PROLONGED: usize = 1_024;

/// When so many counters may have no end, the server is told.
const UNENDED: usize = 256;

/// Which generations were told to live until when, by the hashes of both, each in the place of its tag and that end: many fills under
/// one tag prolong it once. A generation that ends early nevertheless (another server, say) costs a miss.
pub(super) struct Prolonged {
    hasher: RandomState,
    last: Box<[AtomicU64]>,
}

impl Default for Prolonged {
    fn default() -> Self {
        Self { hasher: RandomState::default(), last: (0..PROLONGED).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Prolonged {
    fn place(&self, stamp: &Stamp, until: Millis) -> (&AtomicU64, u64) {
        let of_tag = (stamp.tag.as_bytes(), until);
        // Not by chance, as what a generation is: who does the same again asks the same again.
        let at = FixedState::default().hash_one(of_tag) as usize % PROLONGED;
        (&self.last[at], self.hasher.hash_one((of_tag, stamp.generation.0)))
    }

    pub(super) fn has(&self, stamp: &Stamp, until: Millis) -> bool {
        let (place, hash) = self.place(stamp, until);
        place.load(Ordering::Relaxed) == hash
    }

    /// The server has acknowledged it.
    pub(super) fn add(&self, stamp: &Stamp, until: Millis) {
        let (place, hash) = self.place(stamp, until);
        place.store(hash, Ordering::Relaxed);
    }
}

/// The counters that were added to since the server was told until when they live. One that had to go meanwhile was made anew by
/// that, without an end.
#[derive(Default)]
pub(super) struct Unended(Mutex<HashMap<Vec<u8>, Millis, RandomState>>);

impl Unended {
    fn all(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Millis, RandomState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server has acknowledged an addition that did not tell.
    pub(super) fn add(&self, counter: Vec<u8>, until: Millis) {
        let mut all = self.all();
        let known = all.entry(counter).or_default();
        *known = until.max(*known);
    }

    /// Whom it is to be told of now: nobody, or all, when these are enough.
    pub(super) fn due(&self) -> Vec<(Vec<u8>, Millis)> {
        let all = self.all();
        if all.len() < UNENDED { vec![] } else { all.iter().map(|(name, until)| (name.clone(), *until)).collect() }
    }

    /// It has been told.
    pub(super) fn told(&self, told: &[(Vec<u8>, Millis)]) {
        if !told.is_empty() {
            let mut all = self.all();
            told.iter().for_each(|(name, _)| _ = all.remove(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{key::Tag, store::Generation};

    /// A generation is forgotten for the next of its tag that ends at the same time, and for few others.
    #[test]
    fn what_is_prolonged_has_the_place_of_its_tag() {
        let prolonged = Prolonged::default();
        let stamp = |tag: usize, generation| Stamp {
            tag: Tag(format!("t:{tag}").into_bytes().into()),
            generation: Generation(generation),
        };
        for generation in [1, 2] {
            assert!(!prolonged.has(&stamp(0, generation), 5));
            prolonged.add(&stamp(0, generation), 5);
            assert!(prolonged.has(&stamp(0, generation), 5) && !prolonged.has(&stamp(0, 3 - generation), 5));
            assert!(!prolonged.has(&stamp(0, generation), 6) && !prolonged.has(&stamp(1, generation), 5));
        }
        let other = Prolonged::default();
        for tag in 0..PROLONGED {
            prolonged.add(&stamp(tag, 3), 5);
            other.add(&stamp(tag, 4), 5);
        }
        let has = |known: &Prolonged, generation| -> Vec<_> {
            (0..PROLONGED).filter(|tag| known.has(&stamp(*tag, generation), 5)).collect()
        };
        assert!(has(&prolonged, 3).len() > PROLONGED / 2);
        assert_eq!(has(&prolonged, 3), has(&other, 4));
    }

    /// No more than some are ever without an end, and what is not acknowledged is told again.
    #[test]
    fn counters_without_an_end_are_bounded() {
        let unended = Unended::default();
        let name = |i: usize| i.to_string().into_bytes();
        for round in 0..3 {
            for i in 0..UNENDED {
                assert!(unended.due().is_empty(), "{round}: {i}");
                for until in [5, 9, 7] {
                    unended.add(name(i), until);
                }
            }
            let due = unended.due();
            assert!(due.len() == UNENDED && due.iter().all(|(_, until)| *until == 9) && due == unended.due());
            unended.told(&due);
        }
        assert!(unended.all().is_empty());
    }
}
