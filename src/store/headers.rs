//! The headers of what is stored. A `HeaderMap` takes 104 bytes for each, and room for more, which is most of what a small
//! response takes: held in this process they are packed, and made a map again when they are sent.

use std::{borrow::Cow, fmt};

use bytes::{Buf, BufMut, Bytes};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{self, InvalidHeaderValue},
};

/// Names that take a byte. Of others each is kept as it is.
const KNOWN: [HeaderName; 42] = [
    header::ACCEPT_RANGES,
    header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
    header::ACCESS_CONTROL_ALLOW_HEADERS,
    header::ACCESS_CONTROL_ALLOW_METHODS,
    header::ACCESS_CONTROL_ALLOW_ORIGIN,
    header::ACCESS_CONTROL_EXPOSE_HEADERS,
    header::ACCESS_CONTROL_MAX_AGE,
    header::AGE,
    header::ALLOW,
    header::ALT_SVC,
    header::CACHE_CONTROL,
    header::CACHE_STATUS,
    header::CDN_CACHE_CONTROL,
    header::CONTENT_DISPOSITION,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_LENGTH,
    header::CONTENT_LOCATION,
    header::CONTENT_RANGE,
    header::CONTENT_SECURITY_POLICY,
    header::CONTENT_SECURITY_POLICY_REPORT_ONLY,
    header::CONTENT_TYPE,
    header::DATE,
    header::ETAG,
    header::EXPIRES,
    header::LAST_MODIFIED,
    header::LINK,
    header::LOCATION,
    header::PRAGMA,
    header::REFERRER_POLICY,
    header::RETRY_AFTER,
    header::SERVER,
    header::SET_COOKIE,
    header::STRICT_TRANSPORT_SECURITY,
    header::VARY,
    header::VIA,
    header::WARNING,
    header::WWW_AUTHENTICATE,
    header::X_CONTENT_TYPE_OPTIONS,
    header::X_DNS_PREFETCH_CONTROL,
    header::X_FRAME_OPTIONS,
    header::X_XSS_PROTECTION,
];

/// Instead of a number of those: the next of the others.
const OTHER: u8 = u8::MAX;

/// Set in the length of a value that is not to be shown.
const SENSITIVE: u32 = 1 << 31;

/// The headers of a stored response.
#[derive(Clone)]
pub struct Headers(Form);

#[derive(Clone)]
enum Form {
    Map(HeaderMap),
    Packed(Packed),
}

/// Of each header the number of its name, the length of its value and the value, in one piece.
#[derive(Clone)]
struct Packed {
    bytes: Bytes,
    others: Box<[HeaderName]>,
    count: usize,
}

impl Headers {
    /// As a map.
    pub fn to_map(&self) -> Cow<'_, HeaderMap> {
        match &self.0 {
            Form::Map(map) => Cow::Borrowed(map),
            Form::Packed(packed) => Cow::Owned(packed.map()),
        }
    }

    /// As a map, of headers that are not needed any more.
    pub(crate) fn into_map(self) -> HeaderMap {
        match self.0 {
            Form::Map(map) => map,
            Form::Packed(packed) => packed.map(),
        }
    }

    /// The same headers in little room; nothing if they are.
    pub(super) fn packed(&self) -> Option<Self> {
        let Form::Map(map) = &self.0 else { return None };
        Packed::of(map).map(|packed| Self(Form::Packed(packed)))
    }

    /// The same, sharing nothing that is counted.
    pub(super) fn copied(&self) -> Option<Self> {
        let map = self.to_map();
        let mut packed = Packed::of(&map)?;
        for name in &mut packed.others {
            *name = HeaderName::from_bytes(name.as_str().as_bytes()).ok()?;
        }
        Some(Self(Form::Packed(packed)))
    }

    /// About how many bytes of memory they take.
    pub(super) fn weight(&self) -> usize {
        match &self.0 {
            Form::Map(map) => weight(map),
            Form::Packed(packed) => {
                let others = packed.others.iter().map(|name| name.as_str().len() + size_of::<HeaderName>());
                packed.bytes.len() + others.sum::<usize>()
            }
        }
    }
}

impl Default for Headers {
    fn default() -> Self {
        HeaderMap::new().into()
    }
}

impl From<HeaderMap> for Headers {
    fn from(map: HeaderMap) -> Self {
        Self(Form::Map(map))
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_map().fmt(f)
    }
}

/// About how many bytes of memory a map takes.
pub(super) fn weight(map: &HeaderMap) -> usize {
    map.iter().map(|(name, value)| name.as_str().len() + value.len() + 104).sum()
}

impl Packed {
    /// None if a value is longer than can be said.
    fn of(map: &HeaderMap) -> Option<Self> {
        let size = map.values().map(|value| 1 + size_of::<u32>() + value.len()).sum();
        let (mut bytes, mut others) = (Vec::with_capacity(size), vec![]);
        for (name, value) in map {
            let known = KNOWN.iter().position(|known| known == name);
            bytes.put_u8(known.map_or(OTHER, |at| at as u8));
            others.extend(known.is_none().then(|| name.clone()));
            let length = u32::try_from(value.len()).ok().filter(|length| length & SENSITIVE == 0)?;
            bytes.put_u32_le(if value.is_sensitive() { length | SENSITIVE } else { length });
            bytes.put_slice(value.as_bytes());
        }
        Some(Self { bytes: bytes.into(), others: others.into(), count: map.len() })
    }

    fn map(&self) -> HeaderMap {
        let mut map = HeaderMap::try_with_capacity(self.count).unwrap_or_default();
        let (mut rest, mut others) = (self.bytes.clone(), self.others.iter());
        // It was made of a map, so there is nothing that cannot be read or does not fit.
        while let Some((name, value)) = next(&mut rest, &mut others) {
            let Ok(value) = value else { break };
            if map.try_append(name, value).is_err() {
                break;
            }
        }
        map
    }
}

type Header = (HeaderName, Result<HeaderValue, InvalidHeaderValue>);

fn next<'a>(rest: &mut Bytes, others: &mut impl Iterator<Item = &'a HeaderName>) -> Option<Header> {
    let name = match rest.try_get_u8().ok()? {
        OTHER => others.next()?.clone(),
        known => KNOWN.get(usize::from(known))?.clone(),
    };
    let said = rest.try_get_u32_le().ok()?;
    let length = (said & !SENSITIVE) as usize;
    let value = (length <= rest.len()).then(|| HeaderValue::from_maybe_shared(rest.split_to(length)))?;
    let value = value.map(|mut value| {
        value.set_sensitive(said & SENSITIVE != 0);
        value
    });
    Some((name, value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> impl Strategy<Value = HeaderName> {
        let known = (0..KNOWN.len()).prop_map(|at| KNOWN[at].clone());
        prop_oneof![known, "[a-z][a-z0-9-]{0,20}".prop_map(|name| HeaderName::try_from(name).unwrap())]
    }

    proptest! {
        /// In their order, with all values of a name, empty ones, bytes that are no text, and what is not to be shown.
        #[test]
        fn what_is_packed_is_the_same(
            headers in proptest::collection::vec((name(), proptest::collection::vec(32u8..127, 0..40), any::<bool>(), any::<bool>()), 0..40),
        ) {
            let mut map = HeaderMap::new();
            for (name, mut value, sensitive, opaque) in headers {
                value.extend(opaque.then_some(0xe9));
                let mut value = HeaderValue::from_bytes(&value).unwrap();
                value.set_sensitive(sensitive);
                map.append(name, value);
            }
            let headers = Headers::from(map.clone());
            for packed in [headers.packed().unwrap(), headers.copied().unwrap()] {
                let found = packed.to_map();
                let said = |map: &HeaderMap| {
                    map.iter().map(|(n, v)| (n.clone(), v.clone(), v.is_sensitive())).collect::<Vec<_>>()
                };
                prop_assert_eq!(said(&found), said(&map));
                prop_assert!(packed.packed().is_none());
            }
        }
    }
}
