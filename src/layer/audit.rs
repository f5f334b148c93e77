//! Whether what is served is what the inner service would say now.
//!
//! Of a share of hits, the entry is loaded anew behind its reader, by the way of any refresh, and compared with what it replaces.
//! What differs is suspect: the next hit of the key is loaded anew, too, and must say the same as the first load, and a moment
//! later the old entry must still be valid (no write has dropped it, and no news of one was on its way). A route whose loads
//! keep differing from each other cannot be compared, which is said once. So what is found is healed already, and nobody has
//! waited for it.

use std::{
    collections::{HashMap, HashSet},
    hash::BuildHasher,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    key::Key,
    observe::{Differing, shortened},
    store::{Entry, Payload},
};

/// So many compare at a time.
const AT_ONCE: usize = 2;

/// So many keys are suspect at a time, and keep so many bytes.
const SUSPECTS: usize = 64;
const SUSPECT_BYTES: usize = 8 << 20;

/// One that is not asked for again meanwhile is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// So many fields are named.
const FIELDS: usize = 20;

/// So deep they are looked for.
const DEPTH: usize = 32;

/// How long nothing is compared after the inner service was slow.
const PAUSE: Duration = Duration::from_secs(10);

/// What was served, and what the inner service says.
#[derive(Clone)]
pub(super) struct Suspect {
    pub(super) old: Arc<Entry>,
    pub(super) new: Arc<Entry>,
    /// How often two loads in a row differed, with no write in between.
    pub(super) strikes: u8,
}

#[derive(Default)]
struct Known {
    suspects: HashMap<Key, Held>,
    /// Routes that say something else each time.
    unreproducible: HashSet<String>,
}

struct Held {
    suspect: Suspect,
    route: String,
    since: Instant,
}

impl Known {
    /// What was not asked for again, and the oldest where there are too many.
    fn tidy(&mut self) {
        self.suspects.retain(|_, held| held.since.elapsed() < FORGOTTEN);
        let bytes = |held: &Held| held.suspect.old.weight() + held.suspect.new.weight();
        while self.suspects.len() > SUSPECTS || self.suspects.values().map(bytes).sum::<usize>() > SUSPECT_BYTES {
            let oldest = self.suspects.iter().min_by_key(|(_, held)| held.since).map(|(key, _)| key.clone());
            oldest.and_then(|key| self.suspects.remove(&key));
        }
    }

    /// A bit for each suspect, so that most hits need not look.
    fn filter(&self) -> u64 {
        self.suspects.keys().fold(0, |bits, key| bits | bit(key.as_bytes()))
    }
}

fn bit(key: &[u8]) -> u64 {
    1 << (foldhash::fast::FixedState::default().hash_one(key) % 64)
}

pub(crate) struct Auditor {
    /// The share of hits that are looked at, where their type says nothing else.
    share: f64,
    /// Whether findings show what differs.
    pub(super) shows: bool,
    known: Mutex<Known>,
    suspects: AtomicU64,
    began: Instant,
    /// Until how many milliseconds after that.
    paused: AtomicU64,
    permits: Semaphore,
}

impl Auditor {
    pub(crate) fn new(share: f64, shows: bool) -> Self {
        Self {
            share,
            shows,
            known: Mutex::default(),
            suspects: AtomicU64::new(0),
            began: Instant::now(),
            paused: AtomicU64::new(0),
            permits: Semaphore::new(AT_ONCE),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a hit is to be compared: by chance, or because its key is suspect.
    pub(super) fn picks(&self, share: Option<f64>, key: &[u8], route: impl FnOnce() -> String) -> bool {
        let share = share.unwrap_or(self.share);
        let is_suspect = || {
            let bits = self.suspects.load(Relaxed);
            bits != 0 && bits & bit(key) != 0 && self.known().suspects.keys().any(|suspect| suspect.as_bytes() == key)
        };
        if share <= 0.0 || !(rand::random::<f64>() < share || is_suspect()) || self.paused.load(Relaxed) > self.now() {
            return false;
        }
        !self.known().unreproducible.contains(&route())
    }

    /// Leave to call the inner service, if not too many have it.
    pub(super) fn permit(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.try_acquire().ok()
    }

    /// The inner service took so long, and has taken so long before. Where it is slow, real requests come first.
    pub(super) fn took(&self, took: Duration, before: u32) {
        if took > Duration::from_millis(100) && took.as_millis() > 3 * u128::from(before.max(10)) {
            self.paused.store(self.now() + u64::try_from(PAUSE.as_millis()).unwrap_or(u64::MAX), Relaxed);
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn suspect(&self, key: &Key, route: String, suspect: Suspect) {
        let mut known = self.known();
        known.suspects.insert(key.clone(), Held { suspect, route, since: Instant::now() });
        known.tidy();
        self.suspects.store(known.filter(), Relaxed);
    }

    pub(super) fn take_suspect(&self, key: &Key) -> Option<Suspect> {
        let mut known = self.known();
        let held = known.suspects.remove(key);
        known.tidy();
        self.suspects.store(known.filter(), Relaxed);
        held.map(|held| held.suspect)
    }

    /// Whether that is new.
    pub(super) fn is_unreproducible(&self, route: String) -> bool {
        let mut known = self.known();
        known.suspects.retain(|_, held| held.route != route);
        self.suspects.store(known.filter(), Relaxed);
        known.unreproducible.insert(route)
    }
}

/// Whether two entries say the same.
pub(super) fn is_same(one: &Entry, other: &Entry) -> bool {
    match (&one.payload, &other.payload) {
        (Payload::Response(one), Payload::Response(other)) => one.status == other.status && one.body == other.body,
        _ => false,
    }
}

/// Where two entries differ: JSON pointers (RFC 6901), or what differs as a whole. Without values, which may be anybody's.
pub(super) fn differences(one: &Entry, other: &Entry) -> Vec<String> {
    let (Payload::Response(one), Payload::Response(other)) = (&one.payload, &other.payload) else { return vec![] };
    let mut fields = vec![];
    if one.status != other.status {
        fields.push("status".to_owned());
    }
    match (serde_json::from_slice(&one.body), serde_json::from_slice(&other.body)) {
        (Ok(one), Ok(other)) => compare(&one, &other, &mut String::new(), 0, &mut fields),
        _ if one.body != other.body => fields.push("body".to_owned()),
        _ => {}
    }
    fields
}

/// What was served in these fields, and what the inner service says.
pub(super) fn values(one: &Entry, other: &Entry, fields: &[String]) -> Vec<Differing> {
    let (Payload::Response(one), Payload::Response(other)) = (&one.payload, &other.payload) else { return vec![] };
    let json = |body: &[u8]| serde_json::from_slice::<Value>(body).ok();
    let (one_json, other_json) = (json(&one.body), json(&other.body));
    let text = |body: &[u8]| Some(shortened(&String::from_utf8_lossy(body)));
    let at = |json: &Option<Value>, field: &str| Some(shortened(&json.as_ref()?.pointer(field)?.to_string()));
    let value = |field: &String| {
        let (served, now) = match &**field {
            "status" => (Some(one.status.as_u16().to_string()), Some(other.status.as_u16().to_string())),
            "body" => (text(&one.body), text(&other.body)),
            field => (at(&one_json, field), at(&other_json, field)),
        };
        Differing { field: field.clone(), served, now }
    };
    fields.iter().map(value).collect()
}

fn compare(one: &Value, other: &Value, at: &mut String, depth: usize, fields: &mut Vec<String>) {
    if one == other || fields.len() >= FIELDS {
        return;
    }
    let length = at.len();
    let mut member = |name: &str, one: Option<&Value>, other: Option<&Value>, at: &mut String| {
        at.push('/');
        at.push_str(&name.replace('~', "~0").replace('/', "~1"));
        match (one, other) {
            (Some(one), Some(other)) => compare(one, other, at, depth + 1, fields),
            _ if fields.len() < FIELDS => fields.push(at.clone()),
            _ => {}
        }
        at.truncate(length);
    };
    match (one, other) {
        (Value::Object(one), Value::Object(other)) if depth < DEPTH => {
            let added = other.keys().filter(|name| !one.contains_key(*name));
            for name in one.keys().chain(added) {
                member(name, one.get(name), other.get(name), at);
            }
        }
        (Value::Array(one), Value::Array(other)) if depth < DEPTH => {
            for i in 0..one.len().max(other.len()) {
                member(&i.to_string(), one.get(i), other.get(i), at);
            }
        }
        _ => fields.push(if at.is_empty() { "body".to_owned() } else { at.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_named_and_not_shown() {
        for (one, other, expected) in [
            (json!({"a": 1, "b": [1, 2]}), json!({"a": 1, "b": [1, 3]}), &["/b/1"][..]),
            (json!({"a": 1}), json!({"b": 1}), &["/a", "/b"]),
            (json!([{"a/b": 1, "~": 1}]), json!([{"a/b": 2, "~": 2}, 1]), &["/0/a~1b", "/0/~0", "/1"]),
            (json!(1), json!(2), &["body"]),
            (json!(1), json!(1), &[]),
        ] {
            let mut fields = vec![];
            compare(&one, &other, &mut String::new(), 0, &mut fields);
            assert_eq!(fields, expected, "{one} {other}");
        }
        let (one, other): (Vec<_>, Vec<_>) = (0..100).map(|i| (i, i + 1)).unzip();
        let mut fields = vec![];
        compare(&json!(one), &json!(other), &mut String::new(), 0, &mut fields);
        assert_eq!(fields.len(), FIELDS);
    }
}
