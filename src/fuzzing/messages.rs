//! Bodies: of values in the store, of gRPC, of requests that are told apart by them, and of the admin's API.

use std::{collections::BTreeMap, pin::pin, sync::OnceLock};

use bytes::Bytes;
use futures_util::future::poll_fn;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header, request};
use http_body::Body;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tower_service::Service;

use super::input::Input;
use crate::{
    admin::{Admin, AdminService},
    cache::{Cache, Codec, Json, MessagePack, Shape},
    catalog::{DataType, Lifetime, Ttl},
    layer::{accepts, message},
    route::{BodyKey, GrpcMethod, GrpcTarget},
    store::{Entry, Payload},
};

#[derive(Debug, Deserialize, Serialize)]
struct Thing {
    id: u64,
    name: String,
    at: Option<f64>,
    #[serde(default)]
    tags: Vec<String>,
    parent: Option<Box<Thing>>,
    kind: Kind,
}

#[derive(Debug, Deserialize, Serialize)]
enum Kind {
    Leaf,
    Pair(i64, char),
    Node(Vec<Kind>),
    Named { key: [u8; 4], map: BTreeMap<i32, ()> },
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "type")]
enum Tagged {
    Thing(Thing),
    Other {
        #[serde(flatten)]
        rest: BTreeMap<String, Kind>,
    },
}

/// A value of some type, in some format: whatever can be read is written as what is read as the same.
pub(super) fn values(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let bytes = input.0;
    match choice % 16 {
        0 => value::<Thing, MessagePack>(bytes),
        1 => value::<Thing, Json>(bytes),
        2 => value::<Kind, MessagePack>(bytes),
        3 => value::<Kind, Json>(bytes),
        4 => value::<Tagged, MessagePack>(bytes),
        5 => value::<Tagged, Json>(bytes),
        6 => value::<BTreeMap<String, Vec<u8>>, MessagePack>(bytes),
        7 => value::<(u8, i128, String, Option<bool>), MessagePack>(bytes),
        8 => value::<Option<[String; 2]>, MessagePack>(bytes),
        9 => value::<serde_json::Value, MessagePack>(bytes),
        10 => value::<serde_json::Value, Json>(bytes),
        11 => value::<Vec<f32>, MessagePack>(bytes),
        12 => value::<Vec<()>, MessagePack>(bytes),
        13 => value::<Vec<Thing>, MessagePack>(bytes),
        14 => value::<std::time::Duration, MessagePack>(bytes),
        _ => value::<std::net::IpAddr, MessagePack>(bytes),
    }
}

fn value<T: Serialize + DeserializeOwned, C: Codec>(bytes: &[u8]) {
    let shape = Shape::<T, Option<T>> { of: Some, some: Option::as_ref };
    let read = |bytes: &[u8]| {
        let payload = Payload::Value(Bytes::copy_from_slice(bytes));
        shape.decode::<C>(&Entry::new(payload, [].into(), 0, Lifetime::default()))
    };
    let Some(value) = read(bytes) else { return };
    // What is no value of this type as it is written (NaN in JSON) is not stored.
    let Ok(written) = shape.encode::<C>(&value) else { return };
    let again = read(&written).expect("it can be read");
    assert_eq!(shape.encode::<C>(&again).ok(), Some(written));
}

fn cache() -> &'static Cache {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    // The first line of a message is an id, the second a team; the rest is what else matters.
    let describe = |bytes: &[u8]| {
        let mut lines = bytes.splitn(3, |&b| b == b'\n');
        let mut text = || String::from_utf8(lines.next().unwrap_or_default().to_vec()).ok();
        let target = GrpcTarget::new(text()?).scope("team", text()?);
        Some(target.variant(lines.next().unwrap_or_default()))
    };
    CACHE.get_or_init(|| {
        let described = GrpcMethod::read("/a.B/Get", "agent").message(describe);
        let cache = Cache::builder("svc").single_tenant("all").memory(1 << 20).body_limit(64 << 10);
        let cache = cache.data_type(DataType::new("agent", Ttl::Standard));
        cache.grpc(described).grpc(GrpcMethod::read("/a.B/List", "agent")).build().unwrap()
    })
}

/// The message of a body, letter by letter.
fn framed(body: &[u8]) -> Option<(bool, &[u8])> {
    let [flag, a, b, c, d, message @ ..] = body else { return None };
    let length = (usize::from(*a) << 24) + (usize::from(*b) << 16) + (usize::from(*c) << 8) + usize::from(*d);
    (length == message.len()).then_some((*flag != 0, message))
}

/// Two calls, each a body after its length, and then headers: frames are what they say, and no two calls have one key.
pub(super) fn grpc(data: &[u8]) {
    let mut input = Input(data);
    let bodies = [Bytes::from(input.part()), Bytes::from(input.part())];
    let headers = [input.headers(), input.headers()];
    for body in &bodies {
        let expected = framed(body).map(|(packed, message)| (!packed).then(|| Bytes::copy_from_slice(message)));
        assert_eq!(message(body), expected);
        let is_good = headers[0].get("grpc-status").is_some_and(|status| status == "0");
        assert_eq!(accepts(body, Some(&headers[0])).is_ok(), expected.is_some() && is_good);
        assert!(accepts(body, None).is_err());
    }
    for path in ["/a.B/Get", "/a.B/List"] {
        let found: [_; 2] = std::array::from_fn(|i| wanted(path, &bodies[i], &headers[i]));
        if let [Some(a), Some(b)] = &found {
            assert_eq!(a == b, seen(path, &bodies[0], &headers[0]) == seen(path, &bodies[1], &headers[1]), "{path}");
        }
        if path == "/a.B/List" {
            assert_eq!(found[0].is_some(), framed(&bodies[0]).is_some());
        }
    }
}

fn wanted(path: &str, body: &Bytes, headers: &HeaderMap) -> Option<Vec<u8>> {
    let core = &cache().0;
    let (mut parts, ()): (request::Parts, ()) = Request::new(()).into_parts();
    parts.headers = headers.clone();
    let message = message(body)?;
    let declared = (&core.cascades.entities, &core.routes.expected);
    let route = core.routes.grpc(path)?;
    let tenant = core.space.tenant("all");
    let wanted = route.wanted(&tenant, &parts, (body, message.as_deref()), &core.known(), declared).ok()?;
    assert!(wanted.tags.iter().all(|tag| tag.tenant() == tenant.head()) && wanted.key.starts_with(tenant.head()));
    Some(wanted.key)
}

/// What a handler sees of a call: its message, in the encodings that it may be answered in.
fn seen(path: &str, body: &[u8], headers: &HeaderMap) -> impl PartialEq + use<> {
    let value = |name: &str| headers.get(name).map_or(vec![], |value| value.as_bytes().to_vec());
    let accepted = headers.get_all("grpc-accept-encoding").iter().map(HeaderValue::as_bytes);
    let accepted = accepted.flat_map(|line| line.split(|&b| b == b',')).map(|one| one.trim_ascii().to_vec());
    let mut accepted: Vec<_> = accepted.collect();
    accepted.sort();
    accepted.dedup();
    let message = if path == "/a.B/Get" { framed(body).unwrap().1 } else { body };
    // Nothing is as good as an empty line.
    let mut message: Vec<_> = message.splitn(3, |&b| b == b'\n').map(<[u8]>::to_vec).collect();
    message.resize(3, vec![]);
    let is_none = accepted.iter().all(Vec::is_empty);
    (value("content-type"), value("grpc-encoding"), if is_none { vec![] } else { accepted }, message)
}

/// Two bodies with a line of zero between them: those of one key say the same.
pub(super) fn bodies(data: &[u8]) {
    let at = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    let (a, b) = (&data[..at], data.get(at + 1..).unwrap_or_default());
    let key = |how: BodyKey, body: &[u8], lines: &[(HeaderName, &'static str)]| {
        let mut key = vec![];
        let headers = lines.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
        how.push(&mut key, &headers, body);
        key
    };
    let of = |body: &[u8]| key(BodyKey::Json, body, &[]);
    assert_eq!(key(BodyKey::Bytes, a, &[]) == key(BodyKey::Bytes, b, &[]), a == b);
    for name in [header::CONTENT_TYPE, header::CONTENT_ENCODING] {
        assert_ne!(of(a), key(BodyKey::Json, a, &[(name, "x")]));
    }
    let read = |body: &[u8]| serde_json::from_slice::<serde_json::Value>(body).ok();
    if of(a) == of(b) && a != b {
        assert!(read(a).is_some(), "{} {}", a.escape_ascii(), b.escape_ascii());
        assert_eq!(read(a), read(b));
    }
    // In other words, with the members in their order and with spaces, it is the same.
    let Some(value) = read(a) else { return };
    let (short, long) = (serde_json::to_vec(&value).unwrap(), serde_json::to_vec_pretty(&value).unwrap());
    if nested(&value) < 30 {
        assert_eq!(of(&short), of(&long), "{value}");
    }
}

/// How deep the deepest value is.
fn nested(value: &serde_json::Value) -> usize {
    let deepest = match value {
        serde_json::Value::Array(values) => values.iter().map(nested).max(),
        serde_json::Value::Object(members) => members.values().map(nested).max(),
        _ => None,
    };
    deepest.unwrap_or(0) + 1
}

fn service() -> AdminService {
    static SERVICE: OnceLock<AdminService> = OnceLock::new();
    SERVICE.get_or_init(|| cache().admin(Admin::bearer("secret").unwrap())).clone()
}

/// A method, a target, and a body: whatever is asked is answered in JSON, and nobody is to keep it.
pub(super) fn admin(data: &[u8]) {
    let mut input = Input(data);
    let mut words = input.line().splitn(2, |&b| b == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let body = String::from_utf8_lossy(input.0).into_owned();
    let bearer = HeaderValue::from_static("Bearer secret");
    let request = Request::builder().method(method).uri(target).header(header::AUTHORIZATION, bearer).body(body);
    let Ok(request) = request else { return };
    let path = request.uri().path().to_owned();
    // One that waits for what happens waits for ever.
    if path.ends_with("/events") {
        return;
    }
    let (is_get, mut service) = (request.method() == Method::GET, service());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let Ok(response) = service.call(request).await;
        let (parts, body) = response.into_parts();
        let (mut body, mut all) = (pin!(body), vec![]);
        while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            all.extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
        assert!([200, 400, 404, 405].contains(&parts.status.as_u16()), "{}", parts.status);
        if parts.headers[header::CONTENT_TYPE] == "application/json" {
            assert!(parts.headers.contains_key(header::CACHE_CONTROL) || !path.contains("/api/"));
            let value: serde_json::Value = serde_json::from_slice(&all).unwrap();
            assert_eq!(value["error"].is_string(), !parts.status.is_success());
            let is_explained = is_get && parts.status.is_success() && path.ends_with("/api/explain");
            assert!(!is_explained || ["hit", "miss", "bypass"].contains(&value["verdict"].as_str().unwrap()));
        }
    });
}
