//! One stream of one server, read so that nothing is lost without being noticed: by one process of a fleet at a time, or by
//! each process for itself.
//!
//! Each round waits for an entry and then, in one pipeline, asks which server it is (its reign) and looks and reads in one
//! script, so that nothing can be trimmed between the look and the read. What a fleet knows is kept beside the stream: who
//! reads (`…:reader`, with a lease), and its *place* (`…:place`): the reign, the last entry that was read, and how many entries
//! had come up to it. The place goes ahead in the same step as the group does; whatever else moves either is a gap, and so are
//! a place that is not there and one of another reign. What was read and not acknowledged is pending in the group, and
//! whoever reads claims that first.
//!
//! A proof is an old look: once everything is acknowledged that was the stream's last entry then, all that had been written
//! before it is.

use std::{collections::VecDeque, fmt, pin::Pin, sync::Arc, time::Duration};

use redis::{Client, FromRedisValue, Pipeline, ProtocolVersion, Value, aio::MultiplexedConnection};
use tokio::time::{Instant, sleep, timeout};

use super::{
    address::{Address, CONNECT, config},
    identity::Identity,
    trouble::{REPLICA, Trouble},
};
use crate::error::ConfigError;

/// How long one round waits for an entry.
const WAIT: Duration = Duration::from_millis(200);
/// Within this a server has to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a process that says nothing remains the one that reads.
const LEASE: Duration = Duration::from_secs(2);
/// Entries that are read at once.
const MOST: usize = 1_000;
/// Looks that are kept to be proven.
const SAMPLES: usize = 64;
/// Proofs come no closer than this.
const APART: Duration = Duration::from_millis(100);

const ALONE: &str = concat!(include_str!("stream/look.lua"), include_str!("stream/alone.lua"));
const FLEET: &str =
    concat!(include_str!("stream/look.lua"), include_str!("stream/group.lua"), include_str!("stream/fleet.lua"));
const FORGIVE: &str =
    concat!(include_str!("stream/look.lua"), include_str!("stream/group.lua"), include_str!("stream/forgive.lua"));

/// Reads one stream. Any of its futures may be dropped: the next call of [`next`](Self::next) goes on with what was under way.
pub(crate) struct StreamReader {
    of: Arc<Of>,
    /// Whether only entries that came later prove that an earlier look was current.
    beats: bool,
    link: Option<MultiplexedConnection>,
    /// It outlives the calls that wait for it, or their replies would be lost.
    flight: Option<Flight>,
    rest: Rest,
    /// Entries to ask for; fewer where so many do not come in time.
    count: usize,
    /// What the connection said of the server.
    reign: String,
    /// Without a group: what is acknowledged.
    place: Option<Place>,
    given: Given,
    samples: VecDeque<(Instant, Id)>,
    /// To be given.
    proof: Option<Instant>,
    proven: Option<Instant>,
}

/// What is given.
#[derive(Debug)]
pub(crate) enum StreamRead {
    /// At most a thousand, in order; to be acknowledged.
    Entries(Vec<StreamEntry>),
    /// Why entries may have been missed; to be acknowledged.
    Gap(String),
    /// The same, and another process is the one that has to do something about it.
    Torn(String),
    /// All that was written before this time is acknowledged, by whoever reads.
    Proof(Instant),
}

/// An entry of a stream.
#[derive(Debug)]
pub(crate) struct StreamEntry {
    id: String,
    /// As they were written: a field may be there twice.
    pub(crate) fields: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is read.
struct Of {
    address: Address,
    stream: String,
    group: Option<Group>,
}

struct Group {
    name: String,
    /// The keys beside the stream.
    reader: String,
    place: String,
    me: String,
}

impl Group {
    fn new(stream: &str, name: String) -> Self {
        let [reader, place] = ["reader", "place"].map(|what| beside(stream, &name, what));
        Self { name, reader, place, me: format!("{:032x}", rand::random::<u128>()) }
    }
}

/// How far it was read.
#[derive(Clone, Debug)]
struct Place {
    reign: String,
    at: String,
    /// How many entries had come up to it; Redis 6.2 does not count them.
    added: Option<u64>,
}

/// What was given last and not acknowledged.
enum Given {
    Nothing,
    Entries { ids: Vec<String>, place: Place },
    Gap { place: Place, token: String },
}

/// What a round begins with.
#[derive(Clone)]
enum Rest {
    Not,
    /// Another process reads.
    Sleep,
    /// Nothing was there after this entry.
    After(String),
}

type Flight = Pin<Box<dyn Future<Output = Result<Round, Trouble>> + Send>>;

struct Round {
    link: MultiplexedConnection,
    asked: Instant,
    reign: String,
    look: Look,
}

/// What the scripts answer.
struct Look {
    reads: bool,
    why: Option<String>,
    /// The last entry that was ever written, and how many those were.
    last: String,
    added: Option<u64>,
    /// The last entry that was read before this, and the first of these that is not acknowledged.
    at: Option<String>,
    pending: Option<String>,
    reign: Option<String>,
    token: String,
    entries: Vec<StreamEntry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id(u64, u64);

impl StreamReader {
    /// Reads a stream for all processes that name this group, or without one for this process alone, which begins with a gap.
    /// With `beats` it proves a look only by an entry that came later: for streams that are written to all the time, whose
    /// silence means that their writers cannot.
    ///
    /// # Errors
    /// An address that cannot be read, or is a cluster's; an empty name.
    pub(crate) fn new(url: &str, stream: &str, group: Option<&str>, beats: bool) -> Result<Self, ConfigError> {
        let address = Address::parse([url])?;
        #[cfg(feature = "redis-cluster")]
        if let Address::Cluster(_) = address {
            let fix = "a stream is read from one server; give the address of the master that has it";
            return Err(ConfigError::new(format!("stream `{stream}`: {fix}")));
        }
        if stream.is_empty() || group.is_some_and(str::is_empty) {
            let what = if stream.is_empty() { "a stream has no name" } else { "its group has no name" };
            return Err(ConfigError::new(format!("stream `{stream}`: {what}; give it one")));
        }
        let group = group.map(|name| Group::new(stream, name.to_owned()));
        Ok(Self {
            of: Arc::new(Of { address, stream: stream.to_owned(), group }),
            beats,
            link: None,
            flight: None,
            rest: Rest::Not,
            count: MOST,
            reign: String::new(),
            place: None,
            given: Given::Nothing,
            samples: VecDeque::new(),
            proof: None,
            proven: None,
        })
    }

    /// Reads for a service of the group alone; whether there is a group. Before the first read.
    pub(crate) fn joins(&mut self, service: &str) -> bool {
        let Some(group) = &self.of.group else { return false };
        let name = format!("{}:{service}", group.name);
        let group = Group::new(&self.of.stream, name);
        self.of = Arc::new(Of { address: self.of.address.clone(), stream: self.of.stream.clone(), group: Some(group) });
        true
    }

    /// Waits for what comes next; a proof comes several times a second while the server answers. What was not acknowledged is
    /// given again.
    pub(crate) async fn next(&mut self) -> Result<StreamRead, Trouble> {
        loop {
            if let Some(proof) = self.proof.take() {
                return Ok(StreamRead::Proof(proof));
            }
            let flight = self.flight.get_or_insert_with(|| {
                let (of, link) = (self.of.clone(), self.link.take());
                let known = if link.is_some() { self.reign.clone() } else { String::new() };
                let ask = of.look(self.count, &known, self.place.as_ref());
                Box::pin(round(of, link, self.rest.clone(), ask))
            });
            let round = flight.as_mut().await;
            self.flight = None;
            let round = round.inspect_err(|_| {
                (self.rest, self.given) = (Rest::Not, Given::Nothing);
                self.count = (self.count / 2).max(1);
            })?;
            if let Some(read) = self.judge(round) {
                return Ok(read);
            }
        }
    }

    /// What a round found.
    fn judge(&mut self, round: Round) -> Option<StreamRead> {
        let Round { link, asked, reign, look } = round;
        let known = if self.of.group.is_some() { look.reign } else { self.place.as_ref().map(|p| p.reign.clone()) };
        // Whether it could read at all: it does not before it knows under which reign.
        let could = self.of.group.is_none() || self.reign == reign;
        (self.link, self.reign, self.count) = (Some(link), reign.clone(), (self.count * 2).min(MOST));
        let is_another = known.is_some_and(|known| known != reign);
        let why = is_another.then(|| "the server was restarted, or another took over".to_owned()).or(look.why);
        let Some(at) = look.at.filter(|_| why.is_none()) else {
            self.samples.clear();
            self.given = Given::Nothing;
            self.rest = if look.reads { Rest::Not } else { Rest::Sleep };
            if !look.reads {
                return why.map(StreamRead::Torn);
            }
            self.given = Given::Gap { place: Place { reign, at: look.last, added: look.added }, token: look.token };
            return Some(StreamRead::Gap(why.unwrap_or_default()));
        };
        self.prove(asked, Id::of(&look.last), Id::of(&at), look.pending.as_deref().map(Id::of));
        let Some(last) = look.entries.last() else {
            self.given = Given::Nothing;
            self.rest = match (look.reads, could) {
                (false, _) => Rest::Sleep,
                (true, true) => Rest::After(at),
                (true, false) => Rest::Not,
            };
            return self.proof.take().map(StreamRead::Proof);
        };
        self.rest = Rest::Not;
        let added = self.place.as_ref().and_then(|place| place.added).map(|added| added + look.entries.len() as u64);
        let place = Place { reign, at: last.id.clone(), added };
        self.given = Given::Entries { ids: look.entries.iter().map(|entry| entry.id.clone()).collect(), place };
        Some(StreamRead::Entries(look.entries))
    }

    /// Keeps a look, and sees which are proven by it: those whose last entry is acknowledged, and with `beats` those that an
    /// acknowledged entry came after.
    fn prove(&mut self, asked: Instant, last: Id, at: Id, pending: Option<Id>) {
        match self.samples.back_mut() {
            // The same proves both.
            Some((time, known)) if *known == last => *time = asked,
            _ => self.samples.push_back((asked, last)),
        }
        let is_acknowledged = |id: Id| id <= at && pending.is_none_or(|pending| id < pending);
        let newest = self.samples.iter().map(|(_, last)| *last).chain([at]).filter(|id| is_acknowledged(*id)).max();
        let is_proven = |last: Id| match newest {
            Some(newest) if self.beats => last < newest,
            Some(newest) => last <= newest,
            None => false,
        };
        let proven = self.samples.iter().filter(|(_, last)| is_proven(*last)).map(|(time, _)| *time).max();
        if self.samples.len() > SAMPLES {
            // The oldest are proven first, the newest make the best proof: every other one goes.
            let mut nth = 0;
            self.samples.retain(|_| {
                nth += 1;
                nth % 2 == 1
            });
        }
        let Some(proven) = proven else { return };
        self.samples.retain(|(time, _)| *time > proven);
        if self.proven.is_none_or(|before| proven.duration_since(before) >= APART) {
            (self.proof, self.proven) = (Some(proven), Some(proven));
        }
    }

    /// What was given last is done.
    pub(crate) async fn ack(&mut self) -> Result<(), Trouble> {
        let Some(group) = &self.of.group else {
            match std::mem::replace(&mut self.given, Given::Nothing) {
                Given::Entries { place, .. } | Given::Gap { place, .. } => self.place = Some(place),
                Given::Nothing => {}
            }
            return Ok(());
        };
        let mut ask = redis::pipe();
        match &self.given {
            Given::Nothing => return Ok(()),
            Given::Entries { ids, .. } => ask.cmd("XACK").arg(&self.of.stream).arg(&group.name).arg(ids),
            Given::Gap { place, token } => {
                let eval =
                    ask.cmd("EVAL").arg(FORGIVE).arg(3).arg(&self.of.stream).arg(&group.reader).arg(&group.place);
                let added = place.added.map(|added| added.to_string()).unwrap_or_default();
                eval.arg(&group.name).arg(token).arg(&place.at).arg(&place.reign).arg(added)
            }
        };
        let mut link = match self.link.take() {
            Some(link) => link,
            None => {
                self.reign.clear();
                connect(&self.of.address).await?
            }
        };
        answers(&mut link, &ask, ANSWER).await?;
        (self.link, self.given) = (Some(link), Given::Nothing);
        Ok(())
    }
}

impl fmt::Debug for StreamReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = self.of.group.as_ref().map(|group| &group.name);
        f.debug_struct("StreamReader").field("stream", &self.of.stream).field("group", &group).finish_non_exhaustive()
    }
}

impl Of {
    /// Which server it is, and what the stream has.
    fn look(&self, count: usize, known: &str, place: Option<&Place>) -> Pipeline {
        let mut ask = redis::pipe();
        ask.ignore_errors().cmd("INFO").arg("server").cmd("INFO").arg("replication").cmd("EVAL");
        match &self.group {
            Some(Group { name, reader, place, me }) => {
                ask.arg(FLEET).arg(3).arg(&self.stream).arg(reader).arg(place);
                ask.arg(name).arg(count).arg(me).arg(LEASE.as_millis() as u64).arg(known);
            }
            None => {
                let added = place.and_then(|place| place.added).map(|added| added.to_string()).unwrap_or_default();
                ask.arg(ALONE).arg(1).arg(&self.stream).arg(count).arg(place.map_or("", |place| &place.at)).arg(added);
            }
        }
        ask
    }
}

/// The name of a key beside a stream, in the same slot of a cluster.
fn beside(stream: &str, group: &str, what: &str) -> String {
    let tag = stream.split_once('{').and_then(|(_, rest)| rest.split_once('}')).is_some_and(|(tag, _)| !tag.is_empty());
    if tag { format!("{stream}:{group}:{what}") } else { format!("{{{stream}}}:{group}:{what}") }
}

async fn connect(address: &Address) -> Result<MultiplexedConnection, Trouble> {
    let connect = async {
        let Some(info) = address.server().await? else {
            return Err(Trouble::new("CLUSTER", "a stream is read from one server"));
        };
        // Nothing is pushed here, so the protocol that every server knows will do.
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2);
        let client = Client::open(info.set_redis_settings(settings))?;
        // A reply that is waited for in vain is noticed below.
        Ok(client.get_multiplexed_async_connection_with_config(&config().set_response_timeout(None)).await?)
    };
    timeout(2 * CONNECT, connect).await.unwrap_or_else(|_| Err(Trouble::silent("it does not let us connect in time")))
}

async fn answers(link: &mut MultiplexedConnection, ask: &Pipeline, within: Duration) -> Result<Vec<Value>, Trouble> {
    let answer = timeout(within, ask.query_async::<Vec<Value>>(link)).await;
    Ok(answer.map_err(|_| Trouble::silent("it does not answer in time"))??)
}

async fn round(of: Arc<Of>, link: Option<MultiplexedConnection>, rest: Rest, ask: Pipeline) -> Result<Round, Trouble> {
    let mut link = match link {
        Some(link) => link,
        None => connect(&of.address).await?,
    };
    match rest {
        Rest::Not => {}
        Rest::Sleep => sleep(WAIT).await,
        Rest::After(at) => {
            let mut wait = redis::pipe();
            wait.cmd("XREAD").arg("COUNT").arg(1).arg("BLOCK").arg(WAIT.as_millis() as u64).arg("STREAMS");
            wait.arg(&of.stream).arg(at);
            answers(&mut link, &wait, WAIT + ANSWER).await?;
        }
    }
    let asked = Instant::now();
    let mut replies = answers(&mut link, &ask, ANSWER).await?;
    let found = replies.pop().unwrap_or(Value::Nil);
    let identity = Identity::of(&replies)?;
    if identity.is_master != Some(true) && identity.reign.is_some() {
        return Err(Trouble::new(REPLICA, "the server is a replica"));
    }
    let hidden = || {
        Trouble::new(
            "INFO",
            "the server does not say which it is, and could forget entries unnoticed: let it answer INFO",
        )
    };
    let reign = format!("{:032x}", identity.reign.ok_or_else(hidden)?);
    if let Value::ServerError(error) = &found {
        return Err(error.into());
    }
    let look = Look::of(found).ok_or_else(|| Trouble::silent("it answers what was not asked"))?;
    Ok(Round { link, asked, reign, look })
}

impl Look {
    fn of(reply: Value) -> Option<Self> {
        let Value::Array(fields) = reply else { return None };
        let [reads, why, last, added, at, pending, reign, token, entries] = <[Value; 9]>::try_from(fields).ok()?;
        let Value::Array(entries) = entries else { return None };
        Some(Self {
            reads: read::<i64>(reads)? == 1,
            why: read(why)?,
            last: read(last)?,
            added: read(added)?,
            at: read(at)?,
            pending: read(pending)?,
            reign: read(reign)?,
            token: read(token)?,
            entries: entries.into_iter().map(entry).collect::<Option<_>>()?,
        })
    }
}

fn read<T: FromRedisValue>(value: Value) -> Option<T> {
    T::from_redis_value(value).ok()
}

pub(crate) fn entry(value: Value) -> Option<StreamEntry> {
    let Value::Array(parts) = value else { return None };
    let [id, Value::Array(parts)] = <[Value; 2]>::try_from(parts).ok()? else { return None };
    let (mut parts, mut fields) = (parts.into_iter(), vec![]);
    while let Some(name) = parts.next() {
        let (Value::BulkString(name), Value::BulkString(value)) = (name, parts.next()?) else { return None };
        fields.push((name, value));
    }
    Some(StreamEntry { id: read(id)?, fields })
}

#[cfg(any(test, fuzzing))]
impl StreamEntry {
    pub(crate) fn of(fields: Vec<(Vec<u8>, Vec<u8>)>) -> Self {
        Self { id: String::new(), fields }
    }
}

impl Id {
    /// What is no id is before all others: nothing is proven by it.
    pub(super) fn of(id: &str) -> Self {
        let parsed = id.split_once('-').and_then(|(time, nth)| Some(Self(time.parse().ok()?, nth.parse().ok()?)));
        parsed.unwrap_or(Self(0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(beats: bool) -> StreamReader {
        StreamReader::new("redis://localhost", "{peer}:changes", Some("fleet"), beats).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_is_proven_when_all_that_it_saw_is_acknowledged() {
        let mut reader = reader(false);
        let mut proven = async |last, at, pending: Option<u64>| {
            sleep(Duration::from_secs(1)).await;
            let asked = Instant::now();
            reader.prove(asked, Id(last, 0), Id(at, 0), pending.map(|id| Id(id, 0)));
            reader.proof.take().map(|proof| asked.duration_since(proof).as_secs())
        };
        assert_eq!(proven(5, 5, None).await, Some(0));
        assert_eq!(proven(7, 5, None).await, None, "not read");
        assert_eq!(proven(8, 7, Some(6)).await, None, "not acknowledged");
        assert_eq!(proven(9, 8, Some(8)).await, Some(2), "the look that saw 7");
        assert_eq!(proven(9, 9, Some(9)).await, Some(2), "the one that saw 8");
        assert_eq!(proven(9, 9, None).await, Some(0));
        // A reader that lags far behind is proven to do so.
        for last in 10..500 {
            assert_eq!(proven(last, 9, None).await, None);
        }
        let lag = proven(500, 400, None).await.unwrap();
        assert!((100..150).contains(&lag), "{lag}");
    }

    #[tokio::test(start_paused = true)]
    async fn with_beats_a_look_is_proven_by_what_came_later_only() {
        let mut reader = reader(true);
        let mut proven = async |last, at, pending: Option<u64>| {
            sleep(Duration::from_secs(1)).await;
            let asked = Instant::now();
            reader.prove(asked, Id(last, 0), Id(at, 0), pending.map(|id| Id(id, 0)));
            reader.proof.take().map(|proof| asked.duration_since(proof).as_secs())
        };
        for _ in 0..10 {
            assert_eq!(proven(5, 5, None).await, None, "nobody is heard of");
        }
        assert_eq!(proven(6, 5, None).await, None, "it is not read");
        assert_eq!(proven(6, 6, Some(6)).await, None, "it is not acknowledged");
        assert_eq!(proven(6, 6, None).await, Some(3), "the last look that saw no more than 5");
        assert_eq!(proven(6, 6, None).await, None);
        // In a standby, which sees where the other is.
        assert_eq!(proven(8, 8, Some(7)).await, None);
        assert_eq!(proven(9, 8, None).await, Some(2));
    }

    #[test]
    fn keys_beside_a_stream_are_in_its_slot() {
        for (stream, key) in [("a", "{a}:f:place"), ("{a}:b", "{a}:b:f:place")] {
            assert_eq!(beside(stream, "f", "place"), key);
        }
    }

    #[test]
    fn nonsense_is_no_answer() {
        let texts = |texts: &[&str]| texts.iter().map(|text| Value::BulkString(text.as_bytes().to_vec())).collect();
        assert!(
            entry(Value::Array(vec![Value::SimpleString("1-1".into()), Value::Array(texts(&["a", "b"]))])).is_some()
        );
        for parts in [texts(&["a"]), vec![Value::Int(1), Value::Int(2)], vec![Value::Nil, Value::Nil]] {
            let parts: Vec<Value> = parts;
            assert!(entry(Value::Array(vec![Value::SimpleString("1-1".into()), Value::Array(parts)])).is_none());
        }
        for reply in [Value::Nil, Value::Array(vec![]), Value::Array(vec![Value::Nil; 9])] {
            assert!(Look::of(reply).is_none());
        }
    }
}
