//! How a response says that it was handled: as a value in its extensions, or, where it came over a socket, in its header.

use std::fmt;

use http::{HeaderMap, Response};
use sfv::{BareItem, List, ListEntry, Parameters, Parser};

use crate::{
    http::cache_status::CACHE_STATUS,
    observe::{Handling, Outcome},
};

/// What says how the cache has handled a request: a response, or the headers of one that came over a socket.
pub trait Answer {
    /// Its headers.
    fn headers(&self) -> &HeaderMap;

    /// What a layer of this process says; by default nothing, and the header `Cache-Status` counts.
    fn outcome(&self) -> Option<&Outcome> {
        None
    }
}

impl<B> Answer for Response<B> {
    fn headers(&self) -> &HeaderMap {
        Self::headers(self)
    }

    fn outcome(&self) -> Option<&Outcome> {
        self.extensions().get()
    }
}

impl Answer for HeaderMap {
    fn headers(&self) -> &HeaderMap {
        self
    }
}

impl<A: Answer> Answer for &A {
    fn headers(&self) -> &HeaderMap {
        (**self).headers()
    }

    fn outcome(&self) -> Option<&Outcome> {
        (**self).outcome()
    }
}

/// What a response says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) handling: Handling,
    reason: Option<String>,
}

impl Told {
    pub(super) fn of(answer: &impl Answer) -> Option<Self> {
        if let Some(Outcome { outcome, reason, .. }) = answer.outcome() {
            return Some(Self { handling: *outcome, reason: reason.map(str::to_owned) });
        }
        let lines: Vec<_> =
            answer.headers().get_all(CACHE_STATUS).iter().filter_map(|line| line.to_str().ok()).collect();
        let members: List = Parser::new(&lines.join(",")).parse().ok()?;
        // The last is the nearest.
        match members.last()? {
            ListEntry::Item(item) => Self::said(&item.params),
            ListEntry::InnerList(_) => None,
        }
    }

    /// What the parameters of one cache say (RFC 9211, section 2).
    fn said(parameters: &Parameters) -> Option<Self> {
        let is = |name: &str| parameters.get(name).is_some_and(|value| *value == BareItem::Boolean(true));
        let text = |name: &str| match parameters.get(name)? {
            BareItem::Token(text) => Some(text.as_str().to_owned()),
            BareItem::String(text) => Some(text.as_str().to_owned()),
            _ => None,
        };
        let ttl = match parameters.get("ttl") {
            Some(BareItem::Integer(ttl)) => i64::from(*ttl),
            _ => 0,
        };
        if is("hit") {
            let handling = if ttl < 0 { Handling::Stale } else { Handling::Hit };
            return Some(Self { handling, reason: None });
        }
        let (fwd, detail) = (text("fwd")?, text("detail"));
        let handling = match &*fwd {
            "bypass" | "method" => Handling::Bypass,
            "request" if matches!(detail.as_deref(), Some("no-store" | "only-if-cached")) => Handling::Bypass,
            _ if is("collapsed") => Handling::Coalesced,
            _ => Handling::Miss,
        };
        Some(Self { handling, reason: Some(detail.unwrap_or(fwd)) })
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
        write!(f, "{}{reason}", self.handling.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_what_the_value_does() {
        for (header, told) in [
            ("c; hit; ttl=30", "hit"),
            ("c; hit", "hit"),
            ("c; hit; ttl=-3", "stale"),
            ("c; fwd=uri-miss; stored; fwd-status=200", "miss (uri-miss)"),
            ("c; fwd=vary-miss; collapsed", "coalesced (vary-miss)"),
            ("c; fwd=uri-miss; detail=set-cookie", "miss (set-cookie)"),
            ("c; fwd=bypass; detail=no-tenant", "bypass (no-tenant)"),
            ("c; fwd=method", "bypass (method)"),
            ("c; fwd=request; detail=only-if-cached", "bypass (only-if-cached)"),
            ("origin; hit, c; fwd=stale; detail=\"x\"", "miss (x)"),
        ] {
            let headers = HeaderMap::from_iter([(CACHE_STATUS, header.parse().unwrap())]);
            assert_eq!(Told::of(&headers).unwrap().to_string(), told, "{header}");
        }
        for header in ["", "c", "c; hit=?0", "(c); hit", ";"] {
            let headers = HeaderMap::from_iter([(CACHE_STATUS, header.parse().unwrap())]);
            assert_eq!(Told::of(&headers), None, "{header}");
        }
        assert_eq!(Told::of(&HeaderMap::new()), None);
    }
}
