//! What an invalidation is going to drop, and about whom it is.

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
    pub(super) fn add(&mut self, line: &Arc<str>, data_type: &Arc<str>, tag: Tag) {
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

    /// Adds the tag of every entry of `data_type` of the tenant.
    pub(crate) fn all(&mut self, tenant: &Tenant, data_type: &str) {
        let data_type = Arc::from(data_type);
        self.add(&data_type, &data_type, Tag::all(tenant.head(), &data_type));
    }
}

/// A mutated entity.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) tenant: &'a Tenant,
    pub(crate) data_type: &'a str,
    pub(crate) entity: &'a str,
    pub(crate) id: &'a [u8],
    pub(crate) include: &'a [Arc<str>],
}

impl Target<'_> {
    pub(super) fn tag(&self, data_type: &str) -> Tag {
        Tag::entity(self.tenant.head(), data_type, self.entity, self.id)
    }

    pub(super) fn includes(&self, relation: &str) -> bool {
        self.include.iter().any(|included| **included == *relation)
    }
}
