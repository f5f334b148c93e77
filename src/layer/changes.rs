//! What handlers say that they change, and what they read: where no table can know.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError},
};

use tokio::task_local;

use super::core::Core;
use crate::{
    catalog::Change,
    key::{Tag, Tenant},
};

/// More ids of one request are not kept one by one: their types fall whole.
const MOST: usize = 10_000;

/// More than this is not said of one response.
const MOST_READ: usize = 1_000;

task_local! {
    static WRITES: Changes;
    static READS: Reads;
}

/// In the extensions of every unsafe request (and of every gRPC call that is not a declared read): what the handler, or
/// what is below it, says that it has changed. It is dropped together with what the route declares, by the same rules:
/// before the response, and after an unknown outcome too.
///
/// ```
/// use tower_cache_aside::Changes;
///
/// async fn close_all(request: http::Request<()>, tasks: Vec<u64>) {
///     let Some(changes) = request.extensions().get::<Changes>() else { return };
///     for id in tasks {
///         changes.mutated("task", id);
///     }
/// }
/// ```
///
/// A data type or relation that is not declared is a mistake, which a warning names; since nobody knows what it stands for,
/// everything of the tenant is dropped. Of more than 10,000 ids, the types fall whole.
#[derive(Clone, Default)]
pub struct Changes(Arc<Mutex<Said>>);

/// What was said.
#[derive(Clone, Default)]
pub(super) struct Said {
    pub(super) change: Change,
    /// What the route declares was not changed.
    pub(super) nothing: bool,
}

impl Said {
    pub(super) fn is_empty(&self) -> bool {
        self.change.entities.is_empty() && self.change.all.is_empty()
    }
}

fn push_new(names: &mut Vec<Arc<str>>, name: Arc<str>) {
    if !names.contains(&name) {
        names.push(name);
    }
}

impl Changes {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entity of this data type has changed: its cascade is dropped.
    pub fn mutated(&self, data_type: impl Into<Arc<str>>, id: impl ToString) -> &Self {
        let one = (data_type.into(), id.to_string().into_bytes());
        let change = &mut self.said().change;
        if change.entities.len() < MOST {
            change.entities.push(one);
        } else {
            push_new(&mut change.all, one.0);
        }
        self
    }

    /// Any entity of this data type may have changed: all entries that the tenant has of it, and of what its cascade drops,
    /// are dropped.
    pub fn all(&self, data_type: impl Into<Arc<str>>) -> &Self {
        push_new(&mut self.said().change.all, data_type.into());
        self
    }

    /// Follows this relation of the cascades of what has changed.
    pub fn include(&self, relation: impl Into<Arc<str>>) -> &Self {
        push_new(&mut self.said().change.include, relation.into());
        self
    }

    /// What the route declares has not been changed after all (the new row is the old one): it stays, if the request is
    /// answered with a success. What else is said is dropped all the same.
    pub fn nothing(&self) -> &Self {
        self.said().nothing = true;
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.said().is_empty()
    }

    /// Whether the handler says that nothing of what is declared has changed, and nothing else has.
    #[cfg(feature = "grpc")]
    pub(super) fn says_nothing(&self) -> bool {
        let said = self.said();
        said.nothing && said.is_empty()
    }

    pub(super) fn take(&self) -> Said {
        std::mem::take(&mut *self.said())
    }

    /// Polls the handler so that [`changed`] finds these.
    pub(crate) async fn scope<F: Future>(&self, work: F) -> F::Output {
        WRITES.scope(self.clone(), work).await
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("change", &self.said().change).finish_non_exhaustive()
    }
}

/// Says that the entity of this data type has changed, from anywhere in the task that runs the handler of an unsafe request
/// (a repository, say) or [`Cache::write`](crate::Cache::write). The same as [`Changes::mutated`], without a handle.
///
/// In another task it finds no request: a warning says so once, and nothing is dropped. Hand a [`Changes`] to what you
/// spawn.
pub fn changed(data_type: impl Into<Arc<str>>, id: impl ToString) {
    static OUTSIDE: Once = Once::new();
    let said = WRITES.try_with(|changes| {
        changes.mutated(data_type, id);
    });
    if said.is_err() {
        let mend = "hand `Changes` to what you spawn, and run jobs in `Cache::write`";
        OUTSIDE.call_once(|| tracing::warn!("`changed` was called outside of a write, and nothing is dropped: {mend}"));
    }
}

/// Says that the response (or value) under way is made of the entity of this data type as well, from anywhere in the task
/// that loads it: it then falls as if it were an entry of that entity itself, without a cascade that says so. Where nothing
/// is to be cached, it does nothing.
///
/// The data type must be declared, and the id have a canonical form; else the response is not stored.
pub fn depends_on(data_type: impl Into<Arc<str>>, id: impl ToString) {
    let _ = READS.try_with(|reads| {
        let mut said = reads.said();
        let one = (data_type.into(), id.to_string());
        if said.len() <= MOST_READ && !said.contains(&one) {
            said.push(one);
        }
    });
}

/// Data types and ids.
type Things = Vec<(Arc<str>, String)>;

/// What a load says that it depends on.
#[derive(Clone, Default)]
pub(crate) struct Reads(Arc<Mutex<Things>>);

impl Reads {
    fn said(&self) -> MutexGuard<'_, Things> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Polls the load so that [`depends_on`] finds these.
    pub(crate) async fn scope<F: Future>(&self, load: F) -> F::Output {
        READS.scope(self.clone(), load).await
    }

    pub(crate) fn count(&self) -> usize {
        self.said().len()
    }

    /// The tags of what it depends on: those of that entity's own entries.
    pub(crate) fn tags(&self, core: &Core, tenant: &Tenant) -> Result<Vec<Tag>, &'static str> {
        let said = self.said();
        let mut tags = vec![];
        for (data_type, id) in &*said {
            let entity = core.cascades.entities.of_type(data_type);
            let id = core.cascades.entities.id(entity, id.as_bytes());
            let is_known = core.catalogue.check("depends_on", data_type).is_ok() && said.len() <= MOST_READ;
            let Some(id) = id.filter(|_| is_known) else {
                if core.warnings.is_new("depends_on", data_type) {
                    let mend = "declare the type, give a canonical id, and at most 1,000 of them";
                    tracing::warn!(%data_type, "not stored, for it depends on what no write could name: {mend}");
                }
                return Err("bad-tags");
            };
            for tag in [Tag::entity(tenant.head(), data_type, entity, &id), Tag::all(tenant.head(), data_type)] {
                if !tags.contains(&tag) {
                    tags.push(tag);
                }
            }
        }
        Ok(tags)
    }
}
