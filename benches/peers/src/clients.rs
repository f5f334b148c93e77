//! What a look-up over Redis asks (`MGET` of an entry and two generations), by client libraries and by the connection that this
//! crate has for look-ups, each alone: beside `GET` of 1 KiB by redis-rs.

#[allow(dead_code, unreachable_pub)]
#[path = "../../../src/mux/mod.rs"]
pub(crate) mod mux;
#[allow(dead_code)]
#[path = "../../../src/store/redis/resp.rs"]
mod resp;

use std::{hint::black_box, pin::Pin, time::Duration};

use fred::interfaces::{ClientLike, KeysInterface};
use rustis::commands::StringCommands;

use super::{
    measure::Shared,
    support::NOISE,
    turns::{Goal, Side, Table},
};
use mux::Mux;
use resp::{Resp, write};

const TASKS: u64 = 64;

const NAMES: [&str; 3] =
    ["cache:e:s{tenant-17}:type-0:=4711h0badcafe", "cache:g:s{tenant-17}:agent=4711", "cache:g:s{tenant-17}"];

/// A turn of some tasks, each of which asks one time after the other.
fn side<'a, A, F>(name: &str, workers: usize, calls: u64, shared: &'a Shared, ask: A) -> Side<'a>
where
    A: Fn() -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let turn = move || {
        shared.spread(TASKS, calls, |calls| {
            let ask = ask.clone();
            async move {
                for _ in 0..calls {
                    ask().await;
                }
            }
        })
    };
    let workers = if workers == 1 { "1 worker".to_owned() } else { format!("{workers} workers") };
    (format!("{name}, {workers}, {TASKS} at once"), Box::new(turn))
}

fn own_mget(
    own: Mux<Resp>,
    names: &'static [&'static str],
) -> impl Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Clone + Send + 'static {
    move || {
        let own = own.clone();
        Box::pin(async move {
            let all = names.iter().map(|name| [name.as_bytes()]);
            let answer = own.call(1, |out, _| write(out, "MGET", names.len(), all)).await.unwrap();
            let reply = answer.replies[0].as_ref().unwrap();
            assert_eq!(reply.strings().unwrap().map(black_box).count(), names.len());
        })
    }
}

pub(crate) fn compare(table: &mut Table, workers: usize) {
    let shared = Shared::start(workers);
    let calls = table.calls(64_000);
    let entry = [&NOISE[..], &[b'h'; 450]].concat();
    let (redis, server) = (shared.bare.clone(), &shared.server);
    let (fred, rustis, own) = shared.runtime.block_on(async {
        let mut redis = redis.clone();
        for (name, value) in NAMES.iter().zip([&entry[..], &[7; 16], &[8; 16]]) {
            redis::cmd("SET").arg(name).arg(value).exec_async(&mut redis).await.unwrap();
        }
        redis::cmd("SET").arg("bare").arg(&NOISE[..]).exec_async(&mut redis).await.unwrap();
        let fred = fred::types::config::Config::from_url(&server.url()).unwrap();
        let fred = fred::types::Builder::from_config(fred).build().unwrap();
        fred.init().await.unwrap();
        let rustis = rustis::client::Client::connect(server.url()).await.unwrap();
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (own, serving) = Mux::new(stream, Resp::default(), Duration::from_secs(10));
        tokio::spawn(serving);
        (fred, rustis, own)
    });
    let bare = redis.clone();
    let sides = vec![
        side("GET of 1 KiB by redis-rs", workers, calls, &shared, move || {
            let mut redis = bare.clone();
            async move {
                black_box(redis::cmd("GET").arg("bare").query_async::<redis::Value>(&mut redis).await.unwrap());
            }
        }),
        side("MGET by redis-rs", workers, calls, &shared, move || {
            let mut redis = redis.clone();
            async move {
                let found: Vec<redis::Value> = redis::cmd("MGET").arg(&NAMES).query_async(&mut redis).await.unwrap();
                assert_eq!(black_box(found).len(), NAMES.len());
            }
        }),
        side("MGET by fred", workers, calls, &shared, move || {
            let fred = fred.clone();
            async move {
                let found: Vec<Option<bytes::Bytes>> = fred.mget(NAMES.to_vec()).await.unwrap();
                assert_eq!(black_box(found).len(), NAMES.len());
            }
        }),
        side("MGET by rustis", workers, calls, &shared, move || {
            let rustis = rustis.clone();
            async move {
                let found: Vec<Option<bytes::Bytes>> = rustis.mget(NAMES).await.unwrap();
                assert_eq!(black_box(found).len(), NAMES.len());
            }
        }),
        side("MGET by our own connection", workers, calls, &shared, own_mget(own.clone(), &NAMES)),
        // What tier `validated` asks.
        side(
            "MGET of the generations alone by our own connection",
            workers,
            calls,
            &shared,
            own_mget(own, &NAMES[1..]),
        ),
    ];
    table.compare("µs", sides, &[Goal::Rate(None); 5]);
}
