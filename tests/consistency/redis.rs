//! A Redis that is played, as far as the store asks anything of it: keys with an end, scripts of fences, pushes to those who
//! track, an identity that changes when another takes over. Over connections like those of the other store: what is sent
//! keeps its order, and comes late, or not for a while, or breaks off.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::AbortHandle,
    time::sleep_until,
};

use crate::{
    dice::mix,
    plan::{Fault, THINGS},
    sabotage::Sabotage,
    world::World,
};

/// How far the server's clock is ahead of the others', in milliseconds.
const AHEAD: u64 = 86_400_000;

const GENERATIONS: &[u8] = b"cas:g:";

type Command = Vec<Vec<u8>>;

#[derive(Clone)]
enum Data {
    Text(Vec<u8>),
    Members(BTreeSet<Vec<u8>>),
    Fences(BTreeMap<Vec<u8>, u64>),
}

#[derive(Clone)]
struct Item {
    data: Data,
    until: u64,
}

#[derive(Default)]
pub struct Redis(Mutex<Node>);

#[derive(Default)]
struct Node {
    items: HashMap<Vec<u8>, Item>,
    /// What was there before, of late: a replica may not have heard yet of what came instead.
    undo: Vec<(u64, Vec<u8>, Option<Item>)>,
    /// How many servers there were before this one.
    reign: u64,
    connections: Vec<Arc<Connection>>,
    /// Generations that have changed and that nobody has been told of.
    changed: Vec<Vec<u8>>,
}

struct Connection {
    process: usize,
    /// What the server says, in order.
    out: UnboundedSender<Vec<u8>>,
    tracks: AtomicBool,
    /// Its tasks.
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Connection {
    fn close(&self) {
        self.tasks.lock().unwrap().drain(..).for_each(|task| task.abort());
    }
}

impl Redis {
    /// Another server takes over, which has not heard of the last so many milliseconds.
    pub fn fail_over(&self, world: &World, lag: Option<u64>) {
        let node = &mut *self.0.lock().unwrap();
        let since = lag.map_or(u64::MAX, |lag| world.dice.now().saturating_sub(lag));
        while let Some((at, key, before)) = node.undo.pop() {
            if at < since {
                break;
            }
            match before {
                Some(item) => node.items.insert(key, item),
                None => node.items.remove(&key),
            };
        }
        node.undo.clear();
        if world.sabotage != Sabotage::ForgetTheReign {
            node.reign += 1;
        }
        node.connections.drain(..).for_each(|connection| connection.close());
    }

    pub fn flush(&self) {
        let node = &mut *self.0.lock().unwrap();
        node.items.clear();
        let all = b">2\r\n$10\r\ninvalidate\r\n_\r\n".to_vec();
        for connection in node.connections.iter().filter(|connection| connection.tracks.load(Ordering::SeqCst)) {
            let _ = connection.out.send(all.clone());
        }
    }
}

/// Connects a process to the server.
pub async fn connect(world: Arc<World>, process: usize, is_dead: Arc<AtomicBool>) -> io::Result<DuplexStream> {
    let salt = mix(70 << 8 | process as u64);
    world.dice.pause(salt).await;
    if is_dead.load(Ordering::SeqCst) {
        return std::future::pending().await;
    }
    if matches!(world.fault(process), Some(Fault::Cut | Fault::Resets)) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let (theirs, ours) = duplex(1 << 20);
    let (reading, writing) = split(ours);
    let (out, said) = unbounded_channel();
    let (tracks, tasks) = Default::default();
    let connection = Arc::new(Connection { process, out, tracks, tasks });
    let (asks, asked) = unbounded_channel();
    let tasks = [
        tokio::spawn(hear(world.clone(), connection.clone(), is_dead.clone(), reading, asks)).abort_handle(),
        tokio::spawn(answer(world.clone(), connection.clone(), asked)).abort_handle(),
        tokio::spawn(say(world.clone(), process, is_dead, said, writing)).abort_handle(),
    ];
    connection.tasks.lock().unwrap().extend(tasks);
    world.redis.0.lock().unwrap().connections.push(connection);
    Ok(theirs)
}

/// When what is sent now arrives, after what was sent before; `stalls` is what holds it up.
fn arrival(world: &World, process: usize, last: &mut u64, stalls: Fault) -> u64 {
    let salt = mix(71 << 8 | process as u64);
    let now = world.dice.now();
    let delay = match world.dice.roll(salt, 16) {
        0..=10 => 0,
        11..=14 => 1 + world.dice.roll(salt, 4),
        _ => 5 + world.dice.roll(salt, 14),
    };
    let held_up = match world.fault(process) {
        Some(Fault::Slow) => now + 10 + world.dice.roll(salt, 150),
        Some(fault) if fault == stalls || fault == Fault::Duplicates => world.fault_ends(process),
        _ => now,
    };
    *last = (*last).max(now + delay).max(held_up);
    *last
}

async fn hear(
    world: Arc<World>,
    connection: Arc<Connection>,
    is_dead: Arc<AtomicBool>,
    mut reading: ReadHalf<DuplexStream>,
    asks: UnboundedSender<(u64, Vec<Command>)>,
) {
    let (mut buffer, mut last) = (vec![], 0);
    while reading.read_buf(&mut buffer).await.is_ok_and(|n| n > 0) {
        if is_dead.load(Ordering::SeqCst) {
            return std::future::pending().await;
        }
        let mut commands = vec![];
        while let Some((command, rest)) = parse(&buffer) {
            buffer.drain(..buffer.len() - rest);
            commands.push(command);
        }
        let is_cut = matches!(world.fault(connection.process), Some(Fault::Cut | Fault::Resets));
        let at = arrival(&world, connection.process, &mut last, Fault::LosesRequests);
        if is_cut || asks.send((at, commands)).is_err() {
            break;
        }
    }
    connection.close();
}

async fn answer(world: Arc<World>, connection: Arc<Connection>, mut asked: UnboundedReceiver<(u64, Vec<Command>)>) {
    while let Some((at, commands)) = asked.recv().await {
        sleep_until(world.dice.instant(at)).await;
        let fault = world.fault(connection.process);
        let mut replies = vec![];
        for command in commands {
            world.redis.0.lock().unwrap().execute(&world, &connection, &command, fault, &mut replies);
        }
        // As in Redis: who tracks is told when all that has come is answered.
        let _ = connection.out.send(replies);
        world.redis.0.lock().unwrap().push(&world);
    }
}

async fn say(
    world: Arc<World>,
    process: usize,
    is_dead: Arc<AtomicBool>,
    mut said: UnboundedReceiver<Vec<u8>>,
    mut writing: WriteHalf<DuplexStream>,
) {
    let mut last = 0;
    let (sends, mut sent) = unbounded_channel::<(u64, Vec<u8>)>();
    let carry = {
        let world = world.clone();
        async move {
            while let Some((at, bytes)) = sent.recv().await {
                sleep_until(world.dice.instant(at)).await;
                if is_dead.load(Ordering::SeqCst) {
                    std::future::pending::<()>().await;
                }
                if writing.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        }
    };
    let queue = async move {
        while let Some(bytes) = said.recv().await {
            let at = arrival(&world, process, &mut last, Fault::LosesReplies);
            if sends.send((at, bytes)).is_err() {
                return;
            }
        }
    };
    tokio::join!(carry, queue);
}

/// The first command in the buffer, and how many bytes come after it.
fn parse(buffer: &[u8]) -> Option<(Command, usize)> {
    let number = |from: &mut &[u8]| {
        let end = from.windows(2).position(|two| two == b"\r\n")?;
        let number: usize = std::str::from_utf8(&from[1..end]).unwrap().parse().unwrap();
        *from = &from[end + 2..];
        Some(number)
    };
    let mut rest = buffer;
    let mut command = vec![];
    for _ in 0..number(&mut rest)? {
        let length = number(&mut rest)?;
        command.push(rest.get(..length)?.to_vec());
        rest = rest.get(length + 2..)?;
    }
    Some((command, rest.len()))
}

fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

fn count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(format!(":{count}\r\n").as_bytes());
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Commands that change something.
const WRITES: [&str; 11] =
    ["SET", "UNLINK", "DEL", "PEXPIREAT", "PFADD", "EVAL", "HSET", "HDEL", "EXPIRE", "PEXPIRE", "ZADD"];

impl Node {
    fn get(&self, now: u64, key: &[u8]) -> Option<&Data> {
        self.items.get(key).filter(|item| item.until > now).map(|item| &item.data)
    }

    fn put(&mut self, now: u64, key: &[u8], item: Option<Item>) {
        let before = match item {
            Some(item) => self.items.insert(key.to_vec(), item),
            None => self.items.remove(key),
        };
        self.undo.push((now, key.to_vec(), before));
        if key.starts_with(GENERATIONS) {
            self.changed.push(key.to_vec());
        }
    }

    /// Tells those who track which generations have changed.
    fn push(&mut self, world: &World) {
        for key in std::mem::take(&mut self.changed) {
            let mut push = b">2\r\n$10\r\ninvalidate\r\n*1\r\n".to_vec();
            bulk(&mut push, &key);
            if world.sabotage == Sabotage::TellNobody {
                continue;
            }
            for connection in self.connections.iter().filter(|connection| connection.tracks.load(Ordering::SeqCst)) {
                let _ = connection.out.send(push.clone());
            }
        }
    }

    fn execute(
        &mut self,
        world: &World,
        connection: &Connection,
        command: &[Vec<u8>],
        fault: Option<Fault>,
        out: &mut Vec<u8>,
    ) {
        let (name, args) = (text(&command[0]).to_ascii_uppercase(), &command[1..]);
        let now = world.dice.now();
        if fault == Some(Fault::ReadOnly) && WRITES.contains(&&*name) {
            return out.extend_from_slice(b"-READONLY You can't write against a read only replica.\r\n");
        }
        if fault == Some(Fault::Refuses) && ["SET", "PFADD", "EVAL"].contains(&&*name) {
            return out.extend_from_slice(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n");
        }
        match &*name {
            "HELLO" => out.extend_from_slice(b"%1\r\n$6\r\nserver\r\n$5\r\nredis\r\n"),
            "CLIENT" => {
                if args[0].eq_ignore_ascii_case(b"TRACKING") {
                    connection.tracks.store(true, Ordering::SeqCst);
                }
                out.extend_from_slice(b"+OK\r\n");
            }
            "INFO" => {
                let reign = self.reign;
                bulk(out, format!("run_id:{reign:040}\r\nrole:master\r\nmaster_replid:{reign:040}\r\n").as_bytes());
            }
            "TIME" => {
                let time = now + AHEAD;
                out.extend_from_slice(b"*2\r\n");
                bulk(out, (time / 1_000).to_string().as_bytes());
                bulk(out, (time % 1_000 * 1_000).to_string().as_bytes());
            }
            "HVALS" => out.extend_from_slice(b"*0\r\n"),
            "HSET" | "HDEL" | "EXPIRE" | "WAIT" => count(out, 1),
            _ => self.keys(world, now, (&*name, args), out),
        }
    }

    /// Commands of keys.
    fn keys(&mut self, world: &World, now: u64, (name, args): (&str, &[Vec<u8>]), out: &mut Vec<u8>) {
        match name {
            "MGET" => {
                out.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
                args.iter().for_each(|key| self.say(now, key, out));
            }
            "GET" => self.say(now, &args[0], out),
            "SET" => self.set(now, args, out),
            "UNLINK" | "DEL" => {
                args.iter().for_each(|key| self.put(now, key, None));
                world.dropped(things(world, args.iter()));
                count(out, args.len());
            }
            "PEXPIREAT" => {
                let until = text(&args[1]).parse::<u64>().unwrap().saturating_sub(AHEAD);
                let item = self.items.get(&args[0]).filter(|item| item.until > now).cloned();
                if let Some(item) = item.filter(|item| item.until < until) {
                    self.put(now, &args[0], Some(Item { until, ..item }));
                }
                count(out, 1);
            }
            "PFADD" => {
                let mut members = match self.get(now, &args[0]) {
                    Some(Data::Members(members)) => members.clone(),
                    _ => BTreeSet::new(),
                };
                members.extend(args[1..].iter().cloned());
                self.put(now, &args[0], Some(Item { data: Data::Members(members), until: u64::MAX }));
                count(out, 1);
            }
            "PFCOUNT" => {
                let members = |key: &Vec<u8>| match self.get(now, key) {
                    Some(Data::Members(members)) => members.len(),
                    _ => 0,
                };
                count(out, args.iter().map(members).sum());
            }
            // Whether there are scripts at all.
            "EVAL" if args[1] == b"0" => count(out, 1),
            "EVAL" => {
                self.fence(world, now, args);
                out.extend_from_slice(b"_\r\n");
            }
            // The last of them.
            "ZREVRANGE" => match self.get(now, &args[0]) {
                Some(Data::Fences(fences)) => {
                    let (writer, until) = fences.iter().max_by_key(|(_, until)| **until).unwrap();
                    out.extend_from_slice(b"*1\r\n*2\r\n");
                    bulk(out, writer);
                    out.extend_from_slice(format!(",{}\r\n", until + AHEAD).as_bytes());
                }
                _ => out.extend_from_slice(b"*0\r\n"),
            },
            "SCAN" => {
                let pattern = text(&args[2]).trim_end_matches('*').as_bytes().to_vec();
                let found: BTreeSet<_> = self.items.keys().filter(|key| key.starts_with(&pattern)).collect();
                out.extend_from_slice(format!("*2\r\n$1\r\n0\r\n*{}\r\n", found.len()).as_bytes());
                found.into_iter().for_each(|key| bulk(out, key));
            }
            _ => panic!("the played Redis does not know {name}"),
        }
    }

    fn say(&self, now: u64, key: &[u8], out: &mut Vec<u8>) {
        match self.get(now, key) {
            Some(Data::Text(text)) => bulk(out, text),
            _ => out.extend_from_slice(b"_\r\n"),
        }
    }

    /// `SET key value [NX] PX ttl`.
    fn set(&mut self, now: u64, args: &[Vec<u8>], out: &mut Vec<u8>) {
        let option = |name: &str| args.iter().position(|arg| arg.eq_ignore_ascii_case(name.as_bytes()));
        let ttl = option("PX").map_or(u64::MAX / 2, |at| text(&args[at + 1]).parse().unwrap());
        if option("NX").is_some() && self.get(now, &args[0]).is_some() {
            out.extend_from_slice(b"_\r\n");
        } else {
            out.extend_from_slice(b"+OK\r\n");
            self.put(now, &args[0], Some(Item { data: Data::Text(args[1].clone()), until: now + ttl }));
        }
    }

    /// The script of fences.
    fn fence(&mut self, world: &World, now: u64, args: &[Vec<u8>]) {
        let count: usize = text(&args[1]).parse().unwrap();
        let (keys, argv) = args[2..].split_at(count);
        let number = |at: usize| text(&argv[at]).parse::<u64>().unwrap();
        let (writer, stands, remembered) = (&argv[0], number(1), number(2));
        self.put(now, &keys[0], None);
        for (pair, fenced) in keys[1..].chunks(2).zip(&argv[3..]) {
            let [generation, name] = pair else { panic!("no pair") };
            let mut fences = match self.get(now, name) {
                Some(Data::Fences(fences)) => fences.clone(),
                _ => BTreeMap::new(),
            };
            fences.retain(|_, until| *until > now);
            match stands {
                0 => fences.remove(writer),
                _ => fences.insert(writer.clone(), now + stands),
            };
            let last = fences.values().max().copied();
            let item = |data, longer| last.map(|until| Item { data, until: until + longer });
            self.put(now, generation, item(Data::Text(fenced.clone()), 0));
            self.put(now, name, item(Data::Fences(fences.clone()), remembered));
        }
        world.dropped(things(world, keys.iter()));
    }
}

/// The things all of whose tags these keys drop.
fn things<'k>(world: &World, keys: impl Iterator<Item = &'k Vec<u8>>) -> impl Iterator<Item = usize> {
    let tags: BTreeSet<_> = keys.filter_map(|key| key.strip_prefix(GENERATIONS)).map(<[u8]>::to_vec).collect();
    (0..THINGS).filter(move |thing| world.server.cascades[*thing].is_subset(&tags))
}
