//! Invalidations that the store has not acknowledged. Bounded: beyond [`TAGS`] tags, it keeps only which data types of which
//! tenants they were of, and drops those whole; beyond [`WHOLE`] of those, it drops everything. It never forgets.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{key::Tag, store::TagGroup};

/// Tags kept one by one.
const TAGS: usize = 10_000;

/// Data types of tenants kept one by one.
const WHOLE: usize = 10_000;

/// Tags delivered at once.
const BATCH: usize = 1_000;

/// Each item has the number of its last addition, so that what is added again while it is being delivered is not taken
/// for delivered.
#[derive(Debug, Default)]
pub(super) struct Journal {
    tags: HashMap<(Arc<str>, Tag), u64>,
    /// (what tags of the tenant begin with, data type), after an overflow.
    whole: BTreeMap<(Vec<u8>, Arc<str>), u64>,
    /// After another.
    everything: Option<u64>,
    added: u64,
}

/// What is being delivered.
pub(super) struct Batch {
    pub(super) what: What,
    added: u64,
}

pub(super) enum What {
    /// Of one tenant, since the keys of different tenants may be on different servers.
    Groups(Vec<TagGroup>),
    Everything,
}

impl Journal {
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How much there is to deliver.
    pub(super) fn len(&self) -> usize {
        self.tags.len() + self.whole.len() + usize::from(self.everything.is_some())
    }

    pub(super) fn add(&mut self, groups: &[TagGroup]) {
        self.added += 1;
        for group in groups {
            for tag in &group.tags {
                self.tags.insert((group.data_type.clone(), tag.clone()), self.added);
            }
        }
        if self.tags.len() > TAGS {
            tracing::warn!("too many undelivered invalidations: whole data types will be dropped");
            for ((data_type, tag), _) in self.tags.drain() {
                self.whole.insert((tag.tenant().to_vec(), data_type), self.added);
            }
        }
        if self.whole.len() > WHOLE {
            tracing::warn!("too many undelivered invalidations of too many tenants: everything will be dropped");
            self.add_everything();
        }
    }

    pub(super) fn add_everything(&mut self) {
        self.added += 1;
        self.everything = Some(self.added);
        self.tags.clear();
        self.whole.clear();
    }

    /// What to deliver next.
    pub(super) fn front(&self) -> Option<Batch> {
        let added = self.added;
        if self.everything.is_some() {
            return Some(Batch { what: What::Everything, added });
        }
        if let Some(((tenant, data_type), _)) = self.whole.first_key_value() {
            let group = TagGroup::new(data_type.clone(), vec![Tag::all(tenant, data_type)]);
            return Some(Batch { what: What::Groups(vec![group]), added });
        }
        let ((_, first), _) = self.tags.iter().next()?;
        let mut groups: Vec<TagGroup> = vec![];
        for (data_type, tag) in self.tags.keys().filter(|(_, tag)| tag.tenant() == first.tenant()).take(BATCH) {
            match groups.iter_mut().find(|g| g.data_type == *data_type) {
                Some(group) => group.tags.push(tag.clone()),
                None => groups.push(TagGroup::new(data_type.clone(), vec![tag.clone()])),
            }
        }
        Some(Batch { what: What::Groups(groups), added })
    }

    /// Strikes out what was delivered.
    pub(super) fn delivered(&mut self, batch: &Batch) {
        let groups = match &batch.what {
            What::Groups(groups) => groups,
            What::Everything => {
                self.everything = self.everything.filter(|added| *added > batch.added);
                return;
            }
        };
        for TagGroup { data_type, tags, .. } in groups {
            for tag in tags {
                let key = (data_type.clone(), tag.clone());
                if self.tags.get(&key).is_some_and(|added| *added <= batch.added) {
                    self.tags.remove(&key);
                }
                let whole = (tag.tenant().to_vec(), data_type.clone());
                let is_whole = *tag == Tag::all(tag.tenant(), data_type);
                if is_whole && self.whole.get(&whole).is_some_and(|added| *added <= batch.added) {
                    self.whole.remove(&whole);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(tenant: usize, data_type: &str, ids: std::ops::Range<usize>) -> TagGroup {
        let head = format!("s{{t{tenant}}}");
        let tags = ids.map(|id| Tag::entity(head.as_bytes(), data_type, "agent", id.to_string().as_bytes())).collect();
        TagGroup::new(data_type, tags)
    }

    /// All tags in the order of delivery; `None` if it comes to dropping everything.
    fn drain(journal: &mut Journal) -> Option<Vec<Tag>> {
        let mut all = vec![];
        while let Some(batch) = journal.front() {
            match &batch.what {
                What::Groups(groups) => all.extend(groups.iter().flat_map(|g| g.tags.clone())),
                What::Everything => return None,
            }
            journal.delivered(&batch);
        }
        Some(all)
    }

    #[test]
    fn everything_added_is_delivered_once() {
        let mut journal = Journal::default();
        journal.add(&[group(1, "a", 0..1_500), group(1, "b", 0..10)]);
        journal.add(&[group(1, "a", 0..10), group(2, "a", 0..10)]);
        assert_eq!(drain(&mut journal).unwrap().len(), 1_520);
        assert!(journal.is_empty());
    }

    #[test]
    fn what_is_added_during_a_delivery_is_delivered_again() {
        let mut journal = Journal::default();
        for what in ["tags", "everything"] {
            let add = |journal: &mut Journal| match what {
                "tags" => journal.add(&[group(1, "a", 0..1)]),
                _ => journal.add_everything(),
            };
            add(&mut journal);
            let front = journal.front().unwrap();
            add(&mut journal);
            journal.delivered(&front);
            assert_eq!(journal.len(), 1, "{what}");
            let front = journal.front().unwrap();
            journal.delivered(&front);
            assert!(journal.is_empty(), "{what}");
        }
    }

    #[test]
    fn on_overflow_whole_types_are_dropped_and_none_is_forgotten() {
        let mut journal = Journal::default();
        journal.add(&[group(1, "a", 0..TAGS), group(1, "b", 0..1)]);
        journal.add(&[group(1, "c", 0..1)]);
        assert_eq!(journal.len(), 3, "two types and a tag");
        let mut tags = drain(&mut journal).unwrap();
        tags.sort_by_key(|t| t.as_bytes().to_vec());
        let all = |t: &str| Tag::all(b"s{t1}", t);
        assert_eq!(tags, [all("a"), all("b"), Tag::entity(b"s{t1}", "c", "agent", b"0")]);
    }

    #[test]
    fn with_too_many_tenants_everything_is_dropped() {
        let mut journal = Journal::default();
        for tenant in 0..WHOLE + TAGS + 10 {
            journal.add(&[group(tenant, "a", 0..1)]);
            assert!(journal.len() <= WHOLE + TAGS + 1);
        }
        assert_eq!(drain(&mut journal), None);
    }
}
