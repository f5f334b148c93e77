//! What events make stale.

use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use serde::Deserialize;

use super::Event;
use crate::{catalog::Change, error::ConfigError};

/// More ids than this in one event are their whole type.
const MOST: usize = 10_000;

/// What an event makes stale.
///
/// ```
/// # use tower_cache_aside::EventPolicy;
/// let policy = EventPolicy::on("agents").when("op", ["update", "delete"]).tenant("tenant_id").mutated("agent", "id").include("conversations");
/// ```
///
/// In a file:
///
/// ```toml
/// [[events]]
/// on = "agents"
/// when = { op = ["update", "delete"] }
/// tenant = "tenant_id"
/// mutated = [{ type = "agent", id = "id" }]
/// include = ["conversations"]
/// ```
///
/// Or what a closure says, which is asked for every event of the name:
///
/// ```
/// # use tower_cache_aside::{EventChange, EventPolicy};
/// let policy = EventPolicy::from_fn("prices", |event| {
///     let products = event.values("skus").iter().map(|sku| sku.to_lowercase());
///     products.map(|id| EventChange::new().mutated("product", id)).collect()
/// });
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[must_use]
pub struct EventPolicy {
    on: String,
    #[serde(default)]
    when: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    tenant: Option<String>,
    #[serde(default)]
    mutated: Vec<Mutated>,
    #[serde(default)]
    all: Vec<String>,
    #[serde(default)]
    include: Vec<String>,
    #[serde(skip)]
    code: Option<Code>,
}

/// What reads an event and says what has changed.
#[derive(Clone)]
struct Code(Arc<Reader>);

type Reader = dyn Fn(&Event) -> Vec<EventChange> + Send + Sync;

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Code {}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code")
    }
}

/// What has changed, as [a closure](EventPolicy::from_fn) says that reads an event.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct EventChange {
    tenant: Option<String>,
    change: Change,
}

impl EventChange {
    /// Nothing yet, of the event's own [tenant](Event::tenant).
    pub fn new() -> Self {
        Self::default()
    }

    /// Whose it is.
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// The entity of this data type has changed: its cascade is dropped.
    pub fn mutated(mut self, data_type: impl Into<Arc<str>>, id: impl ToString) -> Self {
        self.change.entities.push((data_type.into(), id.to_string().into_bytes()));
        self
    }

    /// Any entity of this data type may have changed: all that the tenant has of it, and of what its cascade drops, are dropped.
    pub fn all(mut self, data_type: impl Into<Arc<str>>) -> Self {
        self.change.all.push(data_type.into());
        self
    }

    /// Follows this relation of the mutated types' cascades.
    pub fn include(mut self, relation: impl Into<Arc<str>>) -> Self {
        self.change.include.push(relation.into());
        self
    }
}

/// An entity of this type has changed, whose id is in this field.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutated {
    #[serde(rename = "type")]
    data_type: String,
    id: String,
}

impl EventPolicy {
    /// For events of this name.
    pub fn on(name: impl Into<String>) -> Self {
        Self {
            on: name.into(),
            when: BTreeMap::new(),
            tenant: None,
            mutated: vec![],
            all: vec![],
            include: vec![],
            code: None,
        }
    }

    /// For events of this name: what has changed is what the closure says. It must be quick, and is checked with each event: one whose
    /// changes name what there is not is refused, like one that a policy cannot make sense of.
    pub fn from_fn<F>(name: impl Into<String>, changes: F) -> Self
    where
        F: Fn(&Event) -> Vec<EventChange> + Send + Sync + 'static,
    {
        Self { code: Some(Code(Arc::new(changes))), ..Self::on(name) }
    }

    /// Only for those of which this field has one of these values.
    pub fn when<V: Into<String>>(mut self, field: impl Into<String>, values: impl IntoIterator<Item = V>) -> Self {
        self.when.entry(field.into()).or_default().extend(values.into_iter().map(Into::into));
        self
    }

    /// The field that names the tenant; by default the event's own [`tenant`](Event::tenant).
    pub fn tenant(mut self, field: impl Into<String>) -> Self {
        self.tenant = Some(field.into());
        self
    }

    /// The entities of this data type that this field names have changed: their cascades are dropped.
    pub fn mutated(mut self, data_type: impl Into<String>, field: impl Into<String>) -> Self {
        self.mutated.push(Mutated { data_type: data_type.into(), id: field.into() });
        self
    }

    /// Any entity of this data type may have changed: all that the tenant has of it, and of what its cascade drops, are dropped.
    pub fn all(mut self, data_type: impl Into<String>) -> Self {
        self.all.push(data_type.into());
        self
    }

    /// Follows this relation of the mutated types' cascades.
    pub fn include(mut self, relation: impl Into<String>) -> Self {
        self.include.push(relation.into());
        self
    }

    /// How it is called where something is wrong with it.
    pub(crate) fn what(&self) -> String {
        format!("event `{}`", self.on)
    }

    /// Whether an event is for it.
    pub(crate) fn reads(&self, event: &Event) -> bool {
        let is = |(field, accepted): (&String, &Vec<String>)| event.values(field).iter().any(|v| accepted.contains(v));
        event.name() == self.on && self.when.iter().all(is)
    }

    /// What an event with one id in each field would change: what is checked when the cache is built.
    pub(crate) fn sample(&self) -> Result<Change, ConfigError> {
        let fix = if self.on.is_empty() {
            "it has no name; say what it is `on`"
        } else if self.code.is_some() {
            return Ok(Change::default());
        } else if self.mutated.is_empty() && self.all.is_empty() {
            "it drops nothing; say what, with `mutated` or `all`"
        } else if self.when.values().any(Vec::is_empty) {
            "a field of `when` has no value that is accepted; give it one, or take it out"
        } else {
            let event = self.mutated.iter().fold(Event::new(&self.on), |event, mutated| event.field(&mutated.id, "1"));
            return self.change(&event);
        };
        Err(ConfigError::new(format!("{}: {fix}", self.what())))
    }

    /// What has changed, and whose that is, by what an event says.
    pub(crate) fn changes(&self, event: &Event) -> Result<Vec<(Option<String>, Change)>, ConfigError> {
        if let Some(Code(code)) = &self.code {
            let own = || event.tenant_name().map(str::to_owned);
            let said = catch_unwind(AssertUnwindSafe(|| code(event)));
            let said = said.map_err(|_| ConfigError::new(format!("{}: its closure panicked", self.what())))?;
            return Ok(said.into_iter().map(|said| (said.tenant.or_else(own), said.change)).collect());
        }
        Ok(vec![(self.tenant_of(event)?.map(str::to_owned), self.change(event)?)])
    }

    /// Whether what it names can only be checked with each event.
    pub(crate) fn is_code(&self) -> bool {
        self.code.is_some()
    }

    /// Whose an event is, as it says itself.
    fn tenant_of<'e>(&self, event: &'e Event) -> Result<Option<&'e str>, ConfigError> {
        let Some(field) = &self.tenant else { return Ok(event.tenant_name()) };
        match event.values(field) {
            [tenant] if !tenant.is_empty() => Ok(Some(tenant)),
            _ => Err(ConfigError::new(format!("{}: `{field}` is to name one tenant", self.what()))),
        }
    }

    /// What has changed, by what an event says.
    fn change(&self, event: &Event) -> Result<Change, ConfigError> {
        let names = |names: &[String]| names.iter().map(|name| Arc::from(&**name)).collect();
        let mut change = Change { all: names(&self.all), include: names(&self.include), ..Change::default() };
        for Mutated { data_type, id } in &self.mutated {
            let (data_type, ids): (Arc<str>, _) = (data_type.as_str().into(), event.values(id));
            if ids.is_empty() || ids.iter().any(String::is_empty) {
                return Err(ConfigError::new(format!("{}: `{id}` is to name a {data_type}", self.what())));
            }
            if ids.len() > MOST {
                change.all.push(data_type);
            } else {
                change.entities.extend(ids.iter().map(|id| (data_type.clone(), id.clone().into_bytes())));
            }
        }
        Ok(change)
    }
}
