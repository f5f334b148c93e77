//! What is asked for, sampled off the hot path, so that it can be asked for again before anybody does. (Feature `warm`.)

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use http::Request;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::{catalog::Drops, clock::Millis, observe::tag_hash};

/// What waits for the job; what comes then is not counted.
const WAITING: usize = 1_024;

/// In the extensions of a request that is asked again by the job: what is good is not answered but replaced, when it ends within this
/// time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Warmup {
    pub(crate) ahead: Millis,
}

/// A request that anybody in the tenant may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replay {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) body: Option<Vec<u8>>,
}

/// A request that was asked.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// What tells it from others: its key, that of its variant if that is known.
    pub(crate) id: u64,
    pub(crate) tenant: Box<[u8]>,
    /// The tags that its path names, hashed.
    pub(crate) tags: Box<[u64]>,
    pub(crate) replay: Replay,
}

pub(crate) enum Sighting {
    Asked(Box<Seen>),
    /// These tags, hashed, were dropped.
    Dropped(Box<[u64]>),
    /// Everything was.
    Cleared,
}

/// Where it is told.
#[derive(Debug)]
pub(crate) struct Sampler {
    tx: mpsc::Sender<Sighting>,
    /// One request in so many is looked at.
    one_in: u64,
    requests: AtomicU64,
    pub(crate) state: WarmState,
}

/// What the job says of itself.
#[derive(Debug)]
pub(crate) struct WarmState {
    /// Whether what was popular before has been asked.
    pub(crate) warmed: watch::Sender<bool>,
    /// What has been loaded, by cause.
    pub(crate) loaded: Mutex<BTreeMap<&'static str, u64>>,
    /// Whose, what, and how popular: the first of the list.
    pub(crate) popular: Mutex<Vec<(Vec<u8>, String, f64)>>,
}

impl Sampler {
    pub(crate) fn new(one_in: u8) -> (Self, mpsc::Receiver<Sighting>) {
        let (tx, rx) = mpsc::channel(WAITING);
        let state = WarmState { warmed: watch::channel(false).0, loaded: Mutex::default(), popular: Mutex::default() };
        (Self { tx, one_in: u64::from(one_in), requests: AtomicU64::new(0), state }, rx)
    }

    /// Whether this request is to be looked at.
    pub(super) fn picks(&self) -> bool {
        // As if by chance, for requests may come in turns (Weyl's sequence, mixed as in SplitMix64).
        let nth = self.requests.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (nth ^ (nth >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed >> 32).is_multiple_of(self.one_in)
    }

    pub(super) fn asked(&self, seen: Box<Seen>) {
        let _ = self.tx.try_send(Sighting::Asked(seen));
    }

    pub(super) fn dropped(&self, drops: &Drops) {
        let tags = drops.groups.iter().flat_map(|group| &group.tags).map(|tag| tag_hash(tag.as_bytes())).collect();
        let _ = self.tx.try_send(Sighting::Dropped(tags));
    }

    pub(super) fn cleared(&self) {
        let _ = self.tx.try_send(Sighting::Cleared);
    }
}

impl Replay {
    /// As a request; `None` if it is none.
    pub(crate) fn request<B>(&self, body: B) -> Option<Request<B>> {
        let mut request = Request::builder().method(self.method.as_str()).uri(self.path.as_str());
        for (name, value) in &self.headers {
            request = request.header(name, value.as_slice());
        }
        request.body(body).ok()
    }
}
