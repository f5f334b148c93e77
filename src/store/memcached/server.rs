//! One server: the connection to it, what it says of itself, and whether it may be asked.
//!
//! | it | then |
//! | --- | --- |
//! | does not answer, or not in time | it is connected to again and again, with pauses; nobody waits for that |
//! | is back | nothing is read for a while (`settle`), so that others can deliver what they could not |
//! | answers what no memcached of the right version would | it is not used, and says so |
//! | refuses to store | it goes on, and its health says so |

use std::{
    convert::Infallible,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::Notify,
    time::{sleep, timeout},
};

use super::{
    commands::{self, Command, Name, Until},
    frames::{Frames, Kind, Reply},
};
use crate::{
    clock::{self, Millis},
    mux::{Answer, Broken, Mux},
    store::{Generation, Health, StoreError},
};

/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(1);

/// Pauses between two attempts, at first and at most.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long an answer may take before the connection is given up.
const PATIENCE: Duration = Duration::from_secs(2);

/// The space of all generations lives for so long, or a second more, without anybody who uses it.
pub(super) const ROOT: Duration = Duration::from_secs(59);

/// How long it is said of a server that it refuses to store, after it last did.
const REFUSES: Millis = 10_000;

const UNNEEDED: &str = "nobody needs it";

/// What an item takes besides its value, at most: its name, its head, and the rest of its last chunk.
const HEAD: usize = 1_024;

/// No value is larger that a server may have: its `-I` goes up to this.
const LARGEST: usize = 1 << 30;

/// A server's largest item, if it does not say.
const ITEM: usize = 1 << 20;

/// What is asked of every server.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    /// What all names begin with.
    pub(super) prefix: Arc<str>,
    pub(super) heartbeat: Duration,
    /// How long nothing is read after an outage.
    pub(super) settle: Duration,
}

pub(super) struct Server {
    pub(super) address: String,
    pub(super) terms: Terms,
    connection: RwLock<Option<Arc<Connection>>>,
    state: Mutex<State>,
    /// The first attempt to connect has come to an end.
    tried: AtomicBool,
    found: Notify,
    watched: Arc<AtomicBool>,
}

/// What is known, and was said when it began.
#[derive(Default)]
struct State {
    was_up: bool,
    lost: Option<Arc<str>>,
    /// The last refusal to store, and when that was by the machine's uptime, until things are stored again.
    refusal: Option<(Arc<str>, Millis)>,
}

/// A connection that has been answered on.
pub(super) struct Connection {
    address: String,
    mux: Mux<Frames>,
    /// The server's time in seconds when it last said so, and the machine's uptime before and after that.
    time: Mutex<(u64, Millis, Millis)>,
    /// Not to be read until then, by the machine's uptime.
    settles: AtomicU64,
    /// Until when the last heartbeat is good.
    proven: AtomicU64,
    /// The largest value that the server takes.
    largest: AtomicUsize,
}

impl Connection {
    /// Makes these commands in one round trip.
    pub(super) async fn call(&self, commands: &[Command]) -> Result<Answer<Reply>, StoreError> {
        let count = u32::try_from(commands.len()).unwrap_or(u32::MAX);
        let answer = self.mux.call(count, |out, first| commands::write(out, commands, first)).await;
        answer.map_err(|broken| match broken {
            Broken::Unsent(_) => StoreError::away(broken.to_string()),
            Broken::Unanswered(_) => StoreError::unreachable(broken.to_string()),
        })
    }

    /// The time that all processes share, in milliseconds, is not earlier than this. (The server counts seconds.)
    pub(super) fn time_at_least(&self) -> i64 {
        let (seconds, _, after) = *lock(&self.time);
        (seconds * 1_000 + clock::uptime().saturating_sub(after)) as i64
    }

    /// And not later than this, at that time here.
    pub(super) fn time_at_most(&self, here: Millis) -> i64 {
        let (seconds, before, _) = *lock(&self.time);
        (seconds * 1_000 + 999 + here.saturating_sub(before)) as i64
    }

    /// When an item ends that is to be there for so long.
    pub(super) fn until(&self, time: Duration) -> Until {
        Until::after(time, (self.time_at_most(clock::uptime()) / 1_000).unsigned_abs())
    }

    pub(super) fn largest(&self) -> usize {
        self.largest.load(Ordering::Relaxed)
    }

    fn is_proven(&self) -> bool {
        clock::uptime() < self.proven.load(Ordering::Acquire)
    }

    /// Tries what is relied on, and asks what it is.
    async fn probe(&self, terms: &Terms) -> Result<(), Arc<str>> {
        let name = Name::new(&terms.prefix, "p:", &Generation::unique().0.to_be_bytes());
        let soon = Until::after(ROOT, 0);
        let commands = [
            Command::add(name.clone(), b"1".into(), soon),
            Command::add(name.clone(), b"2".into(), soon),
            Command::get_cas(name.clone()),
            Command::delete_unchanged(name.clone(), 0),
            Command::delete(name.clone()),
            Command::delete(name.clone()),
            Command::get(name),
            Command::plain("stats settings"),
        ];
        let answer = self.call(&commands).await.map_err(|error| error.to_string())?;
        let kinds: Vec<_> = answer.replies.iter().map(|reply| reply.as_ref().map(|reply| &reply.kind)).collect();
        let has_cas = matches!(&answer.replies[2], Some(Reply { cas: Some(_), .. }));
        let is_right = matches!(
            &kinds[..7],
            [
                Some(Kind::Done),
                Some(Kind::Refused),
                Some(Kind::Value(value)),
                Some(Kind::Refused),
                Some(Kind::Done),
                Some(Kind::Absent),
                None
            ] if value[..] == *b"1"
        );
        if !is_right || !has_cas {
            let said = answer.others.iter().find(|other| matches!(other.kind, Kind::Error(_)));
            let said = said.map_or(format!("{kinds:?}"), |other| format!("{:?}", other.kind));
            return Err(format!(
                "it does not do what meta commands are to do: {said} (memcached 1.6.9 or later is needed)"
            )
            .into());
        }
        let limit = stat(&answer, "item_size_max").unwrap_or(ITEM as u64);
        self.largest.store(usize::try_from(limit).unwrap_or(ITEM).saturating_sub(HEAD), Ordering::Relaxed);
        Ok(())
    }

    /// Asks for the time, and keeps the space of the generations.
    async fn beat(&self, terms: &Terms) -> Result<(), Arc<str>> {
        let before = clock::uptime();
        let root = root(&self.address, terms);
        let commands = [Command::touch(root, Until::after(ROOT, 0)), Command::plain("stats")];
        let answered = timeout(terms.heartbeat * 2, self.call(&commands)).await;
        let answer = answered.map_err(|_| "a heartbeat was not answered")?.map_err(|error| error.to_string())?;
        let after = clock::uptime();
        let seconds = stat(&answer, "time").ok_or("it does not say what time it is (stats)")?;
        let known = lock(&self.time).0;
        *lock(&self.time) = (seconds, before, after);
        if seconds < known {
            return Err("its time went back".into());
        }
        let good = u64::try_from(terms.heartbeat.as_millis() * 3).unwrap_or(Millis::MAX);
        self.proven.store(before.saturating_add(good), Ordering::Release);
        Ok(())
    }
}

/// What all generations of a server are told by. It is under the address that the server has: of two that have changed places,
/// neither is believed.
pub(super) fn root(address: &str, terms: &Terms) -> Name {
    Name::new(&terms.prefix, "r:", address.as_bytes())
}

/// A number of the server's statistics.
fn stat(answer: &Answer<Reply>, name: &str) -> Option<u64> {
    answer.others.iter().find_map(|reply| match &reply.kind {
        Kind::Line(line) => line.strip_prefix("STAT ")?.strip_prefix(name)?.strip_prefix(' ')?.parse().ok(),
        _ => None,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub(super) fn new(address: String, terms: Terms) -> Self {
        Self {
            address,
            terms,
            connection: RwLock::default(),
            state: Mutex::default(),
            tried: AtomicBool::new(false),
            found: Notify::new(),
            watched: Arc::default(),
        }
    }

    pub(super) fn name(&self, kind: &str, rest: &[u8]) -> Name {
        Name::new(&self.terms.prefix, kind, rest)
    }

    /// The connection to invalidate by. Fails at once when there is none, but waits for the very first attempt.
    pub(super) async fn writing(&self) -> Result<Arc<Connection>, StoreError> {
        if !self.tried.load(Ordering::Acquire) {
            let found = self.found.notified();
            if !self.tried.load(Ordering::Acquire) {
                found.await;
            }
        }
        self.proven().ok_or_else(|| {
            let why = lock(&self.state).lost.clone();
            StoreError::away(why.map_or("no connection to memcached".to_owned(), |why| why.to_string()))
        })
    }

    /// The connection, if its last heartbeat is good.
    fn proven(&self) -> Option<Arc<Connection>> {
        let connection = self.connection.read().unwrap_or_else(PoisonError::into_inner).clone();
        connection.filter(|connection| connection.is_proven())
    }

    /// The connection to read by.
    pub(super) async fn reading(&self) -> Result<Arc<Connection>, StoreError> {
        let connection = self.writing().await?;
        if clock::uptime() < connection.settles.load(Ordering::Acquire) {
            return Err(StoreError::away(
                "memcached was away: it is not read before others have told it what they could not",
            ));
        }
        Ok(connection)
    }

    /// It did not want to store, or did. It may take small items and no larger ones, so it stores again only when it has refused
    /// nothing for a while.
    pub(super) fn refuses(&self, why: Option<&str>) {
        let mut state = lock(&self.state);
        let is_known = state.refusal.is_some();
        match why {
            Some(why) => {
                state.refusal = Some((why.into(), clock::uptime()));
                if !is_known {
                    tracing::warn!(address = self.address, why, "memcached refuses to store");
                }
            }
            None if state.refusal.as_ref().is_some_and(|(_, last)| clock::uptime() > last + REFUSES) => {
                state.refusal = None;
                tracing::info!(address = self.address, "memcached stores again");
            }
            None => {}
        }
    }

    pub(super) fn health(&self) -> Health {
        if !self.tried.load(Ordering::Acquire) {
            return Health::Down(format!("not connected to memcached at {} yet", self.address).into());
        }
        let state = lock(&self.state);
        if let Some(why) = &state.lost {
            return Health::Down(format!("memcached at {}: {why}", self.address).into());
        }
        if self.proven().is_none() {
            return Health::Down(format!("memcached at {} has missed its heartbeats", self.address).into());
        }
        match &state.refusal {
            Some((why, _)) => Health::Degraded(format!("memcached at {} refuses to store: {why}", self.address).into()),
            None => Health::Ok,
        }
    }

    /// Starts the task that keeps the connection, once there is a runtime for it; and again, when that one is gone.
    pub(super) fn start(self: &Arc<Self>) {
        if self.watched.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.watched.swap(true, Ordering::AcqRel) {
            let ended = Ended(Arc::downgrade(self));
            runtime.spawn(async move {
                watch(&ended.0).await;
            });
        }
    }

    fn up(&self, connection: &Arc<Connection>) {
        let was = {
            let mut state = lock(&self.state);
            if state.was_up || state.lost.is_some() {
                let settled = clock::uptime().saturating_add(self.terms.settle.as_millis() as Millis);
                connection.settles.store(settled, Ordering::Release);
            }
            state.was_up = true;
            state.lost.take()
        };
        tracing::info!(address = self.address, was = was.as_deref(), "connected to memcached");
        self.publish(Some(connection.clone()));
    }

    fn lost(&self, why: Arc<str>) {
        let mut state = lock(&self.state);
        if state.lost.as_ref() != Some(&why) {
            tracing::warn!(address = self.address, %why, "memcached cannot be used: serving from the origin");
        }
        state.lost = Some(why);
        drop(state);
        self.publish(None);
    }

    fn publish(&self, connection: Option<Arc<Connection>>) {
        *self.connection.write().unwrap_or_else(PoisonError::into_inner) = connection;
        self.tried.store(true, Ordering::Release);
        self.found.notify_waiters();
    }
}

/// The end of the task that watches: with its runtime went the connection.
struct Ended(Weak<Server>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(server) = self.0.upgrade() {
            server.publish(None);
            server.tried.store(false, Ordering::Release);
            server.watched.store(false, Ordering::Release);
        }
    }
}

/// Connects again and again, for as long as somebody needs the server.
async fn watch(server: &Weak<Server>) {
    let mut pause = RECONNECT.0;
    while let Some(strong) = server.upgrade() {
        let connected = timeout(CONNECT, TcpStream::connect(&strong.address)).await;
        let stream = match connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => stream,
            Err(error) => {
                strong.lost(error.to_string().into());
                drop(strong);
                sleep(pause).await;
                pause = (pause * 2).min(RECONNECT.1);
                continue;
            }
        };
        let (why, was_up) = attend(strong, stream).await;
        let Some(strong) = server.upgrade() else { return };
        strong.lost(why);
        drop(strong);
        // Who was up a moment ago is looked for at once.
        pause = if was_up { RECONNECT.0 } else { (pause * 2).min(RECONNECT.1) };
        sleep(pause).await;
    }
}

/// Keeps one connection for as long as it is good; why it is not any more, and whether it ever was.
async fn attend(server: Arc<Server>, stream: TcpStream) -> (Arc<str>, bool) {
    let _ = stream.set_nodelay(true);
    let (mux, serving) = Mux::new(stream, Frames { largest: LARGEST }, PATIENCE);
    let connection = Arc::new(Connection {
        address: server.address.clone(),
        mux,
        time: Mutex::new((0, 0, 0)),
        settles: AtomicU64::new(0),
        proven: AtomicU64::new(0),
        largest: AtomicUsize::new(0),
    });
    let mut was_up = false;
    let server = {
        let weak = Arc::downgrade(&server);
        drop(server);
        weak
    };
    let beats = async {
        let why = match beats(&server, &connection, &mut was_up).await {
            Ok(never) => match never {},
            Err(why) => why,
        };
        connection.mux.end(&why);
        why
    };
    let why = tokio::select! {
        why = serving => why,
        why = beats => why,
    };
    (why, was_up)
}

/// For as long as they are answered, and somebody needs the server.
async fn beats(server: &Weak<Server>, connection: &Arc<Connection>, was_up: &mut bool) -> Result<Infallible, Arc<str>> {
    let terms = server.upgrade().ok_or(UNNEEDED)?.terms.clone();
    connection.probe(&terms).await?;
    loop {
        connection.beat(&terms).await?;
        let strong = server.upgrade().ok_or(UNNEEDED)?;
        if !std::mem::replace(was_up, true) {
            strong.up(connection);
        }
        drop(strong);
        sleep(terms.heartbeat).await;
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("address", &self.address).field("health", &self.health()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(time: (u64, Millis, Millis), proven: Millis) -> Connection {
        let (mux, _) = Mux::new(tokio::io::duplex(1).0, Frames { largest: 0 }, PATIENCE);
        Connection {
            address: String::new(),
            mux,
            time: Mutex::new(time),
            settles: AtomicU64::new(0),
            proven: AtomicU64::new(proven),
            largest: AtomicUsize::new(0),
        }
    }

    /// It counts seconds, and its answer was under way for a while.
    #[tokio::test]
    async fn times_are_told_by_the_clock_of_the_server() {
        let now = clock::uptime();
        let connection = connection((1_000, now - 300, now - 100), 0);
        let [least, most] = [connection.time_at_least(), connection.time_at_most(clock::uptime())];
        let until = connection.until(Duration::from_secs(40 * 86_400));
        let since = (clock::uptime() - now) as i64;
        assert!((1_000_100..=1_000_100 + since).contains(&least), "{least}");
        assert!((1_001_299..=1_001_299 + since).contains(&most), "{most}");
        let seconds = 40 * 86_400 + 1;
        let ends = [0, 1].map(|late| format!("{:?}", Until::after(Duration::from_secs(seconds - 1), 1_001 + late)));
        assert!(ends.contains(&format!("{until:?}")), "{until:?}");
    }

    /// Also when nothing runs that could notice that its heartbeats have ended.
    #[tokio::test]
    async fn a_heartbeat_is_good_for_a_while() {
        assert!(!connection((0, 0, 0), clock::uptime()).is_proven());
        assert!(connection((0, 0, 0), clock::uptime() + 60_000).is_proven());
    }

    #[test]
    fn what_was_refused_is_known_until_nothing_has_been_for_a_while() {
        let terms = Terms { prefix: "cas:".into(), heartbeat: Duration::ZERO, settle: Duration::ZERO };
        let server = Server::new("localhost:1".to_owned(), terms);
        let why = || lock(&server.state).refusal.clone().map(|(why, _)| why);
        server.refuses(None);
        assert_eq!(why(), None);
        server.refuses(Some("out of memory"));
        server.refuses(None);
        assert_eq!(why().as_deref(), Some("out of memory"), "it may take small items and no larger ones");
        let long_ago = clock::uptime() - REFUSES - 1_000;
        lock(&server.state).refusal = Some(("out of memory".into(), long_ago));
        server.refuses(None);
        assert_eq!(why(), None);
    }
}
