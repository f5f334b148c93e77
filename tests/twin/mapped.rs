//! Services made of mappings: whatever `build` accepts, with a service to which it does justice.
//!
//! The database is one counter for each thing that can be written, and a page shows the counters of all the writes that, by the
//! words of the mapping, make it stale.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use http::Method;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tower_cache_aside::{CacheBuilder, Canonical};

use super::{
    handler::OF_WRITES,
    mappings::{Mapping, MutationSpec, Page, Row, Shows, name},
    world::{Asked, Said, Saying, Seen, Shared, World, pick},
};

#[derive(Clone, Debug)]
pub struct Mapped {
    pub mapping: Mapping,
    pages: Vec<Page>,
    /// By page: the counters it shows, and what its handler says that it depends on and belongs to.
    shown: Arc<Vec<Shown>>,
}

#[derive(Clone, Debug, Default)]
struct Shown {
    counters: BTreeSet<String>,
    depends: Vec<Row>,
    tags: String,
}

fn of_mutation(at: usize, row: &Row) -> String {
    format!("mutation {at} of {row:?}")
}

fn by_hand(kind: usize, include: bool, row: &Row) -> String {
    format!("{} {row:?} by hand, {include}", name(kind))
}

fn of_page(at: usize) -> String {
    format!("page {at}")
}

/// What a cascade of a kind makes stale that is fired by hand, with all of its relations or none.
fn hand(mapping: &Mapping, kind: usize, include: bool) -> MutationSpec {
    let relations = mapping.cascade(&name(kind)).map_or(vec![], |c| c.relations.iter().map(|r| r.0.clone()).collect());
    MutationSpec {
        method: Method::POST,
        path: String::new(),
        data_type: name(kind),
        kind,
        include: if include { relations } else { vec![] },
        all: vec![],
    }
}

impl Mapped {
    /// `None` if `build` refuses the mapping.
    pub fn random(seed: u64) -> Option<Self> {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let mapping = Mapping::random(rng);
        let pages = mapping.pages();
        let mut this = Self { mapping, pages, shown: Arc::default() };
        this.builder().build().ok()?;
        let mut shown = this.counters();
        let rows: Vec<_> = this.mapping.rows.keys().cloned().collect();
        for shown in &mut shown {
            if rng.random_bool(0.3) {
                let row = pick(rng, &rows).clone();
                shown.counters.extend([false, true].map(|include| by_hand(row.0, include, &row)));
                let writes = this.mapping.mutations.iter().enumerate().filter(|(_, write)| write.kind == row.0);
                shown.counters.extend(writes.map(|(i, _)| of_mutation(i, &row)));
                shown.depends.push(row);
            }
        }
        this.shown = Arc::new(shown);
        Some(this)
    }

    fn builder(&self) -> CacheBuilder {
        (0..self.mapping.parents.len()).fold(self.mapping.builder(), |builder, kind| {
            if self.mapping.anonymous { builder } else { builder.entity(name(kind), Canonical::Integer) }
        })
    }

    fn counters(&self) -> Vec<Shown> {
        let (mapping, pages) = (&self.mapping, &self.pages);
        let mut shown: Vec<_> = pages.iter().map(|_| Shown::default()).collect();
        let at = |page: &Page| pages.iter().position(|other| other.path == page.path).unwrap();
        let mut show = |counter: String, affected: Vec<Page>| {
            affected.iter().for_each(|page| _ = shown[at(page)].counters.insert(counter.clone()));
        };
        for (i, write) in mapping.mutations.iter().enumerate() {
            for row in mapping.of_kind(write.kind) {
                show(of_mutation(i, &row), mapping.affected(write, &row, pages));
            }
        }
        for kind in 0..mapping.parents.len() {
            for include in [false, true] {
                for row in mapping.of_kind(kind) {
                    show(by_hand(kind, include, &row), mapping.affected(&hand(mapping, kind, include), &row, pages));
                }
            }
        }
        for (i, page) in pages.iter().enumerate() {
            let route = &mapping.routes[page.route];
            let mut affected = vec![page.clone()];
            if let (Shows::Row, Some(row)) = (route.shows, page.shows.first()) {
                let alone = MutationSpec { data_type: route.data_type.clone(), ..hand(mapping, route.kind, false) };
                affected.extend(mapping.affected(&alone, row, pages));
            }
            show(of_page(i), affected);
        }
        let useful = mapping.useful();
        for (shown, page) in shown.iter_mut().zip(pages) {
            let tags = mapping.declared(page, &useful);
            let tags = tags.iter().map(|(entity, id)| format!("{}={id}", entity.split('@').next().unwrap()));
            shown.tags = tags.collect::<Vec<_>>().join(", ");
        }
        shown
    }

    /// A path in one of its spellings: digits percent-encoded, numbers with zeros and signs before them.
    fn spelled(&self, path: &str, rng: &mut SmallRng) -> String {
        let spell = |part: &str, rng: &mut SmallRng| match part.parse::<u64>() {
            Ok(_) if !self.mapping.anonymous && rng.random_bool(0.3) => format!("00{part}"),
            Ok(_) if !self.mapping.anonymous && rng.random_bool(0.2) => format!("+{part}"),
            Ok(_) if rng.random_bool(0.3) => part.bytes().map(|c| format!("%{c:02X}")).collect(),
            _ => part.to_owned(),
        };
        path.split('/').map(|part| spell(part, rng)).collect::<Vec<_>>().join("/")
    }

    fn page(&self, at: usize, path: &str) -> Asked {
        Asked::new(Method::GET, path).with("x-page", at.to_string())
    }

    /// Every page there is.
    pub fn all_pages(&self) -> Vec<Asked> {
        self.pages.iter().enumerate().map(|(at, page)| self.page(at, &page.path)).collect()
    }

    /// Every write that is declared, of every row.
    pub fn all_writes(&self) -> Vec<Asked> {
        let writes = self.mapping.mutations.iter().enumerate();
        writes
            .flat_map(|(at, write)| self.mapping.of_kind(write.kind).into_iter().map(move |row| (at, write, row)))
            .map(|(at, write, row)| {
                let asked = Asked::new(write.method.clone(), self.mapping.fill(&write.path, &row));
                asked.with("x-bumps", of_mutation(at, &row))
            })
            .collect()
    }
}

impl World for Mapped {
    type Rows = BTreeMap<String, u64>;

    fn rows(&self) -> Self::Rows {
        BTreeMap::new()
    }

    fn mapping(&self, _: &Shared<Self::Rows>) -> CacheBuilder {
        self.builder()
    }

    fn read(&self, rows: &Self::Rows, seen: &Seen) -> Option<Said> {
        if seen.method != Method::GET {
            return None;
        }
        let shown = &self.shown[seen.header("x-page").parse::<usize>().unwrap()];
        let counts = shown.counters.iter().map(|counter| format!("{counter}: {}", rows.get(counter).unwrap_or(&0)));
        let mut said = Said::new(200, counts.collect::<Vec<_>>().join("\n")).header("cache-tag", &shown.tags);
        said.depends = shown.depends.iter().map(|(kind, id)| (name(*kind), id.clone())).collect();
        Some(said)
    }

    fn write(&self, rows: &mut Self::Rows, seen: &Seen) -> Said {
        let bumps = seen.header("x-bumps").split('|').filter(|one| !one.is_empty());
        bumps.for_each(|counter| *rows.entry(counter.to_owned()).or_default() += 1);
        let mut said = Said::new(200, "").header("location", "../x");
        for one in seen.header("x-says").split('|').filter(|one| !one.is_empty()) {
            let mut words = one.split(' ').map(str::to_owned);
            let (how, what, id) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            said.changes.push(match &*how {
                "function" => Saying::ByFunction(what, id),
                "relation" => Saying::Include(what),
                _ => Saying::ByHandle(what, id),
            });
        }
        said
    }

    fn any_read(&self, rng: &mut SmallRng) -> Asked {
        let at = rng.random_range(0..self.pages.len());
        let asked = self.page(at, &self.spelled(&self.pages[at].path, rng));
        if rng.random_bool(0.1) { asked.with("x-fault", "500") } else { asked }
    }

    /// A write of what is declared, of what is only read there, or of what only its handler knows.
    fn any_write(&self, rng: &mut SmallRng) -> Asked {
        let rows: Vec<_> = self.mapping.rows.keys().collect();
        let row = *pick(rng, &rows);
        let (mut bumps, mut says) = (vec![], vec![]);
        let (method, path) = match rng.random_range(0..3) {
            0 if !self.mapping.mutations.is_empty() => {
                let at = rng.random_range(0..self.mapping.mutations.len());
                let write = &self.mapping.mutations[at];
                let rows = self.mapping.of_kind(write.kind);
                let row = pick(rng, &rows);
                bumps.push(of_mutation(at, row));
                (write.method.clone(), self.mapping.fill(&write.path, row))
            }
            1 => {
                let at = rng.random_range(0..self.pages.len());
                bumps.push(of_page(at));
                (Method::PATCH, self.pages[at].path.clone())
            }
            _ => (Method::POST, "/jobs".to_owned()),
        };
        if method == Method::POST || rng.random_bool(0.2) {
            let include = rng.random_bool(0.5);
            bumps.push(by_hand(row.0, include, row));
            let how = if include { "include" } else { *pick(rng, &["handle", "function"]) };
            says.push(format!("{how} {} {}", name(row.0), row.1));
            if include {
                let relations = self.mapping.cascade(&name(row.0)).map_or(vec![], |c| c.relations.clone());
                says.extend(relations.into_iter().map(|relation| format!("relation {} -", relation.0)));
            }
        }
        let fault = if rng.random_bool(0.6) { pick(rng, OF_WRITES) } else { "" };
        let asked = Asked::new(method, self.spelled(&path, rng));
        let asked = asked.with("x-bumps", bumps.join("|")).with("x-says", says.join("|"));
        asked.with("x-pause", rng.random_range(0..5).to_string()).but("x-fault", fault)
    }
}
