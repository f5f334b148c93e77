//! How often a hit allocates, beyond its request, and what an entry takes: `cargo bench --bench allocations`. Apart from `goals`, as an allocator that counts
//! is slower than others.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "support/measure.rs"]
mod measure;
mod support;
#[path = "support/turns.rs"]
mod turns;

use std::time::Duration;

use measure::{Body, PATH, Shared, says};
use support::{Never, origin, served};
use tower::{Layer, Service};
use tower_cache_aside::{CacheBody, Tier};
use turns::{Goal, Table};

fn main() {
    let mut table = Table::from_args("allocations");
    // All is on this thread, which is the one that is counted: with what tasks do for a hit as well.
    let shared = Shared::start_on(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let memory = support::builder().build().unwrap();
    table.count(
        "allocations of a hot hit in process",
        "",
        least(&shared, memory.layer().layer(origin())),
        Goal::Most(Some(3.0)),
    );
    for tier in [Tier::Off, Tier::Validated] {
        let name = format!("allocations of a hit in Redis, `{}`", format!("{tier:?}").to_lowercase());
        let counted = least(&shared, shared.cache(tier).layer().layer(origin()));
        table.count(&name, "", counted, Goal::Most(Some(14.0)));
    }
    let entries = 20_000;
    let path = |n: u64| format!("/agents/{n:07}");
    let cache = support::builder().memory(1 << 30).build().unwrap();
    let mut service = cache.layer().layer(origin());
    let fill = || {
        shared.runtime.block_on(async {
            for n in 0..entries {
                let _ = service.call(served(&path(n))).await.unwrap();
            }
            cache.settled().await;
        });
    };
    let held = allocation_counter::measure(fill).bytes_current as f64 / entries as f64;
    let name = "memory of an entry in process, beyond its own";
    table.count(name, "B", held - measure::own(&path(0)), Goal::Most(None));
    table.finish(env!("CARGO_MANIFEST_DIR"));
}

/// Of many: a heartbeat may come in between, and the second hit of each second makes what the others share.
fn least<S>(shared: &Shared, mut service: S) -> f64
where
    S: Service<Request, Response = http::Response<CacheBody<Body>>, Error = Never> + Clone,
{
    shared.until_hit(&service);
    let hit = |_| {
        let (request, mut response) = (served(PATH), None);
        let counted = allocation_counter::measure(|| {
            response = Some(shared.runtime.block_on(async { service.call(request).await.unwrap() }));
        });
        assert!(says(&response.unwrap(), "; hit"));
        shared.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
        counted.count_total
    };
    (0..200).map(hit).min().unwrap() as f64
}

type Request = http::Request<Body>;
