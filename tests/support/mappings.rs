//! Mappings made at random, the data they are about, and what is true of them, told without the crate.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use http::Method;
use rand::{RngExt, rngs::SmallRng};
use tower_cache_aside::{Cache, CacheBuilder, Cascade, DataType, Mutation, Route, Ttl};

/// A thing: its kind and its id.
pub type Row = (usize, String);

/// What a cascade says, in words of kinds.
#[derive(Clone, Debug)]
pub struct CascadeSpec {
    pub data_type: String,
    pub drops: Vec<String>,
    pub all: Vec<String>,
    /// Name, the child type, and whether the database is asked.
    pub relations: Vec<(String, String, bool)>,
}

/// What a route shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shows {
    /// One row, by its id or by its name.
    Row,
    /// All rows of the kind.
    All,
    /// The rows of the kind below one parent.
    Below,
}

#[derive(Clone, Debug)]
pub struct RouteSpec {
    pub path: String,
    pub data_type: String,
    pub kind: usize,
    pub shows: Shows,
    pub declares: bool,
}

#[derive(Clone, Debug)]
pub struct MutationSpec {
    pub method: Method,
    pub path: String,
    pub data_type: String,
    pub kind: usize,
    pub include: Vec<String>,
    pub all: Vec<String>,
}

/// A mapping and its world: kinds `a`, `b`, `c`, each perhaps below one that comes before it.
#[derive(Clone, Debug)]
pub struct Mapping {
    pub parents: Vec<Option<usize>>,
    /// Whether parameters are called `{id}` instead of `{a_id}`.
    pub anonymous: bool,
    pub types: BTreeMap<String, usize>,
    pub routes: Vec<RouteSpec>,
    pub cascades: Vec<CascadeSpec>,
    pub mutations: Vec<MutationSpec>,
    /// Each row's parent.
    pub rows: BTreeMap<Row, Option<Row>>,
}

/// What is stored: the path, its type and kind, and which rows it shows.
#[derive(Clone, Debug)]
pub struct Page {
    pub path: String,
    pub route: usize,
    pub shows: BTreeSet<Row>,
}

/// A tag: the type, and the entity with its id, or the whole type.
pub type Tag = (String, Option<(String, String)>);

pub fn name(kind: usize) -> String {
    char::from(b'a' + kind as u8).to_string()
}

fn some<T: Clone>(rng: &mut SmallRng, from: &[T], share: f64) -> Vec<T> {
    from.iter().filter(|_| rng.random_bool(share)).cloned().collect()
}

impl Mapping {
    pub fn random(rng: &mut SmallRng) -> Self {
        let kinds = rng.random_range(1..=3);
        let parents: Vec<_> = (0..kinds)
            .map(|kind: usize| (kind > 0 && rng.random_bool(0.8)).then(|| rng.random_range(0..kind)))
            .collect();
        let anonymous = rng.random_bool(0.15);
        let mut this = Self {
            parents,
            anonymous,
            types: BTreeMap::new(),
            routes: vec![],
            cascades: vec![],
            mutations: vec![],
            rows: BTreeMap::new(),
        };
        for kind in 0..kinds {
            this.add_routes(rng, kind);
            this.add_rows(kind);
        }
        for kind in 0..kinds {
            this.add_cascade(rng, kind);
            this.add_mutations(rng, kind);
        }
        this
    }

    pub fn param(&self, kind: usize) -> String {
        if self.anonymous { "{id}".to_owned() } else { format!("{{{}_id}}", name(kind)) }
    }

    fn add_routes(&mut self, rng: &mut SmallRng, kind: usize) {
        let (k, param) = (name(kind), self.param(kind));
        self.types.insert(k.clone(), kind);
        let mut add = |path: String, data_type: String, shows, declares| {
            self.types.insert(data_type.clone(), kind);
            self.routes.push(RouteSpec { path, data_type, kind, shows, declares });
        };
        add(format!("/{k}/{param}"), k.clone(), Shows::Row, false);
        // What strangers do: another way to the same thing, a list under the type of its rows, details elsewhere.
        let declares = rng.random_bool(0.6);
        if rng.random_bool(0.25) {
            add(format!("/{k}-by-name/{{name}}"), k.clone(), Shows::Row, declares);
        }
        if rng.random_bool(0.15) {
            add(format!("/{k}"), k.clone(), Shows::All, declares);
        } else if rng.random_bool(0.7) {
            add(format!("/{k}"), format!("{k}_list"), Shows::All, rng.random_bool(0.2));
        }
        if rng.random_bool(0.6) {
            let path = match rng.random_range(0..4) {
                0 | 1 => format!("/{k}/{param}/detail"),
                2 => format!("/details-of-{k}/{param}"),
                _ => format!("/details-of-{k}/{{name}}"),
            };
            add(path, format!("{k}_detail"), Shows::Row, declares);
        }
        if let Some(parent) = self.parents[kind] {
            let (p, above) = (name(parent), format!("{{{}_id}}", name(parent)));
            let above = if self.anonymous { "{id}".to_owned() } else { above };
            let mut add = |path: String, data_type: String, shows, declares| {
                self.types.insert(data_type.clone(), kind);
                self.routes.push(RouteSpec { path, data_type, kind, shows, declares });
            };
            if rng.random_bool(0.4) && !self.anonymous {
                add(format!("/{p}/{above}/{k}/{param}"), k.clone(), Shows::Row, false);
            }
            if rng.random_bool(0.4) {
                add(format!("/{p}/{above}/{k}"), format!("{k}_below"), Shows::Below, rng.random_bool(0.2));
            }
        }
    }

    /// Two of each kind below each parent; ids of different kinds are the same.
    fn add_rows(&mut self, kind: usize) {
        let above: Vec<_> = match self.parents[kind] {
            None => vec![None],
            Some(parent) => self.rows.keys().filter(|(k, _)| *k == parent).cloned().map(Some).collect(),
        };
        for (id, parent) in (1..).zip(above.into_iter().flat_map(|parent| [parent.clone(), parent])) {
            self.rows.insert((kind, id.to_string()), parent);
        }
    }

    fn add_cascade(&mut self, rng: &mut SmallRng, kind: usize) {
        if rng.random_bool(0.2) {
            return;
        }
        let k = name(kind);
        let own = |t: &&String| **t != k && (t.starts_with(&k));
        let own: Vec<_> = self.types.keys().filter(own).cloned().collect();
        // (Of what is not below it, a drop by its id would find nothing, which is a mistake of another kind.)
        let below = |of: usize| std::iter::successors(Some(of), |of| self.parents[*of]).any(|above| above == kind);
        let any: Vec<_> = self.types.iter().filter(|(t, of)| **t != k && below(**of)).map(|(t, _)| t.clone()).collect();
        let mut drops = some(rng, &own, 0.4);
        if rng.random_bool(0.15) {
            drops.extend(some(rng, &any, 0.3));
        }
        let all = some(rng, &own, 0.5);
        let related: Vec<_> = (0..self.parents.len())
            .filter(|other| self.parents[*other] == Some(kind) || self.parents[kind] == Some(*other))
            .collect();
        let related = some(rng, &related, 0.6).into_iter();
        let relations = related.map(|other| (format!("{k}_to_{}", name(other)), name(other), rng.random_bool(0.7)));
        let relations = relations.collect();
        drops.sort();
        drops.dedup();
        self.cascades.push(CascadeSpec { data_type: k, drops, all, relations });
    }

    fn add_mutations(&mut self, rng: &mut SmallRng, kind: usize) {
        let k = name(kind);
        let relations = self.cascade(&k).map_or(vec![], |c| c.relations.iter().map(|r| r.0.clone()).collect());
        for method in [Method::PUT, Method::DELETE] {
            if !rng.random_bool(0.6) {
                continue;
            }
            let own: Vec<_> = self.types.keys().filter(|t| t.starts_with(&k)).cloned().collect();
            let (path, data_type) = (format!("/{k}/{}", self.param(kind)), k.clone());
            let include = some(rng, &relations, 0.6);
            let all = some(rng, &own, 0.1);
            self.mutations.push(MutationSpec { method, path, data_type, kind, include, all });
        }
    }

    pub fn cascade(&self, data_type: &str) -> Option<&CascadeSpec> {
        self.cascades.iter().find(|c| c.data_type == data_type)
    }

    // ---- as the crate is told ----------------------------------------------------------------------------------------

    pub fn builder(&self) -> CacheBuilder {
        let mut builder = Cache::builder("test").single_tenant("t");
        for data_type in self.types.keys() {
            builder = builder.data_type(DataType::new(data_type, Ttl::Standard));
        }
        for RouteSpec { path, data_type, declares, .. } in &self.routes {
            let route = Route::new(path, data_type);
            builder = builder.route(if *declares { route.declares_tags() } else { route });
        }
        for CascadeSpec { data_type, drops, all, relations } in &self.cascades {
            let mut cascade = Cascade::new(data_type).drops(drops).all(all);
            for (name, child, asks) in relations {
                cascade = cascade.relation(name, child);
                if *asks {
                    let this = self.clone();
                    let (from, to) = (self.types[data_type], self.types[child]);
                    builder = builder.resolver(name, move |_, ids| {
                        let rows = ids.into_iter().flat_map(|id| this.related(&(from, id), to)).map(|row| row.1);
                        let rows = rows.collect();
                        async move { Ok::<_, std::io::Error>(rows) }
                    });
                }
            }
            builder = builder.cascade(cascade);
        }
        for MutationSpec { method, path, data_type, include, all, .. } in &self.mutations {
            let mut mutation = Mutation::new(method.clone(), path).mutates(data_type);
            mutation = include.iter().fold(mutation, |mutation, name| mutation.include(name));
            builder = builder.mutation(all.iter().fold(mutation, |mutation, data_type| mutation.all(data_type)));
        }
        builder
    }

    // ---- what is true ------------------------------------------------------------------------------------------------

    /// The rows of another kind right above or right below.
    pub fn related(&self, row: &Row, kind: usize) -> Vec<Row> {
        let below = self.rows.iter().filter(|((k, _), above)| *k == kind && above.as_ref() == Some(row));
        let above = self.rows.get(row).cloned().flatten().filter(|(k, _)| *k == kind);
        below.map(|(row, _)| row.clone()).chain(above).collect()
    }

    pub fn line(&self, row: &Row) -> Vec<Row> {
        let above = |row: &Row| self.rows.get(row).cloned().flatten();
        std::iter::successors(Some(row.clone()), above).collect()
    }

    pub fn of_kind(&self, kind: usize) -> Vec<Row> {
        self.rows.keys().filter(|(k, _)| *k == kind).cloned().collect()
    }

    /// Every page there is.
    pub fn pages(&self) -> Vec<Page> {
        let mut pages = vec![];
        for (at, route) in self.routes.iter().enumerate() {
            match route.shows {
                Shows::All => pages.push(Page {
                    path: route.path.clone(),
                    route: at,
                    shows: self.of_kind(route.kind).into_iter().collect(),
                }),
                Shows::Row => pages.extend(self.of_kind(route.kind).into_iter().map(|row| {
                    let path = self.fill(&route.path, &row);
                    Page { path, route: at, shows: [row].into() }
                })),
                Shows::Below => pages.extend(self.of_kind(self.parents[route.kind].unwrap()).into_iter().map(|row| {
                    let (path, shows) = (self.fill(&route.path, &row), self.related(&row, route.kind));
                    Page { path, route: at, shows: shows.into_iter().collect() }
                })),
            }
        }
        pages
    }

    pub fn fill(&self, path: &str, row: &Row) -> String {
        let line = self.line(row);
        let path = path.replace("{id}", &row.1).replace("{name}", &format!("name-{}", row.1));
        line.iter().fold(path, |path, (kind, id)| path.replace(&format!("{{{}_id}}", name(*kind)), id))
    }

    /// Whether a page shows something of this row: itself, or what is below it.
    fn is_about(&self, page: &Page, row: &Row) -> bool {
        page.shows.iter().any(|shown| self.line(shown).contains(row))
            || self.parents[self.routes[page.route].kind] == Some(row.0)
                && self.routes[page.route].shows == Shows::Below
                && page.path == self.fill(&self.routes[page.route].path, row)
    }

    /// What a write to this row makes stale, by the words of the mapping.
    pub fn affected(&self, write: &MutationSpec, row: &Row, pages: &[Page]) -> Vec<Page> {
        let mut affected = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut todo = vec![(write.data_type.clone(), row.clone(), Some(&write.include))];
        while let Some((data_type, row, include)) = todo.pop() {
            if !seen.insert((data_type.clone(), row.clone())) && include.is_none() {
                continue;
            }
            let cascade = self.cascade(&data_type);
            let types: Vec<_> = cascade.map_or(vec![], |c| c.drops.clone()).into_iter().chain([data_type]).collect();
            for (at, page) in pages.iter().enumerate() {
                let of = &self.routes[page.route].data_type;
                let falls_whole = cascade.is_some_and(|c| c.all.contains(of));
                if falls_whole || types.contains(of) && self.is_about(page, &row) {
                    affected.insert(at);
                }
            }
            for (name, child, _) in cascade.map_or(&[][..], |c| &c.relations) {
                if include.is_none_or(|include| include.contains(name)) {
                    let rows = self.related(&row, self.types[child]).into_iter();
                    todo.extend(rows.map(|row| (child.clone(), row, None)));
                }
            }
        }
        // What the mutation names whole, with what hangs on it.
        for whole in &write.all {
            let fall = self.whole(whole, &write.include);
            let falls = |page: &Page| fall.contains(&self.routes[page.route].data_type);
            affected.extend(pages.iter().enumerate().filter(|(_, page)| falls(page)).map(|(at, _)| at));
        }
        affected.into_iter().map(|at| pages[at].clone()).collect()
    }

    /// The types that fall when any entity of this one may have changed.
    fn whole(&self, data_type: &str, include: &[String]) -> BTreeSet<String> {
        let mut fall = BTreeSet::new();
        let mut gone = BTreeSet::new();
        let mut todo = vec![(data_type.to_owned(), Some(include))];
        while let Some((data_type, include)) = todo.pop() {
            if include.is_none() && !gone.insert(data_type.clone()) {
                continue;
            }
            if let Some(CascadeSpec { drops, all, relations, .. }) = self.cascade(&data_type) {
                fall.extend([&drops[..], &all[..]].concat());
                let followed =
                    relations.iter().filter(|(name, ..)| include.is_none_or(|include| include.contains(name)));
                todo.extend(followed.map(|(_, child, _)| (child.clone(), None)));
            }
            fall.insert(data_type);
        }
        fall
    }

    // ---- which tags there are ----------------------------------------------------------------------------------------

    /// What the resource of a type is called: as its first route calls it, or like the type where one does.
    fn entity(&self, data_type: &str) -> String {
        let of_type = self.routes.iter().filter(|r| r.data_type == data_type);
        let last = |r: &RouteSpec| params(&r.path).pop().map(|(_, entity)| entity);
        let names: Vec<_> = of_type.filter_map(last).collect();
        let own = names.iter().find(|name| *name == data_type).or(names.first());
        own.cloned().unwrap_or_else(|| data_type.to_owned())
    }

    /// The tags of a page: by its path, and what its handler declares.
    pub fn tags(&self, page: &Page, useful: &BTreeSet<Tag>) -> BTreeSet<Tag> {
        let route = &self.routes[page.route];
        let of = |(entity, id): (String, String)| (route.data_type.clone(), Some((entity, id)));
        let values: Vec<_> = page.path.split('/').map(str::to_owned).collect();
        let by_path = params(&route.path).into_iter().map(|(at, entity)| (entity, values[at].clone()));
        let mut tags: BTreeSet<_> = by_path.chain(self.declared(page, useful)).map(of).collect();
        tags.insert((route.data_type.clone(), None));
        tags
    }

    /// The tags that some write drops.
    pub fn useful(&self) -> BTreeSet<Tag> {
        let mut useful = BTreeSet::new();
        for (data_type, kind) in &self.types {
            let relations = self.cascade(data_type).map_or(vec![], |c| c.relations.clone());
            let include: Vec<_> = relations.into_iter().map(|r| r.0).collect();
            useful.extend(self.of_kind(*kind).into_iter().flat_map(|row| self.drops(data_type, &row, &include)));
        }
        useful
    }

    /// What a diligent handler declares: all that the page shows and what that is below, as far as some cascade asks for it.
    pub fn declared(&self, page: &Page, useful: &BTreeSet<Tag>) -> BTreeSet<(String, String)> {
        let route = &self.routes[page.route];
        if !route.declares {
            return BTreeSet::new();
        }
        let shown = page.shows.iter().flat_map(|row| self.line(row));
        let declared = shown.map(|(kind, id)| (self.entity(&name(kind)), id));
        declared.filter(|by| useful.contains(&(route.data_type.clone(), Some(by.clone())))).collect()
    }

    /// The tags that a mutation of one row drops.
    fn drops(&self, data_type: &str, row: &Row, include: &[String]) -> BTreeSet<Tag> {
        let mut tags = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut todo = vec![(data_type.to_owned(), row.clone(), Some(include))];
        while let Some((data_type, row, include)) = todo.pop() {
            if !seen.insert((data_type.clone(), row.clone(), include.is_some())) {
                continue;
            }
            // By this row's id: its own, and whatever hangs on it by relations.
            let by = (self.entity(&data_type), row.1.clone());
            let mut hang = vec![(data_type.clone(), include)];
            let mut gone = BTreeSet::new();
            while let Some((of, include)) = hang.pop() {
                if include.is_none() && !gone.insert(of.clone()) {
                    continue;
                }
                let cascade = self.cascade(&of);
                for of in cascade.map_or(vec![], |c| c.drops.clone()).into_iter().chain([of.clone()]) {
                    tags.insert((of, Some(by.clone())));
                }
                tags.extend(cascade.map_or(vec![], |c| c.all.clone()).into_iter().map(|of| (of, None)));
                let followed = cascade.map_or(&[][..], |c| &c.relations).iter();
                let followed = followed.filter(|(name, ..)| include.is_none_or(|include| include.contains(name)));
                hang.extend(followed.map(|(_, child, _)| (child.clone(), None)));
            }
            for (name, child, asks) in self.cascade(&data_type).map_or(&[][..], |c| &c.relations) {
                if *asks && include.is_none_or(|include| include.contains(name)) {
                    let rows = self.related(&row, self.types[child]).into_iter();
                    todo.extend(rows.map(|row| (child.clone(), row, None)));
                }
            }
        }
        tags
    }

    /// A write and a page that it makes stale and does not find, if there is one.
    pub fn hole(&self) -> Option<String> {
        let (pages, useful) = (self.pages(), self.useful());
        let pages: Vec<_> = pages.into_iter().map(|page| (self.tags(&page, &useful), page)).collect();
        // Cascades are fired by hand, too, with any relation or none; what their mutations drop whole need not be found.
        let by_hand = |cascade: &CascadeSpec, include: Vec<String>| {
            let own = self.mutations.iter().filter(|m| m.data_type == cascade.data_type);
            MutationSpec {
                method: Method::POST,
                path: "by hand".to_owned(),
                data_type: cascade.data_type.clone(),
                kind: self.types[&cascade.data_type],
                include,
                all: own.flat_map(|m| m.all.clone()).collect(),
            }
        };
        let by_hand = self.cascades.iter().flat_map(|cascade| {
            let relations = cascade.relations.iter().map(|r| r.0.clone()).collect();
            [by_hand(cascade, relations), by_hand(cascade, vec![])]
        });
        for write in self.mutations.iter().cloned().chain(by_hand) {
            for row in self.of_kind(write.kind) {
                let drops = self.drops(&write.data_type, &row, &write.include);
                let mut whole: BTreeSet<_> = drops.into_iter().filter(|(_, by)| by.is_none()).map(|(t, _)| t).collect();
                whole.extend(write.all.iter().flat_map(|t| self.whole(t, &write.include)));
                if let Some(page) = self.left(&write, &row, &whole, &pages) {
                    return Some(format!("{} {} of {row:?} leaves {}", write.method, write.path, page.path));
                }
            }
        }
        None
    }

    /// A page that is not found on the way by which the write reaches it (that it is found on another one, is luck).
    fn left<'p>(
        &self,
        write: &MutationSpec,
        row: &Row,
        whole: &BTreeSet<String>,
        pages: &'p [(BTreeSet<Tag>, Page)],
    ) -> Option<&'p Page> {
        let by = |data_type: &str, row: &Row| (self.entity(data_type), row.1.clone());
        let mut gone = BTreeSet::new();
        // Type, row, the last id that is known on the way, whether it is this row's.
        let way = by(&write.data_type, row);
        let mut todo = vec![(write.data_type.clone(), row.clone(), way, true, Some(&write.include))];
        while let Some((data_type, row, way, is_known, include)) = todo.pop() {
            if !gone.insert((data_type.clone(), row.clone(), way.clone(), is_known, include.is_some())) {
                continue;
            }
            let cascade = self.cascade(&data_type);
            let types: Vec<_> = cascade.map_or(vec![], |c| c.drops.clone()).into_iter().chain([data_type]).collect();
            let is_left = |(tags, page): &&(BTreeSet<Tag>, Page)| {
                let of = &self.routes[page.route].data_type;
                let found = whole.contains(of) || tags.contains(&(of.clone(), Some(way.clone())));
                types.contains(of) && self.is_about(page, &row) && !found
            };
            if let Some((_, page)) = pages.iter().find(is_left) {
                return Some(page);
            }
            for (name, child, asks) in cascade.map_or(&[][..], |c| &c.relations) {
                if include.is_none_or(|include| include.contains(name)) {
                    for row in self.related(&row, self.types[child]) {
                        let is_known = is_known && *asks;
                        // What names the one above, names no sibling.
                        let way = if is_known { by(child, &row) } else { way.clone() };
                        todo.push((child.clone(), row, way, is_known, None));
                    }
                }
            }
        }
        None
    }
}

/// Where a path has parameters, and the entities that they name. An `{id}` names whatever its folder is.
fn params(path: &str) -> Vec<(usize, String)> {
    let parts: Vec<_> = path.split('/').collect();
    let params =
        parts.iter().enumerate().filter_map(|(at, part)| Some((at, part.strip_prefix('{')?.strip_suffix('}')?)));
    let entity = |(at, name): (usize, &str)| match name.strip_suffix("_id") {
        Some(entity) => (at, entity.to_owned()),
        None => (at, format!("{name}@{}", parts[at - 1])),
    };
    params.map(entity).collect()
}
