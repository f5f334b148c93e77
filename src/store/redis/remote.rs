//! The protocol's steps as Redis commands: `MGET` to look up, `SET NX GET` to open, `SET PX` to fill, `UNLINK` to
//! invalidate. Scripts only where fences are raised and lifted.
//!
//! | key | holds |
//! | --- | --- |
//! | `space e:{tenant}:…` | an entry |
//! | `space g:{tenant}:…` | the generation of a tag, 16 bytes; the only keys that are tracked |
//! | `space m:{tenant}` | the mark: dropped by every invalidation of the tenant |
//! | `space c:{tenant}:…` | about which entries were filled under a tag (a HyperLogLog), for the report |
//! | `space f:{tenant}:…` | who fences a tag, and until when (a sorted set) |
//! | `space l:{tenant}:…` | that some process is loading an entry |
//!
//! The space is before the hash tag, so that one prefix covers the generations of all tenants.

use std::{
    collections::BTreeMap,
    fmt,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use redis::{Cmd, FromRedisValue, Pipeline, RedisWrite, ServerError, ToRedisArgs, Value};

use super::link::{Line, Link, Session};
use crate::{
    catalog::Tier,
    clock::{Clock, Millis},
    key::{Key, Tag},
    store::{
        Entry, Fence, Generation, Lookup, Mark, Opened, Store, StoreError, StoreFuture, TagGroup,
        codec::{self, Encoded},
    },
};

/// `KEYS` are pairs of generation and fences; `ARGV` the writer, how long its fences stand from now (0: not at all), and
/// a fenced generation per pair. A tag stays fenced for as long as any writer fences it, under a new generation each time.
const FENCE: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local writer, stands = ARGV[1], tonumber(ARGV[2])
for i = 1, #KEYS / 2 do
    local generation, fences = KEYS[2 * i - 1], KEYS[2 * i]
    local kind = redis.call('TYPE', fences).ok
    if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', fences) end
    redis.call('ZREMRANGEBYSCORE', fences, '-inf', now)
    if stands > 0 then redis.call('ZADD', fences, now + stands, writer) else redis.call('ZREM', fences, writer) end
    local last = redis.call('ZREVRANGE', fences, 0, 0, 'WITHSCORES')
    if last[2] then
        local left = math.max(1, math.ceil(tonumber(last[2]) - now))
        redis.call('SET', generation, ARGV[2 + i], 'PX', left)
        redis.call('PEXPIRE', fences, left)
    else
        redis.call('DEL', generation, fences)
    end
end
";

/// Counters of a [`RedisStore`](super::RedisStore) since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RedisStats {
    /// Values that were no entries: corrupt, truncated, foreign, or of another version.
    pub unreadable: u64,
    /// Bytes of bodies before they were compressed.
    pub uncompressed: u64,
    /// Bytes of the same bodies after.
    pub compressed: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    unreadable: AtomicU64,
    uncompressed: AtomicU64,
    compressed: AtomicU64,
}

/// Redis without a tier in front of it and without a guard.
pub(super) struct Remote {
    pub(super) link: Arc<Link>,
    pub(super) clock: Clock,
    generation_ttl: Duration,
    pub(super) counters: Arc<Counters>,
}

impl Remote {
    pub(super) fn new(link: Arc<Link>, generation_ttl: Duration) -> Self {
        Self { link, clock: Clock::default(), generation_ttl, counters: Arc::default() }
    }

    async fn pipeline(
        &self,
        session: &Arc<Session>,
        line: &Line,
        pipeline: &Pipeline,
    ) -> Result<Vec<Value>, StoreError> {
        let mut connection = line.connection.clone();
        self.link.call(session, pipeline.query_async(&mut connection)).await
    }

    async fn command<T: FromRedisValue>(
        &self,
        session: &Arc<Session>,
        line: Line,
        command: &Cmd,
    ) -> Result<T, StoreError> {
        let mut connection = line.connection;
        self.link.call(session, command.query_async(&mut connection)).await
    }

    /// `SET NX GET`: creates what is absent, and tells what there was.
    fn push_add(&self, pipeline: &mut Pipeline, key: Vec<u8>, generation: Generation) {
        let ttl = self.generation_ttl.as_millis() as u64;
        pipeline.cmd("SET").arg(key).arg(&generation.0.to_be_bytes()).arg("NX").arg("GET").arg("PX").arg(ttl);
    }

    /// The current generations of these names, all of one tenant; those that are absent are created, and those that are
    /// none of ours replaced. Whatever else is asked is answered after them.
    async fn add(
        &self,
        session: &Arc<Session>,
        line: &Line,
        names: &[Vec<u8>],
        also: impl Fn(&mut Pipeline),
    ) -> Result<(Vec<Generation>, Vec<Value>), StoreError> {
        for _ in 0..3 {
            let fresh: Vec<_> = names.iter().map(|_| Generation::unique()).collect();
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            for (name, generation) in names.iter().zip(&fresh) {
                self.push_add(&mut pipeline, name.clone(), *generation);
            }
            also(&mut pipeline);
            let mut replies = self.pipeline(session, line, &pipeline).await?;
            let rest = replies.split_off(names.len().min(replies.len()));
            let mut generations = vec![];
            let mut foreign = redis::cmd("UNLINK");
            let mut clean = true;
            for ((reply, fresh), name) in replies.iter().zip(&fresh).zip(names) {
                match (reply, parse_generation(reply, line.run)) {
                    (Value::Nil, _) => generations.push(Generation(fresh.0 ^ line.run)),
                    (_, Some(generation)) => generations.push(generation),
                    (Value::ServerError(error), _) if error.code() != "WRONGTYPE" => {
                        return Err(refused(session, error));
                    }
                    _ => {
                        foreign.arg(name);
                        clean = false;
                    }
                }
            }
            if clean {
                return Ok((generations, rest));
            }
            self.command::<Value>(session, line.clone(), &foreign).await?;
        }
        Err(StoreError::new("somebody else writes to our keys"))
    }

    fn read_entry(&self, value: Value) -> Option<Arc<Entry>> {
        let Value::BulkString(bytes) = value else { return None };
        match codec::decode(Bytes::from(bytes)) {
            Ok(entry) => Some(Arc::new(entry)),
            Err(codec::Unreadable) => {
                self.counters.unreadable.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    pub(super) async fn generations(&self, tags: &[Tag]) -> Result<Vec<Option<Generation>>, StoreError> {
        let session = self.link.settled().await?;
        let line = session.line(tenant(tags))?;
        let get = mget(&session, None, tags);
        let run = line.run;
        let values: Vec<Value> = self.command(&session, line, &get).await?;
        Ok(values.iter().map(|value| parse_generation(value, run)).collect())
    }

    async fn drop_tags(&self, groups: &[TagGroup], fence: Option<&Fence>) -> Result<Vec<u64>, StoreError> {
        let session = self.link.connected().await?;
        let mut counts = vec![0; groups.len()];
        let mut tenants: BTreeMap<&[u8], Vec<(usize, &Tag)>> = BTreeMap::new();
        for (i, group) in groups.iter().enumerate() {
            for tag in &group.tags {
                tenants.entry(tag.tenant()).or_default().push((i, tag));
            }
        }
        for (tenant, tags) in tenants {
            let line = session.line(tenant)?;
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            let mut counted = vec![];
            for i in 0..groups.len() {
                let mut of_group = tags.iter().filter(|(group, _)| *group == i).peekable();
                if of_group.peek().is_some() {
                    let count = pipeline.cmd("PFCOUNT");
                    for (_, tag) in of_group {
                        count.arg(name(&session, b"c:", tag.as_bytes()));
                    }
                    counted.push(i);
                }
            }
            if let Some(fence) = fence {
                push_fence(&mut pipeline, &session, tags.iter().map(|(_, tag)| *tag), fence.writer, fence.hold);
            }
            let drop = pipeline.cmd("UNLINK").arg(name(&session, b"m:", tenant));
            for (_, tag) in &tags {
                drop.arg(name(&session, b"c:", tag.as_bytes()));
                if fence.is_none() {
                    drop.arg(name(&session, b"g:", tag.as_bytes()));
                }
            }
            let replies = self.pipeline(&session, &line, &pipeline).await?;
            // All but the counts must have succeeded.
            for reply in replies.iter().skip(counted.len()) {
                if let Value::ServerError(error) = reply {
                    return Err(refused(&session, error));
                }
            }
            for (i, reply) in counted.into_iter().zip(&replies) {
                if let Value::Int(count) = reply {
                    counts[i] += u64::try_from(*count).unwrap_or(0);
                }
            }
        }
        Ok(counts)
    }

    fn remember(&self, encoded: &Encoded) {
        if let Some((from, to)) = encoded.compressed {
            self.counters.uncompressed.fetch_add(from as u64, Ordering::Relaxed);
            self.counters.compressed.fetch_add(to as u64, Ordering::Relaxed);
        }
    }
}

impl Counters {
    pub(super) fn stats(&self) -> RedisStats {
        RedisStats {
            unreadable: self.unreadable.load(Ordering::Relaxed),
            uncompressed: self.uncompressed.load(Ordering::Relaxed),
            compressed: self.compressed.load(Ordering::Relaxed),
        }
    }
}

/// What a server's refusal means: that a slot is elsewhere, or will be in a moment, may be otherwise soon.
fn refused(session: &Session, error: &ServerError) -> StoreError {
    if matches!(error.code(), "MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN" | "READONLY" | "LOADING" | "MASTERDOWN") {
        session.look_again();
        return StoreError::unreachable(error.to_string());
    }
    StoreError::new(error.to_string())
}

/// The tenant of these tags, which is that of all of them.
fn tenant(tags: &[Tag]) -> &[u8] {
    tags.first().map_or(b"{}", Tag::tenant)
}

/// The name of a key in Redis.
fn name(session: &Session, kind: &[u8], rest: &[u8]) -> Vec<u8> {
    [session.space.as_bytes(), kind, rest].concat()
}

/// Reads an entry and generations: the one command of a hit, written into place.
fn mget(session: &Session, key: Option<&Key>, tags: &[Tag]) -> Cmd {
    struct Name<'a>(&'a str, &'a str, &'a [u8]);
    impl ToRedisArgs for Name<'_> {
        fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
            let mut writer = out.writer_for_next_arg();
            for part in [self.0.as_bytes(), self.1.as_bytes(), self.2] {
                // It is written to memory.
                let _ = writer.write_all(part);
            }
        }
    }
    let entry = key.map(|key| ("e:", key.as_bytes()));
    let names = entry.into_iter().chain(tags.iter().map(|tag| ("g:", tag.as_bytes())));
    let size = names.clone().map(|(kind, rest)| session.space.len() + kind.len() + rest.len()).sum::<usize>();
    let mut get = Cmd::with_capacity(2 + tags.len(), 4 + size);
    get.arg("MGET");
    for (kind, rest) in names {
        get.arg(Name(&session.space, kind, rest));
    }
    get
}

/// A generation as it is stored: 16 bytes. Anything else was not written by us, and is no generation.
fn parse_generation(value: &Value, run: u128) -> Option<Generation> {
    match value {
        Value::BulkString(bytes) => Some(Generation(u128::from_be_bytes(bytes.as_slice().try_into().ok()?) ^ run)),
        _ => None,
    }
}

fn push_fence<'t>(
    pipeline: &mut Pipeline,
    session: &Session,
    tags: impl Iterator<Item = &'t Tag>,
    writer: u128,
    stands: Duration,
) {
    let mut names = vec![];
    for tag in tags {
        names.push(name(session, b"g:", tag.as_bytes()));
        names.push(name(session, b"f:", tag.as_bytes()));
    }
    let eval = pipeline.cmd("EVAL").arg(FENCE).arg(names.len());
    let count = names.len() / 2;
    for name in names {
        eval.arg(name);
    }
    eval.arg(&writer.to_be_bytes()).arg(stands.as_millis() as u64);
    for _ in 0..count {
        eval.arg(&Generation::unique().fenced().0.to_be_bytes());
    }
}

impl Store for Remote {
    fn lookup<'a>(&'a self, key: &'a Key, tags: &'a [Tag], _: Tier) -> StoreFuture<'a, Lookup> {
        Box::pin(async move {
            let session = self.link.settled().await?;
            let line = session.line(tenant(tags))?;
            let get = mget(&session, Some(key), tags);
            let run = line.run;
            let values: Vec<Value> = self.command(&session, line, &get).await?;
            let mut values = values.into_iter();
            let entry = values.next().and_then(|value| self.read_entry(value));
            Ok(Lookup::new(entry, values.map(|value| parse_generation(&value, run)).collect()))
        })
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(async move {
            let session = self.link.settled().await?;
            let mut names: Vec<_> = tags.iter().map(|tag| name(&session, b"g:", tag.as_bytes())).collect();
            names.push(name(&session, b"m:", tenant(tags)));
            let line = session.line(tenant(tags))?;
            let (mut generations, _) = self.add(&session, &line, &names, |_| {}).await?;
            let mark = generations.pop().map_or(0, |g| g.0);
            Ok(Opened::new(generations, Mark(mark)))
        })
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(async move {
            let session = self.link.settled().await?;
            let names: Vec<_> = tags.iter().map(|tag| name(&session, b"g:", tag.as_bytes())).collect();
            let marked = name(&session, b"m:", tenant(tags));
            let line = session.line(tenant(tags))?;
            // The generations first: if the mark still stands after them, nothing was dropped before.
            let ask = |pipeline: &mut Pipeline| {
                pipeline.cmd("GET").arg(&marked);
            };
            let (generations, rest) = self.add(&session, &line, &names, ask).await?;
            let stands =
                rest.first().and_then(|mark| parse_generation(mark, line.run)).is_some_and(|now| now.0 == mark.0);
            Ok(stands.then_some(generations))
        })
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, _: Tier) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let session = self.link.settled().await?;
            let line = session.line(key.tenant())?;
            let keep = entry.keep_until.saturating_sub(self.clock.now());
            let keep = keep.min(self.generation_ttl.as_millis() as Millis);
            if keep == 0 {
                return Ok(());
            }
            let encoded = codec::encode(&entry);
            self.remember(&encoded);
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            pipeline.cmd("SET").arg(name(&session, b"e:", key.as_bytes())).arg(encoded.bytes).arg("PX").arg(keep);
            for stamp in &entry.stamps {
                let counter = name(&session, b"c:", stamp.tag.as_bytes());
                pipeline.cmd("PFADD").arg(&counter).arg(key.as_bytes());
                pipeline.cmd("PEXPIRE").arg(counter).arg(self.generation_ttl.as_millis() as u64);
            }
            match self.pipeline(&session, &line, &pipeline).await?.first() {
                Some(Value::ServerError(error)) => Err(refused(&session, error)),
                _ => Ok(()),
            }
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(self.drop_tags(groups, fence))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let session = self.link.connected().await?;
            let mut tenants: BTreeMap<&[u8], Vec<&Tag>> = BTreeMap::new();
            for tag in groups.iter().flat_map(|g| &g.tags) {
                tenants.entry(tag.tenant()).or_default().push(tag);
            }
            for (tenant, tags) in tenants {
                let line = session.line(tenant)?;
                let mut pipeline = redis::pipe();
                push_fence(&mut pipeline, &session, tags.into_iter(), fence.writer, fence.lease);
                self.pipeline(&session, &line, &pipeline).await?;
            }
            Ok(())
        })
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(async move {
            let session = self.link.settled().await?;
            let mut set = redis::cmd("SET");
            set.arg(name(&session, b"l:", key.as_bytes())).arg(1).arg("NX").arg("PX").arg(lease.as_millis() as u64);
            let line = session.line(key.tenant())?;
            let reply: Value = self.command(&session, line, &set).await?;
            Ok(!matches!(reply, Value::Nil))
        })
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let session = self.link.connected().await?;
            let line = session.line(key.tenant())?;
            let mut unlink = redis::cmd("UNLINK");
            unlink.arg(name(&session, b"l:", key.as_bytes()));
            self.command::<Value>(&session, line, &unlink).await.map(drop)
        })
    }

    fn is_reachable(&self) -> bool {
        self.link.session().is_some()
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("address", &self.link.address).finish_non_exhaustive()
    }
}
