//! Path patterns: axum's `{param}` syntax, and which entity each parameter names.

use std::{borrow::Cow, collections::BTreeMap};

use http::uri::PathAndQuery;
use percent_encoding::percent_decode_str;

use crate::{
    catalog::{Canonical, Entities, spelled},
    error::ConfigError,
};

/// The router names its own a to y, and panics at the next.
pub(crate) const MOST_PARAMS: usize = 25;

/// The parameters of a path, in the order of the path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pattern {
    params: Vec<Param>,
}

/// A parameter, and the entity that it names.
#[derive(Debug, Clone)]
pub(crate) struct Param {
    pub(crate) name: String,
    pub(crate) entity: String,
    /// What comes before it: the folder, or the whole path up to here where that is a parameter too.
    place: String,
    /// Its own name says which entity it is (`agent_id`), or `entities` does; `{id}` may be anything's.
    is_explicit: bool,
    canonical: Option<Canonical>,
    /// It matches whatever is left of the path.
    is_rest: bool,
}

impl Param {
    /// Whether its own name says which entity it is, or `entities` does.
    pub(crate) fn is_explicit(&self) -> bool {
        self.is_explicit
    }

    /// Whether it evidently names the same entity as another parameter that is called the same.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.entity == other.entity && (self.is_explicit && other.is_explicit || self.place == other.place)
    }

    /// The value as handlers see it, percent-decoded, in the canonical form of the entity's ids; `None` if it has none.
    pub(crate) fn value<'p>(&self, params: &matchit::Params<'_, 'p>) -> Option<Cow<'p, [u8]>> {
        let raw = percent_decode_str(params.get(&self.name).unwrap_or_default());
        spelled(self.canonical.as_ref(), raw.into())
    }

    /// The value as it tells resources apart: the canonical form, where there is one. Else an escaped delimiter is not the
    /// delimiter (RFC 3986, section 2.2), and of the rest of a path, which may be another server's, nothing is decoded.
    pub(crate) fn part<'p>(&self, params: &matchit::Params<'_, 'p>) -> Option<Cow<'p, [u8]>> {
        let raw = params.get(&self.name).unwrap_or_default();
        if self.canonical.is_some() {
            return self.value(params);
        }
        Some(if self.is_rest || !raw.contains('%') { raw.as_bytes().into() } else { unescaped(raw).into() })
    }
}

impl Pattern {
    /// `overrides` says what a parameter is called: else `agent_id` names the entity `agent`.
    pub(crate) fn new(path: &str, overrides: &BTreeMap<String, String>, entities: &Entities) -> Result<Self, String> {
        check_path(path)?;
        let mut params = vec![];
        let mut rest = path;
        while let Some(open) = rest.find('{') {
            if rest[open..].starts_with("{{") {
                rest = &rest[open + 2..];
                continue;
            }
            let close = rest[open..].find('}').ok_or("a { is not closed")? + open;
            let is_rest = rest[open + 1..].starts_with('*');
            let name = rest[open + 1..close].trim_start_matches('*').to_owned();
            // The router reads doubled ones as a part of the name.
            if name.contains('{') || rest[close + 1..].starts_with('}') {
                return Err("a parameter has no braces in its name, or behind it".to_owned());
            }
            let explicit = overrides.get(&name).map(String::as_str).or_else(|| name.strip_suffix("_id"));
            let entity = explicit.unwrap_or(&name).to_owned();
            let before = &path[..path.len() - rest.len() + open];
            let folder = before.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            let place = if folder.is_empty() || folder.contains('{') { before } else { folder }.to_owned();
            let (is_explicit, canonical) = (explicit.is_some(), entities.canonical(&entity).cloned());
            params.push(Param { name, entity, place, is_explicit, canonical, is_rest });
            rest = &rest[close + 1..];
        }
        if params.len() > MOST_PARAMS {
            return Err(format!("it has {} parameters, and may have {MOST_PARAMS}", params.len()));
        }
        if let Some(unknown) = overrides.keys().find(|name| !params.iter().any(|p| p.name == **name)) {
            return Err(format!("it has no parameter `{unknown}`, which `entities` names"));
        }
        Ok(Self { params })
    }

    pub(crate) fn params(&self) -> &[Param] {
        &self.params
    }

    pub(crate) fn position(&self, param: &str) -> Option<usize> {
        self.params.iter().position(|p| p.name == param)
    }

    /// This parameter, or the last.
    pub(crate) fn resource(&self, param: Option<&str>) -> Option<&Param> {
        match param {
            None => self.params.last(),
            Some(param) => self.params.iter().find(|p| p.name == param),
        }
    }
}

/// Decodes what is escaped without need, and spells the other escapes in one way. A `%` that escapes nothing is doubled, so that
/// it does not begin an escape with what was one after it: `%2%46` is not `%2F`.
fn unescaped(raw: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len());
    for (i, piece) in raw.split('%').enumerate() {
        if i == 0 {
            out.extend_from_slice(piece.as_bytes());
            continue;
        }
        let escape = piece.get(..2).and_then(|hex| Some((hex, u8::from_str_radix(hex, 16).ok()?)));
        match escape.filter(|(hex, _)| hex.bytes().all(|c| c.is_ascii_hexdigit())) {
            Some((_, byte)) if !is_delimiter(byte) => out.push(byte),
            Some((hex, _)) => {
                out.push(b'%');
                out.extend_from_slice(hex.to_ascii_uppercase().as_bytes());
            }
            None => {
                out.extend_from_slice(b"%%");
                out.extend_from_slice(piece.as_bytes());
                continue;
            }
        }
        out.extend_from_slice(&piece.as_bytes()[2..]);
    }
    out
}

/// What means something else when it is escaped.
fn is_delimiter(byte: u8) -> bool {
    b":/?#[]@!$&'()*+,;=%\\".contains(&byte)
}

/// What no path of a request can look like.
fn check_path(path: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err("it must begin with /".to_owned());
    }
    if path.contains(['?', '#']) {
        return Err("it is matched with the path alone, without a query; what the query says is for `query`".to_owned());
    }
    if let Some(segment) = path.split('/').find(|segment| segment.starts_with([':', '*'])) {
        let name = segment.trim_start_matches([':', '*']);
        let star = if segment.starts_with('*') { "*" } else { "" };
        return Err(format!("`{segment}` matches only itself; write {{{star}{name}}}"));
    }
    let literal: String = path.chars().map(|c| if matches!(c, '{' | '}' | '*') { '-' } else { c }).collect();
    if !literal.is_ascii() || PathAndQuery::try_from(literal.as_str()).is_err() {
        return Err(
            "no request's path has such characters; write them percent-encoded, as clients send them".to_owned()
        );
    }
    Ok(())
}

pub(crate) fn pattern_error(what: &str, error: &str) -> ConfigError {
    ConfigError::new(format!("{what}: bad pattern: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_are_no_part_of_names() {
        let pattern = |path: &str| Pattern::new(path, &BTreeMap::new(), &Entities::default());
        for wrong in ["/a/{*b{{}", "/a/{b{{c}", "/a/{b}}", "/a/{b}}c}"] {
            assert!(pattern(wrong).is_err_and(|why| why.contains("braces")), "{wrong}");
        }
        for (good, names) in [("/{{a}}/{b}", &["b"][..]), ("/{a}/{b}.{{c}}", &["a", "b"]), ("/{{a}}", &[])] {
            let names_of = pattern(good).unwrap();
            assert!(names_of.params().iter().map(|param| &*param.name).eq(names.iter().copied()), "{good}");
        }
    }

    /// More than the router can name, at which it would panic.
    #[test]
    fn parameters_are_bounded() {
        let path = |count: usize| (0..count).map(|i| format!("/{{p{i}}}")).collect::<String>();
        let pattern = |count| Pattern::new(&path(count), &BTreeMap::new(), &Entities::default());
        matchit::Router::new().insert(path(MOST_PARAMS), ()).unwrap();
        assert!(pattern(MOST_PARAMS).is_ok());
        assert!(pattern(MOST_PARAMS + 1).is_err_and(|why| why.contains("may have 25")));
    }

    #[test]
    fn an_escaped_delimiter_is_not_the_delimiter() {
        for (a, b, same) in [
            ("%41", "A", true),
            ("a%20b", "a%20b", true),
            ("a%2fb", "a%2Fb", true),
            ("a%3Bb", "a;b", false),
            ("a%2Fb", "a%252Fb", false),
            ("%zz", "%ZZ", false),
            ("%+1", "\u{1}", false),
            ("%", "%25", false),
            ("%c3%a9", "\u{e9}", true),
            ("%é", "%é", true),
            ("%2%46", "%2F", false),
            ("%%32F", "%2F", false),
            ("%%41", "%A", true),
        ] {
            assert_eq!(unescaped(a) == unescaped(b), same, "{a} {b}");
        }
    }
}
