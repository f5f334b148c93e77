//! Invalidations that the store has not acknowledged. Bounded: beyond [`CAPACITY`] tags, it keeps only which data types
//! of which tenants they were of, and drops those whole. It never forgets.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{key::Tag, store::TagGroup};

/// Tags kept one by one.
const CAPACITY: usize = 10_000;

/// Tags delivered at once.
const BATCH: usize = 1_000;

/// Each item has the number of its last addition, so that what is added again while it is being delivered is not taken
/// for delivered.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    tags: HashMap<(Arc<str>, Tag), u64>,
    /// (tenant in braces, data type), after an overflow.
    whole: BTreeMap<(Vec<u8>, Arc<str>), u64>,
    added: u64,
}

/// What is being delivered.
pub(crate) struct Batch {
    pub(crate) groups: Vec<TagGroup>,
    added: u64,
}

impl Journal {
    pub(crate) fn is_empty(&self) -> bool {
        self.tags.is_empty() && self.whole.is_empty()
    }

    pub(crate) fn add(&mut self, groups: &[TagGroup]) {
        self.added += 1;
        for group in groups {
            for tag in &group.tags {
                self.tags.insert((group.data_type.clone(), tag.clone()), self.added);
            }
        }
        if self.tags.len() > CAPACITY {
            tracing::warn!("too many undelivered invalidations: dropping whole data types");
            for ((data_type, tag), _) in self.tags.drain() {
                self.whole.insert((tag.tenant().to_vec(), data_type), self.added);
            }
        }
    }

    /// What to deliver next: of one tenant, since the keys of different tenants may be on different servers.
    pub(crate) fn front(&self) -> Option<Batch> {
        let added = self.added;
        if let Some(((tenant, data_type), _)) = self.whole.first_key_value() {
            let group = TagGroup::new(data_type.clone(), vec![Tag::all(tenant, data_type)]);
            return Some(Batch { groups: vec![group], added });
        }
        let ((_, first), _) = self.tags.iter().next()?;
        let mut groups: Vec<TagGroup> = vec![];
        for (data_type, tag) in self.tags.keys().filter(|(_, tag)| tag.tenant() == first.tenant()).take(BATCH) {
            match groups.iter_mut().find(|g| g.data_type == *data_type) {
                Some(group) => group.tags.push(tag.clone()),
                None => groups.push(TagGroup::new(data_type.clone(), vec![tag.clone()])),
            }
        }
        Some(Batch { groups, added })
    }

    /// Strikes out what was delivered. Returns how much is left.
    pub(crate) fn delivered(&mut self, batch: &Batch) -> usize {
        for TagGroup { data_type, tags, .. } in &batch.groups {
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
        self.tags.len() + self.whole.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(data_type: &str, ids: std::ops::Range<usize>) -> TagGroup {
        let tags = ids.map(|id| Tag::entity(b"s{t}", data_type, "agent", id.to_string().as_bytes())).collect();
        TagGroup::new(data_type, tags)
    }

    fn drain(journal: &mut Journal) -> Vec<Tag> {
        let mut all = vec![];
        while let Some(batch) = journal.front() {
            all.extend(batch.groups.iter().flat_map(|g| g.tags.clone()));
            journal.delivered(&batch);
        }
        all
    }

    #[test]
    fn everything_added_is_delivered_once() {
        let mut journal = Journal::default();
        journal.add(&[group("a", 0..1_500), group("b", 0..10)]);
        journal.add(&[group("a", 0..10)]);
        assert_eq!(drain(&mut journal).len(), 1_510);
        assert!(journal.is_empty());
    }

    #[test]
    fn what_is_added_during_a_delivery_is_delivered_again() {
        let mut journal = Journal::default();
        journal.add(&[group("a", 0..1)]);
        let front = journal.front().unwrap();
        journal.add(&[group("a", 0..1)]);
        assert_eq!(journal.delivered(&front), 1);
    }

    #[test]
    fn on_overflow_whole_types_are_dropped_and_none_is_forgotten() {
        let mut journal = Journal::default();
        journal.add(&[group("a", 0..CAPACITY), group("b", 0..1)]);
        journal.add(&[group("c", 0..1)]);
        let mut tags = drain(&mut journal);
        tags.sort_by_key(|t| t.as_bytes().to_vec());
        let all = |t: &str| Tag::all(b"s{t}", t);
        assert_eq!(tags, [all("a"), all("b"), Tag::entity(b"s{t}", "c", "agent", b"0")]);
    }
}
