//! The classic race of cache-aside, forced, step by step.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use tokio::sync::Notify;
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{Cache, CacheTags, Cascade, DataType, Mutation, Route, Ttl, store::MemoryStore};

type Web = BoxCloneSyncService<Request<Full<Bytes>>, Response<BoxBody<Bytes, Infallible>>, Infallible>;

fn cache() -> Cache {
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("parent", Ttl::Standard))
        .data_type(DataType::new("child", Ttl::Standard))
        .data_type(DataType::new("value", Ttl::Standard))
        .route(Route::new("/parents/{parent_id}", "parent"))
        .route(Route::new("/parents/{parent_id}/children/{child_id}", "child"))
        .route(Route::new("/children/{child_id}", "child").declares_tags())
        .mutation(Mutation::put("/parents/{parent_id}", "parent").include("children"))
        .cascade(Cascade::new("parent").drops(["value"]).relation("children", "child"))
        .store(MemoryStore::new(8 << 20))
        .build()
        .unwrap()
}

async fn send(web: &Web, method: &str, path: &str) -> u64 {
    let request = Request::builder().method(method).uri(path).body(Full::default()).unwrap();
    let response = web.clone().oneshot(request).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    std::str::from_utf8(&body).unwrap().parse().unwrap()
}

/// A gate that one visitor waits at until it is opened.
#[derive(Default)]
struct Gate {
    reached: Notify,
    open: Notify,
}

impl Gate {
    async fn pass(&self) {
        self.reached.notify_one();
        self.open.notified().await;
    }
}

#[tokio::test]
async fn a_slow_read_cannot_undo_a_write() {
    let cache = cache();
    let version = Arc::new(AtomicU64::new(1));
    let gate = Arc::new(Gate::default());
    let read = |gate: Option<Arc<Gate>>| {
        let version = version.clone();
        let fetch = move || async move {
            let row = version.load(Ordering::SeqCst);
            if let Some(gate) = gate {
                gate.pass().await;
            }
            Ok::<_, Infallible>(Some(row))
        };
        let entry = cache.entry::<u64>("value", "v").tenant("t").scope("parent", "1").fetch(fetch).unwrap();
        async { entry.await.unwrap().0.unwrap() }
    };
    let slow = tokio::spawn(read(Some(gate.clone())));
    gate.reached.notified().await;
    version.store(2, Ordering::SeqCst);
    cache.invalidate("t").mutated("parent", "1").run().await.unwrap();
    assert_eq!(read(None).await, 2, "a read that begins after the write does not join the flight from before it");
    gate.open.notify_one();
    assert_eq!(slow.await.unwrap(), 1, "the slow read itself began before the write");
    assert_eq!(read(None).await, 2, "what it stored is not valid");
}

/// The same over HTTP, with an entry whose only link to what was written is a tag that its response declares.
#[tokio::test]
async fn a_slow_read_cannot_undo_a_write_over_http() {
    for path in ["/parents/1", "/parents/1/children/c", "/children/1"] {
        let cache = cache();
        let version = Arc::new(AtomicU64::new(1));
        let gate = Arc::new(Gate::default());
        let slow = Arc::new(Mutex::new(Some(gate.clone())));
        let (v, s) = (version.clone(), slow.clone());
        let inner = service_fn(move |request: Request<Full<Bytes>>| {
            let (version, gate) = (v.clone(), s.lock().unwrap().take());
            async move {
                if request.method() == "PUT" {
                    version.fetch_add(1, Ordering::SeqCst);
                }
                let row = version.load(Ordering::SeqCst);
                if let Some(gate) = gate {
                    gate.pass().await;
                }
                let mut response = Response::new(Full::new(Bytes::from(row.to_string())));
                CacheTags::of(response.extensions_mut()).add("parent", "1");
                Ok::<_, Infallible>(response)
            }
        });
        let layered = cache.invalidate_layer().layer(cache.layer().layer(inner));
        let web: Web = BoxCloneSyncService::new(layered.map_response(|r| r.map(BodyExt::boxed)));
        let first = tokio::spawn({
            let web = web.clone();
            async move { send(&web, "GET", path).await }
        });
        gate.reached.notified().await;
        send(&web, "PUT", "/parents/1").await;
        let second = tokio::spawn({
            let web = web.clone();
            async move { send(&web, "GET", path).await }
        });
        // Which tags it has, nobody knows yet of the last: there the second read waits for the first, in vain.
        let (second, path_is_known) = (second, !path.starts_with("/children"));
        let second = if path_is_known { Ok(second.await.unwrap()) } else { Err(second) };
        gate.open.notify_one();
        assert_eq!(first.await.unwrap(), 1);
        let second = match second {
            Ok(version) => version,
            Err(waiting) => waiting.await.unwrap(),
        };
        assert_eq!(second, 2, "{path}");
        for _ in 0..3 {
            assert_eq!(send(&web, "GET", path).await, 2, "{path}");
        }
    }
}
