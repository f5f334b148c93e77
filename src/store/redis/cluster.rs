//! A Redis cluster: a connection to every master, and a watch over them.
//!
//! All keys of a tenant are in one slot, so each command goes to one server; a server that answers that a slot has moved,
//! or is moving, is a miss until the next heartbeat. Each heartbeat asks each of them which slots it serves; a slot that
//! exactly one claims is served, with that server's run id as its *run*. The run is part of how a generation is read, so
//! what was filled under another server than the present one (a replica that took over, a master that came back from a
//! snapshot) is not valid: it may have lost invalidations. Processes that have not noticed yet still write the same keys,
//! so nothing depends on their noticing together.
//!
//! The same connections track the generations for the tier in process: it is answered from while every master has
//! answered, and the slots are all there.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use redis::{Client, ConnectionInfo, ErrorKind, RedisError, Value};
use tokio::{task::JoinSet, time::timeout};

use super::{
    address::info,
    link::{CONNECT, Line, Link, Session, push_config, run_id},
    tracker::Held,
};

const SLOTS: usize = 16_384;

/// What the slot of a key is counted by.
const CRC: crc::Crc<u16> = crc::Crc::<u16>::new(&crc::CRC_16_XMODEM);

/// Who serves each slot; nobody while it is not known.
#[derive(Default)]
pub(super) struct Slots(Vec<Option<Arc<Master>>>);

impl Slots {
    /// Where the keys of a tenant are; `tenant` as it is in keys, with its braces.
    pub(super) fn line(&self, tenant: &[u8]) -> Option<Line> {
        let begin = tenant.iter().position(|&c| c == b'{').map_or(0, |at| at + 1);
        let inner = tenant[begin..].strip_suffix(b"}").unwrap_or(tenant);
        let slot = usize::from(CRC.checksum(inner)) % SLOTS;
        self.0.get(slot)?.as_ref().map(|master| master.line.clone())
    }

    fn new(claims: &[(Arc<Master>, Claim)]) -> Self {
        let mut slots: Vec<Option<Arc<Master>>> = vec![None; SLOTS];
        let mut disputed = BTreeSet::new();
        for (master, claim) in claims {
            for slot in claim.own.iter().flat_map(|&(first, last)| first..=last).map(usize::from) {
                if slot < SLOTS && slots[slot].replace(master.clone()).is_some() {
                    disputed.insert(slot);
                }
            }
        }
        disputed.into_iter().for_each(|slot| slots[slot] = None);
        Self(slots)
    }

    /// How many slots nobody is known to serve.
    pub(super) fn unserved(&self) -> usize {
        self.0.iter().filter(|slot| slot.is_none()).count()
    }
}

impl PartialEq for Slots {
    fn eq(&self, other: &Self) -> bool {
        let same = |(a, b): (&Option<Arc<Master>>, &Option<Arc<Master>>)| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(same)
    }
}

/// A master that is watched.
struct Master {
    line: Line,
    id: String,
}

/// What one master says: the slots it serves itself, and the addresses of all masters.
#[derive(Default)]
struct Claim {
    own: Vec<(u16, u16)>,
    masters: BTreeSet<String>,
}

/// Watches the masters for as long as the link has this session.
pub(super) async fn watch(link: &Weak<Link>, session: &Arc<Session>, seeds: &[ConnectionInfo]) {
    let mut masters: BTreeMap<String, Arc<Master>> = BTreeMap::new();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    loop {
        let Some(strong) = link.upgrade() else { return };
        let heartbeat = strong.options.heartbeat;
        let held = strong.held.clone();
        let beat = Instant::now();
        if wanted.is_empty() {
            wanted = seeds.iter().map(|seed| seed.addr().to_string()).collect();
        }
        let mut armed = false;
        for address in &wanted {
            if masters.contains_key(address) {
                continue;
            }
            match timeout(CONNECT, connect(address, &seeds[0], &strong, session, &held)).await {
                Ok(Ok(master)) => {
                    masters.insert(address.clone(), Arc::new(master));
                    armed = true;
                }
                Ok(Err(error)) => tracing::debug!(address, %error, "cannot connect to a master"),
                Err(_) => tracing::debug!(address, "cannot connect to a master in time"),
            }
        }
        let claims = ask(&mut masters, heartbeat).await;
        let seen: BTreeSet<String> = claims.iter().flat_map(|(_, claim)| claim.masters.iter().cloned()).collect();
        let slots = Slots::new(&claims);
        let unserved = slots.unserved();
        let whole = unserved == 0 && seen.iter().all(|address| masters.contains_key(address));
        let changed = session.publish(slots);
        if changed || !whole {
            let answered = claims.len();
            tracing::debug!(answered, ?seen, unserved, "the cluster changes");
        }
        if let Some(held) = held.as_ref().and_then(Weak::upgrade) {
            // What was heard of before a master was armed, or under another server, proves nothing.
            if changed || armed || !whole {
                held.lose();
            } else {
                held.prove(beat, heartbeat * 2);
            }
        }
        if !seen.is_empty() {
            masters.retain(|address, _| seen.contains(address));
            wanted = seen;
        } else if masters.is_empty() {
            wanted.clear();
        }
        drop(strong);
        let _ = timeout(heartbeat.saturating_sub(beat.elapsed()), session.wrong()).await;
        // Not at once again: a slot that is moving is wrong for a while.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn connect(
    address: &str,
    seed: &ConnectionInfo,
    link: &Link,
    session: &Session,
    held: &Option<Weak<Held>>,
) -> Result<Master, RedisError> {
    // Credentials and TLS are the same on all nodes.
    let (host, port) = address.rsplit_once(':').ok_or((ErrorKind::Client, "a cluster node without a port"))?;
    let port = port.parse().map_err(|_| (ErrorKind::Client, "a cluster node without a port"))?;
    let addr = match seed.addr() {
        redis::ConnectionAddr::TcpTls { insecure, tls_params, .. } => redis::ConnectionAddr::TcpTls {
            host: host.to_owned(),
            port,
            insecure: *insecure,
            tls_params: tls_params.clone(),
        },
        _ => redis::ConnectionAddr::Tcp(host.to_owned(), port),
    };
    let prefix = format!("{}g:", session.space).into_bytes();
    let heard = prefix.clone();
    let ears = held.clone();
    let config = push_config(move |push: redis::PushInfo| {
        if let Some(held) = ears.as_ref().and_then(Weak::upgrade) {
            held.hear(&push, &heard);
        }
        Ok::<_, std::convert::Infallible>(())
    });
    let client = Client::open(info(seed.clone()).set_addr(addr))?;
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    let id = redis::cmd("CLUSTER").arg("MYID").query_async(&mut connection).await?;
    let run = match run_id(&mut connection).await? {
        Some(run) if !link.options.trust_restarted => {
            u128::from_str_radix(&run, 16).map_err(|_| (ErrorKind::Client, "a run id that is no number"))?
        }
        _ => 0,
    };
    if held.is_some() {
        let mut tracking = redis::cmd("CLIENT");
        tracking.arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(&prefix);
        tracking.query_async::<Value>(&mut connection).await?;
    }
    Ok(Master { line: Line { connection, run }, id })
}

/// Asks all masters at once; those that do not answer within a heartbeat are given up.
async fn ask(masters: &mut BTreeMap<String, Arc<Master>>, heartbeat: Duration) -> Vec<(Arc<Master>, Claim)> {
    let mut asked = JoinSet::new();
    for (address, master) in masters.iter() {
        let (address, mut connection, master) = (address.clone(), master.line.connection.clone(), master.clone());
        asked.spawn(async move {
            let mut slots = redis::cmd("CLUSTER");
            let slots = slots.arg("SLOTS");
            match timeout(heartbeat, slots.query_async::<Value>(&mut connection)).await {
                Ok(Ok(reply)) => Ok((parse(&reply, &master.id), master)),
                _ => Err(address),
            }
        });
    }
    let mut claims = vec![];
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok(Ok((claim, master))) => claims.push((master, claim)),
            Ok(Err(address)) => drop(masters.remove(&address)),
            Err(_) => {}
        }
    }
    claims
}

/// Reads `CLUSTER SLOTS`: [first, last, [host, port, id, …], replicas …] for each range.
fn parse(reply: &Value, id: &str) -> Claim {
    let mut claim = Claim::default();
    let Value::Array(ranges) = reply else { return claim };
    for range in ranges {
        let Value::Array(range) = range else { continue };
        let [Value::Int(first), Value::Int(last), Value::Array(master), ..] = &range[..] else { continue };
        let [Value::BulkString(host), Value::Int(port), Value::BulkString(node), ..] = &master[..] else { continue };
        claim.masters.insert(format!("{}:{port}", String::from_utf8_lossy(host)));
        if node == id.as_bytes()
            && let (Ok(first), Ok(last)) = (u16::try_from(*first), u16::try_from(*last))
        {
            claim.own.push((first, last));
        }
    }
    claim
}
