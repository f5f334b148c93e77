//! What is popular: counted by tenant, so that no tenant displaces another, and fading.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::layer::{Replay, Seen};

/// Requests that are counted, of each tenant and of all. What was asked once is not among them.
const COUNTED: usize = 4_096;
const ALL: usize = 16_384;

/// Requests that were asked once, remembered at once for all tenants.
const ONCE: usize = 16_384;

/// Tenants that are told apart; those that come later share one place.
const TENANTS: usize = 64;

/// No tenant has more than this part of the list.
const SHARE: usize = 5;

/// What a count is worth a minute later.
const FADES: f64 = 0.8;

/// Counts below this are forgotten.
const LEAST: f64 = 1.0;

/// What was loaded and is not stored is left alone for so long, at first.
const VAIN: Duration = Duration::from_secs(60);

/// Why something is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Cause {
    /// It was popular before this process began.
    Start,
    /// A write has dropped it.
    Refill,
    /// It was about to end.
    Expiry,
    /// It was gone.
    Missing,
}

pub(super) const CAUSES: [(Cause, &str); 4] =
    [(Cause::Start, "start"), (Cause::Refill, "refill"), (Cause::Expiry, "expiry"), (Cause::Missing, "missing")];

/// A request that was asked more than once.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) replay: Replay,
    pub(super) score: f64,
    tags: Box<[u64]>,
    /// When it is to be asked again, and why; `None` while it is.
    next: Option<(Instant, Cause)>,
    /// How often it was loaded and not stored, in a row.
    vain: u32,
}

/// As it is told to other processes, and to the next that is started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Listed {
    pub(super) id: u64,
    pub(super) tenant: Vec<u8>,
    pub(super) score: f64,
    pub(super) replay: Replay,
}

/// A place of the list: whose, and which.
pub(super) type Place = (Box<[u8]>, u64);

#[derive(Debug, Default)]
pub(super) struct List {
    tenants: HashMap<Box<[u8]>, HashMap<u64, Known>>,
    once: HashSet<u64>,
    /// The most popular, in that order.
    ranked: Vec<Place>,
}

impl List {
    /// Whose place a tenant's requests have.
    fn place(&self, tenant: &[u8]) -> Box<[u8]> {
        let has_room = self.tenants.len() < TENANTS || self.tenants.contains_key(tenant);
        if has_room { tenant.into() } else { Box::default() }
    }

    /// A request was asked.
    pub(super) fn seen(&mut self, seen: Seen) {
        let Seen { id, tenant, tags, replay } = seen;
        let place = self.place(&tenant);
        if let Some(known) = self.tenants.get_mut(&place).and_then(|known| known.get_mut(&id)) {
            known.score += 1.0;
            known.tags = tags;
            return;
        }
        // One that is not asked again takes no place.
        if self.once.insert(id) {
            if self.once.len() > ONCE {
                self.once.clear();
            }
            return;
        }
        self.once.remove(&id);
        let known = self.tenants.entry(place).or_default();
        known.insert(id, Known { replay, score: 2.0, tags, next: None, vain: 0 });
        if known.len() > COUNTED {
            purge(known);
        }
        if self.count() > ALL {
            self.tenants.values_mut().for_each(purge);
        }
    }

    fn count(&self) -> usize {
        self.tenants.values().map(HashMap::len).sum()
    }

    /// What others have found popular, or a process before this one: to be asked at once, if this one has not seen it.
    pub(super) fn adopt(&mut self, listed: Listed, now: Option<Instant>) {
        let place = self.place(&listed.tenant);
        let known = self.tenants.entry(place).or_default();
        if known.len() >= COUNTED || known.contains_key(&listed.id) || !(LEAST..1e9).contains(&listed.score) {
            return;
        }
        let next = now.map(|now| (now, Cause::Start));
        known.insert(listed.id, {
            let Listed { replay, score, .. } = listed;
            Known { replay, score, tags: Box::default(), next, vain: 0 }
        });
    }

    /// A minute is over.
    pub(super) fn fade(&mut self) {
        self.tenants.values_mut().for_each(|known| fade(known, FADES));
        self.tenants.retain(|_, known| !known.is_empty());
    }

    /// Ranks it all anew, `most` of it: of no tenant more than its share, where there are others. What is new in it is asked soon.
    pub(super) fn rank(&mut self, most: usize, now: Instant) {
        let mut all: Vec<(f64, Place)> = vec![];
        for (tenant, known) in &self.tenants {
            let mut own: Vec<_> = known.iter().map(|(id, known)| (known.score, (tenant.clone(), *id))).collect();
            own.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
            own.truncate((most / SHARE).max(1));
            all.extend(own);
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        all.truncate(most);
        let before: HashSet<Place> = std::mem::take(&mut self.ranked).into_iter().collect();
        self.ranked = all.into_iter().map(|(_, place)| place).collect();
        let new: Vec<_> = self.ranked.iter().filter(|place| !before.contains(*place)).cloned().collect();
        for place in new {
            if let Some(known) = self.get(&place)
                && known.next.is_none()
            {
                known.next = Some((now, Cause::Missing));
            }
        }
    }

    fn get(&mut self, (tenant, id): &Place) -> Option<&mut Known> {
        self.tenants.get_mut(tenant)?.get_mut(id)
    }

    /// Those of these tags were dropped, or all: they are asked at once.
    pub(super) fn dropped(&mut self, tags: Option<&[u64]>, now: Instant) {
        let tags: Option<HashSet<u64>> = tags.map(|tags| tags.iter().copied().collect());
        for (tenant, id) in &self.ranked {
            let known = self.tenants.get_mut(tenant).and_then(|known| known.get_mut(id));
            if let Some(known) =
                known.filter(|known| tags.as_ref().is_none_or(|tags| known.tags.iter().any(|t| tags.contains(t))))
            {
                known.next = Some((now, Cause::Refill));
            }
        }
    }

    /// What is to be asked now: what writes have dropped first.
    pub(super) fn due(&mut self, now: Instant) -> Option<(Place, Cause, Replay)> {
        let mut first: Option<(Cause, Place)> = None;
        for place in &self.ranked {
            let known = self.tenants.get(&place.0).and_then(|known| known.get(&place.1));
            let Some((at, cause)) = known.and_then(|known| known.next) else { continue };
            if at <= now && first.as_ref().is_none_or(|(known, _)| cause == Cause::Refill && *known != Cause::Refill) {
                first = Some((cause, place.clone()));
            }
        }
        let (cause, place) = first?;
        let known = self.get(&place)?;
        known.next = None;
        Some((place, cause, known.replay.clone()))
    }

    /// It was asked, and is good for so long. What has been dropped meanwhile is asked again at once.
    pub(super) fn done(&mut self, place: &Place, again: Duration, now: Instant) {
        let Some(known) = self.get(place).filter(|known| known.next.is_none()) else { return };
        known.vain = 0;
        known.next = Some((now + again, Cause::Expiry));
    }

    /// It was loaded, and is not stored: each time it is left alone for twice as long.
    pub(super) fn in_vain(&mut self, place: &Place, now: Instant) {
        let Some(known) = self.get(place).filter(|known| known.next.is_none()) else { return };
        let again = VAIN.saturating_mul(1 << known.vain.min(6));
        known.vain += 1;
        known.next = Some((now + again, Cause::Missing));
    }

    /// As it is told to others.
    pub(super) fn listed(&self) -> Vec<Listed> {
        let listed = |(tenant, id): &Place| {
            let known = self.tenants.get(tenant)?.get(id)?;
            Some(Listed { id: *id, tenant: tenant.to_vec(), score: known.score, replay: known.replay.clone() })
        };
        self.ranked.iter().filter_map(listed).collect()
    }

    /// The first of it, for those who look on: whose, what, and how popular.
    pub(super) fn first(&self, most: usize) -> Vec<(Vec<u8>, String, f64)> {
        let first = |(tenant, id): &Place| {
            let known = self.tenants.get(tenant)?.get(id)?;
            Some((tenant.to_vec(), format!("{} {}", known.replay.method, known.replay.path), known.score))
        };
        self.ranked.iter().take(most).filter_map(first).collect()
    }
}

/// Leaves the more popular half.
fn purge(known: &mut HashMap<u64, Known>) {
    let mut scores: Vec<_> = known.values().map(|known| known.score).collect();
    scores.sort_by(f64::total_cmp);
    let (middle, mut room) = (scores.get(scores.len() / 2).copied().unwrap_or_default(), scores.len() / 2);
    known.retain(|_, known| {
        let stays = known.score > middle || known.score == middle && room > 0;
        room = room.saturating_sub(usize::from(stays));
        stays
    });
}

fn fade(known: &mut HashMap<u64, Known>, by: f64) {
    known.retain(|_, known| {
        known.score *= by;
        known.score >= LEAST
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(tenant: &str, id: u64) -> Seen {
        let replay = Replay { method: "GET".into(), path: format!("/{id}"), headers: vec![], body: None };
        Seen { id, tenant: tenant.as_bytes().into(), tags: Box::new([id, 7]), replay }
    }

    fn top(list: &mut List, most: usize) -> Vec<(String, u64)> {
        list.rank(most, Instant::now());
        list.ranked.iter().map(|(tenant, id)| (String::from_utf8_lossy(tenant).into_owned(), *id)).collect()
    }

    /// What is asked again and again is found under ten times as many requests that are asked once or twice, of its own tenant and
    /// of another.
    #[test]
    fn floods_do_not_displace_what_is_popular() {
        let mut list = List::default();
        let mut strange = 1_000_000;
        for round in 0..400 {
            for id in 0..100 {
                list.seen(seen("acme", id));
            }
            for _ in 0..1_000 {
                strange += 1;
                list.seen(seen("acme", strange));
                list.seen(seen("flood", strange));
                if round % 10 == 0 {
                    list.seen(seen("flood", strange));
                }
            }
        }
        let top = top(&mut list, 1_000);
        let own: Vec<_> = top.iter().filter(|(tenant, _)| tenant == "acme").map(|(_, id)| *id).collect();
        assert!((0..100).all(|id| own[..100].contains(&id)), "{own:?}");
        assert!(top.iter().filter(|(tenant, _)| tenant == "flood").count() <= 200);
        let kept: usize = list.tenants.values().map(HashMap::len).sum();
        assert!(kept <= 2 * COUNTED && list.once.len() <= ONCE, "{kept}");
    }

    #[test]
    fn no_tenant_takes_more_than_a_fifth_and_there_are_not_too_many() {
        let mut list = List::default();
        for tenant in 0..1_000 {
            for id in 0..60 {
                (0..3).for_each(|_| list.seen(seen(&format!("t{tenant}"), tenant * 1_000 + id)));
            }
        }
        assert!(list.tenants.len() <= TENANTS + 1);
        let top = top(&mut list, 100);
        assert_eq!(top.len(), 100);
        assert!(top.iter().all(|(tenant, _)| top.iter().filter(|(other, _)| other == tenant).count() <= 20));
        (0..40).for_each(|_| list.fade());
        assert!(list.tenants.is_empty(), "what nobody asks any more is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_dropped_is_asked_first_and_what_is_dropped_meanwhile_again() {
        let mut list = List::default();
        (0..3).for_each(|_| (0..3).for_each(|id| list.seen(seen("acme", id))));
        let now = Instant::now();
        list.rank(100, now);
        let order = |list: &mut List| {
            std::iter::from_fn(|| list.due(Instant::now())).map(|((_, id), cause, _)| (id, cause)).collect::<Vec<_>>()
        };
        let mut all = order(&mut list);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2].map(|id| (id, Cause::Missing)));
        for id in 0..3 {
            list.done(&(b"acme"[..].into(), id), Duration::from_secs(60), now);
        }
        assert_eq!(order(&mut list), []);
        list.dropped(Some(&[1]), now);
        let (place, cause, _) = list.due(now).unwrap();
        assert_eq!((place.1, cause), (1, Cause::Refill));
        list.dropped(Some(&[1, 2]), now);
        list.done(&place, Duration::from_secs(60), now);
        let mut all = order(&mut list);
        all.sort_unstable();
        assert_eq!(all, [(1, Cause::Refill), (2, Cause::Refill)], "it was dropped while it was asked");
        tokio::time::advance(Duration::from_secs(61)).await;
        assert_eq!(order(&mut list), [(0, Cause::Expiry)]);
        list.dropped(None, now);
        assert_eq!(order(&mut list).len(), 3);
    }
}
