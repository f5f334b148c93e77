//! What each thread has decoded: the same bytes, read again, are the same entry, and are not decoded again.
//!
//! Where nothing is held in this process, each hit reads all of an entry, and decoding is a large part of what that costs. What was
//! read is compared in whole with what was decoded, so this is never another entry than was read. What is read again before
//! another that has the same place is kept, and as little as there is room for.

use std::{cell::RefCell, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    Entry, Inquiry,
    codec::{self, Unreadable},
};
use crate::{clock::Millis, mux::COPIED};

/// The places of a thread, of which each entry has one.
const PLACES: usize = 1 << 10;

/// A thread keeps so many bytes at most, with what they are decoded as.
const MOST: usize = 1 << 20;

/// Larger entries are decoded each time, and such as are twice as large with what they are decoded as.
const LARGEST: usize = 32 << 10;

// A reply with one that is no larger has been copied, with as much again for its generations: it is an allocation of its own.
const _: () = assert!(2 * LARGEST <= COPIED);

/// The times of an entry, as its reader tells them.
#[derive(Clone, Copy)]
pub(super) struct Times {
    now: Millis,
    /// By how much they are shifted.
    shift: i64,
    /// So many milliseconds sooner they may be for having been decoded before: the store's clock is read apart.
    apart: i64,
    longest: Option<Duration>,
}

impl Times {
    /// By the store's clock, which said so much at the inquiry's time.
    pub(super) fn of(inquiry: &Inquiry<'_>, store: i64, apart: i64) -> Self {
        let Inquiry { now, longest, .. } = *inquiry;
        Self { now, shift: now as i64 - store, apart, longest }
    }
}

struct Decoded {
    bytes: Bytes,
    times: Times,
    entry: Arc<Entry>,
    /// About how many bytes of memory it takes.
    size: usize,
}

#[derive(Default)]
struct Place {
    /// The checksum of what was decoded last.
    last: u32,
    kept: Option<Box<Decoded>>,
}

#[derive(Default)]
struct Places {
    all: Vec<Place>,
    /// How many bytes they take.
    size: usize,
    /// The place that is cleared next, when that is too many.
    next: usize,
}

thread_local! {
    static PLACES_OF_THREAD: RefCell<Places> = RefCell::default();
}

/// The entry that these bytes are, as [`codec::decode`] has it; while it is fresh, its times may be earlier by as much as they may
/// be apart. What is to be held in this process is not to hold all that was read with it.
pub(super) fn decoded(bytes: &Bytes, times: Times, is_held: bool) -> Result<Arc<Entry>, Unreadable> {
    let decode = |bytes| codec::decode(bytes, times.shift, times.longest);
    let new = || {
        let own = if is_held && bytes.len() > LARGEST { Bytes::copy_from_slice(bytes) } else { bytes.clone() };
        decode(own)
    };
    // (What else there is, the cache knows by its key, which is not in these bytes.)
    let Some(crc) = codec::checksum_of_response(bytes).filter(|_| bytes.len() <= LARGEST) else {
        return new().map(Arc::new);
    };
    let of_thread = |places: &RefCell<Places>| {
        let mut places = places.try_borrow_mut().ok()?;
        places.all.resize_with(PLACES, Place::default);
        let at = crc as usize % PLACES;
        let place = places.all.get_mut(at)?;
        let is_again = std::mem::replace(&mut place.last, crc) == crc;
        if let Some(kept) = place.kept.as_ref().filter(|kept| kept.is(bytes, times)) {
            return Some(Ok(kept.entry.clone()));
        }
        if !is_again {
            return None;
        }
        let own = Bytes::copy_from_slice(bytes);
        Some(decode(own.clone()).map(|entry| places.keep(at, (own, times), entry)))
    };
    PLACES_OF_THREAD.try_with(of_thread).ok().flatten().unwrap_or_else(|| new().map(Arc::new))
}

impl Decoded {
    /// Whether it is what these bytes would be decoded as, or ends sooner by what clocks are read apart, and has not ended for that:
    /// another cache over the same store may have another clock, and other bounds.
    fn is(&self, bytes: &Bytes, times: Times) -> bool {
        let sooner = times.shift.saturating_sub(self.times.shift);
        let is_fresh_as_it_is = || self.entry.is_fresh(times.now.saturating_add_signed(-sooner));
        (0..=times.apart).contains(&sooner)
            && self.times.longest == times.longest
            && (self.entry.is_fresh(times.now) || !is_fresh_as_it_is())
            && self.bytes == bytes
    }
}

impl Places {
    /// Keeps it, if it is not too large.
    fn keep(&mut self, at: usize, (bytes, times): (Bytes, Times), entry: Entry) -> Arc<Entry> {
        let size = bytes.len() + entry.weight();
        if size > 2 * LARGEST {
            return Arc::new(entry);
        }
        self.clear(at);
        while self.size + size > MOST {
            self.clear(self.next);
            self.next = (self.next + 1) % PLACES;
        }
        self.size += size;
        let entry = Arc::new(entry.replayed());
        if let Some(place) = self.all.get_mut(at) {
            place.kept = Some(Box::new(Decoded { bytes, times, entry: entry.clone(), size }));
        }
        entry
    }

    fn clear(&mut self, at: usize) {
        let cleared = self.all.get_mut(at).and_then(|place| place.kept.take());
        self.size -= cleared.map_or(0, |kept| kept.size);
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::{
        catalog::Lifetime,
        key::Tag,
        store::{Generation, Payload, Stamp, StoredResponse},
    };

    fn bytes(generation: u128, body: Vec<u8>) -> Bytes {
        let tag = Tag(Bytes::from_static(b"s{t}:doc:*"));
        let payload = Payload::Response(StoredResponse {
            status: StatusCode::OK,
            headers: HeaderMap::new().into(),
            body: body.into(),
            trailers: None,
        });
        let stamps = [Stamp { tag, generation: Generation(generation) }].into();
        let entry = Entry::new(payload, stamps, 1_000, Lifetime::fresh_for(Some(Duration::from_secs(60))));
        codec::encode(&entry, 0).unwrap().bytes.into()
    }

    const APART: i64 = 10;

    fn times(shift: i64, longest: Option<Duration>) -> Times {
        Times { now: 1_000, shift, apart: APART, longest }
    }

    fn read(bytes: &[u8]) -> Result<Arc<Entry>, Unreadable> {
        decoded(&Bytes::copy_from_slice(bytes), times(0, None), false)
    }

    fn is_kept(bytes: &[u8]) -> bool {
        (0..3).for_each(|_| _ = read(bytes));
        Arc::ptr_eq(&read(bytes).unwrap(), &read(bytes).unwrap())
    }

    /// What cannot be packed.
    fn noise(size: usize) -> Vec<u8> {
        (0..size as u64).map(|n| ((n * n * 0x9e37_79b9) >> 13) as u8).collect()
    }

    fn other_in_its_place(one: &Bytes) -> Bytes {
        let place = |bytes: &Bytes| codec::checksum_of_response(bytes).unwrap() as usize % PLACES;
        (2..).map(|n| bytes(n, vec![7; 100])).find(|other| place(other) == place(one)).unwrap()
    }

    /// In a thread of its own, which has decoded nothing.
    fn anew(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn what_is_read_again_is_not_decoded_again() {
        anew(|| {
            let bytes = bytes(1, vec![7; 100]);
            let read = [(); 4].map(|()| read(&bytes).unwrap());
            let same: Vec<_> = read.windows(2).map(|two| Arc::ptr_eq(&two[0], &two[1])).collect();
            assert_eq!(same, [false, true, true], "what is read once is not kept");
            assert!(read.iter().all(|entry| codec::encode(entry, 0).unwrap().bytes == bytes));
        });
    }

    /// Also if all but one byte is what was kept.
    #[test]
    fn nothing_is_answered_with_but_what_was_read() {
        anew(|| {
            let good = bytes(1, vec![7; 100]);
            assert!(is_kept(&good));
            for at in 0..good.len() {
                let mut other = good.to_vec();
                other[at] ^= 1;
                assert_eq!(read(&other).err(), Some(Unreadable), "{at}");
                assert!(read(&good).is_ok() && read(&good[..at]).is_err());
            }
            // What has the same place is another.
            let other = other_in_its_place(&good);
            for bytes in [&good, &other, &good, &other, &other, &other, &good] {
                assert_eq!(codec::encode(&read(bytes).unwrap(), 0).unwrap().bytes, *bytes);
            }
        });
    }

    /// What another cache over the same store makes of the same bytes, by another clock or with other bounds, is its own.
    #[test]
    fn what_is_kept_is_for_those_who_would_read_the_same() {
        anew(|| {
            let (bytes, longest) = (bytes(1, vec![7; 100]), Some(Duration::from_secs(1)));
            let at = |shift, longest| decoded(&bytes, times(shift, longest), false).unwrap();
            for longest in [None, longest] {
                for shift in [100, 100, 100 + APART, 100 + APART + 1, 100 + APART, 99, 99 + APART] {
                    let (entry, exact) = (at(shift, longest), codec::decode(bytes.clone(), shift, longest).unwrap());
                    let sooner = exact.expires - entry.expires;
                    assert!(sooner <= APART as u64 && sooner == exact.created - entry.created, "{shift}");
                }
                // That it ends a moment sooner is no harm; that it ends later is.
                assert!(Arc::ptr_eq(&at(99, longest), &at(99 + APART, longest)));
                assert!(!Arc::ptr_eq(&at(99, longest), &at(98, longest)));
            }
        });
    }

    /// What seems to have ended for having been decoded sooner is decoded as it is.
    #[test]
    fn what_is_kept_ends_nothing() {
        anew(|| {
            let bytes = bytes(1, vec![7; 100]);
            let at = |now, shift| decoded(&bytes, Times { now, ..times(shift, None) }, false).unwrap();
            (0..3).for_each(|_| _ = at(1_000, 0));
            let kept = at(60_999, APART);
            assert_eq!(kept.expires, 61_000);
            for _ in 0..3 {
                assert_eq!(at(61_000, APART).expires, 61_000 + APART as u64);
            }
            assert!(!at(61_000, 0).is_fresh(61_000));
            // What has ended either way is not decoded each time that it is served.
            let kept = at(70_000, 0);
            assert!([5, 0, APART].iter().all(|shift| Arc::ptr_eq(&at(70_000, *shift), &kept)));
        });
    }

    /// Nor does what is kept, or held, keep what it was read with.
    #[test]
    fn what_is_kept_is_all_that_is_kept() {
        anew(|| {
            for size in [100, LARGEST + 1_000, 2 * LARGEST] {
                let entry = bytes(1, noise(size));
                let read = Bytes::from([&entry[..], &[0; 1 << 20]].concat());
                let part = || read.slice(..entry.len());
                let is_large = size > LARGEST;
                let mut held: Vec<_> = (0..4).map(|_| decoded(&part(), times(0, None), is_large).unwrap()).collect();
                // What is small, and read for the first time, has an allocation of its own as it comes.
                let kept = held.split_off(usize::from(!is_large));
                drop(held);
                assert!(read.is_unique() && kept.len() >= 3, "{size}");
            }
        });
    }

    /// Two that have one place do not take it from each other each time.
    #[test]
    fn who_comes_in_between_is_not_kept() {
        anew(|| {
            let one = bytes(1, vec![7; 100]);
            let other = other_in_its_place(&one);
            assert!(is_kept(&one));
            let kept = read(&one).unwrap();
            for _ in 0..5 {
                read(&other).unwrap();
                assert!(Arc::ptr_eq(&read(&one).unwrap(), &kept));
            }
            assert!(is_kept(&other) && !Arc::ptr_eq(&read(&one).unwrap(), &kept));
        });
    }

    /// An entry's key is not in its bytes, so what is known of it by its key is not known of it.
    #[test]
    fn only_responses_are_kept() {
        anew(|| {
            for payload in [Payload::Value(Bytes::from_static(b"1")), Payload::Vary([].into())] {
                let entry = Entry::new(payload, Box::default(), 1_000, Lifetime::fresh_for(None));
                assert!(!is_kept(&codec::encode(&entry, 0).unwrap().bytes));
            }
        });
    }

    #[test]
    fn threads_keep_no_more_than_there_is_room_for() {
        anew(|| {
            let kept = || PLACES_OF_THREAD.with_borrow(|p| (p.all.iter().filter(|p| p.kept.is_some()).count(), p.size));
            for n in 0..5_000 {
                assert!(is_kept(&bytes(n, vec![n as u8; 100 + n as usize % 8_000])), "{n}");
                let (count, size) = kept();
                assert!(size <= MOST && count <= PLACES && count * 2 * 100 <= size, "{count} {size}");
            }
            assert!(kept().1 > MOST - 2 * LARGEST && kept().0 > 50);
            for (size, is) in [(LARGEST - 1_000, true), (LARGEST, false)] {
                assert_eq!(is_kept(&bytes(1, noise(size))), is, "{size}");
            }
            // What is small is so until it is unpacked.
            let packed = bytes(1, vec![7; 2 * LARGEST]);
            assert!(packed.len() < 1_000 && !is_kept(&packed));
        });
    }
}
