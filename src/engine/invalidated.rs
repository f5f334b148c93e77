//! The report of an invalidation: how many entries it made stale, by data type.

use std::{fmt, sync::Arc};

/// What an invalidation dropped. A response of the [`InvalidateLayer`](crate::InvalidateLayer) carries it as an
/// extension.
///
/// Displayed, it is the value of the `cache-invalidated` header: `agent=1, agent_config=1, agent_tools=0,
/// conversations=4, total=6`. What a relation reached is counted together under the relation's name. With `undelivered=5`
/// at its end, the shared store was out of reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invalidated {
    lines: Vec<(Arc<str>, u64)>,
    types: Vec<(Arc<str>, u64)>,
    undelivered: usize,
}

impl Invalidated {
    pub(crate) fn new(counts: impl Iterator<Item = ((Arc<str>, Arc<str>), u64)>, undelivered: usize) -> Self {
        let mut this = Self { undelivered, ..Self::default() };
        for ((line, data_type), count) in counts {
            add(&mut this.lines, line, count);
            add(&mut this.types, data_type, count);
        }
        this
    }

    /// How many entries of a data type were dropped.
    pub fn count(&self, data_type: &str) -> u64 {
        self.types.iter().find(|(name, _)| **name == *data_type).map_or(0, |(_, count)| *count)
    }

    /// How many tags the shared store has not been told about yet: it was out of reach, and they are in the journal. This
    /// process serves none of their entries; others may, until the journal is delivered.
    pub fn undelivered(&self) -> usize {
        self.undelivered
    }

    /// How many entries of each data type were dropped.
    #[cfg(feature = "stats")]
    pub(crate) fn types(&self) -> &[(Arc<str>, u64)] {
        &self.types
    }

    /// How many entries were dropped altogether.
    pub fn total(&self) -> u64 {
        self.types.iter().map(|(_, count)| count).sum()
    }
}

fn add(counts: &mut Vec<(Arc<str>, u64)>, name: Arc<str>, count: u64) {
    match counts.iter_mut().find(|(n, _)| *n == name) {
        Some((_, sum)) => *sum += count,
        None => counts.push((name, count)),
    }
}

impl fmt::Display for Invalidated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in &self.lines {
            write!(f, "{name}={count}, ")?;
        }
        write!(f, "total={}", self.total())?;
        match self.undelivered {
            0 => Ok(()),
            tags => write!(f, ", undelivered={tags}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_relation_reached_is_counted_under_its_name_and_its_type() {
        let line = |line: &str, data_type: &str, count| ((line.into(), data_type.into()), count);
        let counts = [line("agent", "agent", 1), line("conversations", "message", 4), line("messages", "message", 3)];
        let report = Invalidated::new(counts.into_iter(), 0);
        assert_eq!((report.count("agent"), report.count("message"), report.count("conversations")), (1, 7, 0));
        assert_eq!(report.to_string(), "agent=1, conversations=4, messages=3, total=8");
    }
}
