//! Cascades: which tags a mutation of one data type drops.
//!
//! A cascade names the types that hang on the same entity (`agent_config` of agent 42), the types that are dropped
//! whole for the tenant (`agents_list`), and relations to other types whose own cascades follow for each child
//! (the conversations of agent 42). Children are found by three ways at once: entries whose *scope* or *declared tags*
//! name the parent, and ids that a *resolver* returns.

use std::{collections::BTreeMap, error::Error as StdError, fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use serde::Deserialize;

use super::{Catalogue, ConfigError, config::duration};
use crate::key::Tag;

/// What a mutation of `data_type` drops besides the entries of that type itself.
///
/// ```
/// # use tower_cache_aside::Cascade;
/// let cascade = Cascade::new("agent")
///     .drops(["agent_config", "agent_tools"])
///     .drops_all(["agents_list"])
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
    pub(crate) drops_all: Vec<String>,
    #[serde(default)]
    pub(crate) relations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "duration")]
    fenced: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    hold: Option<Duration>,
}

impl Cascade {
    /// A cascade that so far drops only the mutated type's own entries.
    pub fn new(data_type: impl Into<String>) -> Self {
        Self {
            data_type: data_type.into(),
            drops: vec![],
            drops_all: vec![],
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
    pub fn drops_all<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.drops_all.extend(types.into_iter().map(Into::into));
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

pub(crate) type ResolverError = Box<dyn StdError + Send + Sync>;
type ResolverFuture = Pin<Box<dyn Future<Output = Result<Vec<String>, ResolverError>> + Send>>;

/// Finds the ids of an entity's children: (tenant, parent id) → ids.
#[derive(Clone)]
pub(crate) struct Resolver(Arc<dyn Fn(String, String) -> ResolverFuture + Send + Sync>);

impl Resolver {
    pub(crate) fn new<F, Fut, E>(resolve: F) -> Self
    where
        F: Fn(String, String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<String>, E>> + Send + 'static,
        E: Into<ResolverError>,
    {
        Self(Arc::new(move |tenant, id| {
            let found = resolve(tenant, id);
            Box::pin(async move { found.await.map_err(Into::into) })
        }))
    }

    async fn resolve(&self, tenant: &[u8], id: &[u8]) -> Result<Vec<String>, ResolverError> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec());
        (self.0)(text(tenant)?, text(id)?).await
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

/// Resolvers by the name of their relation.
pub(crate) type Resolvers = BTreeMap<String, Resolver>;

/// More children than this are not named one by one: their types are dropped whole for the tenant.
const MAX_CHILDREN: usize = 1_000;

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
    seen: std::collections::HashSet<Tag>,
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

    /// Adds the tag of every entry of `data_type` of the tenant.
    pub(crate) fn all(&mut self, tenant: &[u8], data_type: &str) {
        let data_type = Arc::from(data_type);
        self.add(&data_type, &data_type, Tag::all(tenant, &data_type));
    }
}

#[derive(Debug)]
struct Compiled {
    /// The mutated type and those that hang on the same entity.
    types: Vec<Arc<str>>,
    drops_all: Vec<Arc<str>>,
    relations: Vec<Relation>,
    fence: Option<FenceTimes>,
}

/// How long writes are fenced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct FenceTimes {
    pub(crate) lease: Duration,
    pub(crate) hold: Duration,
}

#[derive(Debug)]
struct Relation {
    name: Arc<str>,
    child: String,
    resolver: Option<Resolver>,
}

/// All cascades, checked and ready.
#[derive(Debug)]
pub(crate) struct Cascades(BTreeMap<String, Compiled>);

impl Cascades {
    pub(crate) fn new(catalogue: &Catalogue, declared: &[Cascade], resolvers: &Resolvers) -> Result<Self, ConfigError> {
        let mut map: BTreeMap<String, Compiled> = BTreeMap::new();
        for cascade in declared {
            let name = &cascade.data_type;
            let what = format!("cascade `{name}`");
            for data_type in [name].into_iter().chain(&cascade.drops).chain(&cascade.drops_all) {
                catalogue.check(&what, data_type)?;
            }
            let mut types: Vec<Arc<str>> = vec![name.as_str().into()];
            for data_type in &cascade.drops {
                if !types.iter().any(|t| **t == **data_type) {
                    types.push(data_type.as_str().into());
                }
            }
            let mut relations = vec![];
            for (relation, child) in &cascade.relations {
                catalogue.check(&format!("{what}, relation `{relation}`"), child)?;
                let (name, resolver) = (relation.as_str().into(), resolvers.get(relation).cloned());
                relations.push(Relation { name, child: child.clone(), resolver });
            }
            let fence = match (cascade.fenced, cascade.hold) {
                (Some(Duration::ZERO), _) => {
                    return Err(ConfigError::new(format!(
                        "{what}: a lease of zero fences nothing; make it longer than its handlers take, or take it out"
                    )));
                }
                (None, Some(_)) => {
                    return Err(ConfigError::new(format!(
                        "{what}: `hold` needs a fence; give it a lease with `fenced`"
                    )));
                }
                (Some(lease), hold) => Some(FenceTimes { lease, hold: hold.unwrap_or_default() }),
                (None, None) => None,
            };
            let drops_all = cascade.drops_all.iter().map(|t| t.as_str().into()).collect();
            if map.insert(name.clone(), Compiled { types, drops_all, relations, fence }).is_some() {
                return Err(ConfigError::new(format!("{what} is declared twice; make it one")));
            }
        }
        let known = |name: &String| declared.iter().any(|c| c.relations.contains_key(name));
        if let Some(name) = resolvers.keys().find(|name| !known(name)) {
            return Err(ConfigError::new(format!(
                "resolver `{name}`: no cascade declares a relation of that name; declare it, or remove the resolver"
            )));
        }
        let cascades = Self(map);
        for name in cascades.0.keys() {
            cascades.check_cycle(name, &mut vec![])?;
        }
        Ok(cascades)
    }

    fn check_cycle<'a>(&'a self, name: &'a str, path: &mut Vec<&'a str>) -> Result<(), ConfigError> {
        if let Some(at) = path.iter().position(|p| *p == name) {
            let cycle: Vec<_> = path[at..].iter().chain([&name]).copied().collect();
            return Err(ConfigError::new(format!(
                "cascade `{name}`: its relations form a cycle ({}); remove one of them",
                cycle.join(" → ")
            )));
        }
        path.push(name);
        for relation in self.0.get(name).into_iter().flat_map(|c| &c.relations) {
            self.check_cycle(&relation.child, path)?;
        }
        path.pop();
        Ok(())
    }

    /// How mutations of this type are fenced.
    pub(crate) fn fence(&self, data_type: &str) -> Option<FenceTimes> {
        self.0.get(data_type)?.fence
    }

    /// Whether any cascade is fenced.
    pub(crate) fn any_fence(&self) -> bool {
        self.0.values().any(|c| c.fence.is_some())
    }

    /// The relations that mutations of this type may include.
    pub(crate) fn relations(&self, data_type: &str) -> Vec<&str> {
        self.0.get(data_type).map_or(vec![], |c| c.relations.iter().map(|r| &*r.name).collect())
    }

    /// The types whose entries must carry a tag of the mutated entity, the mutated type itself excepted.
    pub(crate) fn direct(&self, data_type: &str) -> &[Arc<str>] {
        self.0.get(data_type).map_or(&[], |c| &c.types[1..])
    }

    pub(crate) fn declared(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Adds what a mutation of one entity drops, except for the children that only resolvers know.
    pub(crate) fn add(&self, drops: &mut Drops, target: &Target<'_>) {
        match self.0.get(target.data_type) {
            None => {
                let data_type = Arc::from(target.data_type);
                drops.add(&data_type, &data_type, target.tag(&data_type));
            }
            Some(cascade) => {
                for data_type in &cascade.types {
                    drops.add(data_type, data_type, target.tag(data_type));
                }
                for data_type in &cascade.drops_all {
                    drops.add(data_type, data_type, Tag::all(target.tenant, data_type));
                }
                for relation in cascade.included(target.include) {
                    self.add_children(drops, &relation.name, &relation.child, target, Children::OfParent);
                }
            }
        }
    }

    /// Adds what resolvers know: one level of relations, whose children's own relations follow recursively.
    pub(crate) async fn resolve(
        &self,
        drops: &mut Drops,
        target: &Target<'_>,
        entity_of: &(dyn Fn(&str) -> String + Sync),
    ) {
        // (relation whose line it counts under, type, entity, id) of parents still to be asked for their children.
        let mut parents = vec![(None::<Arc<str>>, target.data_type, target.id.to_vec())];
        while let Some((line, data_type, id)) = parents.pop() {
            let Some(cascade) = self.0.get(data_type) else { continue };
            let relations = cascade.relations.iter();
            // Children's own relations always follow: they are part of what the mutation asked for.
            for relation in relations.filter(|r| line.is_some() || target.include.iter().any(|i| **i == *r.name)) {
                let line = line.as_ref().unwrap_or(&relation.name);
                let Some(resolver) = &relation.resolver else { continue };
                match resolver.resolve(target.tenant, &id).await {
                    Ok(ids) if ids.len() <= MAX_CHILDREN => {
                        let entity = entity_of(&relation.child);
                        for child in ids {
                            let child_target = Target { entity: &entity, id: child.as_bytes(), ..*target };
                            self.add_children(drops, line, &relation.child, &child_target, Children::Named);
                            parents.push((Some(line.clone()), &relation.child, child.into_bytes()));
                        }
                    }
                    Ok(_) => self.add_children(drops, line, &relation.child, target, Children::All),
                    Err(error) => {
                        tracing::warn!(relation = %relation.name, %error, "resolver failed: dropping all children");
                        self.add_children(drops, line, &relation.child, target, Children::All);
                    }
                }
            }
        }
    }

    /// Adds the tags of a child type and of all that its cascade drops, its own relations included.
    fn add_children(&self, drops: &mut Drops, line: &Arc<str>, child: &str, of: &Target<'_>, how: Children) {
        let own = [Arc::from(child)];
        let cascade = self.0.get(child);
        for data_type in cascade.map_or(&own[..], |c| &c.types) {
            let tag = match how {
                Children::OfParent | Children::Named => of.tag(data_type),
                Children::All => Tag::all(of.tenant, data_type),
            };
            drops.add(line, data_type, tag);
        }
        for data_type in cascade.map_or(&[][..], |c| &c.drops_all) {
            drops.add(line, data_type, Tag::all(of.tenant, data_type));
        }
        for relation in cascade.map_or(&[][..], |c| &c.relations) {
            self.add_children(drops, line, &relation.child, of, how);
        }
    }
}

/// How the entries of children are named.
#[derive(Clone, Copy)]
enum Children {
    /// By the parent's tag on them: from the scope, or declared by the response.
    OfParent,
    /// By their own id.
    Named,
    /// All of the tenant.
    All,
}

impl Compiled {
    fn included(&self, include: &[Arc<str>]) -> impl Iterator<Item = &Relation> {
        self.relations.iter().filter(move |r| include.iter().any(|i| **i == *r.name))
    }
}

/// A mutated entity.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) tenant: &'a [u8],
    pub(crate) data_type: &'a str,
    pub(crate) entity: &'a str,
    pub(crate) id: &'a [u8],
    pub(crate) include: &'a [Arc<str>],
}

impl Target<'_> {
    fn tag(&self, data_type: &str) -> Tag {
        Tag::entity(self.tenant, data_type, self.entity, self.id)
    }
}
