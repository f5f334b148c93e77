//! What an invalidation is going to drop.

use std::{collections::HashSet, sync::Arc};

use crate::key::{Tag, Tenant};

/// The tags that an invalidation drops, with the line of the report each belongs to.
#[derive(Debug, Default, Clone)]
pub(crate) struct Drops {
    /// (line of the report, data type) → tags, without repetitions, in the order in which they were declared.
    pub(crate) groups: Vec<Group>,
}

#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) line: Arc<str>,
    pub(crate) data_type: Arc<str>,
    pub(crate) tags: Vec<Tag>,
    seen: HashSet<Tag>,
}

impl Drops {
    fn add(&mut self, line: &Arc<str>, data_type: &Arc<str>, tag: Tag) {
        let at = self.groups.iter().position(|g| g.data_type == *data_type && g.line == *line);
        let at = at.unwrap_or_else(|| {
            let (line, data_type) = (line.clone(), data_type.clone());
            self.groups.push(Group { line, data_type, tags: vec![], seen: Default::default() });
            self.groups.len() - 1
        });
        let group = &mut self.groups[at];
        if group.seen.insert(tag.clone()) {
            group.tags.push(tag);
        }
    }

    /// Adds what another drops.
    pub(crate) fn add_all(&mut self, other: Self) {
        for Group { line, data_type, tags, .. } in other.groups {
            tags.into_iter().for_each(|tag| self.add(&line, &data_type, tag));
        }
    }

    /// Adds the entries of `data_type` that `whose` says, under this line of the report.
    pub(super) fn add_of(&mut self, tenant: &Tenant, line: &Arc<str>, data_type: &Arc<str>, whose: Whose<'_>) {
        let head = tenant.head();
        let tag = match whose {
            Whose::Of(entity, id) => Tag::entity(head, data_type, entity, id),
            Whose::All => Tag::all(head, data_type),
        };
        self.add(line, data_type, tag);
    }
}

/// Which entries of a type.
#[derive(Clone, Copy)]
pub(super) enum Whose<'a> {
    /// Those that name this entity with this id.
    Of(&'a str, &'a [u8]),
    /// All of the tenant.
    All,
}
