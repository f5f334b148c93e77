//! What a store holds under a key: a response or a value, the generations it was filled under, and its times.

use std::{
    fmt,
    sync::{
        RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use super::{Generation, Millis};
use crate::key::Tag;

/// A tag and the generation it had before the load began.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// The tag.
    pub tag: Tag,
    /// Its generation then.
    pub generation: Generation,
}

/// A response as it is stored and replayed.
#[derive(Clone, Debug)]
pub struct StoredResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers, without those that are the connection's or the cache's own.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
    /// The trailers, if there were any.
    pub trailers: Option<HeaderMap>,
}

#[derive(Clone, Debug)]
pub(crate) enum Payload {
    Response(StoredResponse),
    /// A value of the cache-aside function, as JSON.
    Value(Bytes),
}

/// A stored response or value.
#[derive(Clone, Debug)]
pub struct Entry {
    pub(crate) payload: Payload,
    pub(crate) stamps: Box<[Stamp]>,
    pub(crate) created: Millis,
    /// Fresh until then; `Millis::MAX` means for ever.
    pub(crate) expires: Millis,
    /// Kept until then, to be served stale on purpose.
    pub(crate) keep_until: Millis,
    pub(crate) replay: Replay,
}

/// The headers of a hit, which are the same for all hits of one second: made for the second hit, and cloned for the
/// others. Hot entries are spared the formatting, and others the memory.
#[derive(Default)]
pub(crate) struct Replay {
    /// When it was last hit: (age, time to live) in seconds.
    last: AtomicU64,
    headers: RwLock<(u64, HeaderMap)>,
}

impl Replay {
    /// The headers of this second, which `make` makes.
    pub(crate) fn headers(&self, age: u64, ttl: u64, make: impl FnOnce() -> HeaderMap) -> HeaderMap {
        // Zero is what it begins with; both halves are precise enough for two hits of different seconds to differ.
        let second = ((age << 32) | (ttl & 0xffff_ffff)).wrapping_add(1);
        if let Ok(made) = self.headers.try_read()
            && made.0 == second
        {
            return made.1.clone();
        }
        let headers = make();
        if self.last.swap(second, Ordering::Relaxed) == second
            && let Ok(mut made) = self.headers.try_write()
        {
            *made = (second, headers.clone());
        }
        headers
    }
}

impl Clone for Replay {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Replay")
    }
}

impl Entry {
    /// The generations it was filled under: it is valid only while all of them are current.
    pub fn stamps(&self) -> &[Stamp] {
        &self.stamps
    }

    /// When the store may forget it; `Millis::MAX` means never.
    pub fn keep_until(&self) -> Millis {
        self.keep_until
    }

    /// About how many bytes of memory it takes.
    pub fn weight(&self) -> usize {
        let stamps: usize = self.stamps.iter().map(|s| s.tag.0.len() + 48).sum();
        let payload = match &self.payload {
            Payload::Value(bytes) => bytes.len(),
            Payload::Response(r) => {
                let headers = |h: &HeaderMap| h.iter().map(|(n, v)| n.as_str().len() + v.len() + 104).sum::<usize>();
                r.body.len() + headers(&r.headers) + r.trailers.as_ref().map_or(0, headers)
            }
        };
        size_of::<Self>() + stamps + payload
    }

    pub(crate) fn is_fresh(&self, now: Millis) -> bool {
        now < self.expires
    }

    /// How long it stays fresh; `None` means for ever.
    pub(crate) fn ttl(&self, now: Millis) -> Option<Duration> {
        (self.expires != Millis::MAX).then(|| Duration::from_millis(self.expires.saturating_sub(now)))
    }

    pub(crate) fn age(&self, now: Millis) -> Duration {
        Duration::from_millis(now.saturating_sub(self.created))
    }
}
