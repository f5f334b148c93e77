//! `Cache-Status` (RFC 9211): how a request was handled, on every response of a cacheable route.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use smallvec::SmallVec;

/// On the stack, so that the header takes one allocation.
type Text = SmallVec<[u8; 128]>;

pub(crate) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// How a request was handled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Handled {
    /// From the cache; fresh for this many more seconds (fewer than none: stale), or for ever.
    Hit {
        ttl: Option<i64>,
    },
    Forwarded(Forwarded),
}

/// Why and to what end a request went to the inner service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Forwarded {
    pub(crate) reason: Reason,
    /// What the inner service answered, where that is not what the client gets.
    pub(crate) status: Option<StatusCode>,
    pub(crate) stored: bool,
    /// By waiting for another request's call.
    pub(crate) collapsed: bool,
    pub(crate) detail: Option<&'static str>,
}

/// The `fwd` parameter (RFC 9211, section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Nothing is stored for the URI, or a write has dropped it.
    UriMiss,
    /// What is stored answers other request headers.
    VaryMiss,
    /// What is stored is no longer fresh.
    Stale,
    /// The cache does not handle such requests.
    Bypass,
    /// Nor this method.
    Method,
    /// The request asked for it.
    Request,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::UriMiss => "uri-miss",
            Self::VaryMiss => "vary-miss",
            Self::Stale => "stale",
            Self::Bypass => "bypass",
            Self::Method => "method",
            Self::Request => "request",
        }
    }
}

impl Forwarded {
    pub(crate) fn new(reason: Reason) -> Self {
        Self { reason, status: None, stored: false, collapsed: false, detail: None }
    }

    pub(crate) fn because(reason: Reason, detail: &'static str) -> Handled {
        Handled::Forwarded(Self { detail: Some(detail), ..Self::new(reason) })
    }
}

impl Handled {
    /// Why it is no hit.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Hit { .. } => "fresh",
            Self::Forwarded(forwarded) => forwarded.detail.unwrap_or_else(|| forwarded.reason.as_str()),
        }
    }

    fn write(self, out: &mut Text, name: &str, forwarded_status: Option<StatusCode>, key: Option<&[u8]>) {
        out.extend_from_slice(name.as_bytes());
        match self {
            Self::Hit { ttl } => {
                out.extend_from_slice(b"; hit");
                if let Some(ttl) = ttl {
                    out.extend_from_slice(b"; ttl=");
                    out.extend_from_slice(itoa::Buffer::new().format(ttl).as_bytes());
                }
            }
            Self::Forwarded(forwarded) => {
                out.extend_from_slice(b"; fwd=");
                out.extend_from_slice(forwarded.reason.as_str().as_bytes());
                for (flag, on) in [(&b"; stored"[..], forwarded.stored), (b"; collapsed", forwarded.collapsed)] {
                    if on {
                        out.extend_from_slice(flag);
                    }
                }
                if let Some(detail) = forwarded.detail {
                    out.extend_from_slice(b"; detail=");
                    out.extend_from_slice(detail.as_bytes());
                }
                if let Some(status) = forwarded.status.or(forwarded_status) {
                    out.extend_from_slice(b"; fwd-status=");
                    out.extend_from_slice(status.as_str().as_bytes());
                }
            }
        }
        if let Some(key) = key {
            // Keys are printable and have neither quotes nor backslashes.
            out.extend_from_slice(b"; key=\"");
            out.extend_from_slice(key);
            out.push(b'"');
        }
    }

    /// Appends the member of the cache of this name to the header, after those of caches nearer to the origin; without a name
    /// nothing. `status` is what the inner service answered, if it was asked.
    pub(crate) fn say(
        self,
        name: Option<&str>,
        headers: &mut HeaderMap,
        status: Option<StatusCode>,
        key: Option<&[u8]>,
    ) {
        let Some(name) = name else {
            if headers.get(CACHE_STATUS).is_some_and(HeaderValue::is_empty) {
                headers.remove(CACHE_STATUS);
            }
            return;
        };
        let mut text = Text::new();
        // The usual case on a hit: stored headers have a place for it, so that the map does not grow.
        if let Some(place) = headers.get_mut(CACHE_STATUS).filter(|place| place.is_empty()) {
            self.write(&mut text, name, status, key);
            if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text)) {
                *place = value;
            }
            return;
        }
        for value in headers.get_all(CACHE_STATUS) {
            text.extend_from_slice(value.as_bytes());
            text.extend_from_slice(b", ");
        }
        self.write(&mut text, name, status, key);
        if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text)) {
            headers.insert(CACHE_STATUS, value);
        }
    }
}
