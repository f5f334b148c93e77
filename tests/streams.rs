//! A stream of Redis as a source of events: whatever becomes of servers, networks and readers, an event is given, or a gap is.
//! Two sources of one group are two processes of a fleet here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use proxy::{Mode, Proxy};
use redis::{Redis, SERVERS, Sentinels};
use tokio::time::{Instant, sleep, timeout};
use tower_cache_aside::{Event, EventSource, Received, RedisStream};

const PATIENCE: Duration = Duration::from_secs(20);
const FLEET: Option<&str> = Some("fleet");
/// Longer than a reader that says nothing is waited for.
const FROZEN: Duration = Duration::from_secs(3);

/// A process that reads, and what it was given.
struct Reader {
    source: RedisStream,
    events: usize,
    rows: Vec<u64>,
    gaps: Vec<String>,
    proofs: Vec<Instant>,
    errors: Vec<String>,
    skipped: Vec<String>,
    largest: usize,
}

impl Reader {
    fn new(url: &str, group: Option<&str>) -> Self {
        let builder = RedisStream::builder(url, "events");
        let source = match group {
            Some(group) => builder.group(group),
            None => builder,
        };
        let source = source.build().unwrap();
        let (rows, gaps, proofs, errors, skipped) = (vec![], vec![], vec![], vec![], vec![]);
        Self { source, events: 0, rows, gaps, proofs, errors, skipped, largest: 0 }
    }

    /// One that has read all there is.
    async fn current(url: &str, group: Option<&str>) -> Self {
        let mut this = Self::new(url, group);
        this.until("the first proof", |r| !r.proofs.is_empty()).await;
        this.gaps.clear();
        this
    }

    /// What comes next, which is not acknowledged. Errors are waited out.
    async fn receive(&mut self) -> Option<Received> {
        match timeout(PATIENCE, self.source.next()).await.expect("an answer in time") {
            Ok(received) => {
                self.keep(&received);
                Some(received)
            }
            Err(error) => {
                self.errors.push(error.to_string());
                sleep(Duration::from_millis(50)).await;
                None
            }
        }
    }

    fn keep(&mut self, received: &Received) {
        match received {
            Received::Events(batch) => {
                let row = |event: &Event| event.values("row").first().and_then(|row| row.parse::<u64>().ok());
                self.rows.extend(batch.events().iter().filter_map(row));
                self.events += batch.events().len();
                self.skipped.extend(batch.reasons().iter().cloned());
                self.largest = self.largest.max(batch.events().len());
            }
            Received::Gap(why) => self.gaps.push(why.clone()),
            Received::Proof(time) => self.proofs.push(*time),
            _ => unreachable!(),
        }
    }

    async fn step(&mut self) {
        if let Some(Received::Events(_) | Received::Gap(_)) = self.receive().await
            && let Err(error) = self.source.ack().await
        {
            self.errors.push(error.to_string());
        }
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "{what} does not come about: {:?} {:?}", self.gaps, self.errors);
            self.step().await;
        }
    }

    /// Reads until all that was written before now is proven to be acknowledged.
    async fn catch_up(&mut self) {
        let now = Instant::now();
        self.until("a new proof", |r| r.proofs.last().is_some_and(|proof| *proof > now)).await;
    }

    /// Until events are given, which are not acknowledged.
    async fn until_given(&mut self) {
        let start = Instant::now();
        loop {
            match self.receive().await {
                Some(Received::Events(_)) => return,
                Some(Received::Gap(_)) => self.source.ack().await.unwrap(),
                _ => assert!(start.elapsed() < PATIENCE, "no events: {:?}", self.errors),
            }
        }
    }

    fn sorted(&self) -> Vec<u64> {
        let mut rows = self.rows.clone();
        rows.sort_unstable();
        rows.dedup();
        rows
    }
}

/// The same on all servers, at once.
async fn everywhere(test: impl AsyncFn(Redis, &'static str)) {
    join_all(SERVERS.map(|server| test(Redis::start_server(server, &[]), server.0))).await;
}

fn add(redis: &Redis, row: u64) -> String {
    let reply = redis.command(&["XADD", "events", "*", "name", "rows", "row", &row.to_string()]);
    reply.lines().nth(1).unwrap_or_else(|| panic!("{reply}")).to_owned()
}

fn add_all(redis: &Redis, rows: impl IntoIterator<Item = u64>) {
    rows.into_iter().for_each(|row| drop(add(redis, row)));
}

fn pending(redis: &Redis) -> String {
    redis.command(&["XPENDING", "events", "fleet"]).lines().nth(1).unwrap_or_default().to_owned()
}

fn consumers(redis: &Redis) -> usize {
    redis.command(&["XINFO", "CONSUMERS", "events", "fleet"]).matches("\r\nname\r\n").count()
}

/// Whether the server counts what was added, and so knows what was trimmed.
fn counts(redis: &Redis) -> bool {
    redis.command(&["XINFO", "STREAM", "events"]).contains("entries-added")
}

/// Any bytes as an entry.
fn add_bytes(redis: &Redis, fields: &[&[u8]]) {
    let mut request = format!("*{}\r\n$4\r\nXADD\r\n$6\r\nevents\r\n$1\r\n*\r\n", fields.len() + 3).into_bytes();
    for field in fields {
        request.extend(format!("${}\r\n", field.len()).bytes());
        request.extend_from_slice(field);
        request.extend(b"\r\n");
    }
    request.extend(b"*1\r\n$4\r\nQUIT\r\n");
    let mut stream = TcpStream::connect(("127.0.0.1", redis.port)).unwrap();
    stream.write_all(&request).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with('$'), "{reply}");
}

#[tokio::test]
async fn events_arrive_on_every_server_and_are_acknowledged() {
    everywhere(async |redis, server| {
        for group in [FLEET, None] {
            // What was there before is dropped with all else: nobody knows who has seen it.
            add(&redis, 0);
            let mut reader = Reader::new(&redis.url(), group);
            reader.until("the first proof", |r| !r.proofs.is_empty()).await;
            assert_eq!((reader.gaps.len(), &reader.rows[..]), (1, &[][..]), "{server:?}");
            add_all(&redis, 1..=5);
            add_bytes(&redis, &[b"event", br#"{"name": "rows", "tenant": "acme", "fields": {"row": [6, "x"]}}"#]);
            add_bytes(&redis, &[b"name", b"rows", b"row", b"7", b"row", b"8", b"event", b"none"]);
            reader.catch_up().await;
            assert_eq!((reader.gaps.len(), &reader.rows[..]), (1, &[1, 2, 3, 4, 5, 6, 7][..]), "{server:?}");
            assert_eq!((reader.errors, reader.skipped), (vec![], vec![]), "{server:?}");
        }
        assert_eq!(pending(&redis), ":0");
        assert_eq!(redis.keys("*").len(), 3, "the stream, who reads, and how far");
    })
    .await;
}

#[tokio::test]
async fn both_forms_of_an_entry_are_the_same_event() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    let mut reader = Reader::current(&redis.url(), FLEET).await;
    let json = br#"{"name": "rows", "tenant": "acme", "fields": {"row": ["1", "2"], "op": "update"}}"#;
    add_bytes(&redis, &[b"event", json]);
    add_bytes(&redis, &[b"row", b"1", b"name", b"rows", b"op", b"update", b"tenant", b"acme", b"row", b"2"]);
    let mut events = vec![];
    while events.len() < 2 {
        if let Some(Received::Events(batch)) = reader.receive().await {
            events.extend(batch.events().to_vec());
            reader.source.ack().await.unwrap();
        }
    }
    assert_eq!(events[0], events[1]);
    assert_eq!((events[0].tenant_name(), events[0].values("row")), (Some("acme"), &["1".into(), "2".into()][..]));
}

#[tokio::test]
async fn what_a_dead_reader_left_is_given_to_the_next_in_order() {
    everywhere(async |redis, server| {
        add(&redis, 100);
        drop(Reader::current(&redis.url(), FLEET).await);
        for round in 0..3 {
            let mut dead = Reader::new(&redis.url(), FLEET);
            add_all(&redis, round * 10..round * 10 + 5);
            dead.until_given().await;
            assert_eq!(dead.gaps, [""; 0], "what is known of the fleet is enough");
            drop(dead);
            add_all(&redis, round * 10 + 5..round * 10 + 10);
        }
        let mut next = Reader::new(&redis.url(), FLEET);
        next.catch_up().await;
        assert_eq!((&next.gaps[..], &next.errors[..]), (&[][..], &[][..]), "{server:?}");
        assert!(next.rows.is_sorted(), "{:?}", next.rows);
        assert_eq!(next.sorted(), (0..30).collect::<Vec<_>>());
        assert_eq!((pending(&redis), consumers(&redis)), (":0".to_owned(), 1), "{server:?}");
    })
    .await;
}

#[tokio::test]
async fn one_reads_and_the_other_proves() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    let mut reads = Reader::current(&redis.url(), FLEET).await;
    let mut stands_by = Reader::new(&redis.url(), FLEET);
    for row in 0..5 {
        add(&redis, row);
        let ((), ()) = tokio::join!(reads.catch_up(), stands_by.catch_up());
    }
    assert_eq!((&reads.rows[..], &stands_by.rows[..]), (&[0, 1, 2, 3, 4][..], &[][..]));
    assert_eq!((&stands_by.gaps[..], &stands_by.errors[..]), (&[][..], &[][..]));
    // What is read and not acknowledged is not proven.
    add(&redis, 5);
    reads.rows = vec![];
    reads.until_given().await;
    let given = Instant::now();
    while given.elapsed() < Duration::from_millis(1_000) {
        match timeout(Duration::from_millis(100), stands_by.source.next()).await {
            Ok(Ok(Received::Proof(proof))) => assert!(proof < given, "a proof of what is not acknowledged"),
            Ok(other) => panic!("{other:?} for one that stands by"),
            Err(_) => {}
        }
    }
    reads.source.ack().await.unwrap();
    let ((), ()) = tokio::join!(reads.catch_up(), stands_by.catch_up());
}

#[tokio::test]
async fn a_reader_that_freezes_is_taken_over_from_and_wakes_up_as_the_standby() {
    let redis = Redis::start(&[]);
    for waits in [true, false] {
        add(&redis, 0);
        let mut frozen = Reader::current(&redis.url(), FLEET).await;
        let mut other = Reader::new(&redis.url(), FLEET);
        if waits {
            // Half-way in a call, with nothing read.
            let _ = timeout(Duration::from_millis(20), frozen.source.next()).await;
            add_all(&redis, 1..=2);
        } else {
            add_all(&redis, 1..=2);
            frozen.until_given().await;
        }
        sleep(FROZEN).await;
        add_all(&redis, 3..=4);
        other.until("taking over", |r| r.sorted() == [1, 2, 3, 4]).await;
        if !waits {
            frozen.source.ack().await.unwrap();
        }
        let ((), ()) = tokio::join!(frozen.catch_up(), other.catch_up());
        add(&redis, 5);
        let ((), ()) = tokio::join!(frozen.catch_up(), other.catch_up());
        assert!(other.rows.contains(&5) && !frozen.rows.contains(&5));
        for reader in [frozen, other] {
            assert_eq!((reader.gaps, reader.errors), (vec![], vec![]), "waits: {waits}");
        }
        assert_eq!(pending(&redis), ":0");
        redis.command(&["FLUSHALL"]);
    }
}

type Loses = fn(&Redis, &[String]);

/// How a stream loses entries that nobody has read, and whether only servers that count notice.
const LOSSES: &[(&str, Loses, bool)] = &[
    ("XTRIM", |redis, _| drop(redis.command(&["XTRIM", "events", "MAXLEN", "1"])), false),
    ("XTRIM all", |redis, _| drop(redis.command(&["XTRIM", "events", "MAXLEN", "0"])), false),
    ("XTRIM MINID", |redis, ids| drop(redis.command(&["XTRIM", "events", "MINID", &ids[2]])), false),
    (
        "XADD MAXLEN",
        |redis, _| drop(redis.command(&["XADD", "events", "MAXLEN", "1", "*", "name", "rows", "row", "9"])),
        false,
    ),
    ("XDEL the first", |redis, ids| drop(redis.command(&["XDEL", "events", &ids[0]])), true),
    ("XDEL the second", |redis, ids| drop(redis.command(&["XDEL", "events", &ids[1]])), true),
    ("XDEL the last", |redis, ids| drop(redis.command(&["XDEL", "events", &ids[2]])), true),
];

#[tokio::test]
async fn what_is_trimmed_before_it_is_read_is_a_gap() {
    everywhere(async |redis, server| {
        for (group, read_before) in [(FLEET, true), (None, true), (FLEET, false), (None, false)] {
            for (what, lose, must_count) in LOSSES {
                redis.command(&["FLUSHALL"]);
                let mut reader = Reader::current(&redis.url(), group).await;
                if read_before {
                    add(&redis, 0);
                    reader.catch_up().await;
                }
                reader.gaps.clear();
                let ids: Vec<_> = (1..=3).map(|row| add(&redis, row)).collect();
                if *must_count && !counts(&redis) {
                    continue;
                }
                lose(&redis, &ids);
                reader.catch_up().await;
                assert_eq!(reader.gaps.len(), 1, "{server:?} {group:?} {what} {read_before}: {:?}", reader.gaps);
                // Redis 6.2 knows no more where it was when nothing at all is left.
                add(&redis, 10);
                reader.catch_up().await;
                let again = usize::from(*what == "XTRIM all" && !counts(&redis));
                assert_eq!(reader.gaps.len(), 1 + again, "{server:?} {group:?} {what}");
                assert_eq!(reader.rows.last() == Some(&10), again == 0, "{server:?} {group:?} {what}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_trimmed_after_it_was_read_is_no_gap() {
    everywhere(async |redis, server| {
        for group in [FLEET, None] {
            redis.command(&["FLUSHALL"]);
            let mut reader = Reader::current(&redis.url(), group).await;
            add(&redis, 0);
            reader.catch_up().await;
            reader.gaps.clear();
            for row in (10..100).step_by(10) {
                // The last that was read remains.
                let id = add(&redis, row);
                add(&redis, row + 1);
                reader.catch_up().await;
                redis.command(&["XDEL", "events", &id]);
                redis.command(&["XTRIM", "events", "MAXLEN", "1"]);
                reader.catch_up().await;
                add_all(&redis, row + 2..row + 4);
            }
            reader.catch_up().await;
            assert_eq!(reader.gaps, [""; 0], "{server:?} {group:?}");
            redis.command(&["XTRIM", "events", "MAXLEN", "0"]);
            reader.catch_up().await;
            assert_eq!(reader.gaps, [""; 0], "{server:?} {group:?}");
            add(&redis, 100);
            reader.catch_up().await;
            // Redis 6.2 cannot tell whether others were between the two.
            assert_eq!(reader.gaps.is_empty(), counts(&redis), "{server:?} {group:?}");
            assert_eq!(reader.rows.last() == Some(&100), counts(&redis), "{server:?} {group:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_trimmed_before_it_is_acknowledged_is_a_gap() {
    everywhere(async |redis, server| {
        for lose in [["XTRIM", "events", "MAXLEN", "0"], ["XTRIM", "events", "MAXLEN", "1"]] {
            add(&redis, 0);
            drop(Reader::current(&redis.url(), FLEET).await);
            let mut dead = Reader::new(&redis.url(), FLEET);
            add_all(&redis, 1..=3);
            dead.until_given().await;
            drop(dead);
            redis.command(&lose);
            // Redis 7 forgets with the first claim that anything was pending.
            let mut dead = Reader::new(&redis.url(), FLEET);
            while !matches!(dead.receive().await, Some(Received::Gap(_))) {}
            drop(dead);
            let mut next = Reader::new(&redis.url(), FLEET);
            next.catch_up().await;
            assert_eq!(next.gaps.len(), 1, "{server:?} {lose:?}");
            add(&redis, 4);
            next.catch_up().await;
            assert_eq!(next.gaps.len(), 1 + usize::from(lose[3] == "0" && !counts(&redis)), "{:?}", next.gaps);
            assert_eq!(pending(&redis), ":0");
        }
    })
    .await;
}

type Happens = fn(&mut Redis);

/// What becomes of a stream, a group or a server, and whether that matters to one who reads alone.
const FATES: &[(&str, Happens, bool)] = &[
    ("DEL", |redis| drop(redis.command(&["DEL", "events"])), true),
    ("FLUSHALL", |redis| drop(redis.command(&["FLUSHALL"])), true),
    ("the place is gone", |redis| drop(redis.command(&["DEL", "{events}:fleet:place"])), false),
    ("XGROUP DESTROY", |redis| drop(redis.command(&["XGROUP", "DESTROY", "events", "fleet"])), false),
    (
        "another group of that name",
        |redis| {
            redis.command(&["XGROUP", "DESTROY", "events", "fleet"]);
            redis.command(&["XGROUP", "CREATE", "events", "fleet", "$"]);
        },
        false,
    ),
    ("XGROUP SETID", |redis| drop(redis.command(&["XGROUP", "SETID", "events", "fleet", "$"])), false),
    ("a restart", |redis| redis.restart(), true),
    (
        "another server",
        |redis| {
            redis.kill();
            *redis = Redis::start_on(redis.port, &[]);
        },
        true,
    ),
    (
        "an older stream",
        |redis| {
            redis.command(&["EVAL", "redis.call('COPY', KEYS[1], 'old') redis.call('DEL', KEYS[1])", "1", "events"]);
            redis.command(&["EVAL", "redis.call('XADD', KEYS[1], '1-1', 'name', 'rows') return 1", "1", "events"]);
        },
        true,
    ),
    (
        "a demotion and a promotion",
        |redis| {
            redis.command(&["REPLICAOF", "127.0.0.1", "1"]);
            redis.command(&["REPLICAOF", "NO", "ONE"]);
        },
        true,
    ),
];

#[tokio::test]
async fn whatever_becomes_of_the_stream_or_its_server_is_a_gap() {
    let args: [&[&str]; 2] = [&[], &["--appendonly", "yes", "--appendfsync", "always"]];
    let cases = FATES.iter().flat_map(|fate| args.map(|args| (fate, args)));
    let cases = cases.flat_map(|case| [(case, FLEET, false), (case, FLEET, true), (case, None, false)]);
    let cases: Vec<_> = cases.filter(|(((.., alone), _), group, _)| *alone || group.is_some()).collect();
    for cases in cases.chunks(6) {
        join_all(cases.iter().map(async |((fate, args), group, is_new)| {
            let (what, happens, _) = fate;
            let mut redis = Redis::start(args);
            add(&redis, 0);
            let mut reader = Reader::current(&redis.url(), *group).await;
            if *is_new {
                drop(reader);
                reader = Reader::new(&redis.url(), *group);
            }
            add(&redis, 1);
            happens(&mut redis);
            add(&redis, 2);
            reader.catch_up().await;
            assert_eq!(reader.gaps.len(), 1, "{what} {args:?} {group:?} {is_new}: {:?}", reader.gaps);
            add(&redis, 3);
            reader.catch_up().await;
            assert_eq!(reader.gaps.len(), 1, "{what} {args:?} {group:?} {is_new}: {:?}", reader.gaps);
            assert_eq!(reader.rows.last(), Some(&3), "{what} {args:?} {group:?} {is_new}");
        }))
        .await;
    }
}

#[tokio::test]
async fn a_stream_that_is_behind_is_a_gap() {
    everywhere(async |redis, server| {
        add(&redis, 0);
        let mut reader = Reader::current(&redis.url(), None).await;
        redis.command(&["DEL", "events"]);
        redis.command(&["XADD", "events", "1-1", "name", "rows"]);
        reader.catch_up().await;
        assert!(matches!(&reader.gaps[..], [gap] if gap.contains("behind")), "{server}: {:?}", reader.gaps);
    })
    .await;
}

#[tokio::test]
async fn a_gap_that_nobody_acknowledges_is_given_again_to_whoever_reads() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    drop(Reader::current(&redis.url(), FLEET).await);
    redis.command(&["DEL", "{events}:fleet:place"]);
    let mut slow = Reader::new(&redis.url(), FLEET);
    while !matches!(slow.receive().await, Some(Received::Gap(_))) {}
    assert!(matches!(slow.receive().await, Some(Received::Gap(_))));
    // Whoever drops for longer than its lease is still believed, unless another was quicker.
    sleep(FROZEN).await;
    let mut other = Reader::new(&redis.url(), FLEET);
    while !matches!(other.receive().await, Some(Received::Gap(_))) {}
    add(&redis, 1);
    slow.source.ack().await.unwrap();
    slow.until("what came after the gap", |r| r.rows == [1]).await;
    other.source.ack().await.unwrap();
    let ((), ()) = tokio::join!(slow.catch_up(), other.catch_up());
    assert_eq!((slow.rows.len(), other.gaps.len(), other.rows), (1, 1, vec![]), "the second to acknowledge was late");
}

#[tokio::test]
async fn a_replica_is_an_error_and_no_gap() {
    let (redis, master) = (Redis::start(&[]), Redis::start(&[]));
    add(&redis, 0);
    for group in [FLEET, None] {
        let mut reader = Reader::current(&redis.url(), group).await;
        redis.command(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]);
        reader.until("an error", |r| r.errors.iter().any(|error| error.contains("replica"))).await;
        assert_eq!(reader.gaps, [""; 0]);
        let (proofs, errors) = (reader.proofs.len(), reader.errors.len());
        reader.until("more errors", |r| r.errors.len() > errors + 3).await;
        assert_eq!(reader.proofs.len(), proofs);
        redis.command(&["REPLICAOF", "NO", "ONE"]);
        reader.catch_up().await;
        assert_eq!(reader.gaps.len(), 1, "it may have lost some meanwhile");
    }
}

#[tokio::test]
async fn a_failover_is_a_gap_after_which_the_new_master_is_read() {
    let mut sentinels = Sentinels::start();
    add(&sentinels.master, 0);
    let mut reader = Reader::current(&sentinels.url(), FLEET).await;
    sentinels.master.kill();
    reader.until("a failover", |r| !r.gaps.is_empty()).await;
    add(&sentinels.replica, 1);
    reader.catch_up().await;
    assert_eq!((reader.gaps.len(), reader.rows), (1, vec![1]));
}

#[tokio::test]
async fn a_black_hole_is_an_error_proves_nothing_and_loses_nothing() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    for group in [FLEET, None] {
        let proxy = Proxy::start(redis.port).await;
        let mut reader = Reader::current(&proxy.url, group).await;
        proxy.set(Mode::Swallow);
        let gone = Instant::now();
        add_all(&redis, 1..=3);
        // One that is connected, and one that connects.
        reader.until("an error", |r| !r.errors.is_empty()).await;
        reader.until("another error", |r| r.errors.len() > 1).await;
        assert!(reader.proofs.iter().all(|proof| *proof <= gone), "{:?}", reader.errors);
        proxy.set(Mode::Pass);
        reader.catch_up().await;
        assert_eq!((reader.gaps.len(), reader.sorted()), (0, vec![1, 2, 3]), "{group:?}");
    }
}

#[tokio::test]
async fn an_unacknowledged_answer_is_given_again_after_an_error() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    for group in [FLEET, None] {
        let proxy = Proxy::start(redis.port).await;
        let mut reader = Reader::current(&proxy.url, group).await;
        add_all(&redis, 1..=3);
        reader.until_given().await;
        if group.is_some() {
            proxy.set(Mode::Cut);
            assert!(reader.source.ack().await.is_err());
            proxy.set(Mode::Pass);
        }
        reader.rows.clear();
        reader.until("the same again", |r| r.rows == [1, 2, 3]).await;
        reader.catch_up().await;
        assert_eq!(reader.gaps, [""; 0]);
    }
}

#[tokio::test]
async fn a_network_that_cuts_delays_and_holds_loses_nothing() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    let proxies = [Proxy::start(redis.port).await, Proxy::start(redis.port).await, Proxy::start(redis.port).await];
    let mut readers = vec![];
    for (proxy, group) in proxies.iter().zip([FLEET, FLEET, None]) {
        readers.push(Reader::current(&proxy.url, group).await);
    }
    let mode = || match rand::random_range(0..8) {
        0 | 1 => Mode::Cut,
        2 | 3 => Mode::CutShort,
        4 => Mode::Hold,
        5 => Mode::Delay(Duration::from_millis(30)),
        _ => Mode::Pass,
    };
    let is_over = AtomicBool::new(false);
    let trouble = async {
        for row in 1..=300 {
            add(&redis, row);
            proxies[rand::random_range(0..3)].set(mode());
            sleep(Duration::from_millis(rand::random_range(0..60))).await;
        }
        proxies.iter().for_each(|proxy| proxy.set(Mode::Pass));
        is_over.store(true, Ordering::SeqCst);
    };
    let reading = join_all(readers.iter_mut().map(async |reader| {
        while !is_over.load(Ordering::SeqCst) {
            let _ = timeout(Duration::from_millis(500), reader.step()).await;
        }
    }));
    tokio::join!(trouble, reading);
    join_all(readers.iter_mut().map(Reader::catch_up)).await;
    assert!(readers.iter().all(|reader| reader.gaps.is_empty()));
    assert!(readers.iter().any(|reader| !reader.errors.is_empty()), "the network was too good");
    let all: Vec<_> = (1..=300).collect();
    assert_eq!(readers[2].sorted(), all);
    let others = readers[1].rows.clone();
    readers[0].rows.extend(others);
    assert_eq!(readers[0].sorted(), all);
    assert_eq!(pending(&redis), ":0");
}

#[tokio::test]
async fn what_is_no_event_is_counted_and_skipped() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    let mut reader = Reader::current(&redis.url(), FLEET).await;
    let kinds: &[(&[&[u8]], &str)] = &[
        (&[b"event", b""], "JSON"),
        (&[b"event", b"{\"name\": \"rows\""], "JSON"),
        (&[b"event", b"[]"], "JSON"),
        (&[b"event", b"{\"name\": \"rows\", \"other\": 1}"], "JSON"),
        (&[b"event", b"{\"name\": \"rows\", \"fields\": {\"row\": {}}}"], "JSON"),
        (&[b"event", b"\xff\xfe"], "JSON"),
        (&[b"event", b"{\"name\": \"\"}"], "empty"),
        (&[b"name", b""], "empty"),
        (&[b"row", b"1"], "neither"),
        (&[b"", b""], "neither"),
        (&[b"event", b"{}", b"row", b"1"], "neither"),
        (&[b"name", b"rows", b"name", b"rows"], "twice"),
        (&[b"name", b"rows", b"tenant", b"a", b"tenant", b"b"], "twice"),
        (&[b"name", b"\xff"], "UTF-8"),
        (&[b"name", b"rows", b"\xff", b"1"], "UTF-8"),
    ];
    for (fields, why) in kinds {
        add_bytes(&redis, fields);
        reader.catch_up().await;
        assert!(reader.skipped.pop().is_some_and(|said| said.contains(why)), "{fields:?}");
    }
    assert_eq!((reader.events, reader.skipped.len()), (0, 0));
    let nested = "[".repeat(200_000);
    add_bytes(&redis, &[b"event", nested.as_bytes()]);
    let parts: &[&[u8]] = &[b"name", b"event", b"tenant", b"", b"row", b"\r\n", b"\x00", b"\xc3\x28", b"{}", b"\"a\""];
    for _ in 0..1_000 {
        let count = 2 * rand::random_range(1..4);
        let fields: Vec<_> = (0..count).map(|_| parts[rand::random_range(0..parts.len())]).collect();
        add_bytes(&redis, &fields);
    }
    reader.catch_up().await;
    assert_eq!(reader.events + reader.skipped.len(), 1_001);
    assert!(reader.events > 0 && reader.skipped.len() > 100);
    assert_eq!((pending(&redis), reader.gaps), (":0".to_owned(), vec![]));
}

#[tokio::test]
async fn a_call_that_is_dropped_has_lost_nothing() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    for group in [FLEET, None] {
        let mut reader = Reader::current(&redis.url(), group).await;
        let start = Instant::now();
        for row in 1..=300 {
            add(&redis, row);
            for _ in 0..rand::random_range(0..4) {
                let _ = timeout(Duration::from_millis(1), reader.step()).await;
            }
        }
        // It gets somewhere, too.
        while reader.sorted().len() < 300 {
            assert!(start.elapsed() < PATIENCE, "{}", reader.rows.len());
            let _ = timeout(Duration::from_millis(1), reader.step()).await;
        }
        reader.catch_up().await;
        assert_eq!((reader.sorted(), reader.gaps), ((1..=300).collect(), vec![]), "{group:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proof_never_comes_before_what_was_written_before_it() {
    let redis = Arc::new(Redis::start(&[]));
    add(&redis, 0);
    let proxy = Proxy::start(redis.port).await;
    proxy.set(Mode::Delay(Duration::from_millis(3)));
    let is_over = Arc::new(AtomicBool::new(false));
    let written: Arc<Mutex<Vec<(u64, Instant)>>> = Arc::default();
    let mut readers = vec![];
    for (url, group) in [(redis.url(), FLEET), (proxy.url.clone(), FLEET), (proxy.url.clone(), None)] {
        readers.push((Reader::current(&url, group).await, group.is_some()));
    }
    let writer = {
        let (redis, is_over, written) = (redis.clone(), is_over.clone(), written.clone());
        tokio::task::spawn_blocking(move || {
            for row in 1.. {
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                add(&redis, row);
                written.lock().unwrap().push((row, Instant::now()));
            }
        })
    };
    let fleet: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    let reading = readers.into_iter().map(|(mut reader, is_fleet)| {
        let (written, acknowledged) = (written.clone(), if is_fleet { fleet.clone() } else { Arc::default() });
        tokio::spawn(async move {
            // Some of it frozen, so that the lease changes hands.
            for round in 0.. {
                if round >= 60 && reader.proofs.len() > 5 {
                    break;
                }
                match reader.receive().await {
                    Some(Received::Events(batch)) => {
                        let rows = batch.events().iter().map(|event| event.values("row")[0].parse().unwrap());
                        let rows: Vec<u64> = rows.collect();
                        if is_fleet && round % 25 == 24 {
                            sleep(FROZEN).await;
                        }
                        acknowledged.lock().unwrap().extend(rows);
                        reader.source.ack().await.unwrap();
                    }
                    Some(Received::Gap(why)) => panic!("{why}"),
                    Some(Received::Proof(proof)) => {
                        let written = written.lock().unwrap();
                        let acknowledged = acknowledged.lock().unwrap();
                        let before = written.iter().filter(|(_, time)| *time < proof).map(|(row, _)| row);
                        let missing: Vec<_> = before.filter(|row| !acknowledged.contains(row)).collect();
                        assert!(missing.is_empty(), "proven, and not acknowledged: {missing:?}");
                    }
                    _ => panic!("{:?}", reader.errors),
                }
            }
        })
    });
    let read = join_all(reading).await;
    is_over.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    read.into_iter().for_each(Result::unwrap);
}

#[tokio::test]
async fn a_long_stream_is_read_in_bounded_batches() {
    let redis = Redis::start(&[]);
    add(&redis, 0);
    let mut readers = vec![];
    for group in [FLEET, None] {
        readers.push(Reader::current(&redis.url(), group).await);
    }
    let fill = "for row = 1, 100000 do redis.call('XADD', KEYS[1], '*', 'name', 'rows', 'row', row) end";
    redis.command(&["EVAL", fill, "1", "events"]);
    for mut reader in readers {
        reader.catch_up().await;
        assert_eq!((reader.largest, reader.gaps.len()), (1_000, 0));
        assert!(reader.rows.iter().copied().eq(1..=100_000));
    }
}

#[tokio::test]
async fn these_rights_are_enough() {
    const FOR_ONE: &str = "+info +eval +exists +xinfo +xrange +xread";
    const FOR_FLEETS: &str =
        "+xreadgroup +xautoclaim +xpending +xack +xgroup +get +set +pexpire +hmget +hset +hincrby +del";
    everywhere(async |redis, server| {
        for (group, rights) in [(None, FOR_ONE.to_owned()), (FLEET, format!("{FOR_ONE} {FOR_FLEETS}"))] {
            let user = ["ACL", "SETUSER", "reader", "reset", "on", ">secret", "~events", "~{events}:*"];
            let reply = redis.command(&user.into_iter().chain(rights.split(' ')).collect::<Vec<_>>());
            assert!(reply.starts_with("+OK"), "{reply}");
            add(&redis, 0);
            let url = redis.url().replace("//", "//reader:secret@");
            drop(Reader::current(&url, group).await);
            let mut reader = Reader::new(&url, group);
            reader.catch_up().await;
            add(&redis, 1);
            reader.until_given().await;
            drop(reader);
            let mut reader = Reader::current(&url, group).await;
            add(&redis, 2);
            reader.catch_up().await;
            assert_eq!((reader.rows.last(), &reader.errors[..]), (Some(&2), &[][..]), "{server} {group:?}");
        }
    })
    .await;
}

#[test]
fn what_cannot_work_is_refused() {
    for (url, stream, group, says) in [
        ("nonsense", "events", None, "Redis address"),
        ("redis://localhost", "", None, "a stream has no name"),
        ("redis://localhost", "events", Some(""), "its group has no name"),
        ("redis+cluster://localhost", "events", None, "from one server"),
    ] {
        let builder = RedisStream::builder(url, stream);
        let builder = group.into_iter().fold(builder, |builder, group: &str| builder.group(group));
        let error = builder.build().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = RedisStream::builder("redis://localhost", "events").name("").build().unwrap_err();
    assert!(error.to_string().contains("its source has no name"));
    let source = RedisStream::builder("redis://user:secret@localhost", "events");
    assert!(!format!("{source:?}").contains("secret"));
    let source = source.group("fleet").build().unwrap();
    assert_eq!(source.name(), "redis:events");
    assert!(!format!("{source:?}").contains("secret"));
}
