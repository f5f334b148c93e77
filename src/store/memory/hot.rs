//! Copies of what a thread answers with most often, of its own: cores that all answer with one entry do not wait for each other
//! to count who holds it, its body and each of its headers.
//!
//! A copy is good for as long as nothing else was put in the place of what it was made of, and that is valid, by the same loads that
//! tell it of the original and one more; what is compared with its generations each time is copied whether it is valid or not. A thread has 16 at most, of 64 KiB each; those of a store that is gone go when others need their places.

use std::{cell::RefCell, sync::Arc};

use bytes::Bytes;

use super::{TagState, is_current};
use crate::{
    clock::Millis,
    store::{Entry, Headers, Payload, StoredResponse},
};

/// The places of a thread, of which each key has one.
const PLACES: usize = 16;

/// So often more than others of its place a key is asked for before it is copied.
const OFTEN: u32 = 64;

/// Every so many hits the original is asked for, so that it is known to be in use.
const AGAIN: u32 = 64;

/// What is larger is seldom asked for so often, and costs more to send than to count.
const LARGEST: usize = 64 << 10;

/// Which key: of which store, by its hash.
pub(super) type Which = (u64, u64);

pub(super) struct Hot {
    pub(super) key: Bytes,
    pub(super) entry: Arc<Entry>,
    pub(super) tags: Box<[(Arc<TagState>, u64)]>,
    /// Not answered from after this.
    pub(super) until: Millis,
    /// How often something had been put in its place in the store.
    pub(super) changes: u64,
}

#[derive(Default)]
struct Place {
    which: Which,
    votes: u32,
    hits: u32,
    copy: Option<Hot>,
}

thread_local! {
    static PLACES_OF_THREAD: RefCell<[Place; PLACES]> = RefCell::default();
}

/// What is known here of a key.
pub(super) enum Looked {
    Good(Arc<Entry>),
    /// It is worth a copy.
    Often,
    Seldom,
}

fn place<T>(which: Which, what: impl FnOnce(&mut Place) -> T) -> Option<T> {
    let with = |places: &RefCell<[Place; PLACES]>| {
        let mut places = places.try_borrow_mut().ok()?;
        places.get_mut(which.1 as usize % PLACES).map(what)
    };
    PLACES_OF_THREAD.try_with(with).ok()?
}

/// Looks for a copy, and counts that it was looked for.
pub(super) fn look(which: Which, key: &[u8], now: Millis, changes: u64) -> Looked {
    place(which, |place| {
        if place.which != which {
            // The vote of a majority: who is asked for most often stays.
            place.votes = place.votes.saturating_sub(1);
            if place.votes == 0 {
                *place = Place { which, votes: 1, ..Place::default() };
            }
            return Looked::Seldom;
        }
        place.votes = (place.votes + 1).min(2 * OFTEN);
        place.hits = place.hits.wrapping_add(1);
        match &place.copy {
            Some(_) if place.hits % AGAIN == 0 => Looked::Seldom,
            Some(hot) if hot.is_good(key, now, changes) => Looked::Good(hot.entry.clone()),
            _ if place.votes >= OFTEN => Looked::Often,
            _ => Looked::Seldom,
        }
    })
    .unwrap_or(Looked::Seldom)
}

/// Keeps a copy, or forgets the one that there was.
pub(super) fn keep(which: Which, copy: Option<Hot>) {
    let before =
        place(which, |place| if place.which == which { std::mem::replace(&mut place.copy, copy) } else { None });
    drop(before);
}

impl Hot {
    fn is_good(&self, key: &[u8], now: Millis, changes: u64) -> bool {
        self.changes == changes && now < self.until && self.key == key && is_current(&self.tags)
    }
}

/// The same entry, sharing nothing that is counted; nothing if it is large.
pub(super) fn copied(entry: &Entry) -> Option<Arc<Entry>> {
    if entry.weight() > LARGEST {
        return None;
    }
    let Payload::Response(StoredResponse { status, headers, body, trailers }) = &entry.payload else {
        // These are read, and not handed out.
        return Some(Arc::new(entry.clone()));
    };
    let headers = headers.copied()?;
    let trailers = match trailers {
        Some(trailers) => Some(Box::new(Headers::from((**trailers).clone()).copied()?.into_map())),
        None => None,
    };
    let body = Bytes::copy_from_slice(body);
    let payload = Payload::Response(StoredResponse { status: *status, headers, body, trailers });
    Some(Arc::new(entry.with(payload).replayed()))
}
