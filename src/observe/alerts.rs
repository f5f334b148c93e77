//! What somebody should look at: raised once, and cleared once.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use super::{
    outcome::Handling,
    recent::What,
    snapshot::{Alert, OfSource, OfType, STEP_SECONDS, Snapshot},
};

/// How long something that has happened once is remembered: a large entry, an unmapped write, what an audit found, drift.
const REMEMBERED: u64 = 15 * 60 * 1_000;

/// A store that is not well for one look may be about to connect.
const PATIENCE: u32 = 3;

/// A source of events that is further behind than this, in milliseconds, is.
const BEHIND: u64 = 5_000;

/// When to raise an alert: for [`CacheBuilder::alerts`](crate::CacheBuilder::alerts).
///
/// ```
/// # use std::time::Duration;
/// # use tower_cache_aside::AlertRules;
/// let rules = AlertRules::default().hit_ratio(0.5).window(Duration::from_secs(60)).entry_bytes(1 << 20);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AlertRules {
    pub(super) hit_ratio: f64,
    pub(super) window: Duration,
    pub(super) requests: u64,
    pub(super) entry_bytes: u64,
}

impl Default for AlertRules {
    fn default() -> Self {
        Self { hit_ratio: 0.7, window: Duration::from_secs(300), requests: 100, entry_bytes: 102_400 }
    }
}

impl AlertRules {
    /// The share of requests (without those that bypass the cache) that a type is to answer without the inner service; by
    /// default 0.7.
    #[must_use]
    pub fn hit_ratio(mut self, least: f64) -> Self {
        self.hit_ratio = least;
        self
    }

    /// Over how long that is looked at, up to five minutes (the default), in steps of five seconds.
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    /// A type with fewer requests in the window has no ratio; by default 100.
    #[must_use]
    pub fn requests(mut self, least: u64) -> Self {
        self.requests = least;
        self
    }

    /// Larger bodies than this are worth a look; by default 102,400 bytes.
    #[must_use]
    pub fn entry_bytes(mut self, most: u64) -> Self {
        self.entry_bytes = most;
        self
    }
}

/// A kind, and the type that it is about.
type Name = (&'static str, Option<String>);

/// Those that stand, and what is remembered for a while.
#[derive(Debug, Default)]
pub(super) struct Raised {
    alerts: BTreeMap<Name, (Value, u64)>,
    /// Until when each is remembered, and what it is.
    remembered: BTreeMap<Name, (Value, u64)>,
    /// For how many looks the store has not been well, and a source of events has been behind.
    ill: u32,
    behind: u32,
}

impl Raised {
    fn remember(&mut self, name: Name, value: Value, now: u64) {
        self.remembered.insert(name, (value, now + REMEMBERED));
    }

    pub(super) fn unmapped(&mut self, what: &str, now: u64) {
        self.remember(("unmapped", None), json!(super::recent::shortened(what)), now);
    }

    pub(super) fn audit(&mut self, data_type: &str, route: &str, now: u64) {
        self.remember(("audit", Some(data_type.to_owned())), json!(route), now);
    }

    pub(super) fn drift(&mut self, data_type: &str, route: &str, now: u64) {
        self.remember(("drift", Some(data_type.to_owned())), json!(route), now);
    }

    pub(super) fn large(&mut self, data_type: &str, bytes: u64, now: u64) {
        self.remember(("large_entry", Some(data_type.to_owned())), json!(bytes), now);
    }

    pub(super) fn all(&self) -> Vec<Alert> {
        let alert = |((kind, data_type), (value, since)): (&Name, &(Value, u64))| Alert {
            kind: (*kind).to_owned(),
            data_type: data_type.clone(),
            value: value.clone(),
            since: *since,
        };
        self.alerts.iter().map(alert).collect()
    }

    /// Looks at everything; what has begun and what has ended.
    pub(super) fn look(&mut self, rules: &AlertRules, snapshot: &Snapshot, now: u64) -> Vec<What> {
        self.remembered.retain(|_, (_, until)| *until > now);
        let mut stands: BTreeMap<Name, Value> =
            self.remembered.iter().map(|(name, (value, _))| (name.clone(), value.clone())).collect();
        for (name, of_type) in &snapshot.types {
            if let Some(ratio) = ratio(rules, of_type).filter(|ratio| *ratio < rules.hit_ratio) {
                stands.insert(("hit_ratio", Some(name.clone())), json!((ratio * 1_000.0).round() / 1_000.0));
            }
        }
        self.ill = if snapshot.health.0 == "ok" { 0 } else { self.ill + 1 };
        if self.ill >= PATIENCE {
            stands.insert(("store", None), json!(snapshot.health.1));
        }
        let troubled = |of: &OfSource| of.behind_ms.is_none_or(|behind| behind > BEHIND);
        let troubled = snapshot.sources.iter().find(|(_, of)| troubled(of));
        self.behind = if troubled.is_some() { self.behind + 1 } else { 0 };
        if let Some((name, of)) = troubled.filter(|_| self.behind >= PATIENCE) {
            let trouble = of.trouble.as_deref().unwrap_or("it is behind");
            stands.insert(("events", None), json!(format!("{name}: {trouble}")));
        }
        let mut changes = vec![];
        let said = |(kind, data_type): &Name, value: &Value, raised| What::Alert {
            alert: (*kind).to_owned(),
            data_type: data_type.clone(),
            value: value.clone(),
            raised,
        };
        self.alerts.retain(|name, (value, _)| {
            let goes_on = stands.contains_key(name);
            if !goes_on {
                changes.push(said(name, value, false));
            }
            goes_on
        });
        for (name, value) in stands {
            match self.alerts.get_mut(&name) {
                Some(known) => known.0 = value,
                None => {
                    changes.push(said(&name, &value, true));
                    self.alerts.insert(name, (value, now));
                }
            }
        }
        changes
    }
}

/// The ratio of a type in the window, if that has enough requests. What the current step has counts, too.
fn ratio(rules: &AlertRules, of_type: &OfType) -> Option<f64> {
    let steps = usize::try_from(rules.window.as_secs() / STEP_SECONDS).unwrap_or(usize::MAX).max(1);
    let [requests, hits] = of_type.series.each_ref().map(|series| series.iter().rev().take(steps).sum::<u64>());
    let now = [of_type.requests() - of_type.of(Handling::Bypass), of_type.spared()];
    let [more, more_hits] = [0, 1].map(|i| now[i].saturating_sub(of_type.series[i].iter().sum()));
    // What the series has forgotten is no part of the current step.
    let is_young = of_type.series[0].len() < super::snapshot::STEPS;
    let (requests, hits) = if is_young { (requests + more, hits + more_hits) } else { (requests, hits) };
    (requests >= rules.requests.max(1)).then(|| hits as f64 / requests as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(requests: u64, hits: u64) -> Snapshot {
        let mut of_type = OfType::default();
        of_type.handled[Handling::Hit as usize].counts = vec![hits];
        of_type.handled[Handling::Miss as usize].counts = vec![requests - hits];
        of_type.series = [vec![requests], vec![hits]];
        let types = [("page".to_owned(), of_type)].into();
        Snapshot { types, health: ("ok".to_owned(), None), ..Snapshot::default() }
    }

    #[test]
    fn alerts_are_raised_once_and_cleared_once() {
        let (mut raised, rules) = (Raised::default(), AlertRules::default());
        let mut look = |requests, hits| {
            let changes = raised.look(&rules, &snapshot(requests, hits), 0);
            changes.iter().map(|c| matches!(c, What::Alert { raised: true, .. })).collect::<Vec<_>>()
        };
        assert_eq!(look(99, 0), [false; 0], "too few");
        assert_eq!(look(100, 70), [false; 0]);
        assert_eq!(look(100, 69), [true]);
        assert_eq!(look(200, 100), [false; 0]);
        assert_eq!(look(1_000, 900), [false]);
        assert_eq!(look(1_000, 900), [false; 0]);
    }

    #[test]
    fn what_has_happened_is_remembered_for_a_while() {
        let (mut raised, rules) = (Raised::default(), AlertRules::default());
        raised.large("page", 200_000, 1_000);
        assert_eq!(raised.look(&rules, &snapshot(0, 0), 1_000).len(), 1);
        assert_eq!(raised.all()[0].value, json!(200_000));
        assert_eq!(raised.look(&rules, &snapshot(0, 0), 1_000 + REMEMBERED).len(), 1);
        assert!(raised.all().is_empty());
    }
}
