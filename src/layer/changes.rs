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
    store::Stamp,
};

/// More ids of one request are not kept one by one: their types fall whole.
const MOST: usize = 10_000;

/// More than this is not said of one response.
pub(super) const MOST_READ: usize = 1_000;

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
#[derive(Default)]
struct Said {
    change: Change,
    /// What the route declares was not changed.
    nothing: bool,
}

/// How much of what was said somebody has heard: several caches may listen to one handler.
#[derive(Clone, Copy, Default)]
pub(super) struct Heard {
    entities: usize,
    all: usize,
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

    /// Follows this relation of the cascades of what has changed, by this and by what the route declares. Where it has a
    /// resolver, all children of the tenant fall: it could only be asked now, and the rows that name them may be gone.
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

    /// Whether nothing has been said since that was heard.
    pub(super) fn is_silent(&self, heard: Heard) -> bool {
        let said = self.said();
        said.change.entities.len() == heard.entities && said.change.all.len() == heard.all
    }

    /// Whether the handler says that what is declared was not changed.
    pub(super) fn says_nothing(&self) -> bool {
        self.said().nothing
    }

    /// What has been said since.
    pub(super) fn hear(&self, heard: &mut Heard) -> Change {
        let change = &self.said().change;
        let since = std::mem::replace(heard, Heard { entities: change.entities.len(), all: change.all.len() });
        let entities = change.entities[since.entities..].to_vec();
        let all = change.all[since.all..].to_vec();
        Change { entities, all, include: change.include.clone(), ..Change::default() }
    }

    /// Polls the handler so that [`changed`] finds these.
    pub(crate) fn scope<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        WRITES.scope(self.clone(), work)
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
/// The data type must be declared, and the id have a canonical form; else the response is not stored. Where cascades drop
/// entries of that type by another entity (conversations by their agent), say that it depends on that one, too. A value of
/// [`Cache::entry`](crate::Cache::entry) needs no word: what is made of it falls with it.
pub fn depends_on(data_type: impl Into<Arc<str>>, id: impl ToString) {
    let _ = READS.try_with(|reads| {
        let one = (data_type.into(), id.to_string());
        push_bounded(&mut reads.said().things, one);
    });
}

fn push_bounded<T: PartialEq>(some: &mut Vec<T>, one: T) {
    if some.len() <= MOST_READ && !some.contains(&one) {
        some.push(one);
    }
}

/// What a load says that it depends on.
#[derive(Clone, Default)]
pub(crate) struct Reads(Arc<Mutex<Dependencies>>);

/// A data type and an id.
type Thing = (Arc<str>, String);

#[derive(Clone, Default)]
struct Dependencies {
    things: Vec<Thing>,
    /// Those of the values that it is made of.
    tags: Vec<Tag>,
    /// And under which generations those were valid that came from the cache.
    stamps: Vec<Stamp>,
    /// It is made of a value that is stale, or that no write finds.
    is_spoiled: bool,
    /// What loads depend on that it has asked for, which may still say more.
    parts: Vec<Reads>,
}

impl Reads {
    fn said(&self) -> MutexGuard<'_, Dependencies> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the load in whose task this runs, if it is one.
    pub(crate) fn current() -> Option<Self> {
        READS.try_with(Self::clone).ok()
    }

    /// It is made of a value that has these tags.
    pub(crate) fn add_tags<'t>(&self, tags: impl Iterator<Item = &'t Tag>) {
        let mut said = self.said();
        tags.for_each(|tag| push_bounded(&mut said.tags, tag.clone()));
    }

    /// It is made of a value that was stored under these generations.
    pub(crate) fn add_stamps(&self, stamps: &[Stamp]) {
        self.add_tags(stamps.iter().map(|stamp| &stamp.tag));
        let mut said = self.said();
        stamps.iter().for_each(|stamp| push_bounded(&mut said.stamps, stamp.clone()));
    }

    /// Under which generations the values were valid that it is made of.
    pub(crate) fn stamps(&self) -> Vec<Stamp> {
        self.of_all(|all| all.stamps.clone())
    }

    /// It is made of what another load comes to.
    pub(crate) fn include(&self, part: &Self) {
        let mut said = self.said();
        if said.parts.len() <= MOST_READ {
            said.parts.push(part.clone());
        } else {
            said.is_spoiled = true;
        }
    }

    /// Of all that it depends on; most depends on nothing, of which no copy is made.
    fn of_all<T>(&self, what: impl FnOnce(&Dependencies) -> T) -> T {
        let said = self.said();
        if said.parts.is_empty() {
            return what(&said);
        }
        drop(said);
        what(&self.all())
    }

    /// All that it depends on, by way of others too.
    fn all(&self) -> Dependencies {
        let mut all = self.said().clone();
        for part in std::mem::take(&mut all.parts) {
            let Dependencies { things, tags, stamps, is_spoiled, .. } = part.all();
            things.into_iter().for_each(|one| push_bounded(&mut all.things, one));
            tags.into_iter().for_each(|tag| push_bounded(&mut all.tags, tag));
            stamps.into_iter().for_each(|stamp| push_bounded(&mut all.stamps, stamp));
            all.is_spoiled |= is_spoiled;
        }
        all
    }

    /// It is made of a value that is stale, or that no write finds.
    pub(crate) fn spoil(&self) {
        self.said().is_spoiled = true;
    }

    /// It is made of a value that was loaded, has these tags if any write can find it, and depends on all this.
    pub(crate) fn add_loaded(&self, tags: Option<&[Tag]>, other: &Self) {
        match tags {
            Some(tags) => self.add_tags(tags.iter()),
            None => self.spoil(),
        }
        self.include(other);
    }

    /// Polls the load so that [`depends_on`] finds these.
    pub(crate) fn scope<F: Future>(&self, load: F) -> impl Future<Output = F::Output> + use<F> {
        READS.scope(self.clone(), load)
    }

    pub(crate) fn count(&self) -> usize {
        self.of_all(|all| all.things.len() + all.tags.len() + all.stamps.len() + usize::from(all.is_spoiled))
    }

    /// The tags of what it depends on: those of the values that it is made of, and of that entity's own entries.
    pub(crate) fn tags(&self, core: &Core, tenant: &Tenant) -> Result<Vec<Tag>, &'static str> {
        let Dependencies { things, mut tags, stamps, is_spoiled, .. } = self.all();
        if is_spoiled {
            return Err("stale-part");
        }
        let is_others = tags.iter().any(|tag| tag.tenant() != tenant.head());
        if is_others || things.len().max(tags.len()).max(stamps.len()) > MOST_READ {
            if core.warnings.is_new("depends_on", "") {
                tracing::warn!("not stored, for it depends on another tenant's things, or on more than 1,000");
            }
            return Err("bad-tags");
        }
        for (data_type, id) in &things {
            let Some(of_thing) = thing_tags(core, tenant, &things, (data_type, id)) else {
                if core.warnings.is_new("depends_on", data_type) {
                    let mend = "declare the type, give a canonical id, and where cascades drop the type by another entity, \
                                say that it depends on that one, too";
                    tracing::warn!(%data_type, "not stored, for it depends on what no write could name: {mend}");
                }
                return Err("bad-tags");
            };
            tags.extend(of_thing);
        }
        Ok(tags)
    }
}

/// The tags by which writes find what depends on a thing: its own, and those of the entities by which cascades drop its
/// type. `None` if some would not find it.
fn thing_tags(core: &Core, tenant: &Tenant, things: &[Thing], (data_type, id): (&str, &str)) -> Option<Vec<Tag>> {
    core.catalogue.check("depends_on", data_type).ok()?;
    let entities = &core.cascades.entities;
    let own = entities.of_type(data_type);
    let tag = |entity: &str, id: &str| {
        let id = entities.id(entity, id.as_bytes())?;
        Some(Tag::entity(tenant.head(), data_type, entity, &id))
    };
    let mut tags = vec![tag(own, id)?, Tag::all(tenant.head(), data_type)];
    for needed in core.routes.expected.needed(data_type).filter(|needed| &***needed != own) {
        let named: Vec<_> = things.iter().filter(|(other, _)| entities.of_type(other) == &**needed).collect();
        if named.is_empty() {
            return None;
        }
        tags.extend(named.into_iter().map(|(_, id)| tag(needed, id)).collect::<Option<Vec<_>>>()?);
    }
    Some(tags)
}
