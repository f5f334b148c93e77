//! What stores answer: entries as bytes, and the replies of Redis' servers.

use std::{
    io::Cursor,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, header};
use redis::{ConnectionAddr, IntoConnectionInfo, Parser, PushInfo, Value};

use super::input::Input;
use crate::{
    catalog::Lifetime,
    clock::{Clock, Millis},
    key::{Key, Tag},
    mux::replies_in,
    store::{
        Entry, Frame, FrameKind, Frames, MemoryStore, Payload, Store,
        codec::{VERSIONS, decode, encode, sealed},
        fuzzed::{Held, Identity, Resp, Trouble, claim, name_in, node, parse_generation, slot, time},
    },
};

fn times(entry: &Entry) -> [Millis; 5] {
    [entry.created, entry.expires, entry.refresh_until, entry.on_error_until, entry.keep_until]
}

/// Without the places that a hit fills in.
fn said(headers: &HeaderMap) -> HeaderMap {
    let is_place = |name: &HeaderName| *name == header::AGE || name == "cache-status";
    let said = headers.iter().filter(|(name, value)| !(value.is_empty() && is_place(name)));
    said.fold(HeaderMap::new(), |mut all, (name, value)| {
        all.append(name, value.clone());
        all
    })
}

fn is_same(a: &Entry, b: &Entry) -> bool {
    let payload = match (&a.payload, &b.payload) {
        (Payload::Value(a), Payload::Value(b)) => a == b,
        (Payload::Vary(a), Payload::Vary(b)) => a == b,
        (Payload::Response(a), Payload::Response(b)) => {
            a.status == b.status
                && said(&a.headers.to_map()) == said(&b.headers.to_map())
                && a.body == b.body
                && a.trailers == b.trailers
        }
        _ => false,
    };
    payload && a.stamps == b.stamps && times(a) == times(b) && a.load == b.load && a.learned == b.learned
}

/// Whatever can be read is an entry, and what that is written as is the same entry.
pub(super) fn entry(data: &[u8]) {
    let mut input = Input(data);
    let (shift, longest) = (i64::from(input.byte() as i8) * 1_000, input.byte());
    let longest = (longest > 0).then(|| Duration::from_secs(longest.into()));
    // As it comes: the checksum is seldom right.
    let _ = decode(Bytes::copy_from_slice(input.0), shift, longest);
    for version in VERSIONS {
        sealed_entry(sealed(version, input.0), shift, longest);
    }
}

fn sealed_entry(bytes: Bytes, shift: i64, longest: Option<Duration>) {
    let read = decode(bytes.clone(), 0, None);
    let shifted = decode(bytes, shift, longest);
    assert_eq!(read.is_ok(), shifted.is_ok());
    let (Ok(read), Ok(shifted)) = (read, shifted) else { return };
    let written = encode(&read, 0).map(|encoded| Bytes::from(encoded.bytes)).ok().unwrap();
    let again = decode(written.clone(), 0, None).unwrap();
    assert!(is_same(&read, &again), "{read:?} {again:?}");
    assert_eq!(written, encode(&again, 0).ok().unwrap().bytes);
    if let Some(longest) = longest.filter(|_| !matches!(shifted.payload, Payload::Vary(_))) {
        assert!(shifted.expires <= shifted.created.saturating_add(longest.as_millis() as Millis));
    }
    for (time, by) in times(&read).into_iter().zip(times(&shifted)).filter(|_| longest.is_none()) {
        assert_eq!(by, if time == Millis::MAX { time } else { time.saturating_add_signed(shift) });
    }
}

/// What memcached answers is the same in whatever pieces it comes, and no value is another than what follows its size.
pub(super) fn frames(data: &[u8]) {
    let mut input = Input(data);
    let piece = usize::from(input.byte());
    let (data, frames) = (input.0, || Frames { largest: 1 << 16 });
    let whole = replies_in(frames(), data, data.len());
    assert_eq!(whole, replies_in(frames(), data, piece));
    for reply in &whole.0 {
        if let Frame { kind: FrameKind::Value(value), .. } = reply {
            let framed = [b"\n", &value[..], b"\r\n"].concat();
            assert!(value.len() <= 1 << 16 && data.windows(framed.len()).any(|part| part == framed));
        }
    }
}

/// The same of what Redis answers to look-ups; what the client library reads, but for pushes, is what is found.
pub(super) fn resp(data: &[u8]) {
    let mut input = Input(data);
    let piece = usize::from(input.byte());
    let data = input.0;
    let whole = replies_in(Resp::default(), data, data.len());
    assert_eq!(whole, replies_in(Resp::default(), data, piece));
    let others = values(data).into_iter().filter(|value| !matches!(value, Value::Push { .. }));
    for (reply, other) in whole.0.iter().zip(others) {
        let Ok(value) = reply.value() else { continue };
        assert_eq!(value, other);
        let strings = reply.strings().map(|all| all.map(|string| string.map(<[u8]>::to_vec)).collect::<Vec<_>>());
        let expected = match value {
            Value::Array(all) => Some(all.into_iter().map(|value| match value {
                Value::BulkString(bytes) => Some(bytes),
                _ => None,
            })),
            _ => None,
        };
        assert_eq!(strings, expected.map(Iterator::collect));
    }
}

/// Replies as a server sends them, one after the other.
pub(super) fn values(data: &[u8]) -> Vec<Value> {
    let (mut parser, mut cursor) = (Parser::new(), Cursor::new(data));
    std::iter::from_fn(|| parser.parse_value(&mut cursor).ok()).take(16).collect()
}

pub(super) fn replies(data: &[u8]) {
    let values = values(data);
    identity(&values);
    for value in &values {
        // The year 36812 is far enough.
        assert!(time(Some(value)).is_none_or(|time| (0..1_100_000_000_000_000).contains(&time)), "{value:?}");
        if let Value::ServerError(error) = value {
            let trouble = Trouble::from(error);
            assert!(trouble.to_string().contains(&error.to_string()), "{trouble:?}");
        }
        generation(value);
        if let Value::Push { kind, data } = value {
            hear(&PushInfo { kind: kind.clone(), data: data.clone() });
        }
    }
    slots(&values);
}

fn identity(values: &[Value]) {
    let Ok(identity) = Identity::of(values) else { return };
    assert!(identity.reign.is_none_or(|reign| reign >> 127 == 0));
    let info = |name: &str, id: &str| Value::BulkString(format!("# it\r\n{name}:{id}\r\nx:y\r\n").into_bytes());
    let ids: Vec<_> = values.iter().filter_map(|value| redis::from_redis_value_ref::<String>(value).ok()).collect();
    let ids: Vec<_> = ids.iter().filter(|id| !id.is_empty() && id.bytes().all(|c| c.is_ascii_alphanumeric())).collect();
    for (run, replication) in ids.iter().zip(ids.iter().skip(1)) {
        let reign = |run: &str, of: &str| Identity::of(&[info("run_id", run), info("master_replid", of)]).ok()?.reign;
        assert!(reign(run, replication).is_some());
        assert_eq!(reign(run, replication) == reign(replication, run), run == replication);
    }
}

/// Sixteen bytes, and nothing else.
fn generation(value: &Value) {
    let reign = 7 << 90;
    match (value, parse_generation(value, reign)) {
        (Value::BulkString(bytes), Some(generation)) => {
            assert_eq!((generation.0 ^ reign).to_be_bytes()[..], bytes[..]);
        }
        (Value::BulkString(bytes), None) => assert_ne!(bytes.len(), 16),
        (_, generation) => assert!(generation.is_none()),
    }
}

/// What a push names is not answered from any more; what it says nothing of is.
fn hear(push: &PushInfo) {
    const PREFIX: &[u8] = b"cas:g:";
    static HELD: OnceLock<Held> = OnceLock::new();
    let held = HELD.get_or_init(|| Held::new(MemoryStore::new(1 << 20), Clock::default()));
    held.prove(Millis::MAX);
    let hold = |tag: &Tag, key: &'static [u8]| {
        let entry = Entry::new(Payload::Value(Bytes::new()), [].into(), 0, Lifetime::default());
        let captured = held.memory.capture([tag, &held.era]);
        held.memory.insert(&Key(Bytes::from_static(key)), Arc::new(entry), captured, Millis::MAX);
        assert!(held.memory.peek(key, 0).is_some());
    };
    let (is_told, named) = match push.data.first() {
        Some(Value::Array(keys)) => (true, &keys[..]),
        _ => (false, &[][..]),
    };
    let keys: Vec<_> =
        named.iter().filter_map(|key| if let Value::BulkString(key) = key { Some(key) } else { None }).collect();
    let tags: Vec<_> = keys.iter().filter_map(|key| key.strip_prefix(PREFIX)).collect();
    let (own, other) = (tags.last().copied().unwrap_or(b"none"), b"another's");
    hold(&Tag(Bytes::copy_from_slice(own)), b"own");
    hold(&Tag(Bytes::from_static(other)), b"other");
    held.hear(push, PREFIX);
    let is_held = |key| held.is_alive() && held.memory.peek(key, 0).is_some();
    match push.kind {
        redis::PushKind::Invalidate if is_told => {
            let (is_foreign, is_other) = (tags.len() < keys.len(), tags.contains(&&other[..]));
            assert_eq!(is_held(b"own"), tags.is_empty() && !is_foreign, "{push:?}");
            assert_eq!(is_held(b"other"), !is_other && !is_foreign, "{push:?}");
        }
        redis::PushKind::Invalidate | redis::PushKind::Disconnection => assert!(!is_held(b"own") && !is_held(b"other")),
        _ => assert!(is_held(b"own") && is_held(b"other")),
    }
}

/// Who serves what: addresses that can be connected to, and slots that there are.
fn slots(values: &[Value]) {
    let claim = claim(values.first(), values.get(1), "asked");
    let Some(Value::Array(ranges)) = values.first() else {
        return assert!(claim.own.is_empty() && claim.masters.is_empty());
    };
    assert!(claim.own.len() <= ranges.len() && claim.masters.len() <= ranges.len());
    let seed = "redis://user:secret@seed:1/0".into_connection_info().unwrap();
    for (i, master) in claim.masters.iter().enumerate() {
        assert!(!claim.masters[..i].contains(master));
        let port = master.rsplit_once(':').unwrap().1;
        let node = node(master, &seed);
        assert_eq!(node.is_ok(), port.parse::<u16>().is_ok(), "{master}");
        let Ok(ConnectionAddr::Tcp(host, named)) = node.as_ref().map(|node| node.addr()) else { continue };
        assert!(named.to_string() == port && !host.is_empty(), "{master} {host} {named}");
    }
    // A range with many slots has names that are soon found.
    if claim.own.iter().any(|(first, last)| *last < 16_384 && last.saturating_sub(*first) > 500) {
        let name = name_in(&claim.own, 1).unwrap();
        let at = slot(format!("{{{name}}}").as_bytes());
        assert!(claim.own.iter().any(|&(first, last)| (usize::from(first)..=usize::from(last)).contains(&at)));
    }
}
