//! The headers of what is stored. A `HeaderMap` takes 104 bytes for each, and room for more, which is most of what a small
//! response takes: held in this process they are packed, and made a map again when they are sent.

use std::{
    array,
    borrow::Cow,
    cell::RefCell,
    fmt,
    hash::{BuildHasher, Hash, Hasher},
};

use foldhash::fast::FixedState;
use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Names that take a byte. Of others each is kept as it is.
static KNOWN: [HeaderName; 42] = [
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

/// Maps of names alone that a thread has, of which all headers with the same names have one.
const FRAMES: usize = 64;

/// Headers that weigh more are not kept by threads.
const SMALL: usize = 16 << 10;

thread_local! {
    static FRAMES_OF_THREAD: RefCell<[HeaderMap; FRAMES]> = RefCell::new(array::from_fn(|_| HeaderMap::new()));
}

/// Instead of a number of those: the next of the others.
const OTHER: u8 = u8::MAX;

const NOTHING: HeaderValue = HeaderValue::from_static("");

/// The headers of a stored response.
#[derive(Clone)]
pub struct Headers(Form);

#[derive(Clone)]
enum Form {
    Map(HeaderMap),
    Packed(Packed),
}

/// Of each header the number of its name and its value, and the names that have none. (A value that is no allocation of its own,
/// as most handlers' are, stays so.)
#[derive(Clone)]
struct Packed {
    names: Box<[u8]>,
    values: Box<[HeaderValue]>,
    others: Box<[HeaderName]>,
    /// The place of a frame of the same names, if there is one.
    frame: usize,
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
        Some(Self(Form::Packed(Packed::of(map))))
    }

    /// The same, sharing nothing that is counted.
    pub(super) fn copied(&self) -> Option<Self> {
        let mut packed = Packed::of(&self.to_map());
        for name in &mut packed.others {
            *name = HeaderName::from_bytes(name.as_str().as_bytes()).ok()?;
        }
        for value in &mut packed.values {
            let mut own = HeaderValue::from_bytes(value.as_bytes()).ok()?;
            own.set_sensitive(value.is_sensitive());
            *value = own;
        }
        Some(Self(Form::Packed(packed)))
    }

    /// Whether they may be kept ready, by as many threads as there are: as a map, whether they are one now or not.
    pub(super) fn is_small(&self) -> bool {
        match &self.0 {
            Form::Map(map) => weight(map) <= SMALL,
            Form::Packed(packed) => packed.frame < FRAMES,
        }
    }

    /// About how many bytes of memory they take.
    pub(super) fn weight(&self) -> usize {
        match &self.0 {
            Form::Map(map) => weight(map),
            Form::Packed(packed) => {
                let others = packed.others.iter().map(|name| name.as_str().len() + size_of::<HeaderName>());
                let values = packed.values.iter().map(|value| 1 + value.len() + size_of::<HeaderValue>());
                others.sum::<usize>() + values.sum::<usize>()
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
    fn of(map: &HeaderMap) -> Self {
        let (mut names, mut others) = (Vec::with_capacity(map.len()), vec![]);
        let mut hasher = FixedState::default().build_hasher();
        for name in map.iter().map(|(name, _)| name) {
            let known = KNOWN.iter().position(|known| known == name);
            names.push(known.map_or(OTHER, |at| at as u8));
            others.extend(known.is_none().then(|| name.clone()));
            name.hash(&mut hasher);
        }
        // There is no frame of what is large.
        let frame = if weight(map) > SMALL { FRAMES } else { hasher.finish() as usize % FRAMES };
        Self { names: names.into(), values: map.values().cloned().collect(), others: others.into(), frame }
    }

    fn names(&self) -> impl Iterator<Item = &HeaderName> {
        let mut others = self.others.iter();
        self.names.iter().map_while(move |known| match *known {
            OTHER => others.next(),
            known => KNOWN.get(usize::from(known)),
        })
    }

    /// Where a map of the same names was made before, that is filled: finding places for names is most of the work.
    fn map(&self) -> HeaderMap {
        let with = |frames: &RefCell<[HeaderMap; FRAMES]>| {
            let mut frames = frames.try_borrow_mut().ok()?;
            let frame = frames.get_mut(self.frame)?;
            let filled = self.filled(frame);
            if filled.is_none() {
                // Its names are its own, or threads would wait for each other to count who has them.
                let own = |name: &HeaderName| HeaderName::from_bytes(name.as_str().as_bytes()).ok();
                *frame = made(self.names().filter_map(own).map(|name| (name, NOTHING)));
            }
            filled
        };
        let filled = FRAMES_OF_THREAD.try_with(with).ok().flatten();
        filled.unwrap_or_else(|| made(self.names().cloned().zip(self.values.iter().cloned())))
    }

    /// The frame with these values, if its names are these.
    fn filled(&self, frame: &HeaderMap) -> Option<HeaderMap> {
        let is_it = frame.len() == self.values.len() && frame.iter().map(|(name, _)| name).eq(self.names());
        let mut map = is_it.then(|| frame.clone())?;
        map.iter_mut().zip(&self.values).for_each(|((_, place), value)| place.clone_from(value));
        Some(map)
    }
}

/// Of a map's headers, so there are not too many.
fn made(headers: impl Iterator<Item = (HeaderName, HeaderValue)>) -> HeaderMap {
    let mut map = HeaderMap::try_with_capacity(headers.size_hint().1.unwrap_or_default()).unwrap_or_default();
    for (name, value) in headers {
        if map.try_append(name, value).is_err() {
            break;
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> impl Strategy<Value = HeaderName> {
        let known = (0..KNOWN.len()).prop_map(|at| KNOWN[at].clone());
        prop_oneof![known, "[a-z][a-z0-9-]{0,20}".prop_map(|name| HeaderName::try_from(name).unwrap())]
    }

    /// Nor is what is large kept by any thread.
    #[test]
    fn what_is_large_is_packed_as_well() {
        let name = |i: usize| HeaderName::try_from(format!("x-{i}")).unwrap();
        let map: HeaderMap = (0..1_000).map(|i| (name(i), HeaderValue::from(i))).collect();
        let packed = Packed::of(&map);
        assert!(packed.frame == FRAMES && packed.map() == map);
        // What takes less room packed is as large when it is kept ready.
        for (count, is_small) in [(100, true), (200, false)] {
            let headers =
                Headers::from(map.iter().take(count).map(|(n, v)| (n.clone(), v.clone())).collect::<HeaderMap>());
            let packed = headers.packed().unwrap();
            assert!(packed.weight() < SMALL && headers.is_small() == is_small && packed.is_small() == is_small);
        }
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
                // The first time its frame is made, and then it is filled.
                prop_assert_eq!(packed.to_map(), packed.to_map());
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
