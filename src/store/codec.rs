//! Entries as bytes, for stores outside this process.
//!
//! ```text
//! version u8 · crc32 u32 (of all that follows) · flags u8
//! created u64 · expires u64 · refresh_until u64 · on_error_until u64 · keep_until u64 · load u32
//! learned polls f32 · changes f32 · exposure f32 · surprise f32, in version 4 only
//! stamps  u16 × (tag: u16 length + bytes · generation u128)
//! status  u16 · headers u16 × (name: u16 length + bytes · value: u32 length + bytes) · trailers likewise
//! body    all the rest; LZ4 with its size in front, if the flags say so
//! ```
//!
//! Times are told by a clock that all processes share, which the store knows: see [`Clocks`]. A list of header names that
//! responses vary by is stored as headers without values. Numbers are little-endian. A value (of the cache-aside function)
//! has no status, headers or trailers. Reading copies nothing but header names that are new to the thread: the body and the header
//! values are slices of what the store returned. An entry whose TTL is not learned is of version 3, so that processes which know
//! no other read it. Whatever cannot be read (foreign, truncated, corrupt, another version) is [`Unreadable`], which the store
//! counts and treats as a miss.

use std::{cell::RefCell, error::Error as StdError, fmt, time::Duration};

use bytes::{Buf, BufMut, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::{Entry, Generation, Payload, Stamp, StoredResponse};
use crate::{catalog::Learned, clock::Millis, key::Tag};

/// Without and with what was learned of its key.
const VERSION: u8 = 3;
const LEARNED: u8 = 4;
pub(crate) const VERSIONS: [u8; 2] = [VERSION, LEARNED];
/// The version and the checksum.
const HEAD: usize = 5;

const RESPONSE: u8 = 1;
const TRAILERS: u8 = 2;
const LZ4: u8 = 4;
const VARY: u8 = 8;

/// Bodies from this size on are compressed.
#[cfg(feature = "lz4")]
const COMPRESS_FROM: usize = 1024;

/// No body is larger than this when it is unpacked, or than so many times what it is packed to, which no format of LZ4 can
/// be: a corrupt size must not take the process's memory.
#[cfg(feature = "lz4")]
const MAX_BODY: (usize, usize) = (256 << 20, 255);

/// These bytes are no entry: foreign, cut, corrupt, or of another version of the format. To a store it is as if there were
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unreadable;

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no entry, or one of another version of the format")
    }
}

impl StdError for Unreadable {}

/// An entry does not fit into the format: it has too many headers or tags (over 65,535), or too long ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TooLarge;

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many or too long headers or tags")
    }
}

impl StdError for TooLarge {}

/// What two clocks say at the same moment: that of this process, which its entries' times are told by, and one that all
/// processes share, by which they are told in the store.
///
/// The shared one is best the server's own. Who can only bound it (an answer took a while to come) takes what it says **at
/// least** to write an entry and **at most** to read one: then no entry is ever fresh for longer than it was meant to be. Where
/// the store has no clock, take the system's; entries then live longer or shorter by as much as the machines' clocks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// This process' clock: the `now` of [`Inquiry`](super::Inquiry) and of [`Store::fill`](super::Store::fill).
    pub here: Millis,
    /// The shared one.
    pub shared: Millis,
}

/// By how much `to` is ahead.
fn ahead(from: Millis, to: Millis) -> i64 {
    let ahead = i128::from(to) - i128::from(from);
    i64::try_from(ahead).unwrap_or(if ahead < 0 { i64::MIN } else { i64::MAX })
}

impl Entry {
    /// The entry as bytes, for a store outside this process. Its body is compressed where that is worth it (feature `lz4`).
    ///
    /// The format has a version and a checksum, so bytes of other versions, and such as were cut or altered, are
    /// [unreadable](Unreadable) and not another entry.
    ///
    /// # Errors
    /// It has too many or too long headers or tags.
    pub fn encode(&self, clocks: Clocks) -> Result<Vec<u8>, TooLarge> {
        encode(self, ahead(clocks.here, clocks.shared)).map(|encoded| encoded.bytes)
    }

    /// The entry that was written as these bytes, which its body and header values go on to share. It is fresh for `longest` at
    /// most, which is that of the [`Inquiry`](super::Inquiry), and served stale for as long after that as was meant: what was to
    /// be fresh for ever, for no time.
    ///
    /// # Errors
    /// These bytes are no entry, which is no error of the store's: it has none.
    pub fn decode(bytes: Bytes, clocks: Clocks, longest: Option<Duration>) -> Result<Self, Unreadable> {
        decode(bytes, ahead(clocks.shared, clocks.here), longest)
    }
}

/// A time by another clock, which is so much ahead.
fn shifted(time: Millis, shift: i64) -> Millis {
    if time == Millis::MAX { time } else { time.saturating_add_signed(shift) }
}

/// An entry as bytes, and what became of its body.
pub(crate) struct Encoded {
    pub(crate) bytes: Vec<u8>,
    /// The sizes of the body before and after, if it was compressed.
    #[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "only stores that count it ask"))]
    pub(crate) compressed: Option<(usize, usize)>,
}

/// `shift` is how far the shared clock is ahead of the one that the entry's times are told by.
pub(crate) fn encode(entry: &Entry, shift: i64) -> Result<Encoded, TooLarge> {
    let nothing = Bytes::new();
    let (body, response) = match &entry.payload {
        Payload::Value(body) => (body, None),
        Payload::Response(response) => (&response.body, Some(response)),
        Payload::Vary(_) => (&nothing, None),
    };
    let headers = response.map(|response| response.headers.to_map());
    let packed = pack(body, headers.as_deref());
    let tail: &[u8] = packed.as_deref().unwrap_or(body);
    let mut flags = if packed.is_some() { LZ4 } else { 0 };
    let mut out = Vec::with_capacity(HEAD + entry.weight() - body.len() + tail.len());
    out.put_u8(if entry.learned.is_some() { LEARNED } else { VERSION });
    out.put_u32_le(0);
    out.put_u8(0);
    for time in [entry.created, entry.expires, entry.refresh_until, entry.on_error_until, entry.keep_until] {
        out.put_u64_le(shifted(time, shift));
    }
    out.put_u32_le(entry.load);
    if let Some(Learned { polls, changes, exposure, surprise }) = entry.learned {
        [polls, changes, exposure, surprise].into_iter().for_each(|number| out.put_f32_le(number));
    }
    put_count(&mut out, entry.stamps.len())?;
    for Stamp { tag, generation } in &entry.stamps {
        put_count(&mut out, tag.as_bytes().len())?;
        out.put_slice(tag.as_bytes());
        out.put_u128_le(generation.0);
    }
    if let Some((response, headers)) = response.zip(headers) {
        flags |= RESPONSE;
        out.put_u16_le(response.status.as_u16());
        // The places of `cache-status` and `age` are empty, and made anew when the entry is read.
        put_headers(&mut out, headers.iter().filter(|(name, value)| !(value.is_empty() && is_place(name))))?;
        if let Some(trailers) = &response.trailers {
            flags |= TRAILERS;
            put_headers(&mut out, trailers.iter())?;
        }
    }
    if let Payload::Vary(names) = &entry.payload {
        flags |= VARY;
        put_headers(&mut out, names.iter().map(|name| (name, &NOTHING)))?;
    }
    out.put_slice(tail);
    out[HEAD] = flags;
    let crc = crc32fast::hash(&out[HEAD..]);
    out[1..HEAD].copy_from_slice(&crc.to_le_bytes());
    Ok(Encoded { compressed: packed.as_ref().map(|p| (body.len(), p.len())), bytes: out })
}

/// What bytes say their checksum is, if they say that they are a response.
#[cfg(any(feature = "redis", feature = "memcached"))]
pub(super) fn checksum_of_response(bytes: &[u8]) -> Option<u32> {
    let (crc, rest) = bytes.get(1..)?.split_first_chunk()?;
    (rest.first()? & RESPONSE != 0).then_some(u32::from_le_bytes(*crc))
}

/// `shift` is how far the clock that the entry's times are to be told by is ahead of the shared one; `longest` is how long
/// it may be fresh at most, whatever its writer thought, if it is more than the way to variants.
pub(crate) fn decode(bytes: Bytes, shift: i64, longest: Option<Duration>) -> Result<Entry, Unreadable> {
    let mut rest = bytes;
    if rest.len() <= HEAD || !VERSIONS.contains(&rest[0]) {
        return Err(Unreadable);
    }
    let has_learned = rest[0] == LEARNED;
    let crc = u32::from_le_bytes([rest[1], rest[2], rest[3], rest[4]]);
    rest.advance(HEAD);
    let flags = rest[0];
    if crc32fast::hash(&rest) != crc || flags & !(RESPONSE | TRAILERS | LZ4 | VARY) != 0 {
        return Err(Unreadable);
    }
    rest.advance(1);
    let mut time = || rest.try_get_u64_le().map(|time| shifted(time, shift)).map_err(|_| Unreadable);
    let (created, expires, refresh_until, on_error_until, keep_until) = (time()?, time()?, time()?, time()?, time()?);
    let load = rest.try_get_u32_le().map_err(|_| Unreadable)?;
    let learned = if has_learned { Some(take_learned(&mut rest)?) } else { None };
    let count = rest.try_get_u16_le().map_err(|_| Unreadable)?;
    let mut stamps = Vec::with_capacity(usize::from(count).min(rest.len() / 18));
    for _ in 0..count {
        let length = rest.try_get_u16_le().map_err(|_| Unreadable)?;
        let tag = Tag(take(&mut rest, length.into())?);
        let generation = Generation(rest.try_get_u128_le().map_err(|_| Unreadable)?);
        stamps.push(Stamp { tag, generation });
    }
    let response = if flags & RESPONSE == 0 {
        None
    } else {
        let status = rest.try_get_u16_le().map_err(|_| Unreadable)?;
        let status = StatusCode::from_u16(status).map_err(|_| Unreadable)?;
        let mut headers = take_headers(&mut rest)?;
        for place in PLACES {
            let entry = headers.try_entry(place).map_err(|_| Unreadable)?;
            entry.or_try_insert(NOTHING.clone()).map_err(|_| Unreadable)?;
        }
        let trailers = if flags & TRAILERS == 0 { None } else { Some(Box::new(take_headers(&mut rest)?)) };
        Some((status, headers, trailers))
    };
    let names = if flags & VARY == 0 { None } else { Some(take_headers(&mut rest)?) };
    let body = if flags & LZ4 == 0 { rest } else { unpack(&rest)? };
    let payload = match response {
        None if names.is_some() => Payload::Vary(names.iter().flat_map(HeaderMap::keys).cloned().collect()),
        None => Payload::Value(body),
        Some((status, headers, trailers)) => {
            Payload::Response(StoredResponse { status, headers: headers.into(), body, trailers })
        }
    };
    let mut entry = Entry {
        payload,
        stamps: stamps.into(),
        created,
        expires,
        refresh_until,
        on_error_until,
        keep_until,
        load,
        learned,
        varied: None,
        replay: Default::default(),
        suits: Default::default(),
    };
    entry.cap(longest);
    Ok(entry)
}

/// Numbers that are none would be read as another TTL each time.
fn take_learned(rest: &mut Bytes) -> Result<Learned, Unreadable> {
    let mut number = || {
        let number = rest.try_get_f32_le().map_err(|_| Unreadable)?;
        if number.is_finite() && number.is_sign_positive() { Ok(number) } else { Err(Unreadable) }
    };
    Ok(Learned { polls: number()?, changes: number()?, exposure: number()?, surprise: number()? })
}

fn put_count(out: &mut Vec<u8>, count: usize) -> Result<(), TooLarge> {
    out.put_u16_le(u16::try_from(count).map_err(|_| TooLarge)?);
    Ok(())
}

static NOTHING: HeaderValue = HeaderValue::from_static("");

fn put_headers<'h>(
    out: &mut Vec<u8>,
    headers: impl Iterator<Item = (&'h HeaderName, &'h HeaderValue)>,
) -> Result<(), TooLarge> {
    let (at, mut count) = (out.len(), 0);
    put_count(out, count)?;
    for (name, value) in headers {
        count += 1;
        put_count(out, name.as_str().len())?;
        out.put_slice(name.as_str().as_bytes());
        out.put_u32_le(u32::try_from(value.len()).map_err(|_| TooLarge)?);
        out.put_slice(value.as_bytes());
    }
    // How many there are is known when they are written.
    let count = u16::try_from(count).map_err(|_| TooLarge)?;
    out[at..at + 2].copy_from_slice(&count.to_le_bytes());
    Ok(())
}

fn take_headers(rest: &mut Bytes) -> Result<HeaderMap, Unreadable> {
    let count = rest.try_get_u16_le().map_err(|_| Unreadable)?;
    // A right checksum is no proof of sense: each header takes six bytes at least, and a map has its limits.
    let fits = usize::from(count) * 6 <= rest.len();
    let capacity = if fits { usize::from(count) + PLACES.len() } else { return Err(Unreadable) };
    let mut headers = HeaderMap::try_with_capacity(capacity).map_err(|_| Unreadable)?;
    for _ in 0..count {
        let length = rest.try_get_u16_le().map_err(|_| Unreadable)?;
        let name = name_of(rest.get(..length.into()).ok_or(Unreadable)?)?;
        rest.advance(length.into());
        let length = rest.try_get_u32_le().map_err(|_| Unreadable)?;
        let value = take(rest, length as usize)?;
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Unreadable)?;
        headers.try_append(name, value).map_err(|_| Unreadable)?;
    }
    Ok(headers)
}

/// So many names are known to each thread, and none that is longer.
const NAMES: (usize, usize) = (64, 64);

thread_local! {
    static NAMES_OF_THREAD: RefCell<[Option<HeaderName>; NAMES.0]> = const { RefCell::new([const { None }; NAMES.0]) };
}

/// A name of a header. One that the library has not is an allocation, but for what this thread has read before: then they share it.
fn name_of(name: &[u8]) -> Result<HeaderName, Unreadable> {
    let read = || HeaderName::from_bytes(name).map_err(|_| Unreadable);
    let (Some(first), Some(last)) = (name.first(), name.last()) else { return Err(Unreadable) };
    let of_thread = |names: &RefCell<[Option<HeaderName>; NAMES.0]>| {
        let mut names = names.try_borrow_mut().ok()?;
        let place = names.get_mut((name.len() * 31 + usize::from(*first) * 7 + usize::from(*last)) % NAMES.0)?;
        if place.as_ref().is_none_or(|known| known.as_str().as_bytes() != name) {
            *place = Some(read().ok()?);
        }
        place.clone()
    };
    let known = if name.len() > NAMES.1 { None } else { NAMES_OF_THREAD.try_with(of_thread).ok().flatten() };
    known.map_or_else(read, Ok)
}

fn take(rest: &mut Bytes, length: usize) -> Result<Bytes, Unreadable> {
    if length > rest.len() { Err(Unreadable) } else { Ok(rest.split_to(length)) }
}

/// What a hit fills in.
const PLACES: [HeaderName; 2] = [HeaderName::from_static("cache-status"), header::AGE];

fn is_place(name: &HeaderName) -> bool {
    PLACES.contains(name)
}

/// The body compressed, if that is worth it: large enough, not compressed already, and at least a tenth smaller.
#[cfg(feature = "lz4")]
fn pack(body: &[u8], headers: Option<&HeaderMap>) -> Option<Vec<u8>> {
    let is_packed = |headers: &HeaderMap| {
        let media_type = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        let packed = ["image/", "video/", "audio/", "font/", "application/zip", "application/gzip", "application/zstd"];
        headers.contains_key(header::CONTENT_ENCODING)
            || (packed.iter().any(|p| media_type.starts_with(p.as_bytes())) && !media_type.starts_with(b"image/svg"))
    };
    if body.len() < COMPRESS_FROM || headers.is_some_and(is_packed) {
        return None;
    }
    let packed = lz4_flex::compress_prepend_size(body);
    (packed.len() <= body.len() / 10 * 9).then_some(packed)
}

#[cfg(not(feature = "lz4"))]
fn pack(_: &[u8], _: Option<&HeaderMap>) -> Option<Vec<u8>> {
    None
}

#[cfg(feature = "lz4")]
fn unpack(packed: &[u8]) -> Result<Bytes, Unreadable> {
    let (size, packed) = lz4_flex::block::uncompressed_size(packed).map_err(|_| Unreadable)?;
    if size > MAX_BODY.0 || size > packed.len().saturating_mul(MAX_BODY.1) {
        return Err(Unreadable);
    }
    let body = lz4_flex::decompress(packed, size).map_err(|_| Unreadable)?;
    if body.len() == size { Ok(body.into()) } else { Err(Unreadable) }
}

/// Another process of the fleet may compress: to this one its entries are misses.
#[cfg(not(feature = "lz4"))]
fn unpack(_: &[u8]) -> Result<Bytes, Unreadable> {
    Err(Unreadable)
}

/// Bytes with a right checksum, which may still make no sense.
#[cfg(any(test, fuzzing))]
pub(crate) fn sealed(version: u8, rest: &[u8]) -> Bytes {
    [&[version], &crc32fast::hash(rest).to_le_bytes()[..], rest].concat().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(body: Vec<u8>, headers: &[(&'static str, &'static str)], response: bool) -> Entry {
        let stamps = ["a", "b"].map(|id| Stamp {
            tag: Tag::entity(b"s{t}", "agent", "agent", id.as_bytes()),
            generation: Generation(u128::MAX - 7),
        });
        let body = Bytes::from(body);
        let payload = if response {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, HeaderValue::from_static(value));
            }
            let trailers = (!headers.is_empty()).then(|| Box::new(map.clone()));
            map.extend(PLACES.map(|place| (place, HeaderValue::from_static(""))));
            Payload::Response(StoredResponse { status: StatusCode::IM_A_TEAPOT, headers: map.into(), body, trailers })
        } else {
            Payload::Value(body)
        };
        Entry {
            payload,
            stamps: stamps.into(),
            created: 1,
            expires: u64::MAX,
            refresh_until: 2,
            on_error_until: 3,
            keep_until: 4,
            load: 5,
            learned: None,
            varied: None,
            replay: Default::default(),
            suits: Default::default(),
        }
    }

    const LEARNT: Learned = Learned { polls: 40.5, changes: 2.25, exposure: 3_600_000.0, surprise: 0.5 };

    fn same(a: &Entry, b: &Entry) -> bool {
        format!("{a:?}") == format!("{b:?}")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn what_is_written_is_read(body in proptest::collection::vec(0u8..4, 0..5_000), response: bool, learned: bool) {
            let headers = [("x-a", "1"), ("x-a", "2"), ("content-type", "text/plain")];
            let entry = Entry { learned: learned.then_some(LEARNT), ..entry(body, &headers, response) };
            let read = decode(encode(&entry, 7).unwrap().bytes.into(), -7, None).unwrap();
            prop_assert!(same(&entry, &read));
        }

        /// More than a thread knows, some of them longer.
        #[test]
        fn names_of_headers_are_read(names in proptest::collection::btree_set("[a-z]{1,3}|x-[a-z]{1,99}|age|cache-status", 1..99)) {
            let names: Box<[HeaderName]> = names.iter().map(|n| n.parse().unwrap()).collect();
            let entry = Entry { payload: Payload::Vary(names), ..entry(vec![], &[], false) };
            let read = decode(encode(&entry, 7).unwrap().bytes.into(), -7, None).unwrap();
            prop_assert!(same(&entry, &read));
        }

        #[test]
        fn anything_else_is_unreadable(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(bytes.into(), 0, None).is_err());
        }

        #[test]
        fn a_flipped_bit_or_a_cut_is_noticed(at in 0usize..3_000, bit in 0u8..8) {
            let good = encode(&entry(vec![7; 1_000], &[("x-a", "1")], true), 0).unwrap().bytes;
            let mut flipped = good.clone();
            let at = at % good.len();
            flipped[at] ^= 1 << bit;
            prop_assert!(decode(flipped.into(), 0, None).is_err());
            prop_assert!(decode(good[..at].to_vec().into(), 0, None).is_err());
        }
    }

    #[cfg(feature = "lz4")]
    #[test]
    fn only_what_shrinks_is_compressed() {
        let packed = |body, headers| encode(&entry(body, headers, true), 0).unwrap().compressed;
        assert!(packed(vec![7; 2_000], &[]).is_some_and(|(from, to)| from == 2_000 && to < 100));
        let half: Vec<u8> = (0..2_000).map(|i| if i < 1_000 { rand::random() } else { 7 }).collect();
        assert!(packed(half, &[]).is_some_and(|(from, to)| from == 2_000 && to > 1_000), "half");
        assert_eq!(packed(vec![7; 1_000], &[]), None, "small");
        assert_eq!(packed(vec![7; 2_000], &[("content-encoding", "br")]), None);
        assert_eq!(packed(vec![7; 2_000], &[("content-type", "image/png")]), None);
        let noise: Vec<u8> = (0..2_000).map(|_| rand::random()).collect();
        assert_eq!(packed(noise, &[]), None, "noise");
    }

    #[cfg(feature = "lz4")]
    #[test]
    fn an_absurd_size_is_unreadable() {
        let mut bytes = encode(&entry(vec![7; 2_000], &[], false), 0).unwrap().bytes;
        let at = bytes.len() - encode(&entry(vec![7; 2_000], &[], false), 0).unwrap().compressed.unwrap().1;
        // Its own size is read, and no other: neither one that is a lie nor one that no such bytes could have.
        for (size, is_read) in [(2_000, true), (1_999, false), (2_001, false), (100_000_000, false), (u32::MAX, false)]
        {
            bytes[at..at + 4].copy_from_slice(&size.to_le_bytes());
            assert_eq!(decode(sealed(VERSION, &bytes[HEAD..]), 0, None).is_ok(), is_read, "{size}");
        }
    }

    #[test]
    fn absurd_counts_are_unreadable() {
        let good = encode(&entry(vec![7; 300_000], &[("x-a", "1")], true), 0).unwrap().bytes;
        let mut refused = 0;
        for at in HEAD + 1..good.len().min(300) {
            let mut bytes = good.clone();
            bytes[at..at + 2].copy_from_slice(&u16::MAX.to_le_bytes());
            refused += usize::from(decode(sealed(VERSION, &bytes[HEAD..]), 0, None).is_err());
        }
        assert!(refused > 20, "{refused}");
        // More headers than a map may hold, all of them there: the count of none is the last of this one.
        let mut many = encode(&entry(vec![], &[], true), 0).unwrap().bytes;
        many.truncate(many.len() - 2);
        many.put_u16_le(40_000);
        for i in 0..40_000u32 {
            let name = format!("x-{i}");
            many.put_u16_le(name.len() as u16);
            many.put_slice(name.as_bytes());
            many.put_u32_le(0);
        }
        assert!(decode(sealed(VERSION, &many[HEAD..]), 0, None).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_and_not_cut() {
        let long = "x".repeat(70_000);
        let tag = Tag(Bytes::from(long.into_bytes()));
        let stamps = [Stamp { tag, generation: Generation(1) }].into();
        assert_eq!(encode(&Entry { stamps, ..entry(vec![], &[], true) }, 0).err(), Some(TooLarge));
    }

    /// No clock but the shared one counts, and the reader's own TTL.
    #[test]
    fn times_are_told_by_the_shared_clock_and_bound_by_the_reader() {
        let written = Entry { created: 1_000, expires: 3_000, ..entry(vec![], &[], true) };
        let bytes = |shift| Bytes::from(encode(&written, shift).unwrap().bytes);
        // The writer's clock is a minute ahead of the shared one, the reader's an hour behind.
        let read = decode(bytes(-60_000 + 100_000), -3_600_000 + 4_000_000, None).unwrap();
        assert_eq!((read.created, read.expires), (441_000, 443_000));
        let read = decode(bytes(0), 0, Some(Duration::from_millis(500))).unwrap();
        assert_eq!((read.created, read.expires), (1_000, 1_500));
        let permanent = Entry { expires: Millis::MAX, ..written };
        let read = decode(encode(&permanent, 5).unwrap().bytes.into(), -7, None).unwrap();
        assert_eq!(read.expires, Millis::MAX);
    }

    /// What processes of released versions may have left in a store: a file for each kind of entry, named after the format's
    /// version. A changed format has another version, files of its own, and leaves these as they are; to write those that are
    /// missing: `WRITE_FIXTURES=1 cargo test --all-features --lib fixtures`.
    mod fixtures {
        use std::{env, fs, path::PathBuf};

        use super::*;

        const CLOCKS: Clocks = Clocks { here: 1_000_000, shared: 1_700_000_000_000 };

        fn dir() -> PathBuf {
            [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "entries"].iter().collect()
        }

        /// One of each kind.
        fn entries() -> Vec<(&'static str, Entry)> {
            let headers = [("content-type", "text/plain"), ("x-twice", "1"), ("x-twice", "2")];
            let timed = |entry: Entry| Entry {
                created: 1_000,
                expires: 3_601_000,
                refresh_until: 3_661_000,
                on_error_until: 3_721_000,
                keep_until: 3_721_000,
                ..entry
            };
            let plain = |response| timed(entry(b"hello".to_vec(), &headers, response));
            let names = ["accept-language", "x-user"].map(HeaderName::from_static).into();
            vec![
                ("response", plain(true)),
                ("value", plain(false)),
                ("vary", Entry { payload: Payload::Vary(names), ..plain(false) }),
                ("lz4", timed(entry(vec![b'a'; 4_000], &headers, true))),
                ("permanent", Entry { expires: Millis::MAX, keep_until: Millis::MAX, ..plain(true) }),
                ("learned", Entry { learned: Some(LEARNT), ..plain(true) }),
            ]
        }

        fn read(file: &str) -> Bytes {
            fs::read(dir().join(file)).unwrap_or_else(|error| panic!("{file}: {error}")).into()
        }

        #[test]
        fn what_this_version_wrote_is_read_as_it_was() {
            for (name, entry) in entries() {
                let version = if entry.learned.is_some() { LEARNED } else { VERSION };
                let file = format!("v{version}-{name}.bin");
                let is_packed = name == "lz4";
                if env::var_os("WRITE_FIXTURES").is_some() && !dir().join(&file).exists() {
                    fs::write(dir().join(&file), entry.encode(CLOCKS).unwrap()).unwrap();
                }
                let bytes = read(&file);
                let found = Entry::decode(bytes.clone(), CLOCKS, None);
                if is_packed && cfg!(not(feature = "lz4")) {
                    assert!(found.is_err(), "{file}");
                    continue;
                }
                assert!(same(&entry, &found.unwrap()), "{file}");
                // How lz4 packs is its own affair.
                assert!(is_packed || bytes == entry.encode(CLOCKS).unwrap(), "{file}: another format, another version");
            }
        }

        /// Of whatever version: an entry, or nothing. No other end of it is read as one, either.
        #[test]
        fn what_any_version_wrote_is_read_or_a_clean_miss() {
            let files: Vec<_> = fs::read_dir(dir()).unwrap().map(|file| file.unwrap().file_name()).collect();
            assert!(files.len() >= entries().len());
            for file in files.iter().map(|file| file.to_str().unwrap()) {
                let bytes = read(file);
                let version: u8 = file[1..file.find('-').unwrap()].parse().unwrap();
                assert_eq!(bytes[0], version, "{file}");
                let _ = Entry::decode(bytes.clone(), CLOCKS, Some(Duration::from_secs(60)));
                for end in 0..bytes.len() {
                    assert_eq!(Entry::decode(bytes.slice(..end), CLOCKS, None).err(), Some(Unreadable), "{file}");
                }
            }
        }
    }

    /// Nothing is learned of numbers that are none, and what is learned costs the others nothing.
    #[test]
    fn what_was_learned_is_sixteen_bytes_of_numbers() {
        let plain = encode(&entry(vec![], &[], true), 0).unwrap().bytes;
        let good = Entry { learned: Some(LEARNT), ..entry(vec![], &[], true) };
        let good = encode(&good, 0).unwrap().bytes;
        assert_eq!((plain[0], good[0], good.len()), (VERSION, LEARNED, plain.len() + 16));
        for (number, is_read) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false), (-1.0, false), (-0.0, false)]
        {
            for at in (HEAD + 45..HEAD + 61).step_by(4) {
                let mut bytes = good.clone();
                bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
                assert_eq!(decode(sealed(LEARNED, &bytes[HEAD..]), 0, None).is_ok(), is_read, "{number}");
            }
        }
    }

    /// The farthest apart that clocks can be.
    #[test]
    fn no_clocks_are_too_far_apart() {
        let entry = entry(vec![], &[], true);
        for (here, shared) in [(0, Millis::MAX), (Millis::MAX, 0), (Millis::MAX, Millis::MAX), (0, 0)] {
            let clocks = Clocks { here, shared };
            let read = Entry::decode(entry.encode(clocks).unwrap().into(), clocks, None).unwrap();
            assert_eq!(read.expires, Millis::MAX);
        }
    }

    #[test]
    fn clocks_may_be_as_far_apart_as_they_like() {
        for (here, shared, shift) in [(5, 3, -2), (3, 5, 2), (0, u64::MAX, i64::MAX), (u64::MAX, 0, i64::MIN)] {
            assert_eq!(ahead(here, shared), shift, "{here} {shared}");
        }
    }
}
