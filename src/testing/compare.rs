//! What two services answered, and whether it is the same.

use std::{fmt, pin::pin};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, Response, StatusCode, header};

use super::told::Told;

/// What describes the connection or the moment, and not what was asked for.
const OF_THE_MOMENT: [&str; 11] = [
    "age",
    "cache-status",
    "connection",
    "date",
    "expires",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What a cache may add, or take out.
const OF_CACHES: [&str; 6] =
    ["cache-invalidated", "cache-tag", "content-length", "etag", "last-modified", "tower-cache-control"];

/// So much of a body is shown, around where it differs.
const SHOWN: usize = 240;

/// A response, read to its end.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    trailers: HeaderMap,
    /// Why its body has no end.
    broken: Option<String>,
    told: Option<Told>,
}

/// A reply, or the error of the service.
pub(super) type Answered = Result<Reply, String>;

impl Reply {
    pub(super) async fn read<R>(response: Response<R>) -> Self
    where
        R: http_body::Body<Data = Bytes>,
        R::Error: fmt::Display,
    {
        let told = Told::of(&response);
        let (parts, body) = response.into_parts();
        let (mut bytes, mut trailers, mut broken) = (BytesMut::new(), HeaderMap::new(), None);
        let mut body = pin!(body);
        while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            match frame.map(|frame| frame.into_data().map_err(|frame| frame.into_trailers())) {
                Ok(Ok(data)) => bytes.extend_from_slice(&data),
                Ok(Err(rest)) => trailers.extend(rest.unwrap_or_default()),
                Err(error) => {
                    broken = Some(error.to_string());
                    break;
                }
            }
        }
        Self { status: parts.status, headers: parts.headers, body: bytes.freeze(), trailers, broken, told }
    }

    pub(super) fn told(&self) -> Option<&Told> {
        self.told.as_ref()
    }
}

/// Where two answers to one request differ, if they do.
pub(super) fn difference(cached: &Answered, uncached: &Answered, ignored: &[HeaderName]) -> Option<String> {
    let (one, other) = match (cached, uncached) {
        (Ok(one), Ok(other)) => (one, other),
        (Err(_), Err(_)) => return None,
        _ => return Some("one of them failed".to_owned()),
    };
    if one.status != other.status {
        return Some("status".to_owned());
    }
    if one.broken.is_some() != other.broken.is_some() {
        return Some("whether the body comes to its end".to_owned());
    }
    // Where it broke off is an accident.
    if one.body != other.body && one.broken.is_none() {
        return Some("body".to_owned());
    }
    let mut names = one.headers.keys().chain(other.headers.keys()).filter(|name| !ignored.contains(name));
    match names.find(|name| !agree(one, other, name)) {
        Some(name) => Some(format!("header `{name}`")),
        None => (one.trailers != other.trailers).then(|| "trailers".to_owned()),
    }
}

fn agree(one: &Reply, other: &Reply, name: &HeaderName) -> bool {
    if OF_THE_MOMENT.contains(&name.as_str()) {
        return true;
    }
    let (own, others) = (one.headers.get_all(name), other.headers.get_all(name));
    let is_on_one_side = one.headers.contains_key(name) != other.headers.contains_key(name);
    own.iter().eq(others.iter()) || is_on_one_side && OF_CACHES.contains(&name.as_str())
}

/// An answer as a report shows it, beside the other.
pub(super) struct Shown<'a>(pub(super) &'a Answered, pub(super) &'a Answered);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reply = match self.0 {
            Ok(reply) => reply,
            Err(error) => return write!(f, "failed: {error}"),
        };
        write!(f, "{}", reply.status)?;
        let other = self.1.as_ref().ok();
        for name in reply.headers.keys() {
            // Of bodies that differ, the lengths say nothing more.
            let says_more = |other: &Reply| *name != header::CONTENT_LENGTH || reply.body == other.body;
            let differs = other.is_some_and(|other| !agree(reply, other, name) && says_more(other));
            if differs || *name == header::AGE {
                let values: Vec<_> = reply.headers.get_all(name).iter().map(|v| v.as_bytes()).collect();
                write!(f, ", {name}: {}", String::from_utf8_lossy(&values.join(&b", "[..])))?;
            }
        }
        if let Some(broken) = &reply.broken {
            write!(f, ", broken off: {broken}")?;
        }
        let same = other.map_or(0, |other| reply.body.iter().zip(&other.body).take_while(|(a, b)| a == b).count());
        let from = if reply.body.len() <= SHOWN { 0 } else { same.saturating_sub(SHOWN / 4) };
        let to = reply.body.len().min(from + SHOWN);
        let (before, after) = (if from > 0 { "…" } else { "" }, if to < reply.body.len() { "…" } else { "" });
        write!(f, "\n    {before}{}{after}", String::from_utf8_lossy(&reply.body[from..to]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Said<'a> = (u16, &'a [(&'static str, &'static str)], &'static str);

    fn reply((status, headers, body): Said<'_>) -> Answered {
        let named = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        Ok(Reply {
            status: StatusCode::from_u16(status).unwrap(),
            headers: named.collect(),
            body: body.into(),
            trailers: HeaderMap::new(),
            broken: None,
            told: None,
        })
    }

    #[test]
    fn what_means_something_is_compared() {
        let cases: [(Said<'_>, Said<'_>, Option<&str>); 9] = [
            ((200, &[], "a"), (200, &[], "a"), None),
            ((200, &[], "a"), (404, &[], "a"), Some("status")),
            ((200, &[], "a"), (200, &[], "b"), Some("body")),
            ((200, &[("x-a", "1")], ""), (200, &[], ""), Some("header `x-a`")),
            ((200, &[], ""), (200, &[("x-a", "1")], ""), Some("header `x-a`")),
            ((200, &[("vary", "a"), ("vary", "b")], ""), (200, &[("vary", "a")], ""), Some("header `vary`")),
            ((200, &[("age", "7"), ("date", "now")], ""), (200, &[("date", "then")], ""), None),
            ((200, &[("etag", "\"1\"")], ""), (200, &[("last-modified", "then")], ""), None),
            ((200, &[("etag", "\"1\"")], ""), (200, &[("etag", "\"2\"")], ""), Some("header `etag`")),
        ];
        for (one, other, expected) in cases {
            let found = difference(&reply(one), &reply(other), &[]);
            assert_eq!(found.as_deref(), expected, "{one:?} {other:?}");
        }
        let ignored = [HeaderName::from_static("x-a")];
        assert_eq!(difference(&reply((200, &[("x-a", "1")], "")), &reply((200, &[], "")), &ignored), None);
        let failed = Err("lost".to_owned());
        assert_eq!(difference(&failed, &Err("gone".to_owned()), &ignored), None);
        assert!(difference(&failed, &reply((500, &[], "")), &ignored).is_some());
    }
}
