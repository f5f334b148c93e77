//! What a write is taken for: what cannot be read about it drops more, never less; and what handlers say that they change.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use tokio::sync::Semaphore;
use tower::{Layer, ServiceExt, service_fn};
use tower_cache_aside::{
    Cache, CacheBuilder, Cascade, Changes, DataType, Freshness, Invalidated, Key, Mutation, OnUnmapped, OnUnreachable,
    Route, Tag, Tier, Ttl, changed, depends_on,
    store::{
        Entry, Fence, Generation, Guard, Inquiry, Lookup, Mark, MemoryStore, Opened, Store, StoreFuture, TagGroup,
    },
    testing::Faulty,
};
use web::{Body, Reply, Web, full, ok, request, with};

/// Tasks of projects: a list of each type, and a cascade from one to the other.
fn tasks() -> CacheBuilder {
    tasks_of(|projects| async move { projects.into_iter().map(|id| format!("{id}0")).collect() })
}

/// The same, with what says which a project has.
fn tasks_of<F, Fut>(children: F) -> CacheBuilder
where
    F: Fn(Vec<String>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Vec<String>> + Send + 'static,
{
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("project", Ttl::Standard))
        .data_type(DataType::new("projects", Ttl::Standard))
        .data_type(DataType::new("task", Ttl::Standard))
        .data_type(DataType::new("tasks", Ttl::Standard))
        .route(Route::new("/projects/{project_id}", "project"))
        .route(Route::new("/projects", "projects"))
        .route(Route::new("/tasks/{task_id}", "task"))
        .route(Route::new("/tasks", "tasks"))
        .cascade(Cascade::new("project").all(["projects"]).relation("tasks", "task"))
        .cascade(Cascade::new("task").all(["tasks"]))
        .resolver("tasks", move |_, projects| {
            let children = children(projects);
            async move { Ok::<_, io::Error>(children.await) }
        })
        .report_header(true)
}

const PATHS: [&str; 6] = ["/projects/1", "/projects/2", "/projects", "/tasks/10", "/tasks/20", "/tasks"];

/// Which of the paths are not hits after this.
async fn dropped(web: &Web, write: impl AsyncFnOnce(&Web)) -> Vec<&'static str> {
    for path in PATHS {
        web.get(path).await;
        assert!(web.get(path).await.is_hit(), "{path}");
    }
    write(web).await;
    let mut dropped = vec![];
    for path in PATHS {
        if !web.get(path).await.is_hit() {
            dropped.push(path);
        }
    }
    dropped
}

/// A service that answers reads with text, and writes by this.
fn answering<F, Fut>(cache: &Cache, write: F) -> Web
where
    F: Fn(Request<Full<Bytes>>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = io::Result<Response<Body>>> + Send + 'static,
{
    let write = Arc::new(write);
    Web::new(cache, move |request| {
        let write = write.clone();
        async move { if request.method() == Method::GET { Ok(ok("text")) } else { write(request).await } }
    })
}

fn status(code: u16) -> Response<Body> {
    Response::builder().status(code).body(full("")).unwrap()
}

/// What is logged while this runs.
struct Logs(
    Arc<Mutex<Vec<u8>>>,
    #[expect(dead_code, reason = "it is what captures")] tracing::subscriber::DefaultGuard,
);

impl Logs {
    fn capture() -> Self {
        // Where there is one subscriber alone, a line that a thread without it says first is heard by nobody from then on.
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry());
        #[derive(Clone)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink(Arc::default());
        let kept = sink.0.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || sink.clone()).finish();
        Self(kept, tracing::subscriber::set_default(subscriber))
    }

    fn count(&self, what: &str) -> usize {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        // An alert may repeat it.
        text.lines().filter(|line| line.contains(what) && !line.contains("alert raised")).count()
    }
}

// ---- statuses --------------------------------------------------------------------------------------------------------

/// Only a status that says "refused before it ran" spares the entries.
#[tokio::test]
async fn only_a_clear_refusal_is_no_write() {
    let refusals = [
        400, 401, 402, 403, 404, 405, 409, 410, 411, 412, 413, 414, 415, 417, 421, 422, 423, 425, 426, 428, 429, 431,
        451,
    ];
    let cache = tasks().mutation(Mutation::put("/tasks/{task_id}", "task")).build().unwrap();
    let answer = Arc::new(AtomicU64::new(0));
    let code = answer.clone();
    let web = answering(&cache, move |_| {
        let code = code.load(Ordering::SeqCst);
        async move { Ok(status(code as u16)) }
    });
    for code in 200..600u16 {
        answer.store(code.into(), Ordering::SeqCst);
        let fallen = dropped(&web, async |web| _ = web.put("/tasks/10").await).await;
        let expected: &[_] = if refusals.contains(&code) { &[] } else { &["/tasks/10", "/tasks"] };
        assert_eq!(fallen, expected, "{code}");
    }
}

/// A handler that rolls back says by which statuses; nothing else is one of them.
#[tokio::test]
async fn a_handler_may_say_by_what_it_refuses() {
    let put = |statuses: &[u16]| Mutation::put("/tasks/{task_id}", "task").refuses_with(statuses.iter().copied());
    let cache = tasks().mutation(put(&[500, 503])).build().unwrap();
    let answer = Arc::new(AtomicU64::new(0));
    let code = answer.clone();
    let web = answering(&cache, move |_| {
        let code = code.load(Ordering::SeqCst);
        async move { Ok(status(code as u16)) }
    });
    for (code, falls) in [(500, false), (503, false), (502, true), (404, false), (200, true), (408, true)] {
        answer.store(code, Ordering::SeqCst);
        let fallen = dropped(&web, async |web| _ = web.put("/tasks/10").await).await;
        assert_eq!(!fallen.is_empty(), falls, "{code}");
    }
    for status in [200, 304, 399, 600] {
        let error = tasks().mutation(put(&[status])).build().unwrap_err().to_string();
        assert!(error.contains("PUT /tasks/{task_id}") && error.contains(&status.to_string()), "{error}");
    }
}

/// A time-out inside answers 408 after the commit, as tower-http's does.
#[tokio::test]
async fn a_time_out_inside_is_a_write() {
    let cache = tasks().mutation(Mutation::put("/tasks/{task_id}", "task")).build().unwrap();
    let version = Arc::new(AtomicU64::new(1));
    let v = version.clone();
    let slow = service_fn(move |request: Request<Full<Bytes>>| {
        let version = v.clone();
        async move {
            if request.method() == Method::PUT {
                version.fetch_add(1, Ordering::SeqCst);
                std::future::pending::<()>().await;
            }
            Ok::<_, io::Error>(Response::new(full(version.load(Ordering::SeqCst).to_string())))
        }
    });
    let timed =
        tower_http::timeout::TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, Duration::from_millis(20));
    let service = cache.invalidate_layer().layer(cache.layer().layer(timed.layer(slow)));
    let send = async |method: Method| {
        let response = service.clone().oneshot(request(method, "/tasks/10")).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    };
    assert_eq!(send(Method::GET).await.1, "1");
    assert_eq!(send(Method::PUT).await.0, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(send(Method::GET).await.1, "2");
}

// ---- what is created -------------------------------------------------------------------------------------------------

/// Whatever the `Location` of a creation, the lists of its cascade fall; a good one spares the other entities.
#[tokio::test]
async fn a_creation_drops_its_cascade_whatever_it_says() {
    let answer = Arc::new(Mutex::new((201, "")));
    let cache = tasks().mutation(Mutation::post("/projects").creates("project").include("tasks")).build().unwrap();
    let says = answer.clone();
    let web = answering(&cache, move |_| {
        let (code, location) = *says.lock().unwrap();
        async move {
            let response = Response::builder().status(code);
            let response = if location.is_empty() { response } else { response.header("location", location) };
            Ok(response.body(full("")).unwrap())
        }
    });
    let whole = vec!["/projects/1", "/projects/2", "/projects", "/tasks/10", "/tasks/20", "/tasks"];
    let one = vec!["/projects/1", "/projects", "/tasks/10", "/tasks"];
    for (code, location, falls) in [
        (201, "/projects/1", &one),
        (201, "projects/1", &one),
        (201, "./x/../projects/1?x=1", &one),
        (201, "http://elsewhere/projects/1", &one),
        (500, "/projects/1", &one),
        (201, "", &whole),
        (200, "", &whole),
        (500, "", &whole),
        (201, "/api/projects/1", &whole),
        (201, "/projects/1/", &whole),
        (201, "/tasks/10", &whole),
        (201, "no reference", &whole),
    ] {
        *answer.lock().unwrap() = (code, location);
        let fallen = dropped(&web, async |web| _ = web.send(request(Method::POST, "/projects")).await).await;
        assert_eq!(fallen, *falls, "{code} {location}");
    }
    *answer.lock().unwrap() = (409, "");
    assert!(dropped(&web, async |web| _ = web.send(request(Method::POST, "/projects")).await).await.is_empty());
}

/// A `Location` by a slug names nothing by its id.
#[tokio::test]
async fn a_slug_is_no_id() {
    let cache = tasks()
        .route(Route::new("/tasks/by-slug/{slug}", "task").declares_tags())
        .mutation(Mutation::post("/tasks").creates("task"))
        .build()
        .unwrap();
    let web = answering(&cache, |_| async {
        Ok(Response::builder().status(201).header("location", "/tasks/by-slug/10").body(full("")).unwrap())
    });
    let fallen = dropped(&web, async |web| _ = web.send(request(Method::POST, "/tasks")).await).await;
    assert_eq!(fallen, ["/tasks/10", "/tasks/20", "/tasks"]);
}

/// Types that fall whole take along what hangs on them: in mutations, and by hand.
#[tokio::test]
async fn what_falls_whole_falls_with_its_cascade() {
    let cache = tasks().mutation(Mutation::post("/import").all("project").include("tasks")).build().unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    let fallen = dropped(&web, async |web| _ = web.send(request(Method::POST, "/import")).await).await;
    assert_eq!(fallen, PATHS);
    let by_hand = cache.invalidate("t").all("project");
    let fallen = dropped(&web, async |_| _ = by_hand.run().await.unwrap()).await;
    assert_eq!(fallen, ["/projects/1", "/projects/2", "/projects"]);
    let fallen = dropped(&web, async |_| _ = cache.invalidate("t").everything().run().await.unwrap()).await;
    assert_eq!(fallen, PATHS);
    let fallen = dropped(&web, async |_| cache.clear().await.unwrap()).await;
    assert_eq!(fallen, PATHS);
}

// ---- resolvers -------------------------------------------------------------------------------------------------------

/// A resolver that panics, hangs or fails loses nothing: the entity itself falls, and all children.
#[tokio::test]
async fn a_resolver_cannot_lose_an_invalidation() {
    for how in ["panics at once", "panics", "hangs", "fails", "finds no id"] {
        let before = Arc::new(AtomicBool::new(true));
        let fine = before.clone();
        let cache = Cache::builder("test")
            .single_tenant("t")
            .data_type(DataType::new("project", Ttl::Standard))
            .data_type(DataType::new("task", Ttl::Standard))
            .entity("task", tower_cache_aside::Canonical::Integer)
            .route(Route::new("/projects/{project_id}", "project"))
            .route(Route::new("/tasks/{task_id}", "task"))
            .mutation(Mutation::put("/projects/{project_id}", "project").include("tasks"))
            .cascade(Cascade::new("project").relation("tasks", "task"))
            .resolver_timeout(Duration::from_millis(50))
            .resolver("tasks", move |_, _| {
                // After the commit.
                let broken = !fine.swap(false, Ordering::SeqCst);
                assert!(!broken || how != "panics at once");
                async move {
                    match how {
                        _ if !broken => Ok(vec![]),
                        "panics" => panic!("a bug"),
                        "hangs" => std::future::pending().await,
                        "fails" => Err(io::Error::other("down")),
                        _ => Ok(vec!["none".to_owned()]),
                    }
                }
            })
            .build()
            .unwrap();
        let web = answering(&cache, |_| async { Ok(status(204)) });
        for path in ["/projects/1", "/projects/2", "/tasks/10", "/tasks/20"] {
            web.get(path).await;
        }
        assert_eq!(web.put("/projects/1").await.status, 204, "{how}");
        let mut hits = vec![];
        for path in ["/projects/1", "/projects/2", "/tasks/10", "/tasks/20"] {
            hits.push(web.get(path).await.is_hit());
        }
        assert_eq!(hits, [false, true, false, false], "{how}");
    }
}

/// A handler is dropped when its client hangs up: between its commit and its invalidation nothing is lost, and nobody else's
/// write is refused for it.
#[tokio::test(start_paused = true)]
async fn an_invalidation_by_hand_goes_on_without_its_caller() {
    let store = Faulty::new(MemoryStore::new(8 << 20));
    let faults = store.faults();
    let gate = Arc::new(Semaphore::new(0));
    let asked = gate.clone();
    let cache = tasks_of(move |_| {
        let gate = asked.clone();
        async move {
            gate.acquire().await.unwrap().forget();
            vec!["10".to_owned()]
        }
    })
    .mutation(Mutation::put("/tasks/{task_id}", "task"))
    .on_unreachable(OnUnreachable::Reject)
    .store(Guard::new(store).budget(Duration::from_secs(5)))
    .build()
    .unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    for clears in [false, true] {
        for path in PATHS {
            web.get(path).await;
            assert!(web.get(path).await.is_hit(), "{path}");
        }
        let run = async {
            match clears {
                true => _ = cache.clear().await,
                false => _ = cache.invalidate("t").mutated("project", "1").include("tasks").run().await,
            }
        };
        // It asks for the children, and the store takes its time: in both it is dropped.
        faults.slow(Duration::from_millis(200));
        assert!(tokio::time::timeout(Duration::from_millis(50), run).await.is_err());
        gate.add_permits(10);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(web.put("/tasks/30").await.status, 204);
        faults.heal();
        cache.settled().await;
        for path in ["/projects/1", "/tasks/10"] {
            assert!(!web.get(path).await.is_hit(), "{path}, {clears}");
        }
    }
}

/// Beyond a thousand nobody asks which they are.
#[tokio::test]
async fn of_very_many_children_all_fall() {
    let (tasks, drafts) = (AtomicU64::new(0), AtomicU64::new(0));
    let counts = Arc::new([tasks, drafts]);
    let some = |nth: usize| {
        let counts = counts.clone();
        move |_: Vec<String>| {
            let count = counts[nth].load(Ordering::SeqCst);
            async move { Ok::<_, io::Error>((0..count).map(|i| format!("{nth}-{i}")).collect::<Vec<_>>()) }
        }
    };
    let (some_tasks, some_drafts) = (some(0), some(1));
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("project", Ttl::Standard))
        .data_type(DataType::new("task", Ttl::Standard))
        .route(Route::new("/projects/{project_id}", "project"))
        .route(Route::new("/tasks/{task_id}", "task"))
        .cascade(Cascade::new("project").relation("tasks", "task").relation("drafts", "task"))
        .resolver("tasks", move |_, ids| some_tasks(ids))
        .resolver("drafts", move |_, ids| some_drafts(ids))
        .mutation(Mutation::put("/projects/{project_id}", "project").include("tasks").include("drafts"))
        .build()
        .unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    for (tasks, drafts, all) in [(1_000, 0, false), (1_001, 0, true), (500, 500, false), (501, 500, true)] {
        counts[0].store(tasks, Ordering::SeqCst);
        counts[1].store(drafts, Ordering::SeqCst);
        web.get("/tasks/10").await;
        assert!(web.get("/tasks/10").await.is_hit());
        web.put("/projects/1").await;
        assert_eq!(!web.get("/tasks/10").await.is_hit(), all, "{tasks} {drafts}");
    }
}

/// A thousand ids are one question, before and after.
#[tokio::test]
async fn resolvers_are_asked_for_many_at_once() {
    let asked = Arc::new(Mutex::new(vec![]));
    let questions = asked.clone();
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("team", Ttl::Standard))
        .data_type(DataType::new("project", Ttl::Standard))
        .data_type(DataType::new("task", Ttl::Standard))
        .route(Route::new("/tasks/{task_id}", "task"))
        .mutation(Mutation::put("/teams/{team_id}", "team").include("projects"))
        .cascade(Cascade::new("team").relation("projects", "project"))
        .cascade(Cascade::new("project").relation("tasks", "task"))
        .resolver("projects", |_, _| async { Ok::<_, io::Error>((0..900).map(|id| id.to_string()).collect()) })
        .resolver("tasks", move |_, projects| {
            questions.lock().unwrap().push(projects.len());
            async { Ok::<_, io::Error>(vec!["10".to_owned()]) }
        })
        .build()
        .unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    web.get("/tasks/10").await;
    web.get("/tasks/20").await;
    web.put("/teams/1").await;
    assert_eq!(*asked.lock().unwrap(), [900, 900]);
    assert!(!web.get("/tasks/10").await.is_hit() && web.get("/tasks/20").await.is_hit());
}

// ---- whose it is, and what is not mapped -----------------------------------------------------------------------------

fn tenants() -> CacheBuilder {
    let builder = Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("task", Ttl::Standard));
    builder.route(Route::new("/tasks/{task_id}", "task")).mutation(Mutation::put("/tasks/{task_id}", "task"))
}

/// A write whose tenant cannot be told is said once; one of several drops what either has; and spellings of a tenant that a
/// handler may trim are not cached.
#[tokio::test]
async fn a_write_of_no_tenant_is_said() {
    let logs = Logs::capture();
    let cache = tenants().build().unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    let send = async |method: Method, tenants: &[&str]| {
        let tenants: Vec<_> = tenants.iter().map(|tenant| ("x-tenant-id", *tenant)).collect();
        web.send(with(method, "/tasks/1", &tenants)).await
    };
    for tenants in [&[][..], &[""], &[" "]] {
        send(Method::PUT, tenants).await;
        assert_eq!(logs.count("a write of no tenant"), 1, "{tenants:?}");
        assert_eq!(send(Method::GET, tenants).await.cache_status(), "fwd=bypass; detail=no-tenant");
    }
    for (tenants, says) in
        [(&["a "][..], "no-tenant"), (&["a, b"], "several-tenants"), (&["a", "b"], "several-tenants")]
    {
        for tenant in ["a", "b", "c"] {
            send(Method::GET, &[tenant]).await;
        }
        assert_eq!(send(Method::GET, tenants).await.cache_status(), format!("fwd=bypass; detail={says}"));
        send(Method::PUT, tenants).await;
        assert!(!send(Method::GET, &["a"]).await.is_hit(), "{tenants:?}");
        assert_eq!(send(Method::GET, &["b"]).await.is_hit(), tenants == ["a "], "{tenants:?}");
        assert!(send(Method::GET, &["c"]).await.is_hit(), "{tenants:?}");
    }

    let cache = tenants().on_unmapped(OnUnmapped::Drop).build().unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    let of = |method: Method| with(method, "/tasks/1", &[("x-tenant-id", "a")]);
    web.send(of(Method::GET)).await;
    web.send(request(Method::POST, "/login")).await;
    assert!(web.send(of(Method::GET)).await.is_hit(), "it is of nobody, and about nothing that is mapped");
    web.send(request(Method::PUT, "/tasks/1")).await;
    assert!(!web.send(of(Method::GET)).await.is_hit(), "anybody's may be stale");
}

/// What is only said is of a tenant, too.
#[tokio::test]
async fn what_is_said_of_no_tenant_is_said() {
    let logs = Logs::capture();
    for (policy, hits, warned) in
        [(OnUnmapped::Ignore, true, 0), (OnUnmapped::Warn, true, 1), (OnUnmapped::Drop, false, 2)]
    {
        let cache = tenants().on_unmapped(policy).build().unwrap();
        let web = answering(&cache, |_| async {
            rename(1).await;
            Ok(status(204))
        });
        let of = || with(Method::GET, "/tasks/1", &[("x-tenant-id", "a")]);
        web.send(of()).await;
        web.send(request(Method::POST, "/jobs/1")).await;
        assert_eq!(web.send(of()).await.is_hit(), hits, "{policy:?}");
        assert_eq!(logs.count("a write of no tenant"), warned, "{policy:?}");
    }
}

/// A request that names many tenants costs no more time than one, and one that names more than it can mean asks nobody.
#[tokio::test(start_paused = true)]
async fn many_tenants_wait_no_longer_than_one() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    let cache = tenants()
        .mutation(Mutation::put("/projects/{project_id}", "project").include("tasks"))
        .data_type(DataType::new("project", Ttl::Standard))
        .cascade(Cascade::new("project").relation("tasks", "task"))
        .resolver("tasks", move |_, _| {
            count.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<io::Result<Vec<String>>>()
        })
        .resolver_timeout(Duration::from_secs(3))
        .build()
        .unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    let names = |n: usize| (0..n).map(|i| format!("t{i}")).collect::<Vec<_>>().join(", ");
    for (tenants, questions) in [("t0", 2), ("t0, t0,t0", 2), (&names(16), 32), (&names(17), 0)] {
        for tenant in ["t0", "other"] {
            web.send(with(Method::GET, "/tasks/1", &[("x-tenant-id", tenant)])).await;
        }
        let (start, before) = (tokio::time::Instant::now(), asked.load(Ordering::SeqCst));
        web.send(with(Method::PUT, "/projects/1", &[("x-tenant-id", tenants)])).await;
        assert_eq!(asked.load(Ordering::SeqCst) - before, questions, "{tenants}");
        assert!(start.elapsed() < Duration::from_secs(7), "{tenants}: {:?}", start.elapsed());
        let hits =
            async |tenant: &str| web.send(with(Method::GET, "/tasks/1", &[("x-tenant-id", tenant)])).await.is_hit();
        assert!(!hits("t0").await && hits("other").await, "{tenants}");
    }
}

/// Methods that only read, unless a mutation says otherwise.
#[tokio::test]
async fn methods_that_read_write_only_where_that_is_declared() {
    let report = Method::from_bytes(b"REPORT").unwrap();
    let cache = tasks()
        .mutation(Mutation::new(report.clone(), "/tasks/{task_id}").mutates("task"))
        .mutation(Mutation::any("/projects/{project_id}").mutates("project"));
    let web = answering(&cache.build().unwrap(), |_| async { Ok(status(200)) });
    for (method, path, falls) in [
        (report.clone(), "/tasks/10", &["/tasks/10", "/tasks"][..]),
        (Method::from_bytes(b"QUERY").unwrap(), "/tasks/10", &[]),
        (report, "/projects/1", &[]),
        (Method::from_bytes(b"LOCK").unwrap(), "/projects/1", &["/projects/1", "/projects"]),
    ] {
        let fallen = dropped(&web, async |web| _ = web.send(request(method.clone(), path)).await).await;
        assert_eq!(fallen, falls, "{method} {path}");
    }
}

/// An unsafe method that no mutation names drops what is read under its path, by its cascade.
#[tokio::test]
async fn unmapped_methods_drop_what_is_read_there() {
    for on_unmapped in [OnUnmapped::Ignore, OnUnmapped::Warn] {
        let mapped = tasks().mutation(Mutation::put("/tasks/{task_id}", "task"));
        let cache = mapped.on_unmapped(on_unmapped).build().unwrap();
        let web = answering(&cache, |_| async { Ok(status(204)) });
        let one = vec!["/tasks/10", "/tasks"];
        for (method, path, falls) in [
            (Method::PUT, "/tasks/10", &one),
            (Method::PATCH, "/tasks/10", &one),
            (Method::DELETE, "/tasks/%310", &one),
            (Method::POST, "/tasks/10?x=1", &one),
            (Method::from_bytes(b"MKCOL").unwrap(), "/tasks/10", &one),
            (Method::POST, "/tasks", &vec!["/tasks"]),
            (Method::PATCH, "/tasks/10/x", &vec![]),
            (Method::OPTIONS, "/tasks/10", &vec![]),
            (Method::from_bytes(b"PROPFIND").unwrap(), "/tasks/10", &vec![]),
        ] {
            let fallen = dropped(&web, async |web| _ = web.send(request(method.clone(), path)).await).await;
            assert_eq!(fallen, *falls, "{method} {path}");
        }
    }
}

/// Each method of a path is declared for itself.
#[tokio::test]
async fn a_mutation_is_of_its_method() {
    let cache = tasks().mutation(Mutation::put("/tasks/{task_id}/done", "task")).build().unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    for (method, falls) in [(Method::DELETE, &[][..]), (Method::PUT, &["/tasks/10", "/tasks"])] {
        let fallen = dropped(&web, async |web| _ = web.send(request(method.clone(), "/tasks/10/done")).await).await;
        assert_eq!(fallen, falls, "{method}");
    }
}

/// A list of the same type names none of those that are in it.
#[tokio::test]
async fn what_no_id_finds_falls_whole() {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("project", Ttl::Standard))
        .data_type(DataType::new("task", Ttl::Standard))
        .route(Route::new("/projects/{project_id}", "project"))
        .route(Route::new("/projects", "project"))
        .route(Route::new("/tasks/{task_id}", "task"))
        .route(Route::new("/tasks", "task"))
        .build()
        .unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    let fallen = dropped(&web, async |web| _ = web.put("/tasks/10").await).await;
    assert_eq!(fallen, ["/tasks/10", "/tasks/20", "/tasks"]);
}

/// A `Location` may lead to what has not changed: it is followed where that is declared.
#[tokio::test]
async fn where_a_response_leads_is_no_part_of_a_write() {
    for follows in [false, true] {
        let mutation = Mutation::put("/tasks/{task_id}", "task");
        let cache = tasks().mutation(if follows { mutation.follows_locations() } else { mutation }).build().unwrap();
        let web = answering(&cache, |_| async {
            Ok(Response::builder().status(303).header("location", "/projects/1").body(full("")).unwrap())
        });
        let fallen = dropped(&web, async |web| _ = web.put("/tasks/10").await).await;
        assert_eq!(fallen.contains(&"/projects/1"), follows, "{fallen:?}");
    }
}

/// Without an `InvalidateLayer`, writes that come through the cache's own layer are as good; with both, in either order, each
/// is taken care of once.
#[tokio::test]
async fn a_forgotten_layer_is_not_missed() {
    let told = Arc::new(AtomicU64::new(0));
    for layers in ["cache", "cache, invalidate", "invalidate, cache"] {
        let count = told.clone();
        let cache = tasks()
            .mutation(Mutation::put("/tasks/{task_id}", "task"))
            .on_invalidated(move |_, _| _ = count.fetch_add(1, Ordering::SeqCst))
            .build()
            .unwrap();
        let inner = service_fn(|request: Request<Full<Bytes>>| async move {
            let frames = [Ok::<_, io::Error>(Frame::data(Bytes::from("text")))];
            Ok::<_, io::Error>(match *request.method() {
                Method::PATCH => Response::new(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(frames)))),
                _ => Response::builder().header("cache-tag", "x=1").body(full("text")).unwrap(),
            })
        });
        let web: tower::util::BoxCloneSyncService<_, Response<Body>, io::Error> = match layers {
            "cache" => tower::util::BoxCloneSyncService::new(cache.layer().layer(inner).map_response(boxed)),
            "cache, invalidate" => {
                let layered = cache.invalidate_layer().layer(cache.layer().layer(inner));
                tower::util::BoxCloneSyncService::new(layered.map_response(boxed))
            }
            _ => {
                let layered = cache.layer().layer(cache.invalidate_layer().layer(inner));
                tower::util::BoxCloneSyncService::new(layered.map_response(boxed))
            }
        };
        let send = async |method: Method| {
            let response = web.clone().oneshot(request(method, "/tasks/10")).await.unwrap();
            let (parts, body) = response.into_parts();
            body.collect().await.unwrap();
            parts.headers
        };
        for method in [Method::PUT, Method::PATCH] {
            cache.invalidate("t").all("task").run().await.unwrap();
            send(Method::GET).await;
            let before = told.load(Ordering::SeqCst);
            let written = send(method.clone()).await;
            assert!(!written.contains_key("cache-tag"), "{layers}");
            // A body that streams is watched, and drops once more at its end.
            let times = if method == Method::PATCH { 2 } else { 1 };
            assert_eq!(told.load(Ordering::SeqCst) - before, times, "{layers} {method}");
            assert!(written.contains_key("cache-invalidated"), "{layers}");
        }
    }

    fn boxed<B>(response: Response<B>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        response.map(UnsyncBoxBody::new)
    }
}

/// Of what nothing is said: once per route it is warned of, or everything of the tenant falls.
#[tokio::test]
async fn what_is_not_mapped_is_said_or_drops_everything() {
    let logs = Logs::capture();
    let answer = Arc::new(AtomicU64::new(204));
    let code = answer.clone();
    let handler = move |request: Request<Full<Bytes>>| {
        let code = code.load(Ordering::SeqCst) as u16;
        if request.uri().path() == "/said" {
            request.extensions().get::<Changes>().unwrap().nothing();
        }
        async move { Ok(status(code)) }
    };
    let web = answering(&tasks().build().unwrap(), handler.clone());
    for path in ["/jobs/17/run", "/jobs/18/run", "/jobs/18/run?x=1", "/said"] {
        web.send(request(Method::POST, path)).await;
    }
    assert_eq!(logs.count("POST /jobs/…/run"), 1);
    assert_eq!(logs.count("/said"), 0, "its handler has said that it is nothing");
    web.send(request(Method::DELETE, "/jobs/17/run")).await;
    assert_eq!(logs.count("DELETE /jobs/…/run"), 1);
    for code in [404, 500] {
        answer.store(code, Ordering::SeqCst);
        web.send(request(Method::POST, "/other")).await;
    }
    assert_eq!(logs.count("/other"), 0, "no success");

    answer.store(204, Ordering::SeqCst);
    let silent = answering(&tasks().on_unmapped(OnUnmapped::Ignore).build().unwrap(), handler.clone());
    silent.send(request(Method::POST, "/ignored")).await;
    assert_eq!(logs.count("/ignored"), 0);

    let web = answering(&tasks().on_unmapped(OnUnmapped::Drop).build().unwrap(), handler);
    for (code, path, falls) in [
        (204, "/jobs/17/run", &PATHS[..]),
        (500, "/jobs/17/run", &PATHS),
        (403, "/jobs/17/run", &[]),
        (204, "/said", &[]),
        (204, "/tasks/10", &["/tasks/10", "/tasks"]),
    ] {
        answer.store(code, Ordering::SeqCst);
        let fallen = dropped(&web, async |web| _ = web.send(request(Method::POST, path)).await).await;
        assert_eq!(fallen, falls, "{code} {path}");
    }
}

// ---- what handlers say -----------------------------------------------------------------------------------------------

/// Deep below a handler, which knows nothing of it.
async fn rename(task: u64) {
    tokio::task::yield_now().await;
    changed("task", task);
}

#[tokio::test]
async fn handlers_say_what_they_change() {
    let cache = tasks()
        .mutation(Mutation::put("/tasks/{task_id}", "task"))
        .mutation(Mutation::put("/projects/{project_id}", "project"))
        .build()
        .unwrap();
    let web = answering(&cache, |request| async move {
        let changes = request.extensions().get::<Changes>().unwrap().clone();
        let path = request.uri().path().to_owned();
        match request.headers().get("do").map_or("", |v| v.to_str().unwrap()) {
            "one" => _ = changes.mutated("task", 10),
            "bulk" => _ = changes.mutated("task", 10).mutated("task", "20"),
            "all" => _ = changes.all("project"),
            "include" => _ = changes.mutated("project", 1).include("tasks"),
            "nothing" => _ = changes.nothing(),
            "nothing but" => _ = changes.nothing().mutated("task", 20),
            "repository" => rename(20).await,
            "include alone" => _ = changes.include("tasks"),
            "include unknown" => _ = changes.include("friends"),
            "unknown" => _ = changes.mutated("tsak", 1),
            "unknown relation" => _ = changes.mutated("task", 10).include("friends"),
            "many" => (0..10_001).for_each(|id| _ = changes.mutated("task", id + 1_000)),
            _ => {}
        }
        match request.headers().get("then").map_or("", |v| v.to_str().unwrap()) {
            "refuse" => Ok(status(409)),
            "fail" => Ok(status(500)),
            "error" => Err(io::Error::other("connection lost")),
            "panic" => panic!("a bug in {path}"),
            _ => Ok(status(204)),
        }
    });
    let send = async |web: &Web, path: &str, what: &str, then: &str| {
        let web = web.clone();
        let request = with(Method::PUT, path, &[("do", what), ("then", then)]);
        let _ = tokio::spawn(async move { web.try_send(request).await }).await;
    };
    for (path, what, then, falls) in [
        ("/jobs", "one", "", &["/tasks/10", "/tasks"][..]),
        ("/jobs", "bulk", "", &["/tasks/10", "/tasks/20", "/tasks"]),
        ("/jobs", "all", "", &["/projects/1", "/projects/2", "/projects"]),
        // Its resolver cannot be asked before any more: what it names may have been removed.
        ("/jobs", "include", "", &["/projects/1", "/projects", "/tasks/10", "/tasks/20", "/tasks"]),
        ("/jobs", "repository", "", &["/tasks/20", "/tasks"]),
        ("/jobs", "many", "", &["/tasks/10", "/tasks/20", "/tasks"]),
        ("/jobs", "nothing", "", &[]),
        ("/jobs", "", "", &[]),
        // What nobody knows may be anything.
        ("/jobs", "unknown", "", &PATHS),
        ("/jobs", "unknown relation", "", &PATHS),
        // Whatever becomes of it.
        ("/jobs", "one", "refuse", &["/tasks/10", "/tasks"]),
        ("/jobs", "one", "fail", &["/tasks/10", "/tasks"]),
        ("/jobs", "one", "error", &["/tasks/10", "/tasks"]),
        ("/jobs", "one", "panic", &["/tasks/10", "/tasks"]),
        // With what the route declares.
        ("/projects/1", "one", "", &["/projects/1", "/projects", "/tasks/10", "/tasks"]),
        ("/projects/1", "include", "", &["/projects/1", "/projects", "/tasks/10", "/tasks/20", "/tasks"]),
        ("/projects/1", "include alone", "", &["/projects/1", "/projects", "/tasks/10", "/tasks/20", "/tasks"]),
        ("/projects/1", "include alone", "refuse", &[]),
        ("/projects/1", "include unknown", "", &PATHS),
        ("/projects/1", "one", "refuse", &["/tasks/10", "/tasks"]),
        ("/projects/1", "nothing", "", &[]),
        ("/projects/1", "nothing but", "", &["/tasks/20", "/tasks"]),
        // Of an unknown outcome, nobody's word counts that nothing happened.
        ("/projects/1", "nothing", "fail", &["/projects/1", "/projects"]),
        ("/projects/1", "nothing", "panic", &["/projects/1", "/projects"]),
    ] {
        let fallen = dropped(&web, async |web| send(web, path, what, then).await).await;
        assert_eq!(fallen, falls, "{path} {what} {then}");
    }
}

/// The rows that name the children may be gone when the handler says whose children fall.
#[tokio::test]
async fn what_is_removed_takes_its_children_along() {
    let rows = Arc::new(AtomicBool::new(true));
    let (there, database) = (rows.clone(), rows.clone());
    let cache = tasks().resolver("tasks", move |_, _| {
        let ids = if there.load(Ordering::SeqCst) { vec!["10".to_owned()] } else { vec![] };
        async move { Ok::<_, io::Error>(ids) }
    });
    let web = answering(&cache.build().unwrap(), move |request| {
        database.store(false, Ordering::SeqCst);
        let changes = request.extensions().get::<Changes>().unwrap();
        changes.mutated("project", 1).include("tasks");
        async { Ok(status(204)) }
    });
    for (method, path) in [(Method::POST, "/purge"), (Method::DELETE, "/projects/1")] {
        rows.store(true, Ordering::SeqCst);
        let fallen = dropped(&web, async |web| _ = web.send(request(method, path)).await).await;
        assert!(fallen.contains(&"/tasks/10"), "{path}: {fallen:?}");
    }
}

/// What a streaming body says at its end is dropped before that end is seen, also if it ends with trailers or breaks.
#[tokio::test]
async fn the_end_of_a_stream_waits_for_what_it_says() {
    let web = answering(&tasks().build().unwrap(), |request| async move {
        let changes = request.extensions().get::<Changes>().unwrap().clone();
        let path = request.uri().path().to_owned();
        let last = futures_util::stream::once(async move {
            changes.mutated("task", 10);
            match &*path {
                "/trailers" => Ok(Frame::trailers(http::HeaderMap::new())),
                _ => Err(io::Error::other("connection lost")),
            }
        });
        let first = futures_util::stream::iter([Ok(Frame::data(Bytes::from("some")))]);
        let body = StreamBody::new(futures_util::StreamExt::chain(first, last));
        Ok(Response::new(UnsyncBoxBody::new(body)))
    });
    for path in ["/trailers", "/breaks"] {
        let fallen = dropped(&web, async |web| {
            let mut body = web.start(request(Method::POST, path)).await.unwrap().into_body();
            // As hyper does: nobody asks again after these.
            while body.frame().await.is_some_and(|frame| frame.is_ok_and(|frame| !frame.is_trailers())) {}
            assert!(!web.get("/tasks/10").await.is_hit(), "{path}");
        });
        assert_eq!(fallen.await, ["/tasks"], "{path}");
    }
}

/// A client that hangs up before it has the head cannot take the second invalidation along.
#[tokio::test]
async fn what_nobody_reads_is_dropped_twice_all_the_same() {
    let told = Arc::new(AtomicU64::new(0));
    let count = told.clone();
    let gate = Arc::new(tokio::sync::Notify::new());
    let opened = gate.clone();
    let cache = tasks()
        .mutation(Mutation::put("/tasks/{task_id}", "task"))
        .on_invalidated(move |_, _| _ = count.fetch_add(1, Ordering::SeqCst));
    let web = answering(&cache.build().unwrap(), move |_| {
        let gate = opened.clone();
        async move {
            gate.notified().await;
            Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::pending()))))
        }
    });
    let hung_up = tokio::time::timeout(Duration::from_millis(10), web.start(request(Method::PUT, "/tasks/10")));
    assert!(hung_up.await.is_err());
    gate.notify_one();
    while told.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
}

/// While its body streams a handler may go on to write, and to say so; its client may hang up.
#[tokio::test]
async fn what_is_said_late_is_dropped_late() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let opened = gate.clone();
    let cache = tasks().build().unwrap();
    let web = answering(&cache, move |request| {
        let gate = opened.clone();
        async move {
            let changes = request.extensions().get::<Changes>().unwrap().clone();
            let ends = request.uri().path() == "/stream";
            if !ends {
                gate.notified().await;
                changes.mutated("task", 10);
                return Ok(status(204));
            }
            let body = futures_util::stream::once(async move {
                gate.notified().await;
                changes.mutated("task", 10);
                Ok(Frame::data(Bytes::from("done")))
            });
            Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(body))))
        }
    });
    let fallen = dropped(&web, async |web| {
        let body = web.start(request(Method::POST, "/stream")).await.unwrap().into_body();
        gate.notify_one();
        body.collect().await.unwrap();
    });
    assert_eq!(fallen.await, ["/tasks/10", "/tasks"]);
    for path in PATHS {
        web.get(path).await;
    }
    let hung_up = tokio::time::timeout(Duration::from_millis(10), web.send(request(Method::POST, "/slow")));
    assert!(hung_up.await.is_err());
    gate.notify_one();
    while web.get("/tasks/10").await.is_hit() {
        tokio::task::yield_now().await;
    }
}

/// Two caches around one handler both hear what it says.
#[tokio::test]
async fn every_cache_around_a_handler_hears_it() {
    let (outer, inner) = (tasks().build().unwrap(), tasks().build().unwrap());
    let web = answering(&inner, |_| async {
        rename(10).await;
        Ok(status(204))
    });
    let inside = service_fn(move |request| {
        let web = web.clone();
        async move {
            let mut response = web.start(request).await?;
            response.headers_mut().remove("cache-status");
            Ok(response)
        }
    });
    let both = Web::around(&outer, inside);
    let fallen = dropped(&both, async |web| _ = web.send(request(Method::POST, "/jobs")).await).await;
    assert_eq!(fallen, ["/tasks/10", "/tasks"]);
}

/// A fence that is held stands around what only the handler knew, too: a replica of the database may lag.
#[tokio::test]
async fn what_is_said_is_fenced_as_what_is_declared() {
    let second = Duration::from_secs(1);
    for hold in [Duration::ZERO, 600 * second] {
        let cache = Cache::builder("test")
            .single_tenant("t")
            .data_type(DataType::new("task", Ttl::Standard))
            .route(Route::new("/tasks/{task_id}", "task"))
            .cascade(Cascade::new("task").fenced(10 * second).hold(hold));
        let web = answering(&cache.build().unwrap(), |_| async {
            rename(10).await;
            Ok(status(204))
        });
        for write in [request(Method::POST, "/jobs"), with(Method::PUT, "/tasks/10", &[])] {
            web.get("/tasks/10").await;
            web.send(write).await;
            web.get("/tasks/10").await;
            assert_eq!(web.get("/tasks/10").await.is_hit(), hold.is_zero(), "{hold:?}");
        }
    }
}

/// Jobs say it as requests do; outside of both, it is said once that nobody listens.
#[tokio::test]
async fn jobs_say_what_they_change() {
    let logs = Logs::capture();
    let cache = tasks().build().unwrap();
    let web = answering(&cache, |_| async { Ok(status(204)) });
    let fallen = dropped(&web, async |_| {
        let ((), report) = cache.write("t", rename(10)).await.unwrap();
        assert_eq!(report.to_string(), "task=1, tasks=1, total=2");
    });
    assert_eq!(fallen.await, ["/tasks/10", "/tasks"]);
    assert!(cache.write("other", async { panic!("it must not run") }).await.is_err());
    // Dropped half-way, and in a panic.
    for path in PATHS {
        web.get(path).await;
    }
    let half = cache.write("t", async {
        changed("task", 10);
        std::future::pending::<()>().await;
    });
    assert!(tokio::time::timeout(Duration::from_millis(10), half).await.is_err());
    while web.get("/tasks/10").await.is_hit() {
        tokio::task::yield_now().await;
    }
    assert_eq!(logs.count("outside of a write"), 0);
    for _ in 0..2 {
        tokio::spawn(rename(20)).await.unwrap();
    }
    assert_eq!(logs.count("outside of a write"), 1);
}

/// A response that says what it is made of falls with that, and no table says so.
#[tokio::test]
async fn reads_say_what_they_depend_on() {
    let cache = tasks()
        .data_type(DataType::new("report", Ttl::Standard))
        .route(Route::new("/reports/{report_id}", "report"))
        .mutation(Mutation::put("/tasks/{task_id}", "task"))
        .entity("task", tower_cache_aside::Canonical::Integer)
        .build()
        .unwrap();
    let web = Web::new(&cache, |request| async move {
        match request.uri().path() {
            "/reports/1" => {
                tokio::task::yield_now().await;
                depends_on("task", "010");
                depends_on("project", 1);
            }
            "/reports/unknown" => depends_on("tsak", 1),
            "/reports/no-id" => depends_on("task", "x"),
            "/reports/late" => {
                let body = futures_util::stream::once(async {
                    depends_on("task", 10);
                    Ok(Frame::data(Bytes::from("text")))
                });
                return Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(body))));
            }
            _ => {}
        }
        Ok(ok("text"))
    });
    let fresh = async || {
        web.get("/reports/1").await;
        assert!(web.get("/reports/1").await.is_hit());
    };
    for (path, falls) in [("/tasks/10", true), ("/tasks/+10", true), ("/tasks/20", false)] {
        fresh().await;
        web.put(path).await;
        assert_eq!(web.get("/reports/1").await.is_hit(), !falls, "{path}");
    }
    for (what, falls) in [("project", true), ("task", true), ("tasks", false)] {
        fresh().await;
        cache.invalidate("t").all(what).run().await.unwrap();
        assert_eq!(web.get("/reports/1").await.is_hit(), !falls, "{what}");
    }
    for (path, detail) in [("unknown", "bad-tags"), ("no-id", "bad-tags"), ("late", "late-tags")] {
        for _ in 0..2 {
            let reply = web.get(&format!("/reports/{path}")).await;
            assert_eq!(reply.cache_status(), format!("fwd=uri-miss; detail={detail}"), "{path}");
        }
    }

    let loads = Arc::new(AtomicU64::new(0));
    let value = async || {
        let count = loads.clone();
        let fetch = || async move {
            depends_on("task", 10);
            Ok::<_, io::Error>(Some(count.fetch_add(1, Ordering::SeqCst)))
        };
        cache.entry::<u64>("report", "9").fetch(fetch).unwrap().await.unwrap().0.unwrap()
    };
    assert_eq!((value().await, value().await), (0, 0));
    web.put("/tasks/10").await;
    assert_eq!((value().await, value().await), (1, 1));
}

/// Where writes drop a type by another entity, it must be said as well.
#[tokio::test]
async fn a_dependency_is_one_that_writes_find() {
    let cache = tasks()
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("conversation", Ttl::Standard))
        .route(Route::new("/agents/{agent_id}/conversations/{conversation_id}", "conversation"))
        .cascade(Cascade::new("agent").relation("conversations", "conversation"))
        .mutation(Mutation::put("/agents/{agent_id}", "agent").include("conversations"))
        .mutation(Mutation::put("/agents/{agent_id}/conversations/{conversation_id}", "conversation"))
        .build()
        .unwrap();
    let web = Web::new(&cache, |request| async move {
        depends_on("conversation", 7);
        if request.uri().path() == "/tasks/2" {
            depends_on("agent", 42);
        }
        Ok(ok("text"))
    });
    assert_eq!(web.get("/tasks/1").await.cache_status(), "fwd=uri-miss; detail=bad-tags");
    for (path, falls) in [("/agents/42", true), ("/agents/42/conversations/7", true), ("/agents/1", false)] {
        web.get("/tasks/2").await;
        assert!(web.get("/tasks/2").await.is_hit());
        web.put(path).await;
        assert_eq!(web.get("/tasks/2").await.is_hit(), !falls, "{path}");
    }
}

/// What is made of a value of the cache falls with that value, whoever has loaded it.
#[tokio::test]
async fn a_response_depends_on_the_values_that_it_is_made_of() {
    let cache = tasks()
        .data_type(DataType::new("report", Ttl::Standard))
        .data_type(DataType::new("name", Ttl::Standard))
        .route(Route::new("/reports/{report_id}", "report"))
        .mutation(Mutation::put("/tasks/{task_id}", "task"))
        .build()
        .unwrap();
    async fn name(cache: &Cache, id: &str) -> u64 {
        let of_user = async || {
            depends_on("task", 10);
            Ok::<_, io::Error>(Some(1))
        };
        let value = cache.entry::<u64>("name", id).tenant("t").fetch(move || async move { of_user().await });
        value.unwrap().await.unwrap().0.unwrap()
    }
    let inner = cache.clone();
    let web = Web::new(&cache, move |request| {
        let cache = inner.clone();
        async move {
            let path = request.uri().path().to_owned();
            let loads = [name(&cache, path.rsplit('/').next().unwrap()), name(&cache, "9")];
            let [one, other] = futures_util::future::join_all(loads).await[..] else { unreachable!() };
            Ok(ok(format!("{one} {other}")))
        }
    });
    let drops: [(&str, Box<dyn Fn() -> _>); 3] = [
        ("a thing that the value depends on", Box::new(|| cache.invalidate("t").mutated("task", "10"))),
        ("the value", Box::new(|| cache.invalidate("t").mutated("name", "9"))),
        ("its type", Box::new(|| cache.invalidate("t").all("name"))),
    ];
    for (what, drop) in drops {
        // One loads the value, one finds it, and several wait for the same.
        for report in ["/reports/1", "/reports/2", "/reports/9"] {
            web.get(report).await;
            assert!(web.get(report).await.is_hit(), "{report}");
        }
        drop().run().await.unwrap();
        for report in ["/reports/1", "/reports/2", "/reports/9"] {
            assert!(!web.get(report).await.is_hit(), "{report} {what}");
        }
        futures_util::future::join_all(["/reports/3", "/reports/4"].map(|path| web.get(path))).await;
        drop().run().await.unwrap();
        for report in ["/reports/3", "/reports/4"] {
            assert!(!web.get(report).await.is_hit(), "{report} {what}");
        }
    }
    // What is another tenant's, no write of this one drops.
    let other = cache_of_tenants();
    let inner = other.clone();
    let web = Web::new(&other, move |_| {
        let value = inner.entry::<u64>("task", "1").tenant("b").fetch(|| async { Ok::<_, io::Error>(Some(1)) });
        async move {
            value.unwrap().await.unwrap();
            Ok(ok("text"))
        }
    });
    let reply = web.send(with(Method::GET, "/tasks/1", &[("x-tenant-id", "a")])).await;
    assert_eq!(reply.cache_status(), "fwd=uri-miss; detail=bad-tags");
}

/// That a value could not be had depends on all that it would have depended on.
#[tokio::test]
async fn an_error_depends_on_what_it_is_about() {
    let cache = tasks()
        .data_type(DataType::new("report", Ttl::Standard))
        .route(Route::new("/reports/{report_id}", "report"))
        .build()
        .unwrap();
    let inner = cache.clone();
    let web = Web::new(&cache, move |_| {
        let value = inner.entry::<u64>("task", "10").fetch(|| async {
            depends_on("project", 1);
            Err(io::Error::other("no such row"))
        });
        async move {
            assert!(value.unwrap().await.is_err());
            Ok(ok("none"))
        }
    });
    for (data_type, id) in [("task", "10"), ("project", "1")] {
        web.get("/reports/1").await;
        assert!(web.get("/reports/1").await.is_hit());
        cache.invalidate("t").mutated(data_type, id).run().await.unwrap();
        assert!(!web.get("/reports/1").await.is_hit(), "{data_type}");
    }
}

fn cache_of_tenants() -> Cache {
    tenants().build().unwrap()
}

// ---- caches outside --------------------------------------------------------------------------------------------------

/// What a response is tagged with outside is what its invalidation says.
#[tokio::test]
async fn caches_outside_can_be_purged_by_the_same_cascade() {
    for (header, between) in [("cache-tag", ','), ("surrogate-key", ' ')] {
        let told = Arc::new(Mutex::new(vec![]));
        let tags = told.clone();
        let cache = tasks()
            .mutation(Mutation::put("/tasks/{task_id}", "task"))
            .forward_tags(header)
            .on_invalidated(move |report: &Invalidated, dropped: &[Tag]| {
                let dropped = dropped.iter().map(|tag| String::from_utf8(tag.as_bytes().to_vec()).unwrap());
                tags.lock().unwrap().push((report.to_string(), dropped.collect::<Vec<_>>()));
            })
            .build()
            .unwrap();
        let web = Web::new(&cache, |request| async move {
            if request.uri().path() == "/tasks/20" {
                (0..1_000).for_each(|id| depends_on("project", format!("{id:0100}")));
            }
            let response = Response::builder()
                .header("cache-control", if request.uri().path() == "/tasks" { "private" } else { "" });
            Ok(response.body(full("text")).unwrap())
        });
        for stored in [false, true] {
            let reply = web.get("/tasks/10").await;
            assert_eq!(
                (reply.is_hit(), reply.header(header)),
                (stored, &*format!("test{{t}}:task:*{between}test{{t}}:task:task=10"))
            );
        }
        assert_eq!(web.get("/tasks").await.header(header), "", "nobody else is to keep it");
        let many = web.get("/tasks/20").await;
        let many: Vec<_> = many.header(header).split(between).collect();
        assert_eq!(many[..3], ["test{t}:task:*", "test{t}:project:*", "test{t}:task:task=20"]);
        assert!(many.len() > 100 && many.join(" ").len() <= 16 << 10, "{}", many.len());
        web.put("/tasks/10").await;
        let tags = ["test{t}:task:task=10", "test{t}:tasks:*"].map(str::to_owned).to_vec();
        assert_eq!(told.lock().unwrap().pop(), Some(("task=1, tasks=0, total=1".to_owned(), tags)));
        cache.invalidate("t").mutated("task", "10").run().await.unwrap();
        assert_eq!(told.lock().unwrap().pop().unwrap().1.len(), 2);
    }
    // A hook that panics is no reason for a write to fail.
    let cache = tasks().mutation(Mutation::put("/tasks/{task_id}", "task")).on_invalidated(|_, _| panic!("a bug"));
    let web = answering(&cache.build().unwrap(), |_| async { Ok(status(204)) });
    let reply: Reply = web.put("/tasks/10").await;
    assert_eq!(reply.status, 204);
}

// ---- confirmed by the origin -----------------------------------------------------------------------------------------

type Filled = (Key, Arc<Entry>);

/// A store in which a write comes between a look-up and the opening of the load.
#[derive(Clone)]
struct Between {
    inner: Arc<MemoryStore>,
    write: Arc<Mutex<Option<Tag>>>,
    /// A tier in process that has not heard of a write yet: what was stored last, while it lags.
    last: Arc<Mutex<Option<Filled>>>,
    lags: Arc<AtomicBool>,
}

impl Between {
    fn new() -> Self {
        let inner = Arc::new(MemoryStore::new(1 << 20));
        Self { inner, write: Arc::default(), last: Arc::default(), lags: Arc::default() }
    }
}

impl Store for Between {
    fn peek(&self, key: &[u8], _: u64) -> Option<Arc<Entry>> {
        let last = self.last.lock().unwrap().clone().filter(|(own, _)| own.as_bytes() == key);
        last.filter(|_| self.lags.load(Ordering::SeqCst)).map(|(_, entry)| entry)
    }
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        self.inner.lookup(inquiry)
    }
    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(async move {
            let written = self.write.lock().unwrap().take();
            if let Some(tag) = written {
                self.inner.invalidate(&[TagGroup::new("page", vec![tag])], None).await?;
            }
            self.inner.open(tags).await
        })
    }
    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        self.inner.extend(mark, tags)
    }
    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: u64) -> StoreFuture<'a, ()> {
        *self.last.lock().unwrap() = Some((key.clone(), entry.clone()));
        self.inner.fill(key, entry, tier, now)
    }
    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        self.inner.invalidate(groups, fence)
    }
    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.inner.fence(groups, fence)
    }
    fn clear(&self) -> StoreFuture<'_, ()> {
        self.inner.clear()
    }
}

/// What the creation of anything drops whole is fenced like what it is of: a list that is read meanwhile is not stored.
#[tokio::test]
async fn a_creation_fences_what_it_drops_whole() {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("agents", Ttl::Standard))
        .route(Route::new("/agents", "agents"))
        .route(Route::new("/agents/{agent_id}", "agent"))
        .mutation(Mutation::post("/agents").creates("agent"))
        .cascade(Cascade::new("agent").all(["agents"]).fenced(Duration::from_secs(60)))
        .build()
        .unwrap();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let own = gate.clone();
    let web = answering(&cache, move |_| {
        let gate = own.clone();
        async move {
            gate.acquire().await.unwrap().forget();
            Ok(ok("created"))
        }
    });
    let creation = web.send(request(Method::POST, "/agents"));
    tokio::pin!(creation);
    for _ in 0..10 {
        assert!(futures_util::poll!(creation.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    for _ in 0..3 {
        assert!(!web.get("/agents").await.is_hit());
    }
    gate.add_permits(1);
    creation.await;
    web.get("/agents").await;
    assert!(web.get("/agents").await.is_hit());
}

/// What is made of an old value, which a tier in process still has, is not stored as if it were made of the new one.
#[tokio::test]
async fn a_response_is_no_newer_than_its_parts() {
    let store = Between::new();
    let cache = tasks()
        .data_type(DataType::new("report", Ttl::Standard))
        .route(Route::new("/reports/{report_id}", "report"))
        .store(store.clone())
        .build()
        .unwrap();
    let inner = cache.clone();
    let web = Web::new(&cache, move |_| {
        let value = inner.entry::<u64>("task", "10").fetch(|| async { Ok::<_, io::Error>(Some(1)) });
        async move {
            value.unwrap().await.unwrap();
            Ok(ok("text"))
        }
    });
    cache.entry::<u64>("task", "10").fetch(|| async { Ok::<_, io::Error>(Some(0)) }).unwrap().await.unwrap();
    while store.last.lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    cache.invalidate("t").mutated("task", "10").run().await.unwrap();
    store.lags.store(true, Ordering::SeqCst);
    web.get("/reports/1").await;
    store.lags.store(false, Ordering::SeqCst);
    assert!(!web.get("/reports/1").await.is_hit(), "it was made of what a write had dropped");
}

/// What the origin confirms is still made of what it was made of.
#[tokio::test]
async fn a_confirmation_keeps_what_the_response_depends_on() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let cache = tasks()
        .data_type(DataType::new("page", Duration::from_secs(100)).freshness(Freshness::Response))
        .route(Route::new("/pages/{page_id}", "page"))
        .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
        .build()
        .unwrap();
    let web = Web::new(&cache, move |request| async move {
        let is_known = request.headers().contains_key("if-none-match");
        if !is_known {
            depends_on("task", 10);
        }
        let response = Response::builder().header("etag", "\"1\"").header("cache-control", "max-age=5");
        Ok(response.status(if is_known { 304 } else { 200 }).body(full("text")).unwrap())
    });
    web.get("/pages/1").await;
    now.fetch_add(6_000, Ordering::SeqCst);
    assert!(!web.get("/pages/1").await.is_hit());
    assert!(web.get("/pages/1").await.is_hit());
    cache.invalidate("t").mutated("task", "10").run().await.unwrap();
    assert!(!web.get("/pages/1").await.is_hit());
}

/// An expired entry that the origin confirms is stored anew only under the generations under which it was valid.
#[tokio::test]
async fn a_confirmation_does_not_outlive_a_write() {
    for races in [false, true] {
        let store = Between::new();
        let now = Arc::new(AtomicU64::new(1_000_000));
        let clock = now.clone();
        let validators = Arc::new(Mutex::new(vec![]));
        let seen = validators.clone();
        let cache = Cache::builder("test")
            .single_tenant("t")
            .data_type(DataType::new("page", Duration::from_secs(10)).freshness(Freshness::Response))
            .route(Route::new("/pages/{page_id}", "page"))
            .store(store.clone())
            .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
            .forward_tags("surrogate-key")
            .build()
            .unwrap();
        let web = Web::new(&cache, move |request| {
            let validator = request.headers().get("if-none-match").map(|v| v.to_str().unwrap().to_owned());
            seen.lock().unwrap().push(validator.clone());
            async move {
                let response = Response::builder().header("etag", "\"1\"").header("cache-control", "max-age=5");
                Ok(response.status(if validator.is_some() { 304 } else { 200 }).body(full("text")).unwrap())
            }
        });
        let first = web.get("/pages/1").await;
        cache.settled().await;
        now.fetch_add(6_000, Ordering::SeqCst);
        if races {
            *store.write.lock().unwrap() = Some(tag(&first));
        }
        let second = web.get("/pages/1").await;
        assert_eq!((second.status, second.text()), (StatusCode::OK, "text"));
        // The origin is asked for all of it: what it would confirm is not what is valid now.
        let expected = if races { None } else { Some("\"1\"".to_owned()) };
        assert_eq!(validators.lock().unwrap()[1], expected, "races: {races}");
    }

    /// The tag of the entity: nobody but the store makes one otherwise.
    fn tag(reply: &Reply) -> Tag {
        let found = Arc::new(Mutex::new(None));
        let kept = found.clone();
        let cache = Cache::builder("test")
            .single_tenant("t")
            .data_type(DataType::new("page", Ttl::Short))
            .on_invalidated(move |_, tags| *kept.lock().unwrap() = tags.first().cloned())
            .build()
            .unwrap();
        let run = cache.invalidate("t").mutated("page", "1").run();
        futures_util::FutureExt::now_or_never(run).unwrap().unwrap();
        let tag: Tag = found.lock().unwrap().take().unwrap();
        assert!(reply.header("surrogate-key").contains(std::str::from_utf8(tag.as_bytes()).unwrap()));
        tag
    }
}
