//! The headers of a hit, which are the same for all hits of one second: what is asked for often is spared the making of them.
//!
//! Each thread has its own, so nobody waits for anybody, and as many as there are places, whatever is asked for. They are copies:
//! what an entry was read in, with its body, goes when the entry does.

use std::{
    array,
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use http::HeaderMap;

use super::Headers;

/// The places of a thread, of which each entry has one.
const PLACES: usize = 256;

/// So often others must be asked for before a place is another's.
const MOST: u8 = 16;

/// And so often an entry before its headers are kept.
const OFTEN: u8 = 4;

/// Which entry it is: no other of this process ever has the same. What has none is not replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replay(u64);

#[derive(Default)]
struct Place {
    of: Replay,
    votes: u8,
    /// When it was last hit: age and time to live in seconds.
    second: (u64, i64),
    /// The name of the cache that answered.
    name: Option<Arc<str>>,
    headers: Option<HeaderMap>,
}

thread_local! {
    static PLACES_OF_THREAD: RefCell<Box<[Place; PLACES]>> = RefCell::new(Box::new(array::from_fn(|_| Place::default())));
}

impl Replay {
    fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Of an entry with these headers; none if they are more than each thread may keep.
    pub(super) fn of(headers: &Headers) -> Self {
        if headers.is_small() { Self::new() } else { Self::default() }
    }

    /// The headers of this second, which `make` makes.
    pub(crate) fn headers(
        self,
        second: (u64, i64),
        name: Option<&Arc<str>>,
        make: impl FnOnce() -> HeaderMap,
    ) -> HeaderMap {
        let mut make = Some(make);
        let mut made = |places: &RefCell<Box<[Place; PLACES]>>| {
            let mut places = places.try_borrow_mut().ok()?;
            let place = places.get_mut(self.0 as usize % PLACES).filter(|_| self != Self::default())?;
            if place.of != self {
                // The vote of a majority: who is asked for most often stays.
                place.votes = place.votes.saturating_sub(1);
                if place.votes == 0 {
                    *place = Place { of: self, votes: 1, second, name: name.cloned(), headers: None };
                }
                return None;
            }
            place.votes = (place.votes + 1).min(MOST);
            if place.second != second || place.name.as_deref() != name.map(|name| &**name) {
                (place.second, place.name, place.headers) = (second, name.cloned(), None);
                return None;
            }
            if place.headers.is_none() && place.votes < OFTEN {
                return None;
            }
            if place.headers.is_none() {
                let made = make.take().map(|make| make())?;
                place.headers = Headers::from(made.clone()).copied().map(Headers::into_map);
                return Some(made);
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

    use bytes::Bytes;
    use http::{HeaderValue, header};

    use super::*;

    /// Each entry its own, of this second, and made twice, once it is asked for often.
    #[test]
    fn what_is_made_for_a_second_is_of_that_second() {
        let count = Cell::new(0);
        let age = |replay: Replay, second| {
            let headers = replay.headers((second, 0), None, || {
                count.set(count.get() + 1);
                HeaderMap::from_iter([(header::AGE, HeaderValue::from(second))])
            });
            assert_eq!(headers[header::AGE], second.to_string().as_str());
        };
        let one = Replay::new();
        for second in [1, 2, 1] {
            (0..10).for_each(|_| age(one, second));
        }
        assert_eq!(count.take(), 8);
        let same_place = Replay(one.0 + PLACES as u64);
        for second in [1, 2] {
            let all = [one, same_place, Replay::new(), one, same_place, Replay::default()];
            all.into_iter().for_each(|replay| age(replay, second));
        }
        let large = HeaderMap::from_iter([(header::LINK, HeaderValue::try_from("x".repeat(20_000)).unwrap())]);
        assert!(
            Replay::of(&HeaderMap::new().into()) != Replay::default() && Replay::of(&large.into()) == Replay::default()
        );
        // Who is asked for more often has the place, in the end.
        (0..100).for_each(|_| age(same_place, 3));
        count.set(0);
        [same_place, one, same_place].into_iter().for_each(|replay| age(replay, 3));
        assert_eq!(count.take(), 1);
    }

    /// Nor does it keep what the entry was read in.
    #[test]
    fn what_is_kept_is_a_copy_of_its_cache() {
        let (replay, read) = (Replay::new(), Bytes::from(vec![b'x'; 1 << 20]));
        let say = |name: &str| {
            let name = Arc::from(name);
            replay.headers((1, 1), Some(&name), || {
                let values = [HeaderValue::from_maybe_shared(read.slice(..5)), HeaderValue::from_str(&name)];
                [header::ETAG, header::SERVER].into_iter().zip(values.map(Result::unwrap)).collect()
            })
        };
        for name in ["one", "one", "one", "other", "other", "one"] {
            assert_eq!((say(name)[header::SERVER].as_bytes(), say(name)[header::ETAG].len()), (name.as_bytes(), 5));
        }
        assert!(read.is_unique());
    }
}
