//! What a cache hands to its layers: the mapping, the engine and the options.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use http::HeaderName;
use tokio::time::Instant;

use super::warnings::Warnings;
#[cfg(feature = "stats")]
use crate::observe::{Cause, Dropped, tag_hash, tag_hashes};
use crate::{
    catalog::{Cascades, Catalogue, Change, Drops, FenceTimes, Policy},
    engine::{Engine, Invalidated},
    error::ConfigError,
    events::{EventPolicy, Sources},
    key::{Space, Tag, Tenant},
    observe::{FoundIn, Observer, Tellers},
    route::{Hosts, Identity, Known, OnUnmapped, Routes, TenantSource},
    store::{Fence, StoreError},
};

/// Of more tenants than this in one request, children are not looked for: everything of theirs falls.
const MOST_TENANTS: usize = 16;

/// By what an invalidation is caused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Request,
    /// Code, and no request.
    Hand,
    /// An event from outside.
    Event,
}

/// Who invalidates.
#[cfg_attr(not(feature = "stats"), allow(dead_code))]
pub(crate) struct Blame<'a> {
    pub(crate) by: By,
    /// `PUT /agents/a1`, or what is done by hand.
    pub(crate) what: &'a str,
    /// If there is one.
    pub(crate) tenant: Option<&'a [u8]>,
}

#[cfg(feature = "stats")]
impl Blame<'_> {
    fn cause(&self) -> Cause {
        match self.by {
            By::Request => Cause::Route,
            By::Hand => Cause::Hand,
            By::Event => Cause::Event,
        }
    }
}

/// The tags as people read them.
#[cfg(feature = "stats")]
fn labels(drops: &Drops) -> (Vec<String>, Arc<[u64]>) {
    let tags = || drops.groups.iter().flat_map(|group| &group.tags);
    (tags().take(MOST_NAMED).map(Tag::label).collect(), tag_hashes(tags().map(Tag::named)))
}

/// So many tags of an invalidation are remembered.
#[cfg(feature = "stats")]
const MOST_NAMED: usize = 32;

/// Who wants to know of invalidations.
pub(crate) type OnInvalidated = Arc<dyn Fn(&Invalidated, &[Tag]) + Send + Sync>;

/// Tells who wants to know. Whatever becomes of that: the invalidation is done.
fn tell(hook: &OnInvalidated, report: &Invalidated, tags: &[Tag]) {
    if catch_unwind(AssertUnwindSafe(|| hook(report, tags))).is_err() {
        tracing::error!("`on_invalidated` panicked");
    }
}

pub(crate) struct Core {
    pub(crate) catalogue: Catalogue,
    pub(crate) cascades: Cascades,
    pub(crate) events: Vec<EventPolicy>,
    pub(crate) sources: Sources,
    pub(crate) routes: Routes,
    pub(crate) tenants: TenantSource,
    pub(crate) identity: Identity,
    pub(crate) hosts: Hosts,
    pub(crate) space: Space,
    pub(crate) engine: Arc<Engine>,
    pub(crate) options: Options,
    pub(crate) warnings: Warnings,
    #[cfg_attr(not(feature = "stats"), allow(dead_code))]
    pub(crate) observer: Arc<Observer>,
    pub(crate) tellers: Tellers,
    #[cfg(feature = "stats")]
    pub(crate) auditor: Option<super::audit::Auditor>,
    pub(crate) on_invalidated: Option<OnInvalidated>,
    /// Who is told of what is asked, once somebody warms.
    #[cfg(feature = "warm")]
    pub(crate) sampler: std::sync::OnceLock<super::sampler::Sampler>,
}

/// What the layers do besides.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Whether anything is answered from the cache.
    pub(crate) enabled: bool,
    pub(crate) body_limit: usize,
    pub(crate) tag_header: HeaderName,
    pub(crate) targeted_header: HeaderName,
    pub(crate) report_header: bool,
    pub(crate) entity_tags: bool,
    pub(crate) request_directives: bool,
    pub(crate) show_keys: bool,
    pub(crate) fence: Option<FenceTimes>,
    pub(crate) on_unmapped: OnUnmapped,
    /// The response header in which the tags go to caches outside.
    pub(crate) forwards: Option<HeaderName>,
    /// Whether writes are refused that the store cannot be told about.
    pub(crate) rejects: bool,
}

impl Core {
    pub(crate) fn policy(&self, data_type: &str) -> Policy {
        self.catalogue.policy(data_type)
    }

    /// Why nothing of a type may be looked up now.
    pub(crate) fn keeps_out(&self, data_type: &str, policy: &Policy) -> Option<&'static str> {
        if !self.options.enabled {
            return Some("disabled");
        }
        let most = policy.max_lag?;
        let lags =
            [self.sources.behind().or_else(|| self.sources.any().then_some(Duration::MAX)), self.engine.behind()];
        // Where nothing at all says what happens elsewhere, nothing is known of it.
        // What comes late to another region is told late to this one: they add up.
        let behind = lags.into_iter().flatten().reduce(Duration::saturating_add).unwrap_or_else(|| {
            if self.warnings.is_new("max-lag", data_type) {
                tracing::warn!(
                    data_type,
                    "not cached: it has a `max_lag`, and no source of events is followed (`Cache::follow`)"
                );
            }
            Duration::MAX
        });
        (behind > most).then_some("events-behind")
    }

    /// Whether a request is a read that a route knows.
    #[cfg(feature = "warm")]
    pub(crate) fn reads(&self, request: &http::Request<()>) -> bool {
        let place = crate::route::Place::new(request.uri(), request.extensions(), None);
        let read = self.routes.read(request.method(), &place);
        read.is_some_and(|read| read.route.is_some())
    }

    /// What identifies a request besides its route.
    pub(crate) fn known(&self) -> Known<'_> {
        Known { tenants: &self.tenants, space: &self.space, identity: &self.identity, hosts: &self.hosts }
    }

    /// Where a stored response is found that is looked up.
    pub(crate) fn found_in(&self) -> FoundIn {
        if self.engine.is_shared() { FoundIn::Store } else { FoundIn::Process }
    }

    /// A path that no route reads. If one would, but for a prefix, somebody has taken pains for nothing.
    pub(crate) fn unmatched(&self, path: &str) {
        if !self.warnings.looks_again() {
            return;
        }
        if let Some(prefix) = self.routes.prefix_of(path).filter(|prefix| self.warnings.is_new("prefix", prefix)) {
            tracing::warn!(
                path,
                prefix,
                "no route reads this path, but one would without the prefix, or with it: routes are written as clients see \
                 them; say `mounted_at` where a router hides the prefix, or use the feature `axum`"
            );
        }
    }

    /// The time as dates in headers have it.
    pub(crate) fn date(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.engine.now())
    }

    /// The fence that a mutation of these types raises, if any of them is fenced.
    pub(crate) fn fence<'t>(&self, types: impl Iterator<Item = &'t str>) -> Option<Fence> {
        let times = types.filter_map(|t| self.cascades.fence(t).or(self.options.fence));
        let all = times.reduce(|a, b| FenceTimes { lease: a.lease.max(b.lease), hold: a.hold.max(b.hold) })?;
        Some(Fence::new(all.lease, all.hold))
    }

    /// How long what is dropped is held, for any type: for replicas.
    pub(crate) fn longest_hold(&self) -> Duration {
        let all = self.catalogue.known().filter_map(|data_type| self.cascades.fence(data_type)).map(|times| times.hold);
        all.max().unwrap_or_default()
    }

    /// Invalidates, and tells who wants to know. Where any fences are used at all, those of other writers are respected.
    pub(crate) async fn drop_all(&self, drops: Drops, fence: Option<&Fence>, blame: &Blame<'_>) -> Invalidated {
        #[cfg(feature = "stats")]
        let (start, (labels, all)) = (Instant::now(), labels(&drops));
        let any = self.options.fence.is_some() || self.cascades.any_fence();
        let tags = |drops: &Drops| drops.groups.iter().flat_map(|group| group.tags.clone()).collect::<Vec<_>>();
        let told = self.on_invalidated.as_ref().map(|hook| (hook, tags(&drops)));
        #[cfg(feature = "warm")]
        let again = self.sampler.get().map(|_| drops.clone());
        let report = self.engine.invalidate(drops, fence.or(any.then_some(&Fence::NOBODY))).await;
        #[cfg(feature = "warm")]
        self.sampler.get().zip(again).into_iter().for_each(|(sampler, drops)| sampler.dropped(&drops));
        if let Some((hook, tags)) = told {
            tell(hook, &report, &tags);
        }
        #[cfg(feature = "stats")]
        self.observer.dropped(&Dropped {
            cause: blame.cause(),
            what: blame.what,
            tenant: blame.tenant,
            types: report.types(),
            tags: labels,
            all,
            took: start.elapsed(),
            undelivered: report.undelivered(),
        });
        #[cfg(not(feature = "stats"))]
        let _ = blame;
        report
    }

    /// Drops everything of everybody.
    pub(crate) async fn clear(&self, blame: &Blame<'_>) -> Result<(), StoreError> {
        #[cfg(feature = "stats")]
        let start = Instant::now();
        let cleared = self.engine.clear().await;
        #[cfg(feature = "warm")]
        self.sampler.get().into_iter().for_each(super::sampler::Sampler::cleared);
        #[cfg(feature = "stats")]
        self.observer.dropped(&Dropped {
            cause: blame.cause(),
            what: blame.what,
            tenant: None,
            types: &[],
            tags: vec!["*".to_owned()],
            all: [tag_hash(b"*")].into(),
            took: start.elapsed(),
            undelivered: usize::from(cleared.is_err()),
        });
        #[cfg(not(feature = "stats"))]
        let _ = blame;
        cleared
    }

    /// Lifts a fence around what was not changed.
    pub(crate) async fn lift(&self, drops: Drops, fence: &Fence) {
        self.engine.invalidate(drops, Some(fence)).await;
    }

    /// Any entity of any type may have changed.
    pub(crate) fn everything(&self) -> Change {
        Change { all: self.catalogue.known().map(Arc::from).collect(), ..Change::default() }
    }

    /// That a change says nothing that would drop nothing.
    pub(crate) fn check_change(&self, what: &str, change: &Change) -> Result<(), ConfigError> {
        let types = change.entities.iter().map(|(data_type, _)| data_type).chain(&change.all).map(|t| &**t);
        for data_type in types.clone() {
            self.catalogue.check(what, data_type)?;
        }
        for (data_type, _) in &change.entities {
            let of_type =
                self.cascades.relations(data_type).into_iter().filter(|r| change.include.contains(r)).map(Some);
            of_type.chain([None]).try_for_each(|r| self.routes.expected.check(data_type, r.as_ref(), &change.all))?;
        }
        change.include.iter().try_for_each(|relation| self.cascades.check_relation(what, types.clone(), relation))
    }

    /// That each policy of events drops what there is.
    pub(crate) fn check_events(&self) -> Result<(), ConfigError> {
        self.events.iter().try_for_each(|policy| self.check_change(&policy.what(), &policy.sample()?))
    }

    /// The same of what a handler says, whose relations may be those of what the route declares.
    pub(crate) fn check_said(&self, change: &Change) -> Result<(), ConfigError> {
        let known = || self.cascades.declared().map(|t| &**t);
        let by_relation = |relation| self.cascades.check_relation("changes", known(), relation);
        change.include.iter().try_for_each(|relation| by_relation(relation))?;
        let of_types = |relation: &&Arc<str>| {
            let types = change.entities.iter().map(|(data_type, _)| data_type).chain(&change.all);
            types.into_iter().any(|data_type| self.cascades.relations(data_type).contains(relation))
        };
        let include = change.include.iter().filter(of_types).cloned().collect();
        self.check_change("changes", &Change { include, ..change.clone() })
    }

    /// Adds what a change drops, as the relations are now. Resolvers may take so long, for all tenants at once; where more
    /// are named than a request can mean, they are not asked.
    pub(crate) async fn add_change(&self, drops: &mut Drops, tenants: &[Tenant], change: &Change, within: Duration) {
        let within = if tenants.len() > MOST_TENANTS { Duration::ZERO } else { within };
        let deadline = Instant::now() + within;
        if let [tenant] = tenants {
            return self.cascades.add_change(drops, tenant, change, deadline).await;
        }
        let of_each = tenants.iter().map(async |tenant| {
            let mut drops = Drops::default();
            self.cascades.add_change(&mut drops, tenant, change, deadline).await;
            drops
        });
        join_all(of_each).await.into_iter().for_each(|of_tenant| drops.add_all(of_tenant));
    }
}
