//! `Cache-Control` as responses and requests write it (RFC 9111, section 5.2), and its targeted sister (RFC 9213).
//!
//! What is malformed makes a response less fresh, never more: a lifetime that cannot be read is zero (section 4.2.1), and
//! of two the smaller counts.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use sfv::{BareItem, Dictionary, ListEntry, Parser};

/// More than anybody means: what is larger is this (RFC 9111, section 1.2.2).
pub(crate) const MAX_SECONDS: u64 = 1 << 31;

/// The directives of a response.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ResponseDirectives {
    pub(crate) no_store: bool,
    pub(crate) private: bool,
    pub(crate) no_cache: bool,
    pub(crate) public: bool,
    pub(crate) must_revalidate: bool,
    pub(crate) proxy_revalidate: bool,
    pub(crate) must_understand: bool,
    pub(crate) max_age: Option<u64>,
    pub(crate) s_maxage: Option<u64>,
    pub(crate) stale_while_revalidate: Option<u64>,
    pub(crate) stale_if_error: Option<u64>,
    /// They are from a targeted header, beside which others do not count.
    pub(crate) targeted: bool,
}

impl ResponseDirectives {
    /// From the targeted header if there is a valid one, else from `Cache-Control`.
    pub(crate) fn of(headers: &HeaderMap, targeted: &HeaderName) -> Self {
        if headers.contains_key(targeted)
            && let Some(found) = Self::targeted(headers, targeted)
        {
            return found;
        }
        let mut this = Self::default();
        for (name, value) in members(headers, &header::CACHE_CONTROL) {
            this.add(&name, value);
        }
        this
    }

    fn targeted(headers: &HeaderMap, name: &HeaderName) -> Option<Self> {
        let lines: Vec<_> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
        let dictionary: Dictionary = Parser::new(&lines.join(&b","[..])).parse().ok()?;
        if dictionary.is_empty() {
            return None;
        }
        let mut this = Self { targeted: true, ..Self::default() };
        for (key, entry) in &dictionary {
            let ListEntry::Item(item) = entry else { continue };
            match &item.bare_item {
                BareItem::Integer(number) => {
                    let seconds = u64::try_from(i64::from(*number)).unwrap_or(0);
                    this.add(key.as_str(), Value::Seconds(seconds.min(MAX_SECONDS)));
                }
                BareItem::Boolean(true) => this.add(key.as_str(), Value::None),
                // A directive of the wrong type makes the whole field as good as none.
                _ if matches!(key.as_str(), "max-age" | "s-maxage") => return None,
                _ => {}
            }
        }
        Some(this)
    }

    fn add(&mut self, name: &str, value: Value) {
        let seconds = |known: Option<u64>| Some(known.unwrap_or(u64::MAX).min(value.seconds()));
        match name {
            "no-store" => self.no_store = true,
            "private" => self.private = true,
            "no-cache" => self.no_cache = true,
            "public" => self.public = true,
            "must-revalidate" => self.must_revalidate = true,
            "proxy-revalidate" => self.proxy_revalidate = true,
            "must-understand" => self.must_understand = true,
            "max-age" => self.max_age = seconds(self.max_age),
            "s-maxage" => self.s_maxage = seconds(self.s_maxage),
            "stale-while-revalidate" => self.stale_while_revalidate = seconds(self.stale_while_revalidate),
            "stale-if-error" => self.stale_if_error = seconds(self.stale_if_error),
            _ => {}
        }
    }

    /// How long the response says it is fresh, as far as a shared cache is concerned.
    pub(crate) fn lifetime(&self, headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
        if let Some(seconds) = self.s_maxage.or(self.max_age) {
            return Some(Duration::from_secs(seconds));
        }
        if self.targeted || !headers.contains_key(header::EXPIRES) {
            return None;
        }
        let expires = single(headers, header::EXPIRES).and_then(date);
        let since = single(headers, header::DATE).and_then(date).unwrap_or(now);
        Some(expires.and_then(|at| at.duration_since(since).ok()).unwrap_or_default())
    }
}

/// The directives of a request.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
pub(crate) struct RequestDirectives {
    pub(crate) no_cache: bool,
    pub(crate) no_store: bool,
    pub(crate) only_if_cached: bool,
    pub(crate) max_age: Option<u64>,
    pub(crate) min_fresh: Option<u64>,
    pub(crate) max_stale: Option<u64>,
}

impl RequestDirectives {
    /// Whether a response of this age, fresh for so many more seconds (`None`: for ever), is good enough.
    pub(crate) fn accept(&self, age: Duration, ttl: Option<i64>) -> bool {
        !self.no_cache
            && self.max_age.is_none_or(|most| age <= Duration::from_secs(most))
            && self.min_fresh.is_none_or(|least| ttl.is_none_or(|ttl| ttl >= i64::try_from(least).unwrap_or(i64::MAX)))
    }

    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut this = Self::default();
        for (name, value) in members(headers, &header::CACHE_CONTROL) {
            match name.as_str() {
                "no-cache" => this.no_cache = true,
                "no-store" => this.no_store = true,
                "only-if-cached" => this.only_if_cached = true,
                "max-age" => this.max_age = Some(value.seconds()),
                "min-fresh" => this.min_fresh = Some(value.seconds()),
                "max-stale" => this.max_stale = Some(if value == Value::None { MAX_SECONDS } else { value.seconds() }),
                _ => {}
            }
        }
        this
    }
}

/// What follows a directive's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    None,
    Seconds(u64),
    Malformed,
}

impl Value {
    fn seconds(self) -> u64 {
        match self {
            Self::Seconds(seconds) => seconds,
            Self::None | Self::Malformed => 0,
        }
    }

    fn parse(text: &str) -> Self {
        let quoted = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
        let digits = quoted.unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Self::Malformed;
        }
        Self::Seconds(digits.parse().unwrap_or(MAX_SECONDS).min(MAX_SECONDS))
    }
}

/// The directives of all lines: names in lower case. A comma in a quoted string parts nothing.
fn members(headers: &HeaderMap, name: &HeaderName) -> impl Iterator<Item = (String, Value)> {
    let lines = headers.get_all(name).iter().map(|line| String::from_utf8_lossy(line.as_bytes()).into_owned());
    lines.flat_map(|line| {
        let mut quoted = false;
        let mut escaped = false;
        let mut parts: Vec<&str> = line
            .split(|c| {
                let comma = c == ',' && !quoted;
                match c {
                    _ if escaped => escaped = false,
                    '\\' if quoted => escaped = true,
                    '"' => quoted = !quoted,
                    _ => {}
                }
                comma
            })
            .collect();
        // What is never closed hides nothing: a `no-store` behind it counts.
        if quoted {
            parts = line.split(',').collect();
        }
        let members = parts.into_iter().map(str::trim).filter(|member| !member.is_empty());
        let members = members.map(|member| match member.split_once('=') {
            None => (member.to_ascii_lowercase(), Value::None),
            // No spaces belong around the equals sign.
            Some((name, _)) if name.trim() != name => (name.trim().to_ascii_lowercase(), Value::Malformed),
            Some((name, value)) => (name.to_ascii_lowercase(), Value::parse(value)),
        });
        members.collect::<Vec<_>>()
    })
}

/// The members of a comma-separated header, over all its lines.
pub(crate) fn list(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter().map(|v| v.to_str().unwrap_or("*"));
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|member| !member.is_empty())
}

/// The value of a header that there may be only one of.
pub(crate) fn single(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// The days as they are written before a date, in short and whole.
const DAYS: [[&str; 2]; 7] = [
    ["Mon", "Monday"],
    ["Tue", "Tuesday"],
    ["Wed", "Wednesday"],
    ["Thu", "Thursday"],
    ["Fri", "Friday"],
    ["Sat", "Saturday"],
    ["Sun", "Sunday"],
];

/// A date as HTTP writes it, or has written it once (RFC 9110, section 5.6.7); in any case, and with any day of the week.
pub(crate) fn date(text: &str) -> Option<SystemTime> {
    // As long as the longest of them, and a bit.
    let text = Some(text.trim()).filter(|text| text.len() <= 40)?;
    httpdate::parse_http_date(text).ok().or_else(|| {
        let (day, rest) = text.split_at_checked(text.find([',', ' '])?)?;
        let length = DAYS.iter().flatten().find(|name| name.eq_ignore_ascii_case(day)).map(|name| name.len() > 3)?;
        let words = rest.split_inclusive([' ', '-']).map(|word| match word.get(..1) {
            _ if word.eq_ignore_ascii_case("gmt") => "GMT".to_owned(),
            Some(first) => first.to_ascii_uppercase() + &word[1..].to_ascii_lowercase(),
            None => word.to_owned(),
        });
        let rest: String = words.collect();
        DAYS.iter().find_map(|day| httpdate::parse_http_date(&format!("{}{rest}", day[usize::from(length)])).ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETED: HeaderName = HeaderName::from_static("cdn-cache-control");

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    fn max_age(line: &'static str) -> Option<u64> {
        ResponseDirectives::of(&headers(&[("cache-control", line)]), &TARGETED).max_age
    }

    /// RFC 9111, sections 1.2.2, 4.2.1 and 5.2.
    #[test]
    fn a_lifetime_that_is_absurd_is_as_short_as_it_can_be_read() {
        for (line, seconds) in [
            ("max-age=60", Some(60)),
            ("MaX-aGe=60", Some(60)),
            ("max-age=\"60\"", Some(60)),
            ("max-age=0060", Some(60)),
            ("foo, max-age=60 , bar", Some(60)),
            ("max-age=60, max-age=5", Some(5)),
            ("max-age=5, max-age=60", Some(5)),
            ("max-age=-1", Some(0)),
            ("max-age='60'", Some(0)),
            ("max-age=60a", Some(0)),
            ("max-age=a60", Some(0)),
            ("max-age=60.5", Some(0)),
            ("max-age =60", Some(0)),
            ("max-age= 60", Some(0)),
            ("max-age", Some(0)),
            ("max-age=", Some(0)),
            ("max-age=99999999999999", Some(MAX_SECONDS)),
            ("max-age=99999999999999999999999999", Some(MAX_SECONDS)),
            ("extension=\"max-age=60\"", None),
            ("extension=\"a, max-age=60\", max-age=1", Some(1)),
            ("extension=\"a\\\", max-age=60\", max-age=2", Some(2)),
            ("extension=\"a, max-age=3", Some(3)),
            ("extension=\\\"a, max-age=4, b\"", None),
            ("x-max-age=60", None),
            ("", None),
        ] {
            assert_eq!(max_age(line), seconds, "{line}");
        }
    }

    /// RFC 9213, section 2.2: a structured dictionary, or nothing.
    #[test]
    fn a_targeted_header_counts_alone_or_not_at_all() {
        for (line, seconds) in [
            ("max-age=60", Some(60)),
            ("foo, max-age=60", Some(60)),
            ("max-age=60, &&&&", None),
            ("max-age=\"60\"", None),
            ("MAX-AGE=60", None),
            ("max-age=60, foo=\"a\"", Some(60)),
            ("max-age=60, s-maxage=\"a\"", None),
            ("", None),
        ] {
            let found = ResponseDirectives::of(
                &headers(&[("cdn-cache-control", line), ("cache-control", "no-store")]),
                &TARGETED,
            );
            assert_eq!((found.max_age, found.no_store), (seconds, seconds.is_none()), "{line}");
        }
    }

    #[test]
    fn expires_counts_from_the_date() {
        let of = |lines: &[(&'static str, &'static str)]| {
            let headers = headers(lines);
            let now = date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
            ResponseDirectives::of(&headers, &TARGETED).lifetime(&headers, now).map(|l| l.as_secs())
        };
        let later = ("expires", "Sun, 06 Nov 1994 08:50:37 GMT");
        assert_eq!(of(&[later]), Some(60));
        assert_eq!(of(&[later, ("date", "Sun, 06 Nov 1994 08:50:00 GMT")]), Some(37));
        assert_eq!(of(&[later, ("date", "nonsense")]), Some(60));
        assert_eq!(of(&[later, ("date", "Sun, 06 Nov 1994 08:59:00 GMT")]), Some(0));
        assert_eq!(of(&[("expires", "0")]), Some(0));
        assert_eq!(of(&[later, ("cache-control", "max-age=5")]), Some(5));
        assert_eq!(of(&[("cache-control", "max-age=5, s-maxage=9")]), Some(9));
        assert_eq!(of(&[("cdn-cache-control", "foo"), later]), None);
        assert_eq!(of(&[]), None);
    }
}
