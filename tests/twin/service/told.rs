//! What the cache is told of a service: how each write finds what it makes stale, by whichever means.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use http::Method;
use tower_cache_aside::{
    Cache, CacheBuilder, Cascade, Coalesce, Credentials, DataType, Freshness, GrpcMethod, GrpcTarget, Hosts, Mutation,
    OnUnmapped, Query, Route, Ttl,
};

use super::{super::world::Shared, Flaw, Id, Means, Page, Row, Rows, Sees, Service, Shape, Tenancy, name, tenant_of};

impl Service {
    pub(super) fn told(&self, rows: &Shared<Rows>) -> CacheBuilder {
        let mut builder = self.types().fold(self.basics(), CacheBuilder::data_type);
        builder = self.pages.iter().fold(builder, |builder, page| builder.route(self.route(page)));
        for kind in 0..self.kinds.len() {
            builder = builder.cascade(self.cascade(kind));
            builder = self.mutations(kind).into_iter().fold(builder, CacheBuilder::mutation);
            builder = self.calls(kind).into_iter().fold(builder, CacheBuilder::grpc);
            for (name, _, relation) in self.relations(kind) {
                let (service, rows) = (self.clone(), rows.clone());
                builder = builder.resolver(name, move |tenant: String, ids: Vec<String>| {
                    let found = rows.lock().0.get(&tenant).map_or(vec![], |rows| relation.find(&service, rows, &ids));
                    async move { Ok::<_, std::io::Error>(found) }
                });
            }
        }
        builder
    }

    /// All but the routes and what changes them.
    fn basics(&self) -> CacheBuilder {
        let mut builder = Cache::builder("twin");
        builder = match self.tenancy {
            _ if self.lacks(Flaw::Tenant) => builder.single_tenant("t"),
            Tenancy::Single => builder.single_tenant("t"),
            Tenancy::Header => builder.tenant_header("x-tenant-id"),
            Tenancy::Host => builder.tenant_from(|parts| {
                let host = parts.headers.get("host").and_then(|host| host.to_str().ok());
                tenant_of(parts.uri.authority().map(|authority| authority.as_str()).or(host)?)
            }),
        };
        if !self.shows_host || self.lacks(Flaw::Host) {
            builder = builder.hosts(Hosts::Any);
        }
        for (kind, of) in self.kinds.iter().enumerate() {
            if let Some(canonical) = of.ids.canonical().filter(|_| !self.lacks(Flaw::Spelling)) {
                builder = builder.entity(name(kind), canonical);
            }
        }
        if self.has(Shape::File, 0) {
            builder = builder.mutation(Mutation::put("/files/{*path}", "file").entity("path", "file"));
        }
        if self.answers.drops_unmapped {
            builder = builder.on_unmapped(OnUnmapped::Drop);
        }
        builder
            .body_limit(self.answers.body_limit)
            .request_directives(self.answers.heeds_requests)
            .data_type(DataType::new("answer", Ttl::Standard))
            .route(Route::new("/answers/{answer_id}", "answer"))
            .grpc(GrpcMethod::read("/twin.Answers/Get", "answer"))
    }

    fn route(&self, page: &Page) -> Route {
        let Sees { query, header, credentials, body, .. } = &page.sees;
        let mut route = Route::new(self.path(page), self.data_type(page.shape, page.kind));
        route = route.query(if self.lacks(Flaw::Query) { Query::Ignore } else { query.clone() });
        let is_of_user = *credentials == Credentials::per_user("x-user");
        route = route.credentials(match self.lacks(Flaw::User) && is_of_user {
            true => Credentials::Shared,
            false => credentials.clone(),
        });
        if *header && !self.lacks(Flaw::Header) {
            route = route.vary("x-lang");
        }
        if page.shape == Shape::Search {
            route = route.method(Method::POST).body(*body);
        }
        if page.shape == Shape::File {
            route = route.entity("path", "file");
        }
        let declares =
            page.shape == Shape::Slug || page.shape == Shape::Line && self.kinds[page.kind].line == Means::Tags;
        if declares { route.declares_tags() } else { route }
    }

    fn types(&self) -> impl Iterator<Item = DataType> {
        let types: BTreeMap<_, _> =
            self.pages.iter().map(|page| (self.data_type(page.shape, page.kind), page.kind)).collect();
        types.into_iter().map(|(data_type, kind)| {
            let policy = &self.kinds[kind].policy;
            let mut known = DataType::new(&data_type, if policy.is_stale { Ttl::Short } else { Ttl::Standard });
            if policy.keeps_none {
                known = known.negative([404], Ttl::Short);
            }
            if policy.is_stale {
                let window = Duration::from_secs(3_600);
                known = known.stale_while_revalidate(window).stale_if_error(window);
            }
            if policy.refreshes_early {
                known = known.early_refresh(5.0).jitter(0.5);
            }
            if policy.by_response {
                known = known.freshness(Freshness::Response);
            }
            if self.answers.in_fleet {
                known = known.coalesce(Coalesce::Fleet);
            }
            if policy.loads_whole { known.loads_whole() } else { known }
        })
    }

    /// The relations of a kind's cascade: name, type, and which numbers of the other kind belong to one of this.
    pub(super) fn relations(&self, kind: usize) -> Vec<(String, String, Relation)> {
        let (k, of) = (name(kind), &self.kinds[kind]);
        let mut relations = vec![];
        if of.up == Means::Resolver && !self.lacks(Flaw::Parent) {
            relations.extend(self.ups(kind).into_iter().map(|up| (format!("{k}_up_{up}"), up, Relation::Parent(kind))));
        }
        for below in self.descendants(kind) {
            let b = name(below);
            if self.kinds[below].line == Means::Resolver && self.has(Shape::Line, below) && !self.lacks(Flaw::Line) {
                relations.push((format!("{k}_lines_{b}"), format!("{b}_line"), Relation::Below(kind, below)));
            }
            if of.gone == Means::Resolver && !self.lacks(Flaw::Children) {
                relations.push((format!("{k}_gone_{b}"), b, Relation::Below(kind, below)));
            }
        }
        relations
    }

    fn cascade(&self, kind: usize) -> Cascade {
        let (k, of) = (name(kind), &self.kinds[kind]);
        let mut cascade = Cascade::new(&k);
        let own = [Shape::Line, Shape::Summary].into_iter().filter(|shape| self.has(*shape, kind));
        cascade = cascade.drops(own.map(|shape| self.data_type(shape, kind)));
        let below = self.below(kind).into_iter().filter(|below| self.has(Shape::Below, *below));
        cascade = cascade.drops(below.map(|below| self.data_type(Shape::Below, below)));
        if !self.lacks(Flaw::List) {
            let lists = [Shape::List, Shape::Search].into_iter().filter(|shape| self.has(*shape, kind));
            cascade = cascade.all(lists.map(|shape| self.data_type(shape, kind)));
        }
        if of.up == Means::All && !self.lacks(Flaw::Parent) {
            cascade = cascade.all(self.ups(kind));
        }
        for below in self.descendants(kind).into_iter().filter(|below| self.has(Shape::Line, *below)) {
            let line = self.data_type(Shape::Line, below);
            match self.kinds[below].line {
                _ if self.lacks(Flaw::Line) => {}
                Means::All => cascade = cascade.all([line]),
                Means::Tags => cascade = cascade.drops([line]),
                _ => {}
            }
        }
        for (name, child, _) in self.relations(kind) {
            cascade = cascade.relation(name, child);
        }
        if of.policy.is_fenced { cascade.fenced(Duration::from_secs(60)) } else { cascade }
    }

    /// What each write of a kind says: removals take along what is below.
    fn mutations(&self, kind: usize) -> Vec<Mutation> {
        let (k, of) = (name(kind), &self.kinds[kind]);
        let row = format!("/{k}/{{{k}_id}}");
        let relations = self.relations(kind);
        let all = |mutation: Mutation| relations.iter().fold(mutation, |m, (name, ..)| m.include(name));
        let some = |mutation: Mutation| {
            let kept = relations.iter().filter(|(name, ..)| !name.contains("_gone_"));
            kept.fold(mutation, |m, (name, ..)| m.include(name))
        };
        let mut mutations = vec![some(Mutation::put(&row, &k)), some(Mutation::post(format!("/{k}")).creates(&k))];
        let mut remove = all(Mutation::delete(&row, &k));
        if of.gone == Means::All && !self.lacks(Flaw::Children) {
            remove = self.descendants(kind).into_iter().fold(remove, |remove, below| remove.all(name(below)));
        }
        if !self.lacks(Flaw::Mutation) {
            mutations.push(remove);
        }
        if let Some(parent) = of.parent {
            let p = name(parent);
            mutations.push(some(Mutation::post(format!("/{p}/{{{p}_id}}/{k}")).creates(&k)));
            mutations.push(some(Mutation::put(format!("/{p}/{{{p}_id}}/{k}/{{{k}_id}}"), &k)));
        }
        mutations
    }

    fn calls(&self, kind: usize) -> Vec<GrpcMethod> {
        let k = name(kind);
        let target = |message: &[u8]| Some(GrpcTarget::new(std::str::from_utf8(message).ok()?));
        let relations = self.relations(kind);
        let include = |method: GrpcMethod, all: bool| {
            let kept = relations.iter().filter(|(name, ..)| all || !name.contains("_gone_"));
            kept.fold(method, |method, (name, ..)| method.include(name))
        };
        let mut calls = vec![
            GrpcMethod::read(format!("/twin.{k}/Get"), &k).message(target),
            include(GrpcMethod::mutation(format!("/twin.{k}/Put"), &k).message(target), false),
        ];
        if self.has(Shape::List, kind) {
            calls.push(GrpcMethod::read(format!("/twin.{k}/List"), format!("{k}_list")));
        }
        if self.removes_by_call(kind) && !self.lacks(Flaw::Mutation) {
            calls.push(include(GrpcMethod::mutation(format!("/twin.{k}/Delete"), &k).message(target), true));
        }
        calls
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Relation {
    Parent(usize),
    Below(usize, usize),
}

impl Relation {
    fn find(self, service: &Service, rows: &BTreeMap<Id, Row>, ids: &[String]) -> Vec<String> {
        let (of, to) = match self {
            Self::Parent(kind) => (kind, service.parent(kind).unwrap()),
            Self::Below(kind, below) => (kind, below),
        };
        let numbers = ids.iter().filter_map(|id| service.kinds[of].ids.number(id));
        let found: BTreeSet<_> = match self {
            Self::Parent(_) => numbers.filter_map(|number| rows.get(&(of, number))?.parent).collect(),
            Self::Below(..) => {
                let numbers: Vec<_> = numbers.map(|number| (of, number)).collect();
                let below = rows.keys().filter(|id| id.0 == to);
                below
                    .filter(|id| service.line(rows, **id).iter().any(|up| numbers.contains(up)))
                    .map(|id| id.1)
                    .collect()
            }
        };
        found.into_iter().map(|number| service.id(to, number)).collect()
    }
}
