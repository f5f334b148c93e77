//! Entities and their ids: which entity a data type's resource is, and how each is spelled.
//!
//! A handler that parses its ids serves `042` for `42` and `A1B2…` for `a1b2…`. A cache which takes these for different
//! things leaves one of them stale when the other is written, so each entity says what its ids are.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use serde::Deserialize;
use uuid::Uuid;

/// The one spelling of an entity's ids: what a handler that parses them takes for the same id has the same form.
///
/// It is applied wherever an id of that entity comes from: paths of reads and writes, declared tags,
/// [`invalidate`](crate::Cache::invalidate), [`entry`](crate::Cache::entry), resolvers, gRPC messages. **An id that has no
/// such form bypasses the cache when it is read, and drops all of its type when it is written.** An entity of which nothing
/// is said has ids that are compared byte by byte, after percent-decoding: right for handlers that take them as text.
///
/// In a file: `[entities]` with `agent = "uuid"`, `"integer"` or `"lowercase"`.
#[derive(Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Canonical {
    /// A UUID in any of its spellings: capitals, without hyphens, in braces, `urn:uuid:` (as `Path<Uuid>` takes them).
    Uuid,
    /// A whole number of any size: a sign, leading zeros (as `Path<u64>` and `Path<i64>` take them).
    Integer,
    /// Text in which capitals do not count: the small form of each letter, in all of Unicode.
    Lowercase,
    /// What a function says. Made by [`by`](Self::by).
    #[serde(skip)]
    By(By),
}

type Spell = dyn Fn(&str) -> Option<String> + Send + Sync;

/// A function that spells ids.
#[derive(Clone)]
pub struct By(Arc<Spell>);

impl Canonical {
    /// The canonical form by a function of your own: `None` for what is no id (as when it panics). What it returns must have
    /// itself as its form.
    pub fn by(spell: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::By(By(Arc::new(spell)))
    }

    fn of(&self, id: &[u8]) -> Option<Vec<u8>> {
        let text = std::str::from_utf8(id).ok()?;
        match self {
            Self::Uuid => Some(Uuid::try_parse(text).ok()?.hyphenated().to_string().into_bytes()),
            Self::Integer => integer(text).map(String::into_bytes),
            // Each letter for itself: at the end of a word a sigma has another small form, and is the same letter.
            Self::Lowercase => {
                let lower = text.chars().flat_map(char::to_lowercase).map(|c| if c == 'ς' { 'σ' } else { c });
                Some(lower.collect::<String>().into_bytes())
            }
            // The write may be committed already: no id, then, instead of no invalidation.
            Self::By(By(spell)) => {
                catch_unwind(AssertUnwindSafe(|| spell(text))).ok().flatten().map(String::into_bytes)
            }
        }
    }
}

fn integer(text: &str) -> Option<String> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    if digits.is_empty() || !digits.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    match digits.trim_start_matches('0') {
        "" => Some("0".to_owned()),
        digits => Some(format!("{sign}{digits}")),
    }
}

impl fmt::Debug for Canonical {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uuid => "Uuid",
            Self::Integer => "Integer",
            Self::Lowercase => "Lowercase",
            Self::By(_) => "By",
        })
    }
}

impl fmt::Debug for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("By")
    }
}

/// What is known of entities.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entities {
    canonical: BTreeMap<String, Canonical>,
    /// The entity that the resource of a data type is, where it is not named like the type.
    of_types: BTreeMap<String, String>,
}

impl Entities {
    pub(crate) fn new(canonical: BTreeMap<String, Canonical>, of_types: BTreeMap<String, String>) -> Self {
        Self { canonical, of_types }
    }

    /// What the resource of a data type is called: `agent` for `agent_config`, if its route is
    /// `/agents/{agent_id}/config`.
    pub(crate) fn of_type<'a>(&'a self, data_type: &'a str) -> &'a str {
        self.of_types.get(data_type).map_or(data_type, String::as_str)
    }

    /// The entities of which something is said.
    pub(crate) fn declared(&self) -> impl Iterator<Item = &str> {
        self.canonical.keys().map(String::as_str)
    }

    /// How this entity's ids are spelled, where that is said.
    pub(crate) fn canonical(&self, entity: &str) -> Option<&Canonical> {
        self.canonical.get(entity)
    }

    /// The canonical form of an id of this entity.
    pub(crate) fn id<'i>(&self, entity: &str, id: &'i [u8]) -> Option<Cow<'i, [u8]>> {
        spelled(self.canonical(entity), id.into())
    }
}

/// The canonical form of an id, where one is declared. What is empty is none: a field that a message left out, say.
pub(crate) fn spelled<'i>(canonical: Option<&Canonical>, id: Cow<'i, [u8]>) -> Option<Cow<'i, [u8]>> {
    let form = match canonical {
        None => Some(id),
        Some(canonical) => canonical.of(&id).map(Cow::Owned),
    };
    form.filter(|form| !form.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_handler_takes_for_the_same_id_has_the_same_form() {
        let same = |canonical: &Canonical, ids: &[&str]| {
            let forms: Vec<_> = ids.iter().map(|id| canonical.of(id.as_bytes())).collect();
            assert!(forms[0].is_some() && forms.iter().all(|form| *form == forms[0]), "{ids:?} {forms:?}");
        };
        same(&Canonical::Integer, &["42", "042", "+42", "+0042"]);
        same(&Canonical::Integer, &["0", "-0", "+000"]);
        same(&Canonical::Integer, &["-7", "-007"]);
        same(
            &Canonical::Uuid,
            &[
                "67e55044-10b1-426f-9247-bb680e5fe0c8",
                "67E55044-10B1-426F-9247-BB680E5FE0C8",
                "67e5504410b1426f9247bb680e5fe0c8",
                "{67e55044-10b1-426f-9247-bb680e5fe0c8}",
                "urn:uuid:67e55044-10b1-426f-9247-bb680e5fe0c8",
            ],
        );
        same(&Canonical::Lowercase, &["Zoë", "ZOË", "zoë"]);
        same(&Canonical::Lowercase, &["ΟΔΟΣ", "οδος", "οδοσ"]);
        for (canonical, id) in [
            (Canonical::Integer, "4 2"),
            (Canonical::Integer, ""),
            (Canonical::Integer, "+"),
            (Canonical::Integer, "--1"),
            (Canonical::Integer, "0x2a"),
            (Canonical::Uuid, "42"),
            (Canonical::by(|_| None), "42"),
            (Canonical::by(|id| Some(id[8..].to_owned())), "42"),
        ] {
            assert_eq!(canonical.of(id.as_bytes()), None, "{canonical:?} {id}");
        }
        assert_eq!(Canonical::Lowercase.of(b"\xff"), None);
    }
}
