//! The headers of a hit, which are the same for all hits of one second: made for the second hit, and cloned for the others. What
//! is asked for often is spared the making of them.
//!
//! Each thread has its own, so nobody waits for anybody, and as many as there are places, whatever is asked for.

use std::{
    array,
    cell::RefCell,
    sync::atomic::{AtomicU64, Ordering},
};

use http::HeaderMap;

/// The places of a thread, of which each entry has one.
const PLACES: usize = 256;

/// So often others must be asked for before a place is another's.
const MOST: u8 = 16;

/// Which entry it is: no other of this process ever has the same. What has none is not replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replay(u64);

#[derive(Default)]
struct Place {
    of: Replay,
    votes: u8,
    /// When it was last hit: age and time to live in seconds.
    second: (u64, i64),
    headers: Option<HeaderMap>,
}

thread_local! {
    static PLACES_OF_THREAD: RefCell<Box<[Place; PLACES]>> = RefCell::new(Box::new(array::from_fn(|_| Place::default())));
}

impl Replay {
    pub(super) fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The headers of this second, which `make` makes.
    pub(crate) fn headers(self, second: (u64, i64), make: impl FnOnce() -> HeaderMap) -> HeaderMap {
        let mut make = Some(make);
        let mut made = |places: &RefCell<Box<[Place; PLACES]>>| {
            let mut places = places.try_borrow_mut().ok()?;
            let place = places.get_mut(self.0 as usize % PLACES).filter(|_| self != Self::default())?;
            if place.of != self {
                // The vote of a majority: who is asked for most often stays.
                place.votes = place.votes.saturating_sub(1);
                if place.votes == 0 {
                    *place = Place { of: self, votes: 1, second, headers: None };
                }
                return None;
            }
            place.votes = (place.votes + 1).min(MOST);
            if place.second != second {
                (place.second, place.headers) = (second, None);
                return None;
            }
            if place.headers.is_none() {
                place.headers = make.take().map(|make| make());
            }
            place.headers.clone()
        };
        let made = PLACES_OF_THREAD.try_with(&mut made).ok().flatten();
        made.or_else(|| make.take().map(|make| make())).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use http::{HeaderValue, header};

    use super::*;

    /// Each entry its own, of this second, and made twice at most.
    #[test]
    fn what_is_made_for_a_second_is_of_that_second() {
        let count = Cell::new(0);
        let age = |replay: Replay, second| {
            let headers = replay.headers((second, 0), || {
                count.set(count.get() + 1);
                HeaderMap::from_iter([(header::AGE, HeaderValue::from(second))])
            });
            assert_eq!(headers[header::AGE], second.to_string().as_str());
        };
        let one = Replay::new();
        for second in [1, 2, 1] {
            (0..10).for_each(|_| age(one, second));
        }
        assert_eq!(count.take(), 6);
        let same_place = Replay(one.0 + PLACES as u64);
        for second in [1, 2] {
            let all = [one, same_place, Replay::new(), one, same_place, Replay::default()];
            all.into_iter().for_each(|replay| age(replay, second));
        }
        // Who is asked for more often has the place, in the end.
        (0..100).for_each(|_| age(same_place, 3));
        count.set(0);
        [same_place, one, same_place].into_iter().for_each(|replay| age(replay, 3));
        assert_eq!(count.take(), 1);
    }
}
