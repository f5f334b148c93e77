//! `Cache-Status` (RFC 9211): how a request was handled, on every response of a cacheable route.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};

pub(crate) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// The name of this cache in the header.
const NAME: &str = "tower-cache-aside";

/// How a request was handled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Handled {
    /// From the cache; fresh for this many more seconds, or for ever.
    Hit {
        ttl: Option<u64>,
    },
    Miss {
        stored: bool,
        detail: Option<&'static str>,
    },
    /// By waiting for another request's call.
    Collapsed,
    Bypass(&'static str),
}

impl Handled {
    fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(NAME.as_bytes());
        let detail = match self {
            Self::Hit { ttl } => {
                out.extend_from_slice(b"; hit");
                if let Some(ttl) = ttl {
                    out.extend_from_slice(b"; ttl=");
                    out.extend_from_slice(itoa::Buffer::new().format(ttl).as_bytes());
                }
                None
            }
            Self::Miss { stored, detail } => {
                out.extend_from_slice(b"; fwd=miss");
                if stored {
                    out.extend_from_slice(b"; stored");
                }
                detail
            }
            Self::Collapsed => {
                out.extend_from_slice(b"; fwd=miss; collapsed");
                None
            }
            Self::Bypass(reason) => {
                out.extend_from_slice(b"; fwd=bypass");
                Some(reason)
            }
        };
        if let Some(detail) = detail {
            out.extend_from_slice(b"; detail=");
            out.extend_from_slice(detail.as_bytes());
        }
    }

    /// Appends this cache's member to the header, after those of caches nearer to the origin.
    pub(crate) fn append(self, headers: &mut HeaderMap) {
        let mut text = Vec::with_capacity(64);
        // The usual case on a hit: stored headers have a place for it, so that the map does not grow.
        if let Some(place) = headers.get_mut(CACHE_STATUS).filter(|place| place.is_empty()) {
            self.write(&mut text);
            if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(text)) {
                *place = value;
            }
            return;
        }
        for value in headers.get_all(CACHE_STATUS) {
            text.extend_from_slice(value.as_bytes());
            text.extend_from_slice(b", ");
        }
        self.write(&mut text);
        if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(text)) {
            headers.insert(CACHE_STATUS, value);
        }
    }
}
