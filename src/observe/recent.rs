//! What has happened last, for people who look: the newest events of each kind, and those as they come.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::BuildHasher,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use serde::Serialize;
use tokio::sync::broadcast;

/// So many of each kind are kept.
const KEPT: usize = 500;

/// More in a second are not noted: nobody could read them.
const A_SECOND: u64 = 100;

/// Somebody who reads too slowly misses what is older.
const BEHIND: usize = 256;

/// Texts of strangers are cut off.
const LONGEST: usize = 256;

/// A text of a stranger, as far as it is of use.
pub(crate) fn shortened(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// Of a write that drops more tags, the first are known again.
const HASHES: usize = 1_000;

/// Which tags a write has dropped, in few bytes.
pub(crate) fn tag_hashes<'t>(named: impl Iterator<Item = &'t [u8]>) -> Arc<[u64]> {
    named.take(HASHES).map(tag_hash).collect()
}

/// A tag by its name within its tenant, in few bytes.
pub(crate) fn tag_hash(named: &[u8]) -> u64 {
    foldhash::fast::FixedState::default().hash_one(named)
}

/// The name of a tenant, as far as it is text.
pub(crate) fn name_of(tenant: &[u8]) -> String {
    shortened(&String::from_utf8_lossy(tenant))
}

/// Something that has happened.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Event {
    /// Milliseconds since 1970.
    pub(crate) at: u64,
    #[serde(flatten)]
    pub(crate) what: What,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum What {
    /// A request that was no hit.
    Miss {
        path: String,
        tenant: Option<String>,
        #[serde(rename = "type")]
        data_type: String,
        outcome: &'static str,
        reason: Option<&'static str>,
        ms: f64,
    },
    Invalidation {
        source: &'static str,
        what: String,
        tenant: Option<String>,
        dropped: BTreeMap<String, u64>,
        total: u64,
        tags: Vec<String>,
        /// The hashes of all of them: not all have room here.
        #[serde(skip)]
        all: Arc<[u64]>,
        ms: f64,
        undelivered: usize,
    },
    Alert {
        alert: String,
        #[serde(rename = "type")]
        data_type: Option<String>,
        value: serde_json::Value,
        raised: bool,
    },
    Audit {
        result: &'static str,
        route: String,
        path: String,
        tenant: Option<String>,
        #[serde(rename = "type")]
        data_type: String,
        age_ms: u64,
        fields: Vec<String>,
        /// What they were and are, if that is asked for.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        values: Vec<Differing>,
        tags: Vec<String>,
        suspects: Vec<String>,
    },
}

/// What was served, and what the inner service says: as JSON, cut off.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Differing {
    pub(crate) field: String,
    pub(crate) served: Option<String>,
    pub(crate) now: Option<String>,
}

impl What {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Miss { .. } => "miss",
            Self::Invalidation { .. } => "invalidation",
            Self::Alert { .. } => "alert",
            Self::Audit { .. } => "audit",
        }
    }
}

/// The kinds there are.
#[cfg(feature = "admin")]
pub(crate) const KINDS: [&str; 4] = ["miss", "invalidation", "alert", "audit"];

#[derive(Debug)]
pub(crate) struct Recent {
    /// Whether anybody may want to see misses.
    watched: AtomicBool,
    kept: Mutex<BTreeMap<&'static str, VecDeque<Event>>>,
    live: broadcast::Sender<Event>,
    /// The second, and how many misses it had.
    second: [AtomicU64; 2],
}

impl Recent {
    pub(super) fn new() -> Self {
        Self {
            watched: AtomicBool::new(false),
            kept: Mutex::default(),
            live: broadcast::channel(BEHIND).0,
            second: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    #[cfg(feature = "admin")]
    pub(crate) fn watch(&self) {
        self.watched.store(true, Relaxed);
    }

    pub(super) fn is_watched(&self) -> bool {
        self.watched.load(Relaxed)
    }

    pub(super) fn note(&self, event: Event) {
        if matches!(event.what, What::Miss { .. }) {
            let second = event.at / 1_000;
            if self.second[0].swap(second, Relaxed) != second {
                self.second[1].store(0, Relaxed);
            }
            if self.second[1].fetch_add(1, Relaxed) >= A_SECOND {
                return;
            }
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let of_kind = kept.entry(event.what.kind()).or_default();
        if of_kind.len() == KEPT {
            of_kind.pop_front();
        }
        of_kind.push_back(event.clone());
        drop(kept);
        // Nobody may be listening.
        let _ = self.live.send(event);
    }

    /// Those of a kind (or of all) that are accepted, the newest first.
    pub(crate) fn newest(&self, kind: Option<&str>, most: usize, accept: impl Fn(&Event) -> bool) -> Vec<Event> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let of_kinds = kept.iter().filter(|(own, _)| kind.is_none_or(|kind| kind == **own));
        let mut all: Vec<_> = of_kinds
            .flat_map(|(_, events)| events.iter().rev().filter(|event| accept(event)).take(most).cloned())
            .collect();
        all.sort_by_key(|event| std::cmp::Reverse(event.at));
        all.truncate(most);
        all
    }

    #[cfg(feature = "admin")]
    pub(crate) fn live(&self) -> broadcast::Receiver<Event> {
        self.live.subscribe()
    }
}
