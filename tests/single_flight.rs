//! Concurrent misses of one key make one call, whatever becomes of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{Method, Response};
use tokio::{sync::Semaphore, task::JoinHandle};
use tower_cache_aside::{Cache, DataType, Mutation, Route, Source, Ttl};
use web::{Reply, Web, full, ok, request};

fn cache() -> Cache {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("user", Ttl::Standard))
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("conversation_memory", Ttl::Standard))
        .route(Route::new("/users/{user_id}", "user"))
        .mutation(Mutation::put("/users/{user_id}", "user"));
    cache.build().unwrap()
}

/// How the calls of the inner service end, first to last; then with the last again.
#[derive(Clone, Copy)]
enum End {
    Ok,
    Error,
    Panic,
    Failure,
    Private,
    NotFound,
}

/// A service whose reads wait for a permit each.
struct Origin {
    web: Web,
    calls: Arc<AtomicU64>,
    permits: Arc<Semaphore>,
}

impl Origin {
    fn new(ends: &'static [End]) -> Self {
        let (calls, permits) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
        let (c, p) = (calls.clone(), permits.clone());
        let web = Web::new(&cache(), move |request| {
            let (calls, permits) = (c.clone(), p.clone());
            async move {
                if request.method() == Method::PUT {
                    return Ok(ok("written"));
                }
                let n = calls.fetch_add(1, Ordering::SeqCst);
                permits.acquire().await.unwrap().forget();
                let response = Response::builder();
                match ends[(n as usize).min(ends.len() - 1)] {
                    End::Ok => Ok(ok(n.to_string())),
                    End::Error => Err(io::Error::other("origin down")),
                    End::Panic => panic!("a bug in the handler"),
                    End::Failure => Ok(response.status(503).body(full(n.to_string())).unwrap()),
                    End::NotFound => Ok(response.status(404).body(full(n.to_string())).unwrap()),
                    End::Private => Ok(response.header("cache-control", "private").body(full(n.to_string())).unwrap()),
                }
            }
        });
        Self { web, calls, permits }
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn read(&self) -> JoinHandle<io::Result<Reply>> {
        let web = self.web.clone();
        tokio::spawn(async move { web.try_send(request(Method::GET, "/users/1")).await })
    }

    async fn crowd(&self, count: usize) -> Vec<JoinHandle<io::Result<Reply>>> {
        let crowd = (0..count).map(|_| self.read()).collect();
        // On one thread, everybody has come as far as they can when nothing else is left to run.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        crowd
    }

    async fn calls_are(&self, count: u64) {
        while self.calls() < count {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_thousand_misses_are_one_call() {
    let origin = Origin::new(&[End::Ok]);
    let crowd = origin.crowd(1_000).await;
    assert_eq!(origin.calls(), 1);
    origin.permits.add_permits(1);
    let mut collapsed = 0;
    for task in crowd {
        let reply = task.await.unwrap().unwrap();
        assert_eq!(reply.text(), "0");
        collapsed += usize::from(reply.cache_status() == "fwd=uri-miss; collapsed");
    }
    assert_eq!((origin.calls(), collapsed), (1, 999));
}

#[tokio::test]
async fn a_leader_whose_client_hangs_up_goes_on() {
    let origin = Origin::new(&[End::Ok]);
    let leader = origin.crowd(1).await;
    let followers = origin.crowd(10).await;
    leader[0].abort();
    origin.permits.add_permits(1);
    for task in followers {
        assert_eq!(task.await.unwrap().unwrap().text(), "0");
    }
    assert_eq!(origin.calls(), 1);
    assert!(origin.web.get("/users/1").await.is_hit());
}

/// Also when nobody is left: the next one finds it stored.
#[tokio::test]
async fn a_call_that_everybody_left_is_still_stored() {
    let origin = Origin::new(&[End::Ok]);
    for task in origin.crowd(5).await {
        task.abort();
    }
    origin.permits.add_permits(1);
    while !origin.web.get("/users/1").await.is_hit() {
        tokio::task::yield_now().await;
    }
    assert_eq!(origin.calls(), 1);
}

#[tokio::test]
async fn a_failed_leader_fails_nobody_else() {
    for (ends, leaders_end) in
        [(&[End::Error, End::Ok], "error"), (&[End::Panic, End::Ok], "panic"), (&[End::Failure, End::Ok], "503")]
    {
        let origin = Origin::new(ends);
        let leader = origin.crowd(1).await.remove(0);
        let followers = origin.crowd(20).await;
        origin.permits.add_permits(2);
        match leaders_end {
            "panic" => assert!(leader.await.unwrap_err().is_panic()),
            "error" => assert!(leader.await.unwrap().is_err()),
            status => assert_eq!(leader.await.unwrap().unwrap().status.as_str(), status),
        }
        for task in followers {
            assert_eq!(task.await.unwrap().unwrap().text(), "1", "{leaders_end}");
        }
        assert_eq!(origin.calls(), 2, "after a {leaders_end} one of them tried, for all");
    }
}

/// An origin that is down is asked by each a few times at most, and everybody is told.
#[tokio::test]
async fn an_origin_that_stays_down_hangs_nobody() {
    let origin = Origin::new(&[End::Error]);
    let crowd = origin.crowd(20).await;
    origin.permits.add_permits(1_000);
    for task in crowd {
        assert!(task.await.unwrap().is_err());
    }
    assert!(origin.calls() <= 20, "{} calls", origin.calls());
}

/// A response for one client alone: the others don't queue up behind each other, each asks for itself.
#[tokio::test]
async fn an_unshareable_response_is_nobody_elses() {
    let origin = Origin::new(&[End::Private]);
    let crowd = origin.crowd(10).await;
    assert_eq!(origin.calls(), 1);
    origin.permits.add_permits(1);
    origin.calls_are(10).await;
    origin.permits.add_permits(9);
    let mut bodies = vec![];
    for task in crowd {
        bodies.push(task.await.unwrap().unwrap().text().to_owned());
    }
    bodies.sort();
    bodies.dedup();
    assert_eq!(bodies.len(), 10);
    let crowd = origin.crowd(10).await;
    assert_eq!(origin.calls(), 20, "and the next ones don't wait at all");
    origin.permits.add_permits(10);
    for task in crowd {
        task.await.unwrap().unwrap();
    }
}

/// What is not stored may still be good for everybody who waits for it.
#[tokio::test]
async fn a_stampede_on_nothing_is_one_call() {
    let origin = Origin::new(&[End::NotFound]);
    let crowd = origin.crowd(10).await;
    origin.permits.add_permits(1);
    for task in crowd {
        assert_eq!(task.await.unwrap().unwrap().status, 404);
    }
    assert_eq!(origin.calls(), 1);
    origin.permits.add_permits(1);
    assert_eq!(origin.web.get("/users/1").await.text(), "1", "it was not stored");
}

#[tokio::test]
async fn a_read_after_a_write_joins_no_flight_from_before_it() {
    let origin = Origin::new(&[End::Ok]);
    let before = origin.crowd(5).await;
    origin.web.put("/users/1").await;
    let after = origin.crowd(5).await;
    assert_eq!(origin.calls(), 2);
    origin.permits.add_permits(2);
    for (tasks, text) in [(before, "0"), (after, "1")] {
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap().text(), text);
        }
    }
    assert_eq!(origin.web.get("/users/1").await.text(), "1");
}

/// The cache-aside function shares its loads as well, passes errors on, and reports.
#[tokio::test]
async fn what_is_not_good_enough_is_made_once() {
    let cache = cache();
    let entry = || cache.entry::<String>("conversation_memory", "7").tenant("t").scope("agent", "42");
    let none = entry().keep_none(Duration::from_secs(60)).fetch(|| async { Ok::<_, &str>(None) }).unwrap();
    assert_eq!(none.await.unwrap().0, None);
    let calls = Arc::new(AtomicU64::new(0));
    let crowd = (0..50).map(|_| {
        let (entry, calls) = (entry(), calls.clone());
        let generate = move || async move {
            calls.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok("generated".to_owned())
        };
        async move {
            let fetch = || async { Ok::<_, &str>(None) };
            entry.fetch(fetch).unwrap().generate(generate).await.unwrap().0
        }
    });
    let values = futures_util::future::join_all(crowd).await;
    assert!(values.iter().all(|value| value == "generated"));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn values_are_loaded_once() {
    let cache = cache();
    let calls = Arc::new(AtomicU64::new(0));
    let load = |fail: bool| {
        let (cache, calls) = (cache.clone(), calls.clone());
        tokio::spawn(async move {
            let fetch = move || async move {
                calls.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                if fail { Err("database down") } else { Ok(None::<String>) }
            };
            let entry = cache.entry::<String>("conversation_memory", "7").tenant("t").scope("agent", "42");
            entry.fetch(fetch).unwrap().generate(|| async { Ok("generated".to_owned()) }).await
        })
    };
    assert_eq!(load(true).await.unwrap().unwrap_err(), "database down");
    let crowd: Vec<_> = (0..10).map(|_| load(false)).collect();
    let mut generated = 0;
    for task in crowd {
        let (value, report) = task.await.unwrap().unwrap();
        assert_eq!(
            (value.as_str(), report.data_type.as_str(), report.resource.as_str()),
            ("generated", "conversation_memory", "7")
        );
        generated += usize::from(report.source == Source::Generated);
        assert!(report.total >= report.lookup + report.fetch + report.generate);
    }
    assert_eq!((calls.load(Ordering::SeqCst), generated), (2, 1));
    let (_, report) = load(true).await.unwrap().unwrap();
    assert_eq!((report.source, report.fetch), (Source::Cache, Duration::ZERO));
    assert_eq!(
        cache.invalidate("t").mutated("agent", "42").run().await.unwrap().total(),
        0,
        "no cascade says that it falls with it"
    );
    assert_eq!(cache.invalidate("t").mutated("conversation_memory", "7").run().await.unwrap().total(), 1);
    assert_eq!(load(true).await.unwrap().unwrap_err(), "database down");
}
