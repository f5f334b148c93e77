//! A stream of Redis as a source of events: whatever becomes of servers, networks and readers, an event is given, or a gap is.
//! Two sources of one group are two processes of a fleet here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use futures_util::future::join_all;
use proxy::{Mode, Proxy};
use redis::{Redis, SERVERS};
use tokio::time::{Instant, sleep, timeout};
use tower_cache_aside::{EventSource, Received, RedisStream};

const PATIENCE: Duration = Duration::from_secs(20);
const FLEET: Option<&str> = Some("fleet");
/// Longer than a reader that says nothing is waited for.
const FROZEN: Duration = Duration::from_secs(3);

/// A process that reads, and what it was given.
struct Reader {
    source: RedisStream,
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
        Self { source, rows, gaps, proofs, errors, skipped, largest: 0 }
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
                self.rows.extend(batch.events().iter().map(|event| event.values("row")[0].parse::<u64>().unwrap()));
                self.skipped.extend(batch.skipped().iter().cloned());
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
        if let Ok(Ok(Received::Proof(proof))) = timeout(Duration::from_millis(100), stands_by.source.next()).await {
            assert!(proof < given, "a proof of what is not acknowledged");
        }
    }
    reads.source.ack().await.unwrap();
    let ((), ()) = tokio::join!(reads.catch_up(), stands_by.catch_up());
}

#[tokio::test]
async fn a_reader_that_freezes_is_taken_over_from_and_wakes_up_as_the_standby() {
    let redis = Redis::start(&[]);
    for waits in [true, false] {
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

/// How a stream loses entries that nobody has read, and whether only servers that count notice.
const LOSSES: &[(&str, fn(&Redis, &[String]), bool)] = &[
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
