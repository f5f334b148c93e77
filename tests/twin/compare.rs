//! Whether an answer of the cached twin is as good as that of the other one.

use std::collections::HashMap;

use bytes::Bytes;
use http::{HeaderMap, Method};

use super::{
    wire::{Reply, Whole},
    world::Asked,
};

/// Headers that are about the way, and not about the response.
const OF_THE_WAY: &[&str] = &[
    "age",
    "cache-invalidated",
    "cache-status",
    "cache-tag",
    "connection",
    "content-length",
    "date",
    "keep-alive",
    "trailer",
    "transfer-encoding",
];

/// What entity tags that begin like this name, the cache knows alone.
const OWN_TAG: &str = "W/\"tca-";

/// Entity tags that were given out: by the cache with the bytes that they name, and the last one of each target.
#[derive(Default)]
pub struct Tags {
    named: HashMap<String, Bytes>,
    last: HashMap<String, String>,
}

impl Tags {
    pub fn last(&self, target: &str) -> String {
        self.last.get(target).cloned().unwrap_or_else(|| "\"none\"".to_owned())
    }

    pub fn learn(&mut self, asked: &Asked, found: &Reply) {
        let (Reply::Whole(whole), tag) = (found, found.header("etag")) else { return };
        if asked.method != Method::GET || whole.status != 200 || tag.is_empty() {
            return;
        }
        self.last.insert(asked.target.clone(), tag.to_owned());
        if tag.starts_with(OWN_TAG) {
            self.named.insert(tag.to_owned(), whole.body.clone());
        }
    }

    fn names(&self, tag: &str, body: &Bytes) -> bool {
        self.named.get(tag) == Some(body)
    }
}

fn is_from_cache(found: &Reply) -> bool {
    found.is_hit() || found.cache_status().contains("collapsed")
}

/// What `asked` might have been, and is answered as well where the cache answers it: it may not know what makes a request odd, and
/// who can decode can do without.
fn others(asked: &Asked) -> Vec<Asked> {
    let plain = asked.but("x-fault", "");
    let both = plain.but("accept-encoding", "");
    let others = [plain, asked.but("accept-encoding", ""), both];
    others.into_iter().filter(|other| other != asked).collect()
}

/// Whether this is an answer to that request, where `twin` says what is answered without a cache.
pub async fn is_good(asked: &Asked, found: &Reply, twin: impl AsyncFn(&Asked) -> Reply, tags: &Tags) -> bool {
    if let Reply::Whole(whole) = found
        && whole.headers.contains_key("cache-tag")
    {
        return false;
    }
    let mut may_be = vec![asked.clone()];
    if is_from_cache(found) {
        may_be.extend(others(asked));
    }
    for asked in may_be {
        let expected = twin(&asked).await;
        let Some(plain) = whole_of(&asked, &twin).await else {
            if is_same(found, &expected) {
                return true;
            }
            continue;
        };
        let is_counted =
            !matches!((found, &plain), (Reply::Whole(found), Reply::Whole(plain)) if !counts(&asked, found, plain));
        if is_counted && (is_same(found, &expected) || is_part(&asked, found, &plain, tags)) {
            return true;
        }
    }
    false
}

/// What a `GET` of the whole is answered, if that is another question.
async fn whole_of(asked: &Asked, twin: &impl AsyncFn(&Asked) -> Reply) -> Option<Reply> {
    if asked.is_grpc() || !matches!(asked.method, Method::GET | Method::HEAD) {
        return None;
    }
    let conditions = ["if-none-match", "if-modified-since", "range"];
    let whole = conditions.iter().fold(asked.clone(), |asked, name| asked.but(name, ""));
    let whole = Asked { method: Method::GET, ..whole };
    if whole == *asked { None } else { Some(twin(&whole).await) }
}

/// Whether the length that a `HEAD` says is that of the whole.
fn counts(asked: &Asked, found: &Whole, plain: &Whole) -> bool {
    let length = found.headers.get("content-length").filter(|_| asked.method == Method::HEAD && found.status == 200);
    let own = plain.headers.get("content-length");
    length.is_none_or(|length| *length == *plain.body.len().to_string() || own == Some(length))
}

pub fn is_same(found: &Reply, expected: &Reply) -> bool {
    match (found, expected) {
        (Reply::Whole(found), Reply::Whole(expected)) => is_equal(found, expected),
        (Reply::Broken, Reply::Broken) => true,
        _ => false,
    }
}

fn is_equal(found: &Whole, expected: &Whole) -> bool {
    let lengths = found.headers.get("content-length").zip(expected.headers.get("content-length"));
    found.status == expected.status
        && found.body == expected.body
        && found.trailers == expected.trailers
        && lengths.is_none_or(|(found, expected)| found == expected)
        && meaning(&found.headers, &expected.headers) == meaning(&expected.headers, &expected.headers)
}

/// The lines that count, in one order. A tag that the cache adds is not in the way.
fn meaning(headers: &HeaderMap, expected: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let is_own = |name: &str, value: &[u8]| {
        name == "etag" && value.starts_with(OWN_TAG.as_bytes()) && !expected.contains_key("etag")
    };
    let lines = headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
    let mut lines: Vec<_> =
        lines.filter(|(name, value)| !OF_THE_WAY.contains(&&**name) && !is_own(name, value)).collect();
    lines.sort();
    lines
}

/// Whether this is what becomes of the whole by the request's conditions, or the part that it asks for.
fn is_part(asked: &Asked, found: &Reply, plain: &Reply, tags: &Tags) -> bool {
    let (found, plain) = match (found, plain) {
        (Reply::Whole(found), Reply::Whole(plain)) => (found, plain),
        // Whatever it is, the client has it; that it is broken, nobody knows yet.
        (Reply::Whole(found), Reply::Broken) => return found.status == 304 && asked.header("if-none-match") == "*",
        _ => return false,
    };
    if plain.status != 200 {
        return is_equal(found, plain);
    }
    let field = |headers: &HeaderMap, name: &str| headers.get(name).map_or("", |v| v.to_str().unwrap()).to_owned();
    let range = range(asked.header("range"), plain.body.len());
    let is_shown = |changed: &[&str]| {
        let rest = |headers: &HeaderMap| {
            let lines = meaning(headers, &plain.headers);
            lines.into_iter().filter(|(name, _)| !changed.contains(&&**name)).collect::<Vec<_>>()
        };
        rest(&found.headers) == rest(&plain.headers)
    };
    match found.status {
        304 => {
            let (own, given) = (field(&plain.headers, "etag"), field(&found.headers, "etag"));
            let wanted: Vec<_> = asked.header("if-none-match").split(',').map(str::trim).collect();
            let is_named = own == given || tags.names(&given, &plain.body);
            let is_known = match asked.header("if-none-match") {
                "" => {
                    !asked.header("if-modified-since").is_empty()
                        && !is_later(&field(&plain.headers, "last-modified"), asked.header("if-modified-since"))
                }
                "*" => true,
                _ => wanted.contains(&&*given) && is_named,
            };
            found.body.is_empty() && is_known && is_shown(&["content-type", "content-encoding"])
        }
        206 if asked.method == Method::GET => {
            let Some(Some((first, last))) = range else { return false };
            let said = format!("bytes {first}-{last}/{}", plain.body.len());
            found.body == plain.body.slice(first..=last)
                && field(&found.headers, "content-range") == said
                && is_shown(&["content-range"])
        }
        416 if asked.method == Method::GET => range == Some(None) && found.body.is_empty(),
        // A range may be ignored.
        200 if asked.method == Method::GET && !asked.header("range").is_empty() => is_equal(found, plain),
        _ => false,
    }
}

/// The bytes that a range asks for: none of it if it is none, or none of them.
fn range(asked: &str, length: usize) -> Option<Option<(usize, usize)>> {
    let (first, last) = asked.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match (first, last.parse::<usize>()) {
        ("", Ok(count)) => (length.saturating_sub(count.max(1)), length.max(1) - 1),
        (first, last) => (first.parse().ok()?, last.unwrap_or(usize::MAX)),
    };
    let is_empty = asked == "bytes=-0" || first >= length;
    Some((!is_empty).then(|| (first, last.min(length - 1))))
}

fn is_later(one: &str, other: &str) -> bool {
    match (httpdate::parse_http_date(one), httpdate::parse_http_date(other)) {
        (Ok(one), Ok(other)) => one > other,
        _ => true,
    }
}
