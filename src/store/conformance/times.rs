//! Another process' clock, and its opinion of how long is fresh; for stores that say that they are shared.

use std::{sync::Arc, time::Duration};

use super::scene::{Flaw, HOUR, Handle, Scene, Seen, TIERS, entry, expect, never, now, response, stamps};
use crate::{
    catalog::{Lifetime, Tier},
    clock::Millis,
    store::{Entry, Inquiry, Payload},
};

/// What a call may take between the look at a clock and its use. Nobody is told a time more exactly.
const EXACT: i64 = 1_000;

/// A reader whose clock differs by this from the writer's.
struct Reader<'a> {
    handle: &'a Handle,
    ahead: i64,
}

impl Reader<'_> {
    fn now(&self) -> Millis {
        now().saturating_add_signed(self.ahead)
    }
}

fn readers(scene: &Scene) -> [Reader<'_>; 2] {
    const DAY: i64 = 86_400_000;
    [Reader { handle: &scene.there, ahead: DAY }, Reader { handle: &scene.elsewhere, ahead: -400 * DAY }]
}

/// By the reader's clock, what was meant by the writer's: never later, and not much earlier.
fn is_as_meant(meant: &Entry, read: &Entry, ahead: i64) -> Seen {
    let of =
        |e: &Entry| [("expires", e.expires), ("refresh_until", e.refresh_until), ("on_error_until", e.on_error_until)];
    for ((name, meant), (_, read)) in of(meant).into_iter().zip(of(read)) {
        if meant == Millis::MAX {
            continue;
        }
        let later = read.saturating_add_signed(-ahead) as i64 - meant as i64;
        never(later > EXACT, || format!("`{name}` is {later} ms later than it was meant"))?;
        expect(later > -60_000, || format!("`{name}` is {} ms earlier than it was meant", -later))?;
    }
    Ok(())
}

pub(super) async fn no_other_clock_makes_an_entry_last_longer(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let generations = scene.here.open(&tags).await?.generations;
    for (i, tier) in TIERS.into_iter().enumerate() {
        for reader in readers(scene) {
            let key = scene.key(&format!("{i}-{}", reader.ahead));
            let filled = Arc::new(entry(response("timed"), stamps(&tags, &generations)));
            scene.here.put(&key, &filled, tier).await?;
            // Twice: a tier in the process may have it the second time.
            for _ in 0..2 {
                let found = reader.handle.ask(Inquiry::new(&key, &tags, tier, reader.now())).await?.entry;
                let found = found.ok_or_else(|| Flaw::Missing("nothing found after a fill".to_owned()))?;
                is_as_meant(&filled, &found, reader.ahead)?;
                expect(found.is_fresh(reader.now()), || "what is fresh for an hour is not fresh".to_owned())?;
                let (age, own) = (found.age(reader.now()), filled.age(now()));
                never(age + Duration::from_millis(EXACT as u64) < own, || {
                    format!("its age is {age:?} instead of {own:?}")
                })?;
            }
        }
    }
    Ok(())
}

/// What is fresh for ever is so by every clock.
pub(super) async fn for_ever_is_for_ever_by_every_clock(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let generations = scene.here.open(&tags).await?.generations;
    for reader in readers(scene) {
        let key = scene.key(&reader.ahead.to_string());
        let payload = Payload::Response(response("for ever"));
        let filled = Entry::new(payload, stamps(&tags, &generations), now(), Lifetime::fresh_for(None));
        scene.here.put(&key, &Arc::new(filled), Tier::Off).await?;
        let found = reader.handle.ask(Inquiry::new(&key, &tags, Tier::Off, reader.now())).await?.entry;
        let later = reader.now() + HOUR.as_millis() as Millis;
        let is_fresh = found.is_some_and(|entry| entry.is_fresh(later));
        expect(is_fresh, || "what is fresh for ever was not found, or ends within the hour".to_owned())?;
    }
    Ok(())
}

/// A deployment may shorten a TTL: what older processes have filled is no exception.
pub(super) async fn a_reader_has_the_last_word_on_how_long(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let generations = scene.here.open(&tags).await?.generations;
    let longest = Duration::from_secs(600);
    for (i, (tier, fresh)) in TIERS.into_iter().flat_map(|tier| [(tier, Some(HOUR)), (tier, None)]).enumerate() {
        let key = scene.key(&i.to_string());
        let payload = Payload::Response(response("too long"));
        let filled = Entry::new(payload, stamps(&tags, &generations), now(), Lifetime::fresh_for(fresh));
        scene.here.put(&key, &Arc::new(filled), tier).await?;
        for _ in 0..2 {
            let inquiry = Inquiry { longest: Some(longest), ..Inquiry::new(&key, &tags, tier, now()) };
            let found = scene.there.ask(inquiry).await?.entry;
            let found = found.ok_or_else(|| Flaw::Missing("nothing found after a fill".to_owned()))?;
            let latest = now() + longest.as_millis() as Millis + EXACT as Millis;
            never(found.expires > latest, || format!("tier {tier:?}: fresh for longer than `longest` says"))?;
            expect(found.is_fresh(now()), || "what is fresh for ten minutes is not fresh".to_owned())?;
        }
    }
    Ok(())
}
