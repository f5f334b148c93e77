//! Cascades as they are declared: which tags a mutation of one data type drops.
//!
//! A cascade names the types that hang on the same entity (`agent_config` of agent 42), the types that are dropped
//! whole for the tenant (`agents_list`), and relations to other types whose own cascades follow for each child
//! (the conversations of agent 42).

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;

use crate::units::duration;

/// What a mutation of `data_type` drops besides the entries of that type itself.
///
/// ```
/// # use tower_cache_aside::Cascade;
/// let cascade = Cascade::new("agent")
///     .drops(["agent_config", "agent_tools"])
///     .all(["agents_list"])
///     .relation("conversations", "conversation");
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cascade {
    #[serde(rename = "type")]
    pub(crate) data_type: String,
    #[serde(default)]
    pub(crate) drops: Vec<String>,
    #[serde(default)]
    pub(crate) all: Vec<String>,
    #[serde(default)]
    pub(crate) relations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) fenced: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) hold: Option<Duration>,
}

impl Cascade {
    /// A cascade that so far drops only the mutated type's own entries.
    pub fn new(data_type: impl Into<String>) -> Self {
        Self {
            data_type: data_type.into(),
            drops: vec![],
            all: vec![],
            relations: BTreeMap::new(),
            fenced: None,
            hold: None,
        }
    }

    /// Also drops the entries of these types that belong to the same entity.
    #[must_use]
    pub fn drops<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.drops.extend(types.into_iter().map(Into::into));
        self
    }

    /// Also drops every entry of these types that the tenant has: lists, search results.
    #[must_use]
    pub fn all<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.all.extend(types.into_iter().map(Into::into));
        self
    }

    /// Names children of another type, whose own cascade follows when a mutation asks for this relation
    /// ([`Mutation::include`](crate::Mutation::include)). The report counts them together under this name.
    #[must_use]
    pub fn relation(mut self, name: impl Into<String>, child_type: impl Into<String>) -> Self {
        self.relations.insert(name.into(), child_type.into());
        self
    }

    /// Fences the tags while a mutation runs: from before the handler until the invalidation, they are misses, and
    /// nothing is stored under them. A process that dies between the commit and the invalidation then leaves nothing
    /// stale: the fence stands for this lease, and ends with new generations. The lease must be longer than the handler
    /// may take.
    #[must_use]
    pub fn fenced(mut self, lease: Duration) -> Self {
        self.fenced = Some(lease);
        self
    }

    /// Leaves the fence standing for this long after the write, when reads may come from replicas that lag. Needs
    /// [`fenced`](Self::fenced).
    #[must_use]
    pub fn hold(mut self, hold: Duration) -> Self {
        self.hold = Some(hold);
        self
    }
}
