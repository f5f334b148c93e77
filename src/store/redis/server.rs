//! One server: the connection to it, and what proves, heartbeat by heartbeat, that it is the master it was.
//!
//! A server that was restarted, or taken over from, may have forgotten invalidations, and so may one that was demoted and
//! promoted again without a restart. What tells them apart is their *reign*: the run id, which changes when the process
//! restarts, and the replication id, which changes at each promotion. It is folded into how generations are read: what was
//! filled under another reign is never valid, while all processes share the keys, and so the invalidations, whatever each
//! of them knows.
//!
//! A heartbeat asks for the reign, the role and the time, and writes: a server that reads and does not write is as good as
//! none, since it cannot be told of invalidations. It also tries what is asked to store an entry. What a server lacks
//! altogether is found out when it is connected to, and done without where that is sound: scripts instead of `PEXPIREAT … GT`,
//! no pushes without RESP3, no fences without scripts.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, FromRedisValue, Pipeline, ProtocolVersion, ServerError, Value,
    aio::MultiplexedConnection,
};
use tokio::sync::Notify;

use super::{
    address::{config, config_with},
    dial::Dial,
    held::Held,
    identity::Identity,
    lane::{self, Lane},
    refusals::Refusals,
    trouble::{CHANGED, HELLO, HIDDEN, REPLICA, Trouble, UNKNOWN},
};
use crate::clock::{Clock, Millis};

/// How long the entry lives that a heartbeat writes.
const PROBE: Duration = Duration::from_secs(60);

/// Less than an invalidation is waited for.
const DROPPED: Duration = Duration::from_millis(900);

/// In how many slots a heartbeat tries to write, one after the other, while slots move.
const PROBES: usize = 64;

/// The kinds of keys there are, each of which a heartbeat must be allowed to write.
const KINDS: [&str; 6] = ["e:", "g:", "m:", "c:", "f:", "l:"];

/// `PEXPIREAT … GT` of all `KEYS`, for servers from before Redis 7.0. In one step, for a fence may just be raised, whose end
/// must come no sooner.
const PROLONG: &str = r"
local time = redis.call('TIME')
local now, till = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[1])
for _, key in ipairs(KEYS) do
    local left = redis.call('PTTL', key)
    if left >= 0 and now + left + 1000 < till then redis.call('PEXPIREAT', key, ARGV[1]) end
end
";

pub(super) struct Server {
    pub(super) connection: MultiplexedConnection,
    /// A connection for look-ups, where there can be one.
    lane: OnceLock<Lane>,
    /// How to reach it.
    info: ConnectionInfo,
    /// A connection for invalidations that wait for replicas: waiting holds up all that comes after.
    pub(super) drops: Option<MultiplexedConnection>,
    /// Folded into generations; never with the bit that says that a tag is fenced.
    pub(super) reign: u128,
    clock: Clock,
    /// Until when it is proven to be the master it was, and to take writes.
    proven_until: AtomicU64,
    /// Whether it may be read.
    readable: AtomicBool,
    /// Its clock less ours: at least and at most.
    ahead: (AtomicI64, AtomicI64),
    /// Before this nothing is read: processes that could not deliver invalidations have until then to do so.
    settled: AtomicU64,
    /// What the keys of a heartbeat have in braces, so that they are in a slot of this server's.
    probe: Mutex<Probe>,
    tracks: AtomicBool,
    /// What it is, as far as it says.
    name: String,
    /// Whether it can speak without having been asked: RESP3.
    speaks: bool,
    /// Whether `PEXPIREAT` knows `GT`.
    knows_gt: bool,
    /// It knows no scripts: nobody can fence anything there.
    lacks_scripts: AtomicBool,
    /// What it refuses of what requests ask.
    pub(super) refusals: Refusals,
    /// Somebody has found it wrong.
    wrong: Notify,
    /// One of its connections is gone: both are made anew.
    lost: AtomicBool,
    /// Where it is, for the nodes of a cluster that do not say it of themselves.
    host: String,
    is_cluster: bool,
}

/// Where a heartbeat writes.
struct Probe {
    nth: usize,
    name: String,
}

fn probe_in(claim: &Claim, nth: usize) -> String {
    let _ = (claim, nth);
    #[cfg(feature = "redis-cluster")]
    if let Some(name) = super::slot::name_in(&claim.own, nth) {
        return name;
    }
    "~".to_owned()
}

/// What is asked of every server.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    /// What all keys begin with: `prefix:`.
    pub(super) prefix: Arc<str>,
    pub(super) heartbeat: Duration,
    /// Whether a server is believed that does not say which it is.
    pub(super) assume_one_server: bool,
    /// How many replicas must have an invalidation.
    pub(super) replicas: u32,
    pub(super) clock: Clock,
    pub(super) dial: Dial,
}

/// What a heartbeat found.
#[derive(Debug, Default)]
pub(super) struct Beat {
    /// Why it may not be read.
    pub(super) unreadable: Option<Trouble>,
    /// What else is missing.
    pub(super) degraded: Option<Trouble>,
    pub(super) claim: Claim,
}

/// What a master of a cluster says: the slots it serves itself, and the addresses of all masters.
#[derive(Debug, Default)]
pub(crate) struct Claim {
    pub(crate) own: Vec<(u16, u16)>,
    pub(crate) masters: Vec<String>,
}

/// A connection, and how another like it is made.
struct Dialled {
    connection: MultiplexedConnection,
    client: Client,
    config: AsyncConnectionConfig,
    speaks: bool,
}

/// Connects, in RESP3 if the server knows it.
async fn dial(info: ConnectionInfo, terms: &Terms, held: Option<&Arc<Held>>) -> Result<Dialled, Trouble> {
    // Every call over it has a time budget already, and one timer is enough.
    let plain = config().set_response_timeout(None);
    let config = match held {
        Some(held) => {
            let (ears, heard) = (Arc::downgrade(held), format!("{}g:", terms.prefix).into_bytes());
            let hear = move |push: redis::PushInfo| {
                if let Some(held) = ears.upgrade() {
                    held.hear(&push, &heard);
                }
                Ok::<_, std::convert::Infallible>(())
            };
            config_with(hear).set_response_timeout(None)
        }
        None => plain.clone(),
    };
    let client = Client::open(info.clone())?;
    match terms.dial.connect(&client, &config).await.map_err(Trouble::from) {
        Ok(connection) => Ok(Dialled { connection, client, config, speaks: true }),
        Err(trouble) if &*trouble.code == HELLO => {
            let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2);
            let client = Client::open(info.set_redis_settings(settings))?;
            let connection = terms.dial.connect(&client, &plain).await?;
            Ok(Dialled { connection, client, config: plain, speaks: false })
        }
        Err(trouble) => Err(trouble),
    }
}

/// Nothing is heard over this one between two writes: what is not answered in time is gone.
async fn dial_for_drops(
    client: &Client,
    config: AsyncConnectionConfig,
    terms: &Terms,
) -> Result<MultiplexedConnection, Trouble> {
    let config = config.set_response_timeout(Some((terms.heartbeat * 3).min(DROPPED)));
    let mut drops = terms.dial.connect(client, &config).await?;
    // Without it no invalidation would ever be acknowledged. (A replica refuses as well, and knows who the masters are.)
    let tried = redis::cmd("WAIT").arg(0).arg(0).query_async::<Value>(&mut drops).await;
    match tried.err().map(Trouble::from).filter(|trouble| [UNKNOWN, "NOPERM"].contains(&&*trouble.code)) {
        Some(trouble) => Err(trouble),
        None => Ok(drops),
    }
}

impl Server {
    /// Connects, and finds out which server it is. It is not proven to be of use before the first heartbeat.
    pub(super) async fn connect(
        info: ConnectionInfo,
        terms: &Terms,
        is_cluster: bool,
        held: Option<&Arc<Held>>,
    ) -> Result<(Self, Claim), Trouble> {
        let host = match info.addr() {
            redis::ConnectionAddr::Tcp(host, _) | redis::ConnectionAddr::TcpTls { host, .. } => host.clone(),
            _ => String::new(),
        };
        let Dialled { mut connection, client, config, speaks } = dial(info.clone(), terms, held).await?;
        let mut ask = redis::pipe();
        ask.ignore_errors().cmd("INFO").arg("server").cmd("INFO").arg("replication");
        // Of a key that is nowhere.
        ask.cmd("PEXPIREAT").arg(format!("{}g:{{~}}", terms.prefix)).arg(1).arg("GT");
        if is_cluster {
            ask.cmd("CLUSTER").arg("SLOTS").cmd("CLUSTER").arg("MYID");
        }
        let replies: Vec<Value> = ask.query_async(&mut connection).await?;
        let identity = Identity::of(&replies)?;
        if identity.is_cluster && !is_cluster {
            return Err(Trouble::new("CLUSTER", "a single address, and cluster mode is on there"));
        }
        let drops = match terms.replicas {
            0 => None,
            _ => Some(dial_for_drops(&client, config, terms).await?),
        };
        let claim = claim(replies.get(3), replies.get(4), &host);
        let this = Self {
            connection,
            lane: OnceLock::new(),
            info,
            drops,
            reign: identity.reign.unwrap_or(0),
            clock: terms.clock.clone(),
            proven_until: AtomicU64::new(0),
            readable: AtomicBool::new(false),
            ahead: (AtomicI64::new(0), AtomicI64::new(0)),
            settled: AtomicU64::new(0),
            probe: Mutex::new(Probe { nth: 0, name: probe_in(&claim, 0) }),
            tracks: AtomicBool::new(false),
            name: identity.name,
            speaks,
            knows_gt: !is_syntax(replies.get(2)),
            lacks_scripts: AtomicBool::new(false),
            refusals: Refusals::default(),
            wrong: Notify::new(),
            lost: AtomicBool::new(false),
            host,
            is_cluster,
        };
        Ok((this, claim))
    }

    /// Nothing is read for so long.
    pub(super) fn settle(&self, settle: Duration) {
        self.settled.store(self.clock.now() + settle.as_millis() as Millis, Ordering::Release);
    }

    /// Whether it is proven to be the master, and to take writes.
    pub(super) fn is_proven(&self) -> bool {
        self.clock.now() < self.proven_until()
    }

    pub(super) fn proven_until(&self) -> Millis {
        self.proven_until.load(Ordering::Acquire)
    }

    /// Whether what it answers may be believed as well.
    pub(super) fn is_readable(&self) -> bool {
        let now = self.clock.now();
        now < self.proven_until()
            && now >= self.settled.load(Ordering::Acquire)
            && self.readable.load(Ordering::Acquire)
    }

    pub(super) fn tracks(&self) -> bool {
        self.tracks.load(Ordering::Acquire)
    }

    /// It is not known to be of use any more.
    pub(super) fn doubt(&self) {
        self.proven_until.store(0, Ordering::Release);
    }

    /// One of its connections is gone.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.doubt();
        self.look_again();
    }

    pub(super) fn look_again(&self) {
        self.wrong.notify_one();
    }

    /// Until somebody has found it wrong.
    pub(super) async fn wrong(&self) {
        self.wrong.notified().await;
    }

    /// The server's time, as it is at least: for what is written.
    pub(super) fn time_at_least(&self) -> i64 {
        self.clock.now() as i64 + self.ahead.0.load(Ordering::Acquire)
    }

    /// This process' clock, by which those two are told.
    pub(super) fn here(&self) -> Millis {
        self.clock.now()
    }

    /// The server's time at that time here, as it was at most: for what is read.
    pub(super) fn time_at_most(&self, here: Millis) -> i64 {
        here as i64 + self.ahead.1.load(Ordering::Acquire)
    }

    /// The connection for look-ups, if there is one.
    pub(super) fn lane(&self) -> Option<&Lane> {
        self.lane.get()
    }

    /// Opens the connection for look-ups, in that time.
    pub(super) async fn open_lane(&self, terms: &Terms, within: Duration) {
        if let Some(lane) = lane::open(&self.info, &terms.dial, self.reign, terms.heartbeat, within).await {
            let _ = self.lane.set(lane);
        }
    }

    /// Makes a heartbeat, which goes over the connection for look-ups as well: each is given up with the other.
    async fn ask(&self, questions: &Pipeline) -> Result<Vec<Value>, Trouble> {
        let mut connection = self.connection.clone();
        let Some(lane) = self.lane() else { return Ok(questions.query_async(&mut connection).await?) };
        let (replies, beat) = tokio::join!(questions.query_async(&mut connection), lane.beat());
        beat?;
        Ok(replies?)
    }

    /// Asks everything that has to hold; good for two heartbeats.
    pub(super) async fn beat(&self, terms: &Terms) -> Result<Beat, Trouble> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Trouble::silent("a connection was lost"));
        }
        let sent = self.clock.now();
        let ask = self.questions(terms, &self.probe().name);
        let replies = self.ask(&ask).await?;
        let answered = self.clock.now();
        let identity = Identity::of(&replies)?;
        if identity.is_master == Some(false) {
            return Err(Trouble::new(REPLICA, "the server is a replica"));
        }
        if identity.reign.unwrap_or(0) != self.reign {
            return Err(Trouble::new(CHANGED, "the server was restarted, or promoted anew"));
        }
        // The slot that is written to may be on its way elsewhere.
        let moves = |trouble: &Trouble| self.is_cluster && ["MOVED", "ASK", "TRYAGAIN"].contains(&&*trouble.code);
        let at = |i: usize| refusal(replies.get(i)).filter(|trouble| !moves(trouble));
        // It must take invalidations.
        if let Some(refused) = at(3) {
            return Err(refused);
        }
        let time = time(replies.get(2));
        let mut beat = Beat { unreadable: at(5).or(at(2)), degraded: at(4).or(at(6)), claim: Claim::default() };
        if identity.reign.is_none() && !terms.assume_one_server {
            let hidden =
                "the server does not say which it is: nothing is read from it, since it may forget invalidations";
            beat.unreadable.get_or_insert_with(|| Trouble::new(HIDDEN, hidden));
        }
        if self.is_cluster {
            if let Some(refused) = at(7) {
                return Err(refused);
            }
            beat.claim = claim(replies.get(7), replies.get(8), &self.host);
            if (3..7).filter_map(|i| refusal(replies.get(i))).any(|trouble| moves(&trouble)) {
                let mut probe = self.probe();
                probe.nth = (probe.nth + 1) % PROBES;
                probe.name = probe_in(&beat.claim, probe.nth);
            }
        }
        if let Some(time) = time {
            self.ahead.0.store(time - answered as i64, Ordering::Release);
            self.ahead.1.store(time - sent as i64, Ordering::Release);
        }
        self.readable.store(beat.unreadable.is_none() && time.is_some(), Ordering::Release);
        self.proven_until.store(sent + 2 * terms.heartbeat.as_millis() as Millis, Ordering::Release);
        Ok(beat)
    }

    fn probe(&self) -> MutexGuard<'_, Probe> {
        self.probe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a heartbeat asks. `probe` is what the keys it writes have in braces.
    fn questions(&self, terms: &Terms, probe: &str) -> Pipeline {
        let name = |kind: &str| format!("{}{kind}{{{probe}}}", terms.prefix);
        let mut ask = redis::pipe();
        ask.ignore_errors().cmd("INFO").arg("server").cmd("INFO").arg("replication").cmd("TIME");
        let unlink = ask.cmd("UNLINK");
        for kind in KINDS {
            unlink.arg(name(kind));
        }
        // It may be full, and take invalidations all the same.
        ask.cmd("SET").arg(name("e:")).arg(1).arg("NX").arg("PX").arg(PROBE.as_millis() as u64);
        ask.cmd("MGET").arg(name("e:")).arg(name("g:"));
        self.push_prolong(&mut ask, &[name("g:").into_bytes()], 1);
        if self.is_cluster {
            ask.cmd("CLUSTER").arg("SLOTS").cmd("CLUSTER").arg("MYID");
        }
        ask
    }

    /// Keeps what is there of these until then at least. How many replies that has.
    pub(super) fn push_prolong(&self, pipeline: &mut Pipeline, names: &[Vec<u8>], until: Millis) -> usize {
        if self.knows_gt || names.is_empty() {
            for name in names {
                pipeline.cmd("PEXPIREAT").arg(name).arg(until).arg("GT");
            }
            return names.len();
        }
        pipeline.cmd("EVAL").arg(PROLONG).arg(names.len()).arg(names).arg(until);
        1
    }

    /// Whether counters may be told together until when they live: not where a later end cannot be told from an earlier one, and of
    /// a cluster others' may be elsewhere.
    pub(super) fn ends_together(&self) -> bool {
        self.knows_gt && !self.is_cluster
    }

    /// A counter without an end has this one; and so has one that ends before, if it is to be raised.
    pub(super) fn push_end(&self, pipeline: &mut Pipeline, counter: &[u8], until: Millis, raises: bool) {
        if !self.knows_gt {
            pipeline.cmd("PEXPIREAT").arg(counter).arg(until);
            return;
        }
        pipeline.cmd("PEXPIREAT").arg(counter).arg(until).arg("NX");
        if raises {
            pipeline.cmd("PEXPIREAT").arg(counter).arg(until).arg("GT");
        }
    }

    pub(super) fn lacks_scripts(&self) -> bool {
        self.lacks_scripts.load(Ordering::Acquire)
    }

    /// Somebody has found that out.
    pub(super) fn miss_scripts(&self) {
        self.lacks_scripts.store(true, Ordering::Release);
    }

    /// Finds out whether it knows scripts. (Whether one may use them shows when one does, and connections are for heartbeats to
    /// judge.)
    pub(super) async fn try_scripts(&self) {
        let mut connection = self.connection.clone();
        let tried = redis::cmd("EVAL").arg("return 1").arg(0).query_async::<Value>(&mut connection).await;
        if tried.is_err_and(|error| Trouble::from(error).is_without("EVAL")) {
            self.miss_scripts();
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What it lacks, and what is done instead.
    pub(super) fn without(&self) -> String {
        let lacks = [
            (self.knows_gt, "PEXPIREAT GT (a script prolongs generations)"),
            (self.speaks, "RESP3 (tier `on` is like `validated`)"),
            (self.reign != 0, "INFO (it cannot be told from another)"),
            (!self.lacks_scripts(), "EVAL (nothing is fenced)"),
        ];
        let lacks: Vec<_> = lacks.into_iter().filter(|(knows, _)| !knows).map(|(_, what)| what).collect();
        if lacks.is_empty() { "nothing that is needed".to_owned() } else { lacks.join(", ") }
    }

    /// Begins to hear of dropped generations.
    pub(super) async fn track(&self, terms: &Terms) -> Result<(), Trouble> {
        if !self.speaks {
            return Err(Trouble::new(HELLO, "the server does not speak RESP3"));
        }
        let mut tracking = redis::cmd("CLIENT");
        tracking.arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(format!("{}g:", terms.prefix));
        let mut connection = self.connection.clone();
        tracking.query_async::<Value>(&mut connection).await?;
        self.tracks.store(true, Ordering::Release);
        Ok(())
    }
}

fn refusal(reply: Option<&Value>) -> Option<Trouble> {
    match reply {
        Some(Value::ServerError(error)) => Some(error.into()),
        Some(_) => None,
        None => Some(Trouble::silent("a heartbeat was answered in part")),
    }
}

/// Whether the server does not know what a known command was given.
fn is_syntax(reply: Option<&Value>) -> bool {
    let says = |error: &ServerError| error.to_string().to_ascii_lowercase();
    matches!(reply, Some(Value::ServerError(error)) if ["wrong number", "syntax", "unsupported option"]
        .iter()
        .any(|words| says(error).contains(words)))
}

/// `TIME` in milliseconds; a server that knows no time that makes sense says none.
pub(crate) fn time(reply: Option<&Value>) -> Option<i64> {
    let (seconds, micros): (i64, i64) = <(i64, i64)>::from_redis_value_ref(reply?).ok()?;
    let makes_sense = (0..1 << 40).contains(&seconds) && (0..1_000_000).contains(&micros);
    makes_sense.then(|| seconds * 1_000 + micros / 1_000)
}

/// Reads `CLUSTER SLOTS`: [first, last, [host, port, id, …], replicas …] for each range; and `CLUSTER MYID`.
pub(crate) fn claim(slots: Option<&Value>, own: Option<&Value>, asked: &str) -> Claim {
    let mut claim = Claim::default();
    let id = own.and_then(|id| String::from_redis_value_ref(id).ok()).unwrap_or_default();
    let Some(Value::Array(ranges)) = slots else { return claim };
    for range in ranges {
        let Value::Array(range) = range else { continue };
        let [Value::Int(first), Value::Int(last), Value::Array(master), ..] = &range[..] else { continue };
        let [host, Value::Int(port), Value::BulkString(node), ..] = &master[..] else { continue };
        // A node that does not know its own name leaves it out: it is where it was asked.
        let host = String::from_redis_value_ref(host).ok().filter(|host| !host.is_empty() && host != "?");
        let address = format!("{}:{port}", host.as_deref().unwrap_or(asked));
        if !claim.masters.contains(&address) {
            claim.masters.push(address);
        }
        if node == id.as_bytes()
            && let (Ok(first), Ok(last)) = (u16::try_from(*first), u16::try_from(*last))
        {
            claim.own.push((first, last));
        }
    }
    claim
}

/// The address of a cluster's node, to be reached like this one: with the same login and encryption.
#[cfg(feature = "redis-cluster")]
pub(crate) fn node(address: &str, seed: &ConnectionInfo) -> Result<ConnectionInfo, redis::RedisError> {
    let bad = || redis::RedisError::from((redis::ErrorKind::Client, "a cluster node without a port"));
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    let port = port.parse().map_err(|_| bad())?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let addr = match seed.addr() {
        redis::ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            redis::ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => redis::ConnectionAddr::Tcp(host, port),
    };
    Ok(seed.clone().set_addr(addr))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::AtomicUsize;

    use bytes::BytesMut;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        time::timeout,
    };

    use super::*;
    use crate::{mux::Framing, store::redis::resp::Resp};

    /// What a test wants to hear in answer to a command.
    pub(in crate::store::redis) type Answers = fn(&str) -> Option<&'static str>;

    /// A server that says of itself what a test wants to hear.
    pub(in crate::store::redis) struct Fake {
        pub(in crate::store::redis) info: ConnectionInfo,
        connections: Arc<AtomicUsize>,
    }

    impl Fake {
        /// It answers what this does not as a master does, whose clock stands at 1.25 s.
        pub(in crate::store::redis) async fn new(answer: Answers) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("redis://{}", listener.local_addr().unwrap());
            let connections = Arc::new(AtomicUsize::new(0));
            let count = connections.clone();
            tokio::spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    count.fetch_add(1, Ordering::SeqCst);
                    tokio::spawn(async move {
                        let (mut scanner, mut bytes) = (Resp::default(), BytesMut::new());
                        while matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                            while let Some(command) = scanner.next(&mut bytes).unwrap() {
                                let words = command.strings().unwrap().flatten().map(String::from_utf8_lossy);
                                let line = words.collect::<Vec<_>>().join(" ");
                                let reply = answer(&line).unwrap_or_else(|| as_master(&line));
                                stream.write_all(reply.as_bytes()).await.unwrap();
                            }
                        }
                    });
                }
            });
            Self { info: redis::IntoConnectionInfo::into_connection_info(url).unwrap(), connections }
        }

        pub(in crate::store::redis) async fn connect(&self, terms: &Terms, is_cluster: bool) -> (Arc<Server>, Claim) {
            let (server, claim) = Server::connect(self.info.clone(), terms, is_cluster, None).await.unwrap();
            (Arc::new(server), claim)
        }

        pub(in crate::store::redis) fn address(&self) -> String {
            self.info.addr().to_string()
        }
    }

    fn as_master(line: &str) -> &'static str {
        match line.split(' ').next().unwrap_or_default() {
            "HELLO" => "%1\r\n$5\r\nproto\r\n:3\r\n",
            "INFO" if line.contains("server") => "$8\r\nrun_id:a\r\n",
            "INFO" => "$30\r\nrole:master\r\nmaster_replid:b\r\n\r\n",
            "TIME" => "*2\r\n$1\r\n1\r\n$6\r\n250000\r\n",
            "MGET" => "*2\r\n_\r\n_\r\n",
            "UNLINK" | "PEXPIREAT" => ":0\r\n",
            _ => "+OK\r\n",
        }
    }

    pub(in crate::store::redis) fn terms() -> Terms {
        Terms {
            prefix: "cas:".into(),
            heartbeat: Duration::from_secs(60),
            assume_one_server: false,
            replicas: 0,
            clock: Clock::default(),
            dial: Dial::Network,
        }
    }

    #[tokio::test]
    async fn a_server_is_read_while_all_that_has_to_hold_does() {
        let terms = terms();
        for (answer, is_readable) in [
            ((|_| None) as Answers, true),
            // A time that makes no sense: nobody knows when its fences end.
            (|line| (line == "TIME").then_some("*2\r\n$1\r\nx\r\n$1\r\n0\r\n"), false),
            (|line| line.starts_with("MGET").then_some("-NOPERM no permissions\r\n"), false),
        ] {
            let fake = Fake::new(answer).await;
            let (server, _) = fake.connect(&terms, false).await;
            assert!(!server.is_proven() && !server.is_readable(), "before the first heartbeat");
            let before = terms.clock.now();
            server.beat(&terms).await.unwrap();
            assert!(server.is_proven());
            assert!((before + 120_000..=terms.clock.now() + 120_000).contains(&server.proven_until()));
            assert_eq!(server.is_readable(), is_readable);
            server.settle(Duration::from_secs(60));
            assert!(server.is_proven() && !server.is_readable(), "others may have something to deliver");
            server.settle(Duration::ZERO);
            assert_eq!(server.is_readable(), is_readable);
            server.doubt();
            assert!(!server.is_proven() && !server.is_readable());
            assert_eq!(fake.connections.load(Ordering::SeqCst), 1, "nothing waits for replicas");
        }
    }

    /// Where a heartbeat writes says something of that server alone.
    #[cfg(feature = "redis-cluster")]
    #[test]
    fn a_heartbeat_writes_where_the_server_serves() {
        let claim = Claim { own: vec![(100, 200)], masters: vec![] };
        for nth in [0, 1] {
            let slot = super::super::slot::slot(format!("{{{}}}", probe_in(&claim, nth)).as_bytes());
            assert!((100..=200).contains(&slot), "{slot}");
        }
    }

    /// All processes share its clock, whatever theirs say.
    #[tokio::test]
    async fn times_are_told_by_the_clock_of_the_server() {
        let (terms, fake) = (terms(), Fake::new(|_| None).await);
        let (server, _) = fake.connect(&terms, false).await;
        let before = terms.clock.now();
        server.beat(&terms).await.unwrap();
        let took = (terms.clock.now() - before) as i64;
        let [least, most] = [server.time_at_least(), server.time_at_most(server.here())];
        let since = (terms.clock.now() - before) as i64;
        assert!((1_250..=1_250 + since).contains(&least), "{least}");
        assert!(most >= least && most <= least + took + since, "{least} {most}");
        assert_eq!(server.name(), "unknown");
        assert_eq!(server.without(), "nothing that is needed");
        server.miss_scripts();
        assert!(server.without().contains("EVAL"));
    }

    /// A task that beats waits for its time, or for whoever finds the server wrong.
    #[tokio::test]
    async fn who_beats_is_woken_when_it_is_wrong() {
        let terms = terms();
        let (server, _) = Fake::new(|_| None).await.connect(&terms, false).await;
        assert!(timeout(Duration::from_millis(20), server.wrong()).await.is_err());
        server.lose();
        timeout(Duration::from_secs(10), server.wrong()).await.unwrap();
        assert!(server.beat(&terms).await.is_err_and(|trouble| trouble.to_string() == "a connection was lost"));
    }

    /// A password goes to no node in the clear, where it did not go so to the first.
    #[cfg(all(feature = "redis-cluster", feature = "redis-tls"))]
    #[test]
    fn nodes_are_reached_as_the_first_one_is() {
        for (seed, is_encrypted) in [("redis://eve:pw@a:1", false), ("rediss://eve:pw@a:1", true)] {
            let seed = redis::IntoConnectionInfo::into_connection_info(seed).unwrap();
            let node = node("[::1]:7000", &seed).unwrap();
            match node.addr() {
                redis::ConnectionAddr::TcpTls { host, port, insecure, .. } => {
                    assert!(is_encrypted && (host.as_str(), *port, *insecure) == ("::1", 7_000, false));
                }
                other => assert_eq!((other.to_string(), is_encrypted), ("::1:7000".to_owned(), false)),
            }
            assert_eq!(node.redis_settings().password(), Some("pw"));
        }
    }

    /// A node that does not say where it is, is where it was asked.
    #[tokio::test]
    async fn nodes_are_where_they_say_or_where_they_were_asked() {
        for (host, expected) in [("", "127.0.0.1:7"), ("?", "127.0.0.1:7"), ("b.example", "b.example:7")] {
            let range = format!("*3\r\n:1\r\n:5\r\n*3\r\n${}\r\n{host}\r\n:7\r\n$2\r\nid\r\n", host.len());
            let slots = redis::parse_redis_value(format!("*1\r\n{range}").as_bytes()).unwrap();
            let claim = claim(Some(&slots), Some(&Value::BulkString(b"id".to_vec())), "127.0.0.1");
            assert_eq!((claim.masters, claim.own), (vec![expected.to_owned()], vec![(1, 5)]), "{host}");
        }
        let unsaid = "*1\r\n*3\r\n:1\r\n:5\r\n*3\r\n$0\r\n\r\n:7\r\n$2\r\nid\r\n";
        assert!(unsaid.len() > 1);
        let fake = Fake::new(|line| {
            line.starts_with("CLUSTER SLOTS").then_some("*1\r\n*3\r\n:1\r\n:5\r\n*3\r\n$0\r\n\r\n:7\r\n$2\r\nid\r\n")
        })
        .await;
        assert_eq!(fake.connect(&terms(), true).await.1.masters, ["127.0.0.1:7"]);
    }
}
