//! The protocol's steps as meta commands, on the server of a tenant. No step needs more than add, set, get, delete and CAS, and
//! all but those of fences are one round trip.
//!
//! | name | holds |
//! | --- | --- |
//! | `prefix r:address` | the root: what all generations are told by; with it all are gone (`clear`) |
//! | `prefix e:service{tenant}:…` | an entry |
//! | `prefix g:service{tenant}:…` | the generation of a tag, 16 bytes |
//! | `prefix m:service{tenant}` | the mark: dropped by every invalidation of the tenant |
//! | `prefix f:service{tenant}:…` | who fences a tag, and until when |
//! | `prefix c:service{tenant}:…` | how often something was filled under a tag, for the report |
//! | `prefix l:service{tenant}:…` | that some process is loading an entry |
//! | `prefix n:service…` | what the fleet has to remember: how far a source of events was read |
//! | `prefix s:service…` | what the processes of the fleet say of themselves |
//!
//! A server makes the commands of one connection in their order, and those of others in between: so the order is what counts.
//!
//! - An invalidation drops the mark, and then the generations; who extends reads the generations, and then the mark. If the
//!   mark still stands, no generation that was read is one that the invalidation will leave.
//! - A fence is raised, and then the generations are dropped; who opens makes the generations, and then looks for fences. What is
//!   opened before the fence can be seen is dropped by it.
//! - Fences are items of their own, and hold until when they stand by the server's time: no fill prolongs them. They are kept for as
//!   long as a load may take after they have ended, since what began under one proves nothing.
//!
//! Anything may be evicted at any time. That costs a miss; of a fence, what it is there for: see `docs/memcached.md`.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use tokio::time::sleep;

use super::{
    commands::{Command, Name},
    frames::{Kind, Reply},
    server::{Connection, ROOT, Server, root},
};
use crate::{
    catalog::Tier,
    clock::{self, Millis},
    key::{Key, Tag},
    mux::Answer,
    store::{
        Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, Opened, Store, StoreError, StoreFuture,
        TagGroup,
        decoded::Times,
        wire::{Counters, Generations, Tags, by_tenant},
    },
};

/// How long a generation lives that nothing is stored under: longer than a load may take.
const OPENED: Duration = Duration::from_secs(120);

/// Attempts to change what others change as well: at each of them, one of all who try succeeds.
const ATTEMPTS: u64 = 1_000;

/// So many milliseconds sooner an entry may end for having been decoded before: the server tells its time in whole seconds.
const APART: i64 = 1_000;

/// The longest pause between two of them.
const PAUSE: u64 = 16;

/// Writers that fence one tag, at most; of more it is remembered only until when the last of them does.
const WRITERS: usize = 1_000;

/// How long is kept what the processes of a fleet have said of themselves, and how many there are at most.
const SAID: Duration = Duration::from_secs(60);
const MEMBERS: usize = 1_000;

/// How long a note is kept that nobody writes again.
const NOTED: Duration = Duration::from_secs(30 * 86_400);

/// One server, without a guard.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) server: Arc<Server>,
    pub(super) generation_ttl: Duration,
    pub(super) counters: Arc<Counters>,
}

/// A writer that fences a tag, until a time of the server's, in seconds.
type Writer = (u128, u64);

/// What is done with a writer's fence.
#[derive(Clone, Copy)]
enum Change {
    /// It stands for so long from now.
    Stand(Duration),
    Lift,
}

fn value(answer: &Answer<Reply>, at: usize) -> Option<&Bytes> {
    match &answer.replies.get(at)?.as_ref()?.kind {
        Kind::Value(value) => Some(value),
        _ => None,
    }
}

fn kind(answer: &Answer<Reply>, at: usize) -> Option<&Kind> {
    answer.replies.get(at)?.as_ref().map(|reply| &reply.kind)
}

/// What was refused, in the server's words.
fn refusal(answer: &Answer<Reply>) -> Option<&str> {
    answer.others.iter().find_map(|other| match &other.kind {
        Kind::Error(text) => Some(text.as_str()),
        _ => None,
    })
}

/// A generation, as it is told by the root. What was not written by us is none.
fn generation(answer: &Answer<Reply>, root: Option<u128>, at: usize) -> Option<Generation> {
    number(value(answer, at)?).zip(root).map(|(number, root)| Generation(number ^ root).unfenced())
}

fn number(bytes: &[u8]) -> Option<u128> {
    Some(u128::from_be_bytes(bytes.try_into().ok()?))
}

fn unique() -> Vec<u8> {
    Generation::unique().0.to_be_bytes().into()
}

/// The tenant of these tags, which is that of all of them.
fn tenant(tags: &[Tag]) -> &[u8] {
    tags.first().map_or(b"{}", Tag::tenant)
}

fn writers_in(bytes: &[u8]) -> Option<Vec<Writer>> {
    let mut rest = bytes;
    let mut writers = vec![];
    while !rest.is_empty() {
        writers.push((rest.try_get_u128().ok()?, rest.try_get_u64().ok()?));
    }
    Some(writers)
}

fn written(writers: &[Writer]) -> Vec<u8> {
    let mut out = Vec::with_capacity(writers.len() * 24);
    for (writer, until) in writers {
        out.put_u128(*writer);
        out.put_u64(*until);
    }
    out
}

impl Change {
    /// The writers of a tag after this, at a time of the server's.
    fn apply(self, writers: Vec<Writer>, writer: u128, now: u64) -> Vec<Writer> {
        let is_kept = |(other, until): &Writer| *other != writer && until.saturating_add(OPENED.as_secs()) > now;
        let mut after: Vec<_> = writers.into_iter().filter(is_kept).collect();
        if let Self::Stand(time) = self {
            // The server's seconds begin with anybody's, and a fence is not to end early.
            after.push((writer, now.saturating_add(time.as_secs()).saturating_add(2)));
        }
        if after.len() > WRITERS {
            let last = after.iter().map(|(_, until)| *until).max().unwrap_or(now);
            after = vec![(0, last), after.pop().unwrap_or((writer, last))];
        }
        after
    }
}

impl Remote {
    fn name(&self, kind: &str, rest: &[u8]) -> Name {
        self.server.name(kind, rest)
    }

    fn root(&self) -> Name {
        root(&self.server.address, &self.server.terms)
    }

    fn of_tags<'t>(
        &self,
        kind: &str,
        tags: impl Iterator<Item = &'t Tag>,
        command: impl Fn(Name) -> Command,
    ) -> Vec<Command> {
        tags.map(|tag| command(self.name(kind, tag.as_bytes()))).collect()
    }

    /// The generations of the tags, and the mark: those that are absent are created. And who fences the tags.
    async fn add(
        &self,
        tags: &[Tag],
    ) -> Result<(Vec<Generation>, Mark, Vec<Option<Bytes>>, Arc<Connection>), StoreError> {
        let connection = self.server.reading().await?;
        let opened = connection.until(OPENED);
        let mut commands = vec![];
        let mut made = |name: Name, until| {
            commands.extend([Command::add(name.clone(), unique(), until), Command::get(name)]);
        };
        made(self.root(), connection.until(ROOT));
        tags.iter().for_each(|tag| made(self.name("g:", tag.as_bytes()), opened));
        made(self.name("m:", tenant(tags)), opened);
        let fences = commands.len();
        commands.extend(self.of_tags("f:", tags.iter(), Command::get));
        let answer = connection.call(&commands).await?;
        self.server.refuses(refusal(&answer));
        let root = value(&answer, 1).and_then(|root| number(root));
        // What has just been dropped, or is not ours, is unlike anything that is stored: it costs a miss.
        let read = |at| generation(&answer, root, at).unwrap_or_else(Generation::unique);
        let generations = (1..=tags.len()).map(|tag| read(2 * tag + 1)).collect();
        let mark = Mark(read(fences - 1).0);
        let fences = (fences..commands.len()).map(|at| value(&answer, at).cloned()).collect();
        Ok((generations, mark, fences, connection))
    }

    /// Changes a writer's fences of these tags. All have been changed when it returns.
    async fn change_fences(
        &self,
        connection: &Connection,
        tags: &[&Tag],
        writer: u128,
        change: Change,
    ) -> Result<(), StoreError> {
        let mut left: Vec<_> = tags.iter().map(|tag| self.name("f:", tag.as_bytes())).collect();
        for attempt in 0..ATTEMPTS {
            let ask: Vec<_> = left.iter().cloned().map(Command::get_cas).collect();
            let found = connection.call(&ask).await?;
            let now = (connection.time_at_most(clock::uptime()) / 1_000).unsigned_abs();
            let mut commands = vec![];
            let mut changed = vec![];
            for (at, name) in left.into_iter().enumerate() {
                let known = found.replies.get(at).and_then(Option::as_ref);
                // What cannot be read is none of ours.
                let writers = value(&found, at).and_then(|bytes| writers_in(bytes)).unwrap_or_default();
                let after = change.apply(writers, writer, now);
                let last = after.iter().map(|(_, until)| *until).max();
                let until = last.map(|last| connection.until(Duration::from_secs(last.saturating_sub(now)) + OPENED));
                let command = match (known.and_then(|reply| reply.cas), until) {
                    (None, None) => continue,
                    (None, Some(until)) => Command::add(name.clone(), written(&after), until),
                    (Some(cas), None) => Command::delete_unchanged(name.clone(), cas),
                    (Some(cas), Some(until)) => Command::replace(name.clone(), written(&after), until, cas),
                };
                commands.push(command);
                changed.push(name);
            }
            if commands.is_empty() {
                return Ok(());
            }
            let answer = connection.call(&commands).await?;
            if let Some(why) = refusal(&answer) {
                self.server.refuses(Some(why));
                return Err(StoreError::new(why));
            }
            let is_done = |at: &usize| matches!(kind(&answer, *at), Some(Kind::Done));
            left = changed.into_iter().enumerate().filter(|(at, _)| !is_done(at)).map(|(_, name)| name).collect();
            if left.is_empty() {
                return Ok(());
            }
            // Not all of them in step.
            sleep(Duration::from_millis(rand::random::<u64>() % (attempt + 2).min(PAUSE))).await;
        }
        Err(StoreError::new("too many writers change the fences of one tag"))
    }

    /// Drops the mark of a tenant, and then the generations of these tags; and counts what was filled under them.
    async fn drop_all(
        &self,
        connection: &Connection,
        tags: &[(usize, &Tag)],
        counts: &mut [u64],
    ) -> Result<(), StoreError> {
        let Some((_, first)) = tags.first() else { return Ok(()) };
        let names = |kind: &'static str| tags.iter().map(move |(_, tag)| self.name(kind, tag.as_bytes()));
        let mut commands = vec![Command::delete(self.name("m:", first.tenant()))];
        commands.extend(names("g:").map(Command::delete));
        let dropped = commands.len();
        commands.extend(names("c:").map(Command::get));
        commands.extend(names("c:").map(Command::delete));
        let answer = connection.call(&commands).await?;
        // Nothing else says that it was done.
        let is_done = |at| matches!(kind(&answer, at), Some(Kind::Done | Kind::Absent));
        if !(0..dropped).all(is_done) {
            return Err(StoreError::new(refusal(&answer).unwrap_or("a deletion was not acknowledged")));
        }
        self.add_counts(&answer, dropped, tags, counts);
        Ok(())
    }

    /// About how many entries each group has, by the counters from `first` on. An entry is counted for each of its tags: once for
    /// each kind of entity that it is about. Of these, the one that most have is believed.
    fn add_counts(&self, answer: &Answer<Reply>, first: usize, tags: &[(usize, &Tag)], counts: &mut [u64]) {
        let mut about: BTreeMap<(usize, &[u8]), u64> = BTreeMap::new();
        for (at, (group, tag)) in tags.iter().enumerate() {
            let count =
                value(answer, first + at).and_then(|count| str::from_utf8(count).ok()?.trim().parse::<u64>().ok());
            *about.entry((*group, tag.about())).or_default() += count.unwrap_or(0);
        }
        let mut most: BTreeMap<usize, u64> = BTreeMap::new();
        for ((group, _), count) in about {
            let most = most.entry(group).or_default();
            *most = count.max(*most);
        }
        for (group, count) in most {
            if let Some(all) = counts.get_mut(group) {
                *all += count;
            }
        }
    }

    /// Drops all that is told by the root.
    async fn drop_root(&self) -> Result<(), StoreError> {
        let connection = self.server.writing().await?;
        let answer = connection.call(&[Command::delete(self.root())]).await?;
        match kind(&answer, 0) {
            Some(Kind::Done | Kind::Absent) => Ok(()),
            _ => Err(StoreError::new(refusal(&answer).unwrap_or("a deletion was not acknowledged"))),
        }
    }

    async fn raise(&self, groups: &[TagGroup], fence: &Fence) -> Result<(), StoreError> {
        let connection = self.server.writing().await?;
        for tags in by_tenant(groups).into_values() {
            let all: Vec<_> = tags.iter().map(|(_, tag)| *tag).collect();
            self.change_fences(&connection, &all, fence.writer, Change::Stand(fence.lease)).await?;
            self.drop_all(&connection, &tags, &mut []).await?;
        }
        Ok(())
    }

    async fn drop_tags(&self, groups: &[TagGroup], fence: Option<&Fence>) -> Result<Vec<u64>, StoreError> {
        let connection = self.server.writing().await?;
        let mut counts = vec![0; groups.len()];
        for tags in by_tenant(groups).into_values() {
            if let Some(fence) = fence.filter(|fence| fence.writer != Fence::NOBODY.writer) {
                let all: Vec<_> = tags.iter().map(|(_, tag)| *tag).collect();
                // Before the drop: what is held must stand when the next reader opens.
                let change = if fence.hold.is_zero() { Change::Lift } else { Change::Stand(fence.hold) };
                self.change_fences(&connection, &all, fence.writer, change).await?;
            }
            self.drop_all(&connection, &tags, &mut counts).await?;
        }
        Ok(counts)
    }

    fn fill_commands(
        &self,
        connection: &Connection,
        key: &Key,
        entry: &Entry,
        bytes: Vec<u8>,
        keep: Duration,
    ) -> Vec<Command> {
        let (end, long) = (connection.until(keep), connection.until(self.generation_ttl));
        let mut commands = vec![Command::set(self.name("e:", key.as_bytes()), bytes, end)];
        for stamp in &entry.stamps {
            let tag = stamp.tag.as_bytes();
            commands.push(Command::touch(self.name("g:", tag), long));
            commands.push(Command::count(self.name("c:", tag), long));
        }
        commands
    }
}

impl Generations for Remote {
    async fn generations<'t>(&self, tags: impl Tags<'t>) -> Result<Vec<Option<Generation>>, StoreError> {
        let connection = self.server.reading().await?;
        let mut commands = vec![Command::get(self.root())];
        let count = tags.len();
        commands.extend(self.of_tags("g:", tags, Command::get));
        let answer = connection.call(&commands).await?;
        let root = value(&answer, 0).and_then(|root| number(root));
        Ok((1..=count).map(|at| generation(&answer, root, at)).collect())
    }
}

impl Store for Remote {
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            // Of the same moment as the inquiry's, however long the answer takes.
            let here = clock::uptime();
            let mut commands = vec![Command::get(self.root()), Command::get(self.name("e:", inquiry.key.as_bytes()))];
            commands.extend(self.of_tags("g:", inquiry.tags.iter(), Command::get));
            let answer = connection.call(&commands).await?;
            let times = Times::of(&inquiry, connection.time_at_most(here), APART);
            let root = value(&answer, 0).and_then(|root| number(root));
            let entry = value(&answer, 1).and_then(|bytes| self.counters.decode(bytes, times, inquiry.tier));
            Ok(Lookup::new(entry, (2..commands.len()).map(|at| generation(&answer, root, at)).collect()))
        })
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(async move {
            let (mut generations, mark, fences, connection) = self.add(tags).await?;
            let now = (connection.time_at_least() / 1_000).unsigned_abs();
            for (generation, fence) in generations.iter_mut().zip(fences) {
                let stands =
                    |bytes: Bytes| writers_in(&bytes).is_some_and(|all| all.iter().any(|(_, until)| *until >= now));
                if fence.is_some_and(stands) {
                    *generation = generation.fenced();
                }
            }
            Ok(Opened::new(generations, mark))
        })
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(async move {
            let (generations, now, fences, _) = self.add(tags).await?;
            // A fence may have stood when the load began, and its writer be gone.
            let is_proven = now == mark && fences.iter().all(Option::is_none);
            Ok(is_proven.then_some(generations))
        })
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, _: Tier, now: Millis) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            let keep = Duration::from_millis(entry.keep_until.saturating_sub(now)).min(self.generation_ttl);
            if keep.is_zero() {
                return Ok(());
            }
            let bytes = self.counters.encode(&entry, connection.time_at_least() - now as i64)?;
            if bytes.len() > connection.largest() {
                self.counters.too_large.fetch_add(1, Ordering::Relaxed);
                return Err(StoreError::new(
                    "larger than memcached's largest item: raise its -I, or lower the type's limit",
                ));
            }
            let answer = connection.call(&self.fill_commands(&connection, key, &entry, bytes, keep)).await?;
            let why = match kind(&answer, 0) {
                Some(Kind::Done) => None,
                _ => Some(refusal(&answer).unwrap_or("it was not stored")),
            };
            // It may know better than what it says of itself.
            if why.is_some_and(|why| why.contains("too large")) {
                self.counters.too_large.fetch_add(1, Ordering::Relaxed);
            } else {
                self.server.refuses(why);
            }
            why.map_or(Ok(()), |why| Err(StoreError::new(why)))
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(self.drop_tags(groups, fence))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(self.raise(groups, fence))
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            let add = Command::add(self.name("l:", key.as_bytes()), b"1".into(), connection.until(lease));
            let answer = connection.call(&[add]).await?;
            match kind(&answer, 0) {
                Some(Kind::Done) => Ok(true),
                Some(Kind::Refused) => Ok(false),
                _ => Err(StoreError::new(refusal(&answer).unwrap_or("a claim was not answered"))),
            }
        })
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            connection.call(&[Command::delete(self.name("l:", key.as_bytes()))]).await.map(drop)
        })
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.drop_root())
    }

    fn health(&self) -> Health {
        self.server.health()
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            let mut counts = vec![0; groups.len()];
            let tags: Vec<_> = by_tenant(groups).into_values().flatten().collect();
            let ask: Vec<_> = tags.iter().map(|(_, tag)| Command::get(self.name("c:", tag.as_bytes()))).collect();
            let answer = connection.call(&ask).await?;
            self.add_counts(&answer, 0, &tags, &mut counts);
            Ok(counts)
        })
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            let set = Command::set(self.name("n:", name.as_bytes()), note.into(), connection.until(NOTED));
            let answer = connection.call(&[set]).await?;
            refusal(&answer).map_or(Ok(()), |why| Err(StoreError::new(why.to_owned())))
        })
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            let answer = connection.call(&[Command::get(self.name("n:", name.as_bytes()))]).await?;
            Ok(value(&answer, 0).map(|note| note.to_vec()))
        })
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        Box::pin(async move {
            let connection = self.server.reading().await?;
            let soon = connection.until(SAID);
            let index = self.name("s:", exchange.fleet.as_bytes());
            let of = |member: &str| self.name("s:", format!("{}:{member}", exchange.fleet).as_bytes());
            let say = [Command::set(of(exchange.member), exchange.said.into(), soon), Command::get_cas(index.clone())];
            let answer = connection.call(&say).await?;
            let known = value(&answer, 1).map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default();
            let mut members: Vec<_> =
                known.lines().filter(|name| exchange.gone.iter().all(|gone| gone != name)).collect();
            if !members.contains(&exchange.member) && members.len() < MEMBERS {
                members.push(exchange.member);
            }
            let text = members.join("\n").into_bytes();
            // If somebody else has changed it just now, this is done the next time.
            let keep = match answer.replies.get(1).and_then(|reply| reply.as_ref()?.cas) {
                Some(cas) => Command::replace(index, text, soon, cas),
                None => Command::add(index, text, soon),
            };
            let mut commands = vec![keep];
            commands.extend(members.iter().filter(|_| exchange.hears).map(|member| Command::get(of(member))));
            let answer = connection.call(&commands).await?;
            Ok((1..commands.len()).filter_map(|at| value(&answer, at)).map(|said| said.to_vec()).collect())
        })
    }
}
