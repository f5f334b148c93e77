//! The authority that a request is for: a part of what identifies its response (RFC 9111, section 2; RFC 9110, section 7.1).

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, Uri, header, uri::Authority};
use serde::Deserialize;

use super::tenant::header_values;
use crate::{
    error::ConfigError,
    key::{KeyBuf, push_escaped},
};

/// How far the host of a request (`:authority` or `Host`) tells its response from those for other hosts.
///
/// Answers that hold absolute links, redirects or the name of a site differ by host, and a client may send any. So by default
/// each has entries of its own, and what proxies say in `Forwarded`, `X-Forwarded-Host` and `X-Forwarded-Proto` is part of them.
/// Writes drop entries of all hosts.
///
/// In a file: `hosts = "each"`, `"any"`, `{ same = ["example.com", "www.example.com"] }`, `{ only = ["example.com"] }`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Hosts {
    /// Each host has entries of its own (the default).
    #[default]
    Each,
    /// No answer depends on the host: all share their entries.
    Any,
    /// These hosts share their entries; each other one has its own.
    Same(Vec<String>),
    /// These hosts share their entries; requests for others are not cached.
    Only(Vec<String>),
}

impl Hosts {
    /// These hosts share their entries; each other one has its own.
    pub fn same<T: Into<String>>(hosts: impl IntoIterator<Item = T>) -> Self {
        Self::Same(hosts.into_iter().map(Into::into).collect())
    }

    /// These hosts share their entries; requests for others are not cached.
    pub fn only<T: Into<String>>(hosts: impl IntoIterator<Item = T>) -> Self {
        Self::Only(hosts.into_iter().map(Into::into).collect())
    }

    /// Checked, and spelled as requests are compared.
    pub(crate) fn checked(mut self) -> Result<Self, ConfigError> {
        let (Self::Same(hosts) | Self::Only(hosts)) = &mut self else { return Ok(self) };
        for host in hosts.iter_mut() {
            let authority =
                Authority::try_from(host.as_str()).ok().filter(|authority| !authority.as_str().contains('@'));
            let Some(authority) = authority else {
                return Err(ConfigError::new(format!(
                    "hosts: `{host}` is none; write it as requests name it, such as example.com or localhost:8080"
                )));
            };
            *host = authority.as_str().to_ascii_lowercase();
        }
        if hosts.is_empty() {
            return Err(ConfigError::new("hosts: the list is empty; name some, or say `each` or `any`"));
        }
        Ok(self)
    }

    /// Appends what tells this request's host from others; or why it must not be answered.
    pub(crate) fn push(&self, key: &mut KeyBuf, uri: &Uri, headers: &HeaderMap) -> Result<(), &'static str> {
        if *self == Self::Any {
            return Ok(());
        }
        self.push_host(key, authority(uri, headers)?)?;
        // Only some servers know it, and only of some requests: what they make of it may differ.
        if let Some(scheme) = uri.scheme_str() {
            key.extend_from_slice(b"/s=");
            push_escaped(key, scheme.as_bytes());
        }
        // Most requests came by no proxy: a look at the names is cheaper than to ask for each of these.
        let lengths = [&header::FORWARDED, &FORWARDED_HOST, &FORWARDED_PROTO].map(|name| name.as_str().len());
        let may_say = headers.keys().any(|name| lengths.contains(&name.as_str().len()));
        if may_say { self.push_forwarded(key, headers) } else { Ok(()) }
    }

    /// Listed hosts are one, which no host is spelled like.
    fn push_host(&self, key: &mut KeyBuf, host: Option<Cow<'_, str>>) -> Result<(), &'static str> {
        match (self, host) {
            (Self::Same(hosts) | Self::Only(hosts), Some(own)) if hosts.iter().any(|host| *host == own) => {
                key.extend_from_slice(b"/=");
            }
            (Self::Only(_), _) => return Err("host"),
            (_, Some(own)) => {
                key.push(b'/');
                push_escaped(key, own.as_bytes());
            }
            (_, None) => {}
        }
        Ok(())
    }

    /// Appends the host and scheme that proxies say the client has asked for: many frameworks make links of them.
    fn push_forwarded(&self, key: &mut KeyBuf, headers: &HeaderMap) -> Result<(), &'static str> {
        for line in header_values(headers, &FORWARDED_HOST) {
            key.extend_from_slice(b"/h");
            self.push_host(key, Some(host(line)?))?;
        }
        for line in header_values(headers, &FORWARDED_PROTO) {
            self.push_proto(key, line)?;
        }
        // RFC 7239: `for` and `by` tell clients and proxies apart, not responses.
        for line in header_values(headers, &header::FORWARDED) {
            for pair in line.split(|&b| b == b';' || b == b',').map(<[u8]>::trim_ascii) {
                let mut parts = pair.splitn(2, |&b| b == b'=');
                let (name, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
                if name.eq_ignore_ascii_case(b"host") {
                    key.extend_from_slice(b"/f");
                    self.push_host(key, Some(host(value)?))?;
                } else if name.eq_ignore_ascii_case(b"proto") {
                    self.push_proto(key, value)?;
                }
            }
        }
        Ok(())
    }

    fn push_proto(&self, key: &mut KeyBuf, value: &[u8]) -> Result<(), &'static str> {
        if matches!(self, Self::Only(_)) && value != b"http" && value != b"https" {
            return Err("host");
        }
        key.extend_from_slice(b"/p=");
        push_escaped(key, value);
        Ok(())
    }
}

/// The host that a request names, in small letters.
fn authority<'r>(uri: &'r Uri, headers: &'r HeaderMap) -> Result<Option<Cow<'r, str>>, &'static str> {
    let mut lines = header_values(headers, &header::HOST);
    let said = match (lines.next(), lines.next()) {
        (Some(_), Some(_)) => return Err("host"),
        // There may be none (RFC 9112, section 3.2).
        (Some(b""), None) | (None, _) => None,
        (Some(line), None) => Some(host(line)?),
    };
    let named = uri.authority().map(|authority| host(authority.as_str().as_bytes())).transpose()?;
    match (named, said) {
        // Some servers go by the one, some by the other.
        (Some(named), Some(said)) if named != said => Err("host"),
        (named, said) => Ok(named.or(said)),
    }
}

/// A host and its port, in small letters; an error for what is none, and would be something else in a link.
fn host(name: &[u8]) -> Result<Cow<'_, str>, &'static str> {
    let is_of_host = |c: &u8| c.is_ascii_alphanumeric() || b".-_~:[]%!$&'()*+,;=".contains(c);
    let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty() && name.as_bytes().iter().all(is_of_host));
    let name = name.ok_or("host")?;
    Ok(if name.bytes().any(|c| c.is_ascii_uppercase()) { name.to_ascii_lowercase().into() } else { name.into() })
}

const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

#[cfg(test)]
mod tests {
    use super::*;

    fn place(hosts: &Hosts, uri: &str, headers: &[(&str, &str)]) -> Result<String, &'static str> {
        let headers = headers.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()));
        let mut key = KeyBuf::new();
        hosts.push(
            &mut key,
            &uri.parse().unwrap(),
            &headers.fold(HeaderMap::new(), |mut all, (name, value)| {
                all.append(name, value);
                all
            }),
        )?;
        Ok(String::from_utf8(key).unwrap())
    }

    #[test]
    fn a_host_is_one_however_it_is_spelled() {
        let each = |uri: &str, headers: &[(&str, &str)]| place(&Hosts::Each, uri, headers);
        for (uri, headers, key) in [
            ("/", &[("host", "example.com")][..], Ok("/example.com")),
            ("/", &[("host", "EXAMPLE.com")], Ok("/example.com")),
            ("http://example.com/", &[], Ok("/example.com/s=http")),
            ("https://example.com/", &[("host", "example.com")], Ok("/example.com/s=https")),
            ("/", &[], Ok("")),
            ("/", &[("host", "")], Ok("")),
            ("/", &[("host", "example.com:8080")], Ok("/example.com%3A8080")),
            ("/", &[("host", "[::1]:80")], Ok("/%5B%3A%3A1%5D%3A80")),
            ("/", &[("host", "a"), ("host", "b")], Err("host")),
            ("http://a/", &[("host", "b")], Err("host")),
            ("http://user@example.com/", &[], Err("host")),
            ("/", &[("host", "evil.com/x@example.com")], Err("host")),
            ("/", &[("host", "evil.com/?example.com")], Err("host")),
            ("/", &[("host", "a b")], Err("host")),
        ] {
            assert_eq!(each(uri, headers), key.map(str::to_owned), "{uri} {headers:?}");
        }
        let with = |name, value| each("/", &[("host", "a"), (name, value)]);
        for (name, a, b, same) in [
            ("x-forwarded-host", "a", "b", false),
            ("x-forwarded-proto", "http", "https", false),
            ("x-forwarded-for", "1.1.1.1", "2.2.2.2", true),
            ("forwarded", "for=1.1.1.1;host=a", "for=2.2.2.2; Host=\"a\"", true),
            ("forwarded", "for=1.1.1.1;host=a", "for=1.1.1.1;host=b", false),
            ("forwarded", "for=1.1.1.1, proto=http", "for=1.1.1.1, proto=https", false),
        ] {
            assert_eq!(with(name, a) == with(name, b), same, "{name} {a} {b}");
        }
    }

    #[test]
    fn hosts_may_be_the_same() {
        let (same, only) = (Hosts::same(["A.example", "b.example:81"]), Hosts::only(["a.example", "b.example:81"]));
        let (same, only) = (same.checked().unwrap(), only.checked().unwrap());
        for (host, is_same) in [("a.example", true), ("B.example:81", true), ("b.example", false), ("c", false)] {
            let host = [("host", host)];
            assert_eq!(place(&same, "/", &host) == Ok("/=".to_owned()), is_same, "{host:?}");
            assert_eq!(place(&only, "/", &host), if is_same { Ok("/=".to_owned()) } else { Err("host") }, "{host:?}");
            assert_eq!(place(&Hosts::Any, "/", &host), Ok(String::new()));
        }
        for (name, value, is_known) in [
            ("x-forwarded-host", "b.example:81", true),
            ("x-forwarded-host", "evil.example", false),
            ("x-forwarded-proto", "https", true),
            ("x-forwarded-proto", "x", false),
            ("forwarded", "host=evil.example", false),
        ] {
            let headers = [("host", "a.example"), (name, value)];
            assert_eq!(
                place(&only, "/", &headers).is_ok(),
                is_known,
                "{name} {value}: a stranger could make any number"
            );
        }
        for wrong in [Hosts::only([""]), Hosts::only(["http://a"]), Hosts::only(["a/b"]), Hosts::same::<String>([])] {
            assert!(wrong.clone().checked().is_err(), "{wrong:?}");
        }
    }

    /// A key for each would be as many as a client can think of.
    #[test]
    fn of_few_hosts_there_are_two_schemes() {
        for (hosts, value, is_known) in [
            (Hosts::only(["a"]), "http", true),
            (Hosts::only(["a"]), "https", true),
            (Hosts::only(["a"]), "gopher", false),
            (Hosts::Each, "gopher", true),
        ] {
            let found = place(&hosts, "/", &[("host", "a"), ("x-forwarded-proto", value)]);
            assert_eq!(found.is_ok(), is_known, "{hosts:?} {value}: {found:?}");
        }
    }
}
