//! Who serves which tenant: the one server there is, or the master of the slot that the tenant's keys are in.

use std::sync::Arc;

use super::server::Server;
#[cfg(feature = "redis-cluster")]
use super::slot::{SLOTS, slot};

/// Who serves what, as far as it is known.
#[derive(Clone, Default)]
pub(super) enum Slots {
    #[default]
    Nobody,
    One(Arc<Server>),
    #[cfg(feature = "redis-cluster")]
    Cluster(Arc<[Option<Arc<Server>>]>),
}

impl Slots {
    /// Where the keys of a tenant are; `tenant` as it is in keys, with its braces.
    pub(super) fn of(&self, tenant: &[u8]) -> Option<&Arc<Server>> {
        let _ = tenant;
        match self {
            Self::Nobody => None,
            Self::One(server) => Some(server),
            #[cfg(feature = "redis-cluster")]
            Self::Cluster(slots) => slots.get(slot(tenant))?.as_ref(),
        }
    }

    /// Every server, once.
    pub(super) fn servers(&self) -> Vec<Arc<Server>> {
        match self {
            Self::Nobody => vec![],
            Self::One(server) => vec![server.clone()],
            #[cfg(feature = "redis-cluster")]
            Self::Cluster(slots) => {
                let mut servers: Vec<Arc<Server>> = vec![];
                for server in slots.iter().flatten() {
                    if !servers.iter().any(|known| Arc::ptr_eq(known, server)) {
                        servers.push(server.clone());
                    }
                }
                servers
            }
        }
    }

    /// Whether every slot is served by somebody.
    pub(super) fn is_whole(&self) -> bool {
        match self {
            Self::Nobody => false,
            Self::One(_) => true,
            #[cfg(feature = "redis-cluster")]
            Self::Cluster(slots) => slots.iter().all(Option::is_some),
        }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Nobody, Self::Nobody) => true,
            (Self::One(a), Self::One(b)) => Arc::ptr_eq(a, b),
            #[cfg(feature = "redis-cluster")]
            (Self::Cluster(a), Self::Cluster(b)) => a.iter().zip(b.iter()).all(|(a, b)| match (a, b) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            }),
            _ => false,
        }
    }

    /// Each server with the slots that it says it serves; one that two claim is nobody's.
    #[cfg(feature = "redis-cluster")]
    pub(super) fn claimed<'a>(claims: impl Iterator<Item = (&'a Arc<Server>, &'a [(u16, u16)])>) -> Self {
        let mut slots: Vec<Option<Arc<Server>>> = vec![None; SLOTS];
        let mut disputed = std::collections::BTreeSet::new();
        for (server, own) in claims {
            for slot in own.iter().flat_map(|&(first, last)| first..=last).map(usize::from).filter(|s| *s < SLOTS) {
                if slots[slot].replace(server.clone()).is_some() {
                    disputed.insert(slot);
                }
            }
        }
        disputed.into_iter().for_each(|slot| slots[slot] = None);
        Self::Cluster(slots.into())
    }
}
