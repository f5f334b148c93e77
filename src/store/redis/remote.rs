//! The protocol's steps as Redis commands: `MGET` to look up, `SET NX` and `MGET` to open, `SET PX` to fill, `UNLINK` to
//! invalidate. Scripts only where fences are raised and lifted (and where Redis is older than `PEXPIREAT … GT`).
//!
//! | key | holds |
//! | --- | --- |
//! | `prefix:e:service{tenant}:…` | an entry |
//! | `prefix:g:service{tenant}:…` | the generation of a tag, 16 bytes; the only keys that are tracked |
//! | `prefix:m:service{tenant}` | the mark: dropped by every invalidation of the tenant |
//! | `prefix:c:service{tenant}:…` | about which entries were filled under a tag (a HyperLogLog), for the report |
//! | `prefix:f:service{tenant}:…` | who fences a tag, and until when (a sorted set) |
//! | `prefix:l:service{tenant}:…` | that some process is loading an entry |
//! | `prefix:n:{*}:…` | what the fleet has to remember: how far a source of events was read |
//! | `prefix:r:{region}` | what a region tells the others (a stream), and beside it who follows it |
//! | `prefix:s:service{*}` | what the processes of the fleet say of themselves (a hash) |
//!
//! The mark is read with what is looked up, so a load does not wait for generations that were absent: `SET NX` and `MGET` make them
//! beside it, and tell the mark of the same moment.
//!
//! The prefix is before the hash tag, so that one prefix covers the generations of all tenants. A generation and a mark
//! are made for as long as a load may take; only what is stored under a generation prolongs it. So an id that turns out
//! not to exist leaves nothing for long, and a generation that ends early costs a miss.

use std::{
    fmt,
    io::Write,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, RedisWrite, ToRedisArgs, Value};
use smallvec::SmallVec;

use super::{
    ends::{Prolonged, Unended},
    link::Link,
    refusals::Step,
    resp::{self, Reply},
    server::Server,
    stream::Id,
    trouble::Trouble,
};
use crate::{
    catalog::Tier,
    clock::Millis,
    key::{Key, Tag},
    store::{
        Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, Opened, Search, Stamp, Store, StoreError,
        StoreFuture, TagGroup,
        decoded::Times,
        regional::{FIELD, Kind, Record},
        wire::{Counters, Generations, Tags, by_tenant},
    },
};

/// How long a generation lives that nothing is stored under: longer than a load may take.
const OPENED: Duration = Duration::from_secs(120);

/// The ends of generations are multiples of at least this, since whoever tracks them hears of each change.
const GRID: Duration = Duration::from_secs(60);

/// How long is kept what the processes of a fleet have said of themselves.
const SAID: Duration = Duration::from_secs(60);

/// How long a note is kept that nobody writes again.
const NOTED: Duration = Duration::from_secs(30 * 86_400);

/// So many milliseconds sooner an entry may end for having been decoded before: each heartbeat tells how the clocks differ.
const APART: i64 = 10;

/// So many tags are dropped or fenced by one script, and told by one entry: others wait meanwhile.
const AT_ONCE: usize = 1_000;

/// So many entries of a region's stream are kept, about: whoever is further behind has a gap.
const TOLD: usize = 100_000;

/// Keys looked through at once.
const SCANNED: usize = 1_000;

/// Who searches sees so many rounds of each server's keys.
const ROUNDS: usize = 200;

/// `KEYS` are the mark and pairs of generation and fences; `ARGV` the writer, how long its fences stand from now (0: not at
/// all), for how long it is remembered that they stood, and a fenced generation per pair. A tag stays fenced for as long as any
/// writer fences it, under a new generation each time. All of it is one step: whoever sees the mark of before sees the
/// generations of before. A lease that ends leaves the mark, and takes the generation: for as long as a load may take, what
/// stood tells that nothing is proven of the tag.
const FENCE: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local writer, stands = ARGV[1], tonumber(ARGV[2])
redis.call('DEL', KEYS[1])
for i = 1, (#KEYS - 1) / 2 do
    local generation, fences = KEYS[2 * i], KEYS[2 * i + 1]
    local kind = redis.call('TYPE', fences).ok
    if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', fences) end
    redis.call('ZREMRANGEBYSCORE', fences, '-inf', now)
    if stands > 0 then redis.call('ZADD', fences, now + stands, writer) else redis.call('ZREM', fences, writer) end
    local last = redis.call('ZREVRANGE', fences, 0, 0, 'WITHSCORES')
    if last[2] then
        local left = math.max(1, math.ceil(tonumber(last[2]) - now))
        redis.call('SET', generation, ARGV[3 + i], 'PX', left)
        redis.call('PEXPIRE', fences, left + tonumber(ARGV[3]))
    else
        redis.call('DEL', generation, fences)
    end
end
";

/// Redis without a tier in front of it and without a guard.
pub(super) struct Remote {
    pub(super) link: Arc<Link>,
    generation_ttl: Duration,
    pub(super) counters: Arc<Counters>,
    tells: Option<Tells>,
    prolonged: Prolonged,
    unended: Unended,
}

/// The stream by which a region tells the others what it drops.
pub(super) struct Tells {
    stream: String,
    /// The last entry of this process.
    last: Mutex<Option<String>>,
}

impl Tells {
    pub(super) fn new(stream: String) -> Self {
        Self { stream, last: Mutex::default() }
    }

    fn push(&self, pipeline: &mut Pipeline, record: &[u8]) {
        let add = pipeline.cmd("XADD").arg(&self.stream).arg("MAXLEN").arg("~").arg(TOLD);
        add.arg("*").arg(FIELD).arg(record);
    }

    fn has(&self, reply: Option<&Value>) {
        let id = reply.and_then(|reply| String::from_redis_value_ref(reply).ok());
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Another's may have been answered first.
        if id.as_deref().map(Id::of) > last.as_deref().map(Id::of) {
            *last = id;
        }
    }
}

/// What is asked of the server with a fill.
struct Filling {
    /// So many replies must not be refusals; what follows them is for the report.
    needed: usize,
    /// Until when its generations live.
    end: Millis,
    /// Counters that are not told until when they live, and those that are told instead.
    unended: Vec<Vec<u8>>,
    due: Vec<(Vec<u8>, Millis)>,
}

impl Remote {
    pub(super) fn new(link: Arc<Link>, generation_ttl: Duration, tells: Option<Tells>) -> Self {
        Self {
            link,
            generation_ttl,
            counters: Arc::default(),
            tells,
            prolonged: Prolonged::default(),
            unended: Unended::default(),
        }
    }

    async fn pipeline(&self, server: &Server, step: Step, pipeline: &Pipeline) -> Result<Vec<Value>, StoreError> {
        if pipeline.is_empty() {
            return Ok(vec![]);
        }
        let mut connection = server.connection.clone();
        self.link.call(server, step, pipeline.query_async(&mut connection)).await
    }

    async fn command<T: FromRedisValue>(&self, server: &Server, step: Step, command: &Cmd) -> Result<T, StoreError> {
        let mut connection = server.connection.clone();
        self.link.call(server, step, command.query_async(&mut connection)).await
    }

    /// The first of these replies that is a refusal.
    fn refusal<'v>(
        &self,
        server: &Server,
        step: Step,
        replies: impl IntoIterator<Item = &'v Value>,
    ) -> Result<(), StoreError> {
        for reply in replies {
            if let Value::ServerError(error) = reply {
                return Err(self.link.refused(server, step, error.into()));
            }
        }
        Ok(())
    }

    /// The name of a key in Redis.
    fn name(&self, kind: &str, rest: &[u8]) -> Vec<u8> {
        [self.link.terms.prefix.as_bytes(), kind.as_bytes(), rest].concat()
    }

    /// The current generations of these tags, all of one tenant, and its mark, if that is wanted: all of one moment. Those that
    /// are absent are created, and those that are none of ours replaced. Whatever else is asked is answered after them.
    ///
    /// Only the first of them ever sets a key, and what counts is what all are told afterwards, in the same round trip.
    async fn add(
        &self,
        server: &Server,
        tags: &[Tag],
        marks: bool,
        also: impl Fn(&mut Pipeline),
    ) -> Result<(Vec<Generation>, Vec<Value>), StoreError> {
        let mark = marks.then(|| self.name("m:", tenant(tags)));
        let names: Vec<_> = tags.iter().map(|tag| self.name("g:", tag.as_bytes())).chain(mark).collect();
        for attempt in 0..3 {
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            for name in &names {
                let set = pipeline.cmd("SET").arg(name).arg(&Generation::unique().0.to_be_bytes());
                set.arg("NX").arg("PX").arg(OPENED.as_millis() as u64);
            }
            pipeline.cmd("MGET").arg(&names);
            also(&mut pipeline);
            let mut replies = self.pipeline(server, Step::Open, &pipeline).await?;
            let rest = replies.split_off((names.len() + 1).min(replies.len()));
            self.refusal(server, Step::Open, &replies)?;
            let Some(Value::Array(found)) = replies.pop() else { break };
            if let Some(generations) = told(&replies, &found, server.reign) {
                server.refusals.done(Step::Open);
                return Ok((generations, rest));
            }
            // Dropped since it was found to be there; if it is there again, it is none of ours.
            if attempt > 0 {
                let strange = tags.iter().zip(&found).filter(|(_, found)| parse_generation(found, 0).is_none());
                let strange: Vec<_> = strange.map(|(tag, _)| tag).collect();
                self.take_away(server, Step::Open, tenant(tags), &strange).await?;
            }
        }
        let foreign = Trouble::new("FOREIGN", "what is under our keys is none of ours");
        Err(self.link.refused(server, Step::Open, foreign))
    }

    /// Drops these, and the mark, but for what is fenced: in one step, for a fence may just have been raised.
    async fn take_away(&self, server: &Server, step: Step, tenant: &[u8], tags: &[&Tag]) -> Result<(), StoreError> {
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors();
        self.push_fence(&mut pipeline, server, tenant, tags.iter().copied(), &Fence::NOBODY, Duration::ZERO);
        self.acknowledged(server, step, pipeline, 0).await.map(drop)
    }

    /// The keys that a look-up reads: that of an entry and the mark, and those of generations.
    fn names<'a, 't: 'a>(&'a self, key: Option<&'a Key>, tags: impl Tags<'t> + 'a) -> impl Iterator<Item = Name<'a>> {
        let entry = key.into_iter().flat_map(|key| [("e:", key.as_bytes()), ("m:", key.tenant())]);
        let all = entry.chain(tags.map(|tag| ("g:", tag.as_bytes())));
        all.map(|(kind, rest)| Name([self.link.terms.prefix.as_bytes(), kind.as_bytes(), rest]))
    }

    /// Reads what is stored of an entry, and the mark, if that is asked for, and generations: the one command of a hit. It goes
    /// over the connection for look-ups where there is one, else over the client library's.
    async fn read<'t>(&self, server: &Server, key: Option<&Key>, tags: impl Tags<'t>) -> Result<Found, StoreError> {
        let count = key.map_or(0, |_| 2) + tags.len();
        let found = match server.lane() {
            Some(lane) => {
                let names = self.names(key, tags).map(|name| name.0);
                // An entry is worth it: what it takes to send, to read and to make something of.
                let asked = lane.ask(key.is_some(), |out| resp::write(out, "MGET", count, names));
                let reply = self.link.asked(server, lane, asked.await)?;
                let found = Found::of(&reply, key.is_some(), count, server.reign);
                let found = found.map_err(|trouble| self.link.refused(server, Step::Read, trouble))?;
                // Then nobody knows whose the next replies are.
                found.ok_or_else(|| self.link.confused(server, lane))?
            }
            None => {
                let size = self.names(key, tags.clone()).flat_map(|name| name.0).map(<[u8]>::len).sum::<usize>();
                let mut get = Cmd::with_capacity(1 + count, 4 + size);
                get.arg("MGET");
                for name in self.names(key, tags.clone()) {
                    get.arg(name);
                }
                let values: Vec<Value> = self.command(server, Step::Read, &get).await?;
                let mut values = values.into_iter();
                let entry = match key.and_then(|_| values.next()) {
                    Some(Value::BulkString(bytes)) => Some(Bytes::from(bytes)),
                    _ => None,
                };
                let mut generations = values.map(|value| parse_generation(&value, server.reign));
                let mark = key.and_then(|_| generations.next().flatten());
                Found { entry, mark, generations: generations.collect() }
            }
        };
        server.refusals.done(Step::Read);
        Ok(found)
    }

    pub(super) async fn find(&self, inquiry: Inquiry<'_>) -> Result<Lookup, StoreError> {
        let server = self.link.reading(inquiry.key.tenant()).await?;
        // Of the same moment as the inquiry's, however long the answer takes.
        let here = server.here();
        let Found { entry, mark, generations } = self.read(&server, Some(inquiry.key), inquiry.tags.iter()).await?;
        let times = Times::of(&inquiry, server.time_at_most(here), APART);
        let entry = entry.and_then(|bytes| self.counters.decode(&bytes, times, inquiry.tier));
        Ok(Lookup::new(entry, generations).marked(mark.map(|mark| Mark(mark.0))))
    }

    /// Drops them, and tells other regions in the same round trip, if there are any that are to be told.
    async fn drop_tags(
        &self,
        groups: &[TagGroup],
        fence: Option<&Fence>,
        tells: Option<&Tells>,
    ) -> Result<Vec<u64>, StoreError> {
        let mut counts = vec![0; groups.len()];
        for (tenant, tags) in by_tenant(groups) {
            let server = self.link.writing(tenant).await?;
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            let counted = self.push_counts(&mut pipeline, groups.len(), &tags);
            let hold = fence.map_or(Duration::ZERO, |fence| fence.hold);
            let told = counted.len() + tags.len().div_ceil(AT_ONCE) - 1;
            for (tells, tags) in tells.iter().flat_map(|tells| tags.chunks(AT_ONCE).map(move |tags| (tells, tags))) {
                tells.push(&mut pipeline, &Record::encode(Kind::Drop, fence, hold, tags.iter().map(|(_, tag)| *tag)));
            }
            match fence {
                Some(fence) => {
                    for tags in tags.chunks(AT_ONCE) {
                        let of_tenant = tags.iter().map(|(_, tag)| *tag);
                        self.push_fence(&mut pipeline, &server, tenant, of_tenant, fence, fence.hold);
                    }
                    let counters = pipeline.cmd("UNLINK");
                    for (_, tag) in &tags {
                        counters.arg(self.name("c:", tag.as_bytes()));
                    }
                }
                None => {
                    let all = pipeline.cmd("UNLINK").arg(self.name("m:", tenant));
                    for (_, tag) in &tags {
                        all.arg(self.name("g:", tag.as_bytes())).arg(self.name("c:", tag.as_bytes()));
                    }
                }
            }
            let replies = self.acknowledged(&server, Step::Other, pipeline, counted.len()).await?;
            tells.into_iter().for_each(|tells| tells.has(replies.get(told)));
            for (i, reply) in counted.into_iter().zip(&replies) {
                if let Value::Int(count) = reply {
                    counts[i] += u64::try_from(*count).unwrap_or(0);
                }
            }
        }
        Ok(counts)
    }

    async fn fence_tags(&self, groups: &[TagGroup], fence: &Fence, tells: Option<&Tells>) -> Result<(), StoreError> {
        for (tenant, tags) in by_tenant(groups) {
            let server = self.link.writing(tenant).await?;
            if server.lacks_scripts() {
                return Err(StoreError::new("the server knows no EVAL: nothing can be fenced there"));
            }
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            for tags in tags.chunks(AT_ONCE) {
                let tags = || tags.iter().map(|(_, tag)| *tag);
                if let Some(tells) = tells {
                    tells.push(&mut pipeline, &Record::encode(Kind::Fence, Some(fence), fence.lease, tags()));
                }
                self.push_fence(&mut pipeline, &server, tenant, tags(), fence, fence.lease);
            }
            self.acknowledged(&server, Step::Other, pipeline, 0).await?;
        }
        Ok(())
    }

    /// What another region tells, which has told all others.
    pub(super) async fn drop_here(&self, groups: &[TagGroup], fence: &Fence) -> Result<(), StoreError> {
        self.link.fence();
        self.drop_tags(groups, Some(fence), None).await.map(drop)
    }

    pub(super) async fn fence_here(&self, groups: &[TagGroup], fence: &Fence) -> Result<(), StoreError> {
        self.link.fence();
        self.fence_tags(groups, fence, None).await
    }

    pub(super) async fn clear_here(&self) -> Result<(), StoreError> {
        let slots = self.link.slots();
        if !slots.is_whole() || !slots.servers().iter().all(|server| server.is_proven()) {
            return Err(StoreError::away("some of the servers cannot be told"));
        }
        for server in slots.servers() {
            self.clear_server(&server).await?;
        }
        Ok(())
    }

    /// Tells the other regions something that is no drop.
    async fn tell(&self, record: &Record) -> Result<(), StoreError> {
        let Some(tells) = &self.tells else { return Ok(()) };
        let server = self.link.writing(b"{~}").await?;
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors();
        tells.push(&mut pipeline, &record.bytes());
        let replies = self.acknowledged(&server, Step::Other, pipeline, 0).await?;
        tells.has(replies.first());
        Ok(())
    }

    /// Says that the region is alive, if nobody has said so of late.
    pub(super) async fn beat(&self, every: Duration) -> Result<(), StoreError> {
        let Some(tells) = &self.tells else { return Ok(()) };
        let server = self.link.writing(b"{~}").await?;
        let mut first = redis::cmd("SET");
        let most = (every - every / 10).as_millis() as u64;
        first.arg(format!("{}:beat", tells.stream)).arg(1).arg("NX").arg("PX").arg(most);
        if self.command::<Value>(&server, Step::Other, &first).await? == Value::Nil {
            return Ok(());
        }
        self.tell(&Record::beat()).await
    }

    pub(super) fn told(&self) -> Option<String> {
        self.tells.as_ref()?.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all these groups have acknowledged what was told.
    pub(super) async fn is_heard(&self, told: &str, groups: &[&str]) -> Result<bool, StoreError> {
        let Some(tells) = &self.tells else { return Ok(true) };
        let server = self.link.writing(b"{~}").await?;
        let mut ask = redis::pipe();
        ask.ignore_errors().cmd("XINFO").arg("GROUPS").arg(&tells.stream);
        for group in groups {
            ask.cmd("XPENDING").arg(&tells.stream).arg(group);
        }
        let replies = self.pipeline(&server, Step::Other, &ask).await?;
        Ok(is_acknowledged(told, groups, &replies))
    }

    /// Asks about how many entries each group has.
    fn push_counts(&self, pipeline: &mut Pipeline, groups: usize, tags: &[(usize, &Tag)]) -> Vec<usize> {
        let mut counted = vec![];
        for i in 0..groups {
            let mut of_group = tags.iter().filter(|(group, _)| *group == i).peekable();
            if of_group.peek().is_some() {
                let count = pipeline.cmd("PFCOUNT");
                for (_, tag) in of_group {
                    count.arg(self.name("c:", tag.as_bytes()));
                }
                counted.push(i);
            }
        }
        counted
    }

    /// Makes an invalidation, all of which must succeed but the first few, and waits for as many replicas as are asked for.
    async fn acknowledged(
        &self,
        server: &Server,
        step: Step,
        mut pipeline: Pipeline,
        may_fail: usize,
    ) -> Result<Vec<Value>, StoreError> {
        let wanted = self.link.terms.replicas;
        let replies = match &server.drops {
            None => self.pipeline(server, step, &pipeline).await?,
            Some(drops) => {
                let patience = self.link.terms.heartbeat.as_millis() as u64;
                pipeline.cmd("WAIT").arg(wanted).arg(patience);
                let mut connection = drops.clone();
                let answered = pipeline.query_async(&mut connection).await;
                if answered.as_ref().is_err_and(RedisError::is_timeout) {
                    server.lose();
                }
                self.link.call(server, step, std::future::ready(answered)).await?
            }
        };
        self.refusal(server, step, replies.iter().skip(may_fail))?;
        match replies.last() {
            Some(Value::Int(got)) if wanted > 0 && *got < i64::from(wanted) => {
                Err(StoreError::new(format!("{got} of {wanted} replicas have the invalidation so far")))
            }
            _ => Ok(replies),
        }
    }

    /// Drops the mark and these tags, and lets the writer fence them for so long. Where there are no scripts nobody fences.
    fn push_fence<'t>(
        &self,
        pipeline: &mut Pipeline,
        server: &Server,
        tenant: &[u8],
        tags: impl Iterator<Item = &'t Tag>,
        fence: &Fence,
        stands: Duration,
    ) {
        let mut names = vec![self.name("m:", tenant)];
        if server.lacks_scripts() {
            names.extend(tags.map(|tag| self.name("g:", tag.as_bytes())));
            pipeline.cmd("UNLINK").arg(names);
            return;
        }
        for tag in tags {
            names.push(self.name("g:", tag.as_bytes()));
            names.push(self.name("f:", tag.as_bytes()));
        }
        let eval = pipeline.cmd("EVAL").arg(FENCE).arg(names.len());
        let count = names.len() / 2;
        for name in names {
            eval.arg(name);
        }
        eval.arg(&fence.writer.to_be_bytes()).arg(stands.as_millis() as u64).arg(OPENED.as_millis() as u64);
        for _ in 0..count {
            eval.arg(&Generation::unique().fenced().0.to_be_bytes());
        }
    }

    /// Asks who fences a tag, or did, and until when.
    fn push_fences(&self, pipeline: &mut Pipeline, tag: &Tag) {
        pipeline.cmd("ZREVRANGE").arg(self.name("f:", tag.as_bytes())).arg(0).arg(0).arg("WITHSCORES");
    }

    /// Takes down what is fenced by nobody any more: whoever filled under what was there before the fence has prolonged it
    /// beyond its lease. Whether there was anything.
    async fn take_down(&self, server: &Server, fenced: &[&Tag]) -> Result<bool, StoreError> {
        if fenced.is_empty() {
            return Ok(false);
        }
        let mut ask = redis::pipe();
        fenced.iter().for_each(|tag| self.push_fences(&mut ask, tag));
        let fences = self.pipeline(server, Step::Other, &ask).await?;
        let now = server.time_at_least() as f64;
        let is_over = |fences: &Value| fences_in(fences).is_some_and(|all| all.iter().all(|(_, until)| *until < now));
        let over: Vec<_> =
            fenced.iter().zip(&fences).filter(|(_, fences)| is_over(fences)).map(|(tag, _)| *tag).collect();
        let Some(first) = over.first() else { return Ok(false) };
        self.take_away(server, Step::Other, first.tenant(), &over).await.map(|()| true)
    }

    fn push_fill(
        &self,
        pipeline: &mut Pipeline,
        server: &Server,
        key: &Key,
        entry: &Entry,
        bytes: Vec<u8>,
        keep: Millis,
    ) -> Filling {
        // Later than the entry's own end by less than two of the grid, which is the same for all that is kept for about as long:
        // those who track hear of each change of a generation's end.
        let grid = (GRID.as_millis() as Millis).max(keep.next_power_of_two() / 8);
        let end = ((server.time_at_least().max(0) as Millis + keep) / grid + 2) * grid;
        let is_short = |stamp: &Stamp| !self.prolonged.has(stamp, end);
        let short: SmallVec<[_; 4]> = entry.stamps.iter().map(is_short).collect();
        let names = entry.stamps.iter().zip(&short).filter(|(_, is_short)| **is_short);
        let names: Vec<_> = names.map(|(stamp, _)| self.name("g:", stamp.tag.as_bytes())).collect();
        let prolonged = server.push_prolong(pipeline, &names, end);
        pipeline.cmd("SET").arg(self.name("e:", key.as_bytes())).arg(bytes).arg("PX").arg(keep);
        let due = self.unended.due();
        let mut unended = vec![];
        for (stamp, is_short) in entry.stamps.iter().zip(short) {
            let counter = self.name("c:", stamp.tag.as_bytes());
            pipeline.cmd("PFADD").arg(&counter).arg(key.as_bytes());
            if is_short || !server.ends_together() {
                server.push_end(pipeline, &counter, end, is_short);
            } else {
                unended.push(counter);
            }
        }
        for (counter, end) in &due {
            server.push_end(pipeline, counter, *end, false);
        }
        Filling { needed: prolonged + 1, end, unended, due }
    }

    /// Some names of one server that are like this, and where to go on.
    async fn scan(&self, server: &Server, cursor: u64, pattern: &[u8]) -> Result<(u64, Vec<Vec<u8>>), StoreError> {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(SCANNED);
        self.command(server, Step::Other, &scan).await
    }

    /// Drops every mark and generation of one server: the marks first, or a load from before might yet be proven by a mark that is
    /// still to be dropped, under a generation that was not there to be dropped. Then gives those back what fences them who were
    /// fenced between the look at them and their drop: also after an attempt that was cut off there, of which nothing else tells.
    async fn clear_server(&self, server: &Server) -> Result<(), StoreError> {
        for kind in ["m:", "g:", "f:"] {
            let pattern = format!("{}{kind}*", self.link.terms.prefix);
            let mut cursor = 0u64;
            loop {
                let (next, names) = self.scan(server, cursor, pattern.as_bytes()).await?;
                match kind {
                    _ if names.is_empty() => {}
                    "f:" => self.raise_again(server, names.iter()).await?,
                    _ => self.clear_names(server, &names).await?,
                }
                cursor = next;
                if cursor == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// One by one: they may be in different slots. Those that are fenced stay so: their writers have not come back.
    async fn clear_names(&self, server: &Server, names: &[Vec<u8>]) -> Result<(), StoreError> {
        let mut read = redis::pipe();
        read.ignore_errors();
        for name in names {
            read.cmd("MGET").arg(name);
        }
        let values = self.pipeline(server, Step::Other, &read).await?;
        let is_fenced =
            |value| the_only(value).and_then(|value| parse_generation(value, 0)).is_some_and(|g| g.is_fenced());
        let (fenced, free): (Vec<_>, Vec<_>) = names.iter().zip(&values).partition(|(_, value)| is_fenced(value));
        let mut unlink = redis::pipe();
        unlink.ignore_errors();
        for (name, _) in free {
            unlink.cmd("UNLINK").arg(name);
        }
        self.acknowledged(server, Step::Other, unlink, 0).await?;
        self.raise_again(server, fenced.into_iter().map(|(name, _)| name)).await
    }

    /// Gives the tags of these names new generations, fenced for as long as their writers' fences stand.
    async fn raise_again<'n>(
        &self,
        server: &Server,
        names: impl Iterator<Item = &'n Vec<u8>>,
    ) -> Result<(), StoreError> {
        let mut raise = redis::pipe();
        raise.ignore_errors();
        for name in names {
            let tag = Tag(Bytes::copy_from_slice(name.get(self.link.terms.prefix.len() + 2..).unwrap_or_default()));
            self.push_fence(&mut raise, server, tag.tenant(), std::iter::once(&tag), &Fence::NOBODY, Duration::ZERO);
        }
        self.acknowledged(server, Step::Other, raise, 0).await.map(drop)
    }
}

/// Whether groups of readers have acknowledged an entry: by `XINFO GROUPS`, and `XPENDING` of each.
fn is_acknowledged(told: &str, groups: &[&str], replies: &[Value]) -> bool {
    type Fields = std::collections::HashMap<String, Value>;
    let known = replies.first().and_then(|reply| Vec::<Fields>::from_redis_value_ref(reply).ok()).unwrap_or_default();
    let text = |value: Option<&Value>| value.and_then(|value| String::from_redis_value_ref(value).ok());
    groups.iter().zip(replies.iter().skip(1)).all(|(group, pending)| {
        let own = known.iter().find(|fields| text(fields.get("name")).as_deref() == Some(group));
        let delivered = own.and_then(|fields| text(fields.get("last-delivered-id")));
        let first = match pending {
            Value::Array(summary) => text(summary.get(1)),
            _ => return false,
        };
        let told = Id::of(told);
        delivered.is_some_and(|delivered| Id::of(&delivered) >= told) && first.is_none_or(|first| Id::of(&first) > told)
    })
}

/// The tenant of these tags, which is that of all of them.
fn tenant(tags: &[Tag]) -> &[u8] {
    tags.first().map_or(b"{~}", Tag::tenant)
}

/// What a look-up read.
struct Found {
    entry: Option<Bytes>,
    mark: Option<Generation>,
    generations: Vec<Option<Generation>>,
}

impl Found {
    /// What a reply to so many keys says; nothing if it is none to them.
    fn of(reply: &Reply, has_entry: bool, count: usize, reign: u128) -> Result<Option<Self>, Trouble> {
        let Some(mut strings) = reply.strings() else {
            return match reply.value()? {
                Value::ServerError(error) => Err((&error).into()),
                _ => Ok(None),
            };
        };
        let [entry, mark] = if has_entry { [strings.next(), strings.next()] } else { [None; 2] };
        let before = [entry, mark].iter().flatten().count();
        let entry = entry.flatten().map(|entry| reply.keep(entry));
        let mark = mark.flatten().and_then(|mark| generation_in(mark, reign));
        let mut generations = Vec::with_capacity(count);
        generations.extend(strings.map(|stored| generation_in(stored?, reign)));
        Ok((before + generations.len() == count).then_some(Self { entry, mark, generations }))
    }
}

/// A key in parts.
#[derive(Clone, Copy)]
struct Name<'a>([&'a [u8]; 3]);

impl ToRedisArgs for Name<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        let mut writer = out.writer_for_next_arg();
        for part in self.0 {
            // It is written to memory.
            let _ = writer.write_all(part);
        }
    }
}

/// A name in which nothing is a pattern.
fn escaped(name: &[u8]) -> Vec<u8> {
    let escape = |byte: &u8| [b'\\', *byte].into_iter().skip(usize::from(!b"*?[]\\^".contains(byte)));
    name.iter().flat_map(escape).collect()
}

/// Who fences a tag, and until when; `None` if the server does not say.
fn fences_in(reply: &Value) -> Option<Vec<(Vec<u8>, f64)>> {
    FromRedisValue::from_redis_value_ref(reply).ok()
}

/// The generations that there are, as was told after they were set, where there was none.
fn told(set: &[Value], found: &[Value], reign: u128) -> Option<Vec<Generation>> {
    let told = set.iter().zip(found).map(|(set, found)| match (parse_generation(found, reign), set) {
        (Some(generation), _) => Some(generation),
        // It was made, and dropped at once: what is stored under one that nobody has is never valid.
        (None, Value::Okay) => Some(Generation::unique()),
        (None, _) => None,
    });
    told.collect::<Option<Vec<_>>>().filter(|told| told.len() == set.len())
}

/// What `MGET` of one key says. (`GET` would be another right to grant.)
fn the_only(reply: &Value) -> Option<&Value> {
    match reply {
        Value::Array(values) => values.first(),
        _ => None,
    }
}

/// A generation as it is stored: 16 bytes. Anything else was not written by us, and is no generation.
pub(crate) fn parse_generation(value: &Value, reign: u128) -> Option<Generation> {
    match value {
        Value::BulkString(bytes) => generation_in(bytes, reign),
        _ => None,
    }
}

fn generation_in(stored: &[u8], reign: u128) -> Option<Generation> {
    Some(Generation(u128::from_be_bytes(stored.try_into().ok()?) ^ reign))
}

impl Generations for Remote {
    async fn generations<'t>(&self, tags: impl Tags<'t>) -> Result<Vec<Option<Generation>>, StoreError> {
        let Some(first) = tags.clone().next() else { return Ok(vec![]) };
        let server = self.link.reading(first.tenant()).await?;
        Ok(self.read(&server, None, tags).await?.generations)
    }
}

impl Store for Remote {
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        Box::pin(self.find(inquiry))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(async move {
            let server = self.link.reading(tenant(tags)).await?;
            let (mut generations, _) = self.add(&server, tags, true, |_| {}).await?;
            let fenced = tags.iter().zip(&generations).filter(|(_, generation)| generation.is_fenced());
            let fenced: Vec<_> = fenced.map(|(tag, _)| tag).collect();
            // Who may not ask leaves them as they are.
            if self.take_down(&server, &fenced).await.unwrap_or(false) {
                (generations, _) = self.add(&server, tags, true, |_| {}).await?;
            }
            let mark = generations.pop().map_or(0, |g| g.0);
            Ok(Opened::new(generations, Mark(mark)))
        })
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(async move {
            let server = self.link.reading(tenant(tags)).await?;
            let marked = self.name("m:", tenant(tags));
            // The generations first: if the mark still stands after them, nothing was dropped before.
            let ask = |pipeline: &mut Pipeline| {
                pipeline.cmd("MGET").arg(&marked);
                tags.iter().for_each(|tag| self.push_fences(pipeline, tag));
            };
            let (generations, rest) = self.add(&server, tags, false, ask).await?;
            let now = rest.first().and_then(the_only).and_then(|mark| parse_generation(mark, server.reign));
            // A fence may have stood when the load began, and its writer be gone. (Who may not ask knows of no fences.)
            let was_fenced = rest.iter().skip(1).any(|reply| fences_in(reply).is_some_and(|all| !all.is_empty()));
            let is_fenced = was_fenced || generations.iter().any(|generation| generation.is_fenced());
            Ok((!is_fenced && now.is_some_and(|now| now.0 == mark.0)).then_some(generations))
        })
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, _: Tier, now: Millis) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let server = self.link.reading(key.tenant()).await?;
            let keep = entry.keep_until.saturating_sub(now).min(self.generation_ttl.as_millis() as Millis);
            if keep == 0 {
                return Ok(());
            }
            let bytes = self.counters.encode(&entry, server.time_at_least() - now as i64)?;
            let mut pipeline = redis::pipe();
            pipeline.ignore_errors();
            let Filling { needed, end, unended, due } =
                self.push_fill(&mut pipeline, &server, key, &entry, bytes, keep);
            let replies = self.pipeline(&server, Step::Fill, &pipeline).await?;
            self.refusal(&server, Step::Fill, replies.iter().take(needed))?;
            entry.stamps.iter().for_each(|stamp| self.prolonged.add(stamp, end));
            self.unended.told(&due);
            unended.into_iter().for_each(|counter| self.unended.add(counter, end));
            server.refusals.done(Step::Fill);
            Ok(())
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        if fence.is_some() {
            self.link.fence();
        }
        Box::pin(self.drop_tags(groups, fence, self.tells.as_ref()))
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            if self.tells.is_some() {
                self.tell(&Record::clear()).await?;
            }
            self.clear_here().await
        })
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.link.fence();
        Box::pin(self.fence_tags(groups, fence, self.tells.as_ref()))
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(async move {
            let server = self.link.reading(key.tenant()).await?;
            let mut set = redis::cmd("SET");
            set.arg(self.name("l:", key.as_bytes())).arg(1).arg("NX").arg("PX").arg(lease.as_millis() as u64);
            let reply: Value = self.command(&server, Step::Claim, &set).await?;
            server.refusals.done(Step::Claim);
            Ok(!matches!(reply, Value::Nil))
        })
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let server = self.link.writing(key.tenant()).await?;
            let mut unlink = redis::cmd("UNLINK");
            unlink.arg(self.name("l:", key.as_bytes()));
            self.command::<Value>(&server, Step::Other, &unlink).await.map(drop)
        })
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(async move {
            let mut counts = vec![0; groups.len()];
            for (tenant, tags) in by_tenant(groups) {
                let server = self.link.reading(tenant).await?;
                let mut pipeline = redis::pipe();
                let counted = self.push_counts(&mut pipeline, groups.len(), &tags);
                for (i, reply) in counted.into_iter().zip(self.pipeline(&server, Step::Other, &pipeline).await?) {
                    if let Value::Int(count) = reply {
                        counts[i] += u64::try_from(count).unwrap_or(0);
                    }
                }
            }
            Ok(counts)
        })
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        Box::pin(async move {
            let head = self.name("e:", search.prefix);
            let mut pattern = escaped(&head);
            pattern.push(b'*');
            for word in search.words.iter().take(1) {
                pattern.extend(escaped(word));
                pattern.push(b'*');
            }
            let mut found = vec![];
            for server in self.link.slots().servers() {
                let mut cursor = 0_u64;
                for _ in 0..ROUNDS {
                    let (next, names) = self.scan(&server, cursor, &pattern).await?;
                    let keys = names.iter().filter_map(|name| name.get(self.link.terms.prefix.len() + 2..));
                    found.extend(keys.filter(|key| search.accepts(key)).map(|key| Key(Bytes::copy_from_slice(key))));
                    cursor = next;
                    if cursor == 0 || found.len() >= search.most {
                        break;
                    }
                }
            }
            found.truncate(search.most);
            Ok(found)
        })
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        let Exchange { fleet, member, said, gone, hears } = exchange;
        Box::pin(async move {
            let server = self.link.writing(fleet.as_bytes()).await?;
            let key = self.name("s:", fleet.as_bytes());
            let mut pipeline = redis::pipe();
            pipeline.hset(&key, member, said).ignore().expire(&key, SAID.as_secs() as i64).ignore();
            if !gone.is_empty() {
                pipeline.hdel(&key, gone).ignore();
            }
            if hears {
                pipeline.hvals(&key);
            }
            let mut connection = server.connection.clone();
            let all: Vec<Vec<Vec<u8>>> =
                self.link.call(&server, Step::Other, pipeline.query_async(&mut connection)).await?;
            Ok(all.into_iter().next().unwrap_or_default())
        })
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let server = self.link.writing(b"{*}").await?;
            let mut set = redis::cmd("SET");
            set.arg(self.name("n:{*}:", name.as_bytes())).arg(note).arg("PX").arg(NOTED.as_millis() as u64);
            self.command(&server, Step::Other, &set).await
        })
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            let server = self.link.writing(b"{*}").await?;
            let mut get = redis::cmd("GET");
            get.arg(self.name("n:{*}:", name.as_bytes()));
            self.command(&server, Step::Other, &get).await
        })
    }

    fn health(&self) -> Health {
        self.link.health()
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("health", &self.link.health()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_what_is_told_after_it_was_set() {
        let stored = |generation: u128| Value::BulkString(generation.to_be_bytes().to_vec());
        let reign = 7 << 90;
        let told = |set: Value, found: Value| told(&[Value::Nil, set], &[stored(1), found], reign);
        assert_eq!(told(Value::Okay, stored(2)), Some(vec![Generation(1 ^ reign), Generation(2 ^ reign)]));
        let dropped = told(Value::Okay, Value::Nil).unwrap();
        assert!(
            dropped[0] == Generation(1 ^ reign)
                && !dropped[1].is_fenced()
                && dropped != told(Value::Okay, Value::Nil).unwrap()
        );
        assert_eq!(told(Value::Nil, Value::Nil), None, "dropped in between, or a list");
        assert_eq!(told(Value::Nil, Value::BulkString(b"foreign".to_vec())), None);
        assert_eq!(super::told(&[Value::Okay, Value::Okay], &[stored(1)], reign), None, "too few");
    }

    /// By each of the groups: it was delivered to a reader, who has nothing left of what came up to it.
    #[test]
    fn an_entry_is_acknowledged_when_no_reader_has_it_before_him() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let group = |name, last| Value::Array(vec![text("name"), text(name), text("last-delivered-id"), text(last)]);
        let pending = |first: Option<&str>| Value::Array(vec![Value::Int(1), first.map_or(Value::Nil, text)]);
        for (last, first, is_done) in [
            ("5-0", None, true),
            ("4-9", None, false),
            ("10-0", None, true),
            ("6-0", Some("5-0"), false),
            ("6-0", Some("4-0"), false),
            ("6-0", Some("5-1"), true),
            ("6-0", Some("10-0"), true),
        ] {
            let groups = Value::Array(vec![group("east", "9-0"), group("west", last)]);
            let replies = [groups, pending(None), pending(first)];
            assert_eq!(is_acknowledged("5-0", &["east", "west"], &replies), is_done, "{last} {first:?}");
            assert!(is_acknowledged("5-0", &["east"], &replies));
            assert!(!is_acknowledged("5-0", &["north"], &replies), "a group that is not there");
            assert!(!is_acknowledged("5-0", &["east"], &[Value::Nil, pending(None)]), "no groups");
            assert!(!is_acknowledged("5-0", &["east"], &[replies[0].clone(), Value::Nil]), "no answer");
        }
    }
}
