//! The point of it all: whatever is asked of a service behind the cache, under whatever mapping `build` accepts, no read is
//! older than that of its twin without a cache.
//!
//! Mappings come from the generator; so does what each write makes stale, by its model. The database is one counter for each
//! thing that can be written, and a page shows the counters of all the writes that, by the words of the mapping, make it
//! stale.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/mappings.rs"]
mod mappings;
#[path = "support/web.rs"]
mod web;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body::Frame;
use http_body_util::{Full, StreamBody, combinators::UnsyncBoxBody};
use mappings::{Mapping, MutationSpec, Page, Row, Shows, name};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tower_cache_aside::{Cache, Canonical, Changes, changed, depends_on};
use web::{Body, Web, full};

type Database = Arc<Mutex<BTreeMap<String, u64>>>;

/// A service, its world, and what each page shows.
struct Twins {
    mapping: Mapping,
    pages: Vec<Page>,
    /// By page: the counters it shows, and the rows that its handler says it depends on.
    shown: Arc<Vec<(BTreeSet<String>, Vec<Row>)>>,
    database: Database,
    cache: Cache,
    web: Web,
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

impl Twins {
    fn new(mapping: Mapping, rng: &mut SmallRng) -> Option<Self> {
        let builder = (0..mapping.parents.len()).fold(mapping.builder(), |builder, kind| {
            if mapping.anonymous { builder } else { builder.entity(name(kind), Canonical::Integer) }
        });
        let cache = builder.build().ok()?;
        let pages = mapping.pages();
        let mut shown: Vec<_> = pages.iter().map(|_| (BTreeSet::new(), vec![])).collect();
        let at = |page: &Page| pages.iter().position(|other| other.path == page.path).unwrap();
        let mut show = |counter: String, affected: Vec<Page>| {
            affected.iter().for_each(|page| _ = shown[at(page)].0.insert(counter.clone()));
        };
        for (i, write) in mapping.mutations.iter().enumerate() {
            for row in mapping.of_kind(write.kind) {
                show(of_mutation(i, &row), mapping.affected(write, &row, &pages));
            }
        }
        for kind in 0..mapping.parents.len() {
            for include in [false, true] {
                for row in mapping.of_kind(kind) {
                    show(by_hand(kind, include, &row), mapping.affected(&hand(&mapping, kind, include), &row, &pages));
                }
            }
        }
        for (i, page) in pages.iter().enumerate() {
            let route = &mapping.routes[page.route];
            let mut affected = vec![page.clone()];
            if let (Shows::Row, Some(row)) = (route.shows, page.shows.first()) {
                let alone = MutationSpec { data_type: route.data_type.clone(), ..hand(&mapping, route.kind, false) };
                affected.extend(mapping.affected(&alone, row, &pages));
            }
            show(of_page(i), affected);
        }
        let rows: Vec<_> = mapping.rows.keys().cloned().collect();
        for (counters, depends) in &mut shown {
            if rng.random_bool(0.3) {
                let row = rows[rng.random_range(0..rows.len())].clone();
                counters.extend([false, true].map(|include| by_hand(row.0, include, &row)));
                let writes = mapping.mutations.iter().enumerate().filter(|(_, write)| write.kind == row.0);
                counters.extend(writes.map(|(i, _)| of_mutation(i, &row)));
                depends.push(row);
            }
        }
        let (database, shown) = (Database::default(), Arc::new(shown));
        let useful = mapping.useful();
        let tags: Vec<_> = pages.iter().map(|page| mapping.declared(page, &useful)).collect();
        let (tags, d, s) = (Arc::new(tags), database.clone(), shown.clone());
        let web = Web::new(&cache, move |request: Request<Full<Bytes>>| {
            let (tags, database, shown) = (tags.clone(), d.clone(), s.clone());
            async move {
                if request.method() != Method::GET {
                    return write(request, database).await;
                }
                let page: usize = header(request.headers(), "page").parse().unwrap();
                shown[page].1.iter().for_each(|(kind, id)| depends_on(name(*kind), id));
                let text = content(&database, &shown[page].0);
                pause(request.headers()).await;
                let tags: Vec<_> =
                    tags[page].iter().map(|(e, id)| format!("{}={id}", e.split('@').next().unwrap())).collect();
                let response =
                    Response::builder().status(status(request.headers())).header("cache-tag", tags.join(", "));
                Ok(response.body(full(text)).unwrap())
            }
        });
        Some(Self { mapping, pages, shown, database, cache, web })
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

    /// A read, which may take its time or fail; and what its twin without a cache answers.
    fn read(&self, rng: &mut SmallRng, slow: bool) -> (Request<Full<Bytes>>, usize) {
        let page = rng.random_range(0..self.pages.len());
        let path = self.spelled(&self.pages[page].path, rng);
        let pauses = if slow { rng.random_range(1..20) } else { 0 };
        let status = if rng.random_bool(0.1) { 500 } else { 200 };
        (
            send(
                Method::GET,
                &path,
                &[("page", page.to_string()), ("pause", pauses.to_string()), ("status", status.to_string())],
            ),
            page,
        )
    }

    /// A write of what is declared, of what is only read there, or of what only its handler knows.
    fn write(&self, rng: &mut SmallRng) -> Request<Full<Bytes>> {
        let rows: Vec<_> = self.mapping.rows.keys().collect();
        let row = rows[rng.random_range(0..rows.len())];
        let (mut bumps, mut said) = (vec![], vec![]);
        let (method, path) = match rng.random_range(0..3) {
            0 if !self.mapping.mutations.is_empty() => {
                let at = rng.random_range(0..self.mapping.mutations.len());
                let write = &self.mapping.mutations[at];
                let rows = self.mapping.of_kind(write.kind);
                let row = &rows[rng.random_range(0..rows.len())];
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
            let how = if include { "include" } else { ["handle", "function"][rng.random_range(0..2)] };
            said.push(format!("{how} {} {}", name(row.0), row.1));
            if include {
                let relations = self.mapping.cascade(&name(row.0)).map_or(vec![], |c| c.relations.clone());
                said.extend(relations.into_iter().map(|relation| format!("relation {} -", relation.0)));
            }
        }
        let how = ["", "", "", "", "refuse", "error", "panic", "stream", "late"][rng.random_range(0..9)];
        let status = [200, 200, 204, 303, 304, 408, 499, 500, 503][rng.random_range(0..9)];
        let status = if how == "refuse" { [400, 403, 404, 409, 422][rng.random_range(0..5)] } else { status };
        let headers = [
            ("bump", bumps.join("|")),
            ("said", said.join("|")),
            ("how", how.to_owned()),
            ("status", status.to_string()),
            ("pause", rng.random_range(0..5).to_string()),
        ];
        send(method, &self.spelled(&path, rng), &headers)
    }
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

fn send(method: Method, path: &str, headers: &[(&'static str, String)]) -> Request<Full<Bytes>> {
    let request =
        headers.iter().fold(Request::builder().method(method).uri(path), |r, (name, value)| r.header(*name, value));
    request.body(Full::default()).unwrap()
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

fn status(headers: &HeaderMap) -> u16 {
    header(headers, "status").parse().unwrap()
}

async fn pause(headers: &HeaderMap) {
    for _ in 0..header(headers, "pause").parse().unwrap() {
        tokio::task::yield_now().await;
    }
}

fn content(database: &Database, counters: &BTreeSet<String>) -> String {
    let database = database.lock().unwrap();
    let counts = counters.iter().map(|counter| format!("{counter}: {}", database.get(counter).unwrap_or(&0)));
    counts.collect::<Vec<_>>().join("\n")
}

/// What a handler says, by its handle or by the task it runs in.
fn say(changes: &Changes, said: &str) {
    for one in said.split('|').filter(|one| !one.is_empty()) {
        let mut words = one.split(' ');
        let (how, what, id) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        match how {
            "function" => changed(what, id),
            "relation" => _ = changes.include(what),
            _ => _ = changes.mutated(what, id),
        }
    }
}

async fn write(request: Request<Full<Bytes>>, database: Database) -> Result<Response<Body>, std::io::Error> {
    let headers = request.headers().clone();
    let changes = request.extensions().get::<Changes>().unwrap().clone();
    pause(&headers).await;
    let how = header(&headers, "how").to_owned();
    let bump = {
        let headers = headers.clone();
        move || {
            let mut database = database.lock().unwrap();
            let bumps = header(&headers, "bump").split('|').filter(|one| !one.is_empty());
            bumps.for_each(|counter| *database.entry(counter.to_owned()).or_default() += 1);
        }
    };
    let response = Response::builder().status(status(&headers)).header("location", "../x");
    if how == "refuse" {
        return Ok(response.body(full("")).unwrap());
    }
    if how == "late" {
        // While its body streams. (What it says then, it says by its handle.)
        let said = header(&headers, "said").replace("function", "handle");
        let body = futures_util::stream::once(async move {
            tokio::task::yield_now().await;
            bump();
            say(&changes, &said);
            Ok(Frame::data(Bytes::from("done")))
        });
        return Ok(response.status(200).body(UnsyncBoxBody::new(StreamBody::new(body))).unwrap());
    }
    bump();
    say(&changes, header(&headers, "said"));
    pause(&headers).await;
    match &*how {
        "error" => Err(std::io::Error::other("connection lost")),
        "panic" => panic!("a bug"),
        "stream" => {
            let frames = [Ok(Frame::data(Bytes::from("half"))), Err(std::io::Error::other("broken"))];
            Ok(response.body(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(frames)))).unwrap())
        }
        _ => Ok(response.body(full("")).unwrap()),
    }
}

#[tokio::test]
async fn no_read_is_older_than_that_of_the_twin() {
    std::panic::set_hook(Box::new(|info| {
        if info.payload_as_str() != Some("a bug") {
            eprintln!("{info}");
        }
    }));
    let (mut mappings, mut hits, mut writes) = (0, 0, 0);
    for seed in 0..1_000 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let Some(twins) = Twins::new(Mapping::random(&mut rng), &mut rng) else { continue };
        mappings += 1;
        let mut log = vec![];
        for _ in 0..60 {
            match rng.random_range(0..10) {
                0..=5 => {
                    let (request, page) = twins.read(&mut rng, false);
                    let (fails, path) = (header(request.headers(), "status") == "500", request.uri().clone());
                    let reply = twins.web.send(request).await;
                    assert!(
                        reply.is_hit() || !fails || reply.status == 500 || reply.cache_status().contains("collapsed")
                    );
                    hits += usize::from(reply.is_hit());
                    let now = content(&twins.database, &twins.shown[page].0);
                    assert_eq!(
                        reply.text(),
                        now,
                        "seed {seed}: {path} is old ({}), after\n{}\n{:#?}",
                        reply.cache_status(),
                        log.join("\n"),
                        twins.mapping
                    );
                    log.push(format!("GET {path}: {}", reply.cache_status()));
                }
                // A read that is under way while others write; its client waits or hangs up.
                6 => {
                    let (request, _) = twins.read(&mut rng, true);
                    log.push(format!("slow GET {}", request.uri()));
                    let (web, hangs_up) = (twins.web.clone(), rng.random_bool(0.3));
                    let read = tokio::spawn(async move { web.try_send(request).await });
                    tokio::task::yield_now().await;
                    if hangs_up {
                        read.abort();
                    }
                }
                _ => {
                    let request = twins.write(&mut rng);
                    log.push(format!("{} {} {:?}", request.method(), request.uri(), request.headers()));
                    writes += 1;
                    let (web, hangs_up) = (twins.web.clone(), rng.random_bool(0.2));
                    let write = tokio::spawn(async move { web.try_send(request).await });
                    if hangs_up {
                        for _ in 0..rng.random_range(0..8) {
                            tokio::task::yield_now().await;
                        }
                        write.abort();
                        let _ = write.await;
                        // Nobody has been told that it is done; when it is, it is seen.
                        twins.cache.drain(Duration::from_secs(10)).await;
                    } else {
                        let _ = write.await;
                    }
                }
            }
        }
    }
    assert!(mappings > 200 && hits > 2_000 && writes > 2_000, "{mappings} {hits} {writes}");
}
