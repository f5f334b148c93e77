//! How often a hit allocates, beyond its request: `cargo bench --bench allocations`. Apart from `goals`, as an allocator that counts
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
