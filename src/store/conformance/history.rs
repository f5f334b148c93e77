//! Readers and writers at once, and what they see: no entry is valid that was loaded before a write, once that write's
//! invalidation was acknowledged.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::scene::{
    Flaw, Handle, Scene, Seen, TIERS, entry, expect, group, is_valid, never, now, response, stamps, text,
};
use crate::{
    catalog::Tier,
    key::{Key, Tag},
    store::{Entry, Fence, Generation, Inquiry, Mark},
};

const THINGS: usize = 3;

/// How long they go on, at least; and at most, until something has been found.
const LASTS: (Duration, Duration) = (Duration::from_millis(1_500), Duration::from_secs(6));

/// One row of the database behind the cache.
struct Thing {
    key: Key,
    tag: Tag,
    /// The version that who reads it now gets.
    written: AtomicU64,
    /// The last version whose invalidation has been acknowledged.
    acknowledged: AtomicU64,
    /// The same, for writes of each handle: in its own process they take effect at once, also where nothing is asked.
    own: [AtomicU64; 3],
}

struct World {
    tier: Tier,
    things: Vec<Thing>,
    /// What is in every entry: all of them fall with it.
    whole: Tag,
    hits: AtomicU64,
    ends: Instant,
}

pub(super) async fn no_entry_outlives_the_drop_of_its_tags(scene: &Scene) -> Seen {
    let worlds = TIERS.into_iter().enumerate().map(|(i, tier)| play(scene, Arc::new(world(scene, i, tier))));
    join_all(worlds).await.into_iter().collect()
}

fn world(scene: &Scene, i: usize, tier: Tier) -> World {
    let thing = |n: usize| {
        let id = format!("{i}-{n}");
        let [written, acknowledged] = [1, 1].map(AtomicU64::new);
        Thing { key: scene.key(&id), tag: scene.tag(&id), written, acknowledged, own: [1, 1, 1].map(AtomicU64::new) }
    };
    World {
        tier,
        things: (0..THINGS).map(thing).collect(),
        whole: scene.tag(&format!("{i}-whole")),
        hits: AtomicU64::new(0),
        ends: Instant::now() + LASTS.0,
    }
}

/// Each in a task of its own, and so in a thread if there are several.
async fn play(scene: &Scene, world: Arc<World>) -> Seen {
    let mut tasks = JoinSet::new();
    for (at, handle) in scene.handles().into_iter().enumerate() {
        for first in 0..2 {
            tasks.spawn(read(handle.clone(), at, world.clone(), first));
        }
        tasks.spawn(write(handle.clone(), at, world.clone()));
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| Flaw::Wrong(format!("a call ends with {error}")))??;
    }
    expect(world.hits.load(Ordering::Relaxed) > 0, || format!("tier {:?}: nothing was ever found valid", world.tier))
}

impl World {
    fn goes_on(&self) -> bool {
        let now = Instant::now();
        let last = self.ends + (LASTS.1 - LASTS.0);
        now < self.ends || (self.hits.load(Ordering::Relaxed) == 0 && now < last)
    }

    /// An entry is of this version, or of a later one.
    fn at_least(&self, needed: u64, entry: &Entry, how: &str) -> Seen {
        let version = text(entry).parse::<u64>().map_err(|_| Flaw::Wrong(format!("found {:?}", text(entry))))?;
        never(version < needed, || {
            format!("tier {:?}: version {version} is {how}, after a write of {needed} was acknowledged", self.tier)
        })
    }
}

/// Looks up, and on a miss loads and fills, as the engine does. Whoever gets no answer tries again later.
async fn read(handle: Handle, at: usize, world: Arc<World>, mut n: usize) -> Seen {
    while world.goes_on() {
        n += 1;
        let thing = &world.things[n % THINGS];
        let tags = [thing.tag.clone(), world.whole.clone()];
        let own = thing.own[at].load(Ordering::SeqCst);
        if let Some(entry) = handle.0.peek(thing.key.as_bytes(), now()) {
            world.at_least(own, &entry, "answered at once")?;
        }
        let needed = thing.acknowledged.load(Ordering::SeqCst);
        let held = handle.0.held(thing.key.as_bytes(), world.tier);
        if let Some(entry) = held
            && handle.0.is_current(thing.key.as_bytes(), &entry).await.is_ok_and(|is_current| is_current)
        {
            world.at_least(needed, &entry, "current")?;
        }
        let inquiry = Inquiry::new(&thing.key, &tags, world.tier, now());
        let Ok(found) = handle.0.lookup(inquiry).await else {
            sleep(Duration::from_millis(5)).await;
            continue;
        };
        if let Some(entry) = found.entry.filter(|entry| is_valid(entry, &tags, &found.generations)) {
            world.at_least(needed, &entry, "valid")?;
            world.hits.fetch_add(1, Ordering::Relaxed);
        } else if let Some((version, generations)) =
            load(&handle, thing, &tags, (&found.generations, found.mark), n).await
        {
            let entry = entry(response(version.to_string()), stamps(&tags, &generations));
            let _ = handle.0.fill(&thing.key, Arc::new(entry), world.tier, now()).await;
        }
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Opens the generations before a load, or those that were absent after it, if the look-up is marked; `None` if nothing is stored.
async fn load(
    handle: &Handle,
    thing: &Thing,
    tags: &[Tag],
    (seen, mark): (&[Option<Generation>], Option<Mark>),
    n: usize,
) -> Option<(u64, Vec<Generation>)> {
    let is_marked = mark.is_some() && !seen.iter().flatten().any(|generation| generation.is_fenced());
    let mut generations = seen.to_vec();
    if !is_marked {
        generations = handle.0.open(tags).await.ok()?.generations.into_iter().map(Some).collect();
    }
    let version = thing.written.load(Ordering::SeqCst);
    // A slow load, now and then.
    sleep(Duration::from_millis([0, 1, 8][n % 3])).await;
    let absent = tags.iter().zip(&generations).filter(|(_, now)| now.is_none()).map(|(tag, _)| tag.clone());
    let absent: Vec<_> = absent.collect();
    if !absent.is_empty() {
        let opened = handle.0.open(&absent).await.ok().filter(|opened| Some(opened.mark) == mark)?;
        let places = generations.iter_mut().filter(|now| now.is_none());
        places.zip(opened.generations).for_each(|(place, made)| *place = Some(made));
    }
    let generations = generations.into_iter().collect::<Option<Vec<_>>>()?;
    (!generations.iter().any(|generation| generation.is_fenced())).then_some((version, generations))
}

/// Writes one thing, or all of them, behind a fence or not; those of others are always left standing.
async fn write(handle: Handle, at: usize, world: Arc<World>) -> Seen {
    let mut n = at;
    while world.goes_on() {
        n += 1;
        let fence = Fence::new(Duration::from_secs(60), Duration::ZERO);
        let is_whole = n.is_multiple_of(5);
        let things = if is_whole { &world.things[..] } else { std::slice::from_ref(&world.things[n % THINGS]) };
        let tag = if is_whole { &world.whole } else { &things[0].tag };
        let groups = group(std::slice::from_ref(tag));
        if n.is_multiple_of(2) && handle.0.fence(&groups, &fence).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
        let written: Vec<_> = things.iter().map(|thing| thing.written.fetch_add(1, Ordering::SeqCst) + 1).collect();
        // Until it is acknowledged, nothing is known.
        while handle.0.invalidate(&groups, Some(&fence)).await.is_err() && world.goes_on() {
            sleep(Duration::from_millis(20)).await;
        }
        if world.goes_on() {
            for (thing, version) in things.iter().zip(written) {
                thing.acknowledged.fetch_max(version, Ordering::SeqCst);
                thing.own[at].fetch_max(version, Ordering::SeqCst);
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
