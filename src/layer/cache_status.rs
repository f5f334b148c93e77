//! `Cache-Status` (RFC 9211): how a request was handled, on every response of a cacheable route.

use std::fmt::Write;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

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
    fn write(self, out: &mut impl Write) -> std::fmt::Result {
        out.write_str(NAME)?;
        match self {
            Self::Hit { ttl: None } => out.write_str("; hit"),
            Self::Hit { ttl: Some(ttl) } => write!(out, "; hit; ttl={ttl}"),
            Self::Miss { stored, detail } => {
                out.write_str("; fwd=miss")?;
                if stored {
                    out.write_str("; stored")?;
                }
                detail.map_or(Ok(()), |detail| write!(out, "; detail={detail}"))
            }
            Self::Collapsed => out.write_str("; fwd=miss; collapsed"),
            Self::Bypass(reason) => write!(out, "; fwd=bypass; detail={reason}"),
        }
    }

    /// Appends this cache's member to the header, after those of caches nearer to the origin.
    pub(crate) fn append(self, headers: &mut HeaderMap) {
        let mut buf = Buf(SmallVec::new());
        for value in headers.get_all(CACHE_STATUS).iter().filter(|v| !v.is_empty()) {
            buf.0.extend_from_slice(value.as_bytes());
            buf.0.extend_from_slice(b", ");
        }
        if self.write(&mut buf).is_err() {
            return;
        }
        let Ok(value) = HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&buf.0)) else { return };
        match headers.get_mut(CACHE_STATUS) {
            // The usual case on a hit: stored headers have a place for it, so that the map does not grow.
            Some(place) if place.is_empty() => *place = value,
            _ => {
                headers.insert(CACHE_STATUS, value);
            }
        }
    }
}

struct Buf(SmallVec<[u8; 128]>);

impl Write for Buf {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        self.0.extend_from_slice(s.as_bytes());
        Ok(())
    }
}
