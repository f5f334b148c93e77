//! How often something changes of which nobody tells, learned from reloads, and how long it is kept for a stated risk.
//!
//! A *poll* is the reload of an entry that no write has dropped: all it tells is how long ago the last one was, and whether
//! the response is another by now. That is the setting of Cho and Garcia-Molina ("Estimating frequency of change", ACM TOIT
//! 2003): changes are a Poisson process, of which only "none" or "some" is seen. Their estimator for few polls at equal
//! intervals is λ̂ = −ln((n − X + ½) / (n + ½)) / I, with X of n polls changed. Reloads come when somebody asks, at intervals
//! that differ by orders of magnitude between day and night, so this is their maximum-likelihood form for unequal ones, solved in
//! one pass: λ̂ = X / E, where an interval without a change exposes for all of its length, and one with a change for as long as
//! the first change is expected to have taken. Where nothing has ever changed, half a change is assumed, as in theirs.
//!
//! With that rate and the accepted risk r of a change within the TTL, the TTL is −ln(1 − r) / λ̂.

use std::time::Duration;

/// As many changes as are expected at the stated risk are remembered: older polls fade.
const REMEMBERED: f64 = 4.0;

/// No fewer polls are remembered than these, and no more.
const WINDOW: (f64, f64) = (8.0, 10_000.0);

/// What was not seen to change is assumed to have done so half a time.
const AT_LEAST: f64 = 0.5;

/// Changes in a row that come by chance less than once in a thousand times say that the rate is another now.
const SURPRISE: f64 = 6.9;

/// So many polls of a type say something of keys that have had none.
const ENOUGH: f32 = 4.0;

/// The bounds of an adaptive TTL, and the accepted risk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bounds {
    pub(crate) min: Duration,
    pub(crate) max: Duration,
    pub(crate) risk: f64,
}

impl Bounds {
    /// For what part of the mean time between two changes something is kept.
    fn share(&self) -> f64 {
        -(-self.risk).ln_1p()
    }
}

/// What reloads have told of a key, or of all keys of a type. All of it fades.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Learned {
    /// How many there were.
    pub(crate) polls: f32,
    /// How many of them found a change.
    pub(crate) changes: f32,
    /// For how many milliseconds nothing had changed.
    pub(crate) exposure: f32,
    /// How unlikely the last changes are, all in a row, at the rate that was known: −ln of the probability.
    pub(crate) surprise: f32,
}

impl Learned {
    /// What is assumed of a key of which nothing is known when its type is like this: its rate, as if known from half a change.
    pub(crate) fn seed(self) -> Self {
        let rate = self.rate().filter(|_| self.is_enough());
        let exposure = rate.map_or(0.0, |rate| (AT_LEAST / rate) as f32);
        Self { changes: if rate.is_some() { AT_LEAST as f32 } else { 0.0 }, exposure, ..Self::default() }
    }

    /// Whether it says something of other keys.
    pub(crate) fn is_enough(&self) -> bool {
        self.polls >= ENOUGH
    }

    /// How often it changes in a millisecond, if anything is known.
    fn rate(&self) -> Option<f64> {
        let (changes, exposure) = (f64::from(self.changes), f64::from(self.exposure));
        (exposure > 0.0).then(|| changes.max(AT_LEAST) / exposure)
    }

    /// How long to keep it: within the bounds, and the shortest while nothing is known.
    pub(crate) fn ttl(&self, bounds: &Bounds) -> Duration {
        let millis = self.rate().map_or(0.0, |rate| bounds.share() / rate);
        Duration::from_millis(millis as u64).max(bounds.min).min(bounds.max)
    }

    /// With one more poll of the key, so long after the last.
    pub(crate) fn polled(self, changed: bool, interval: Duration, bounds: &Bounds) -> Self {
        let mut next = Self { surprise: 0.0, ..self.counted(changed, interval) };
        if let (true, Some(rate)) = (changed, self.rate()) {
            let chance = -(-rate * millis(interval)).exp_m1();
            next.surprise = self.surprise - chance.max(1e-30).ln() as f32;
            // A burst: what was before says nothing of what is now.
            let anew = Self::default().counted(true, interval);
            if f64::from(next.surprise) >= SURPRISE && anew.rate() > next.rate() {
                next = anew;
            }
        }
        next.faded(bounds)
    }

    /// With one more poll of any key.
    pub(crate) fn pooled(self, changed: bool, interval: Duration, bounds: &Bounds) -> Self {
        self.counted(changed, interval).faded(bounds)
    }

    fn counted(self, changed: bool, interval: Duration) -> Self {
        let interval = millis(interval);
        let (changes, exposure) = (f64::from(self.changes), f64::from(self.exposure));
        // With this one there is at least one change: then no change ever lowers the rate, however long its interval was.
        let exposed = if changed { until_change(changes.max(1.0), exposure, interval) } else { interval };
        Self {
            polls: self.polls + 1.0,
            changes: self.changes + f32::from(u8::from(changed)),
            exposure: (exposure + exposed) as f32,
            ..self
        }
    }

    /// Old polls count for less and less, and no more time is remembered than says that the longest TTL is right. The rate
    /// stays as it is.
    fn faded(self, bounds: &Bounds) -> Self {
        let window = (REMEMBERED / bounds.risk).clamp(WINDOW.0, WINDOW.1);
        let most = REMEMBERED * millis(bounds.max) / bounds.share();
        let (changes, exposure) = (f64::from(self.changes), f64::from(self.exposure));
        let is_full = f64::from(self.polls) >= window;
        // Half of less than one would be less than is assumed in any case.
        let halved = if is_full && changes >= 2.0 * AT_LEAST { 0.5 } else { 1.0 };
        let share = halved * (most / (exposure * halved)).min(1.0);
        Self {
            polls: if is_full { self.polls / 2.0 } else { self.polls },
            changes: (changes * share) as f32,
            exposure: (exposure * share) as f32,
            ..self
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

/// How long the first change of an interval with a change is expected to have taken.
fn until_change(changes: f64, exposure: f64, interval: f64) -> f64 {
    let rate = changes / exposure;
    let expected = rate * interval;
    match expected {
        // So seldom that it is anywhere in it.
        ..1e-4 => interval * (0.5 - expected / 12.0),
        // Nothing is known: the same.
        _ if !rate.is_finite() => interval / 2.0,
        _ => 1.0 / rate - interval / expected.exp_m1(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    const DAY: f64 = 86_400.0;

    fn bounds(risk: f64) -> Bounds {
        Bounds { min: Duration::from_secs(30), max: Duration::from_secs(86_400), risk }
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// But for the rounding of numbers.
    fn no_longer(one: Duration, other: Duration) -> bool {
        one <= other + other / 500_000 + Duration::from_millis(1)
    }

    /// The rate stays as it is, and less is known of it.
    #[test]
    fn no_more_is_remembered_than_the_longest_ttl_needs() {
        let bounds = bounds(0.5);
        let most = REMEMBERED * millis(bounds.max) / bounds.share();
        for (known, expected) in [
            (Learned { polls: 5.0, changes: 1.0, exposure: 1e6, surprise: 0.0 }, [5.0, 1.0, 1e6]),
            (Learned { polls: 5.0, changes: 1.0, exposure: (most * 8.0) as f32, surprise: 0.0 }, [5.0, 0.125, most]),
            (Learned { polls: 8.0, changes: 1.0, exposure: 1e6, surprise: 0.0 }, [4.0, 0.5, 5e5]),
            (Learned { polls: 8.0, changes: 1.0, exposure: (most * 8.0) as f32, surprise: 0.0 }, [4.0, 0.125, most]),
            (Learned { polls: 8.0, changes: 0.9, exposure: 1e6, surprise: 0.0 }, [4.0, 0.9, 1e6]),
        ] {
            let Learned { polls, changes, exposure, .. } = known.faded(&bounds);
            for (found, expected) in [polls, changes, exposure].into_iter().zip(expected) {
                assert!((f64::from(found) / expected - 1.0).abs() < 1e-6, "{known:?}: {found}, not {expected}");
            }
        }
    }

    /// What a type has shown is assumed of its keys, and what it has not is not.
    #[test]
    fn a_key_begins_with_the_rate_of_its_type() {
        let known = Learned { polls: 100.0, changes: 40.0, exposure: 1e7, surprise: 0.0 };
        let rates = [known.rate(), known.seed().rate()].map(Option::unwrap);
        assert!((rates[0] / rates[1] - 1.0).abs() < 1e-6, "{rates:?}");
        assert_eq!(Learned { polls: ENOUGH - 1.0, ..known }.seed(), Learned::default());
    }

    #[test]
    fn a_change_that_was_never_seen_before_is_anywhere_in_its_interval() {
        assert_eq!(until_change(0.0, 1_000.0, 10.0), 5.0);
        assert!((until_change(1e-3, 1e6, 1.0) - 0.5).abs() < 1e-6);
    }

    /// Any state that polls lead to.
    fn learned() -> impl Strategy<Value = Learned> {
        let poll = (any::<bool>(), 1e-3..1e7);
        (proptest::collection::vec(poll, 0..60), 1e-4..0.999, 0.0..1e8).prop_map(|(polls, risk, seed)| {
            let seed = Learned { polls: ENOUGH, changes: 1.0, exposure: seed as f32, surprise: 0.0 }.seed();
            polls.iter().fold(seed, |state, (changed, after)| state.polled(*changed, seconds(*after), &bounds(risk)))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn a_change_never_lengthens_and_no_change_never_shortens(
            state in learned(), after in 1e-3..1e7, more in 0.0..1e7, risk in 1e-4..0.999,
        ) {
            let bounds = bounds(risk);
            let ttl = |changed, after| state.polled(changed, seconds(after), &bounds).ttl(&bounds);
            prop_assert!(no_longer(ttl(true, after), state.ttl(&bounds)));
            prop_assert!(no_longer(ttl(true, after), ttl(false, after)));
            prop_assert!(no_longer(state.ttl(&bounds), ttl(false, after)));
            prop_assert!(no_longer(ttl(false, after), ttl(false, after + more)));
            let pooled = |changed, after| state.pooled(changed, seconds(after), &bounds).ttl(&bounds);
            prop_assert!(no_longer(pooled(true, after), state.ttl(&bounds)));
            prop_assert!(no_longer(pooled(true, after), pooled(false, after)));
            prop_assert!(no_longer(pooled(false, after), pooled(false, after + more)));
        }

        #[test]
        fn a_higher_risk_never_shortens(state in learned(), risk in 1e-4..0.5, more in 0.0..0.499) {
            prop_assert!(no_longer(state.ttl(&bounds(risk)), state.ttl(&bounds(risk + more))));
        }

        /// Whatever comes from a store, and whatever a file says.
        #[test]
        fn it_stays_within_its_bounds(
            numbers in proptest::array::uniform4(0.0..f32::MAX), polls in proptest::collection::vec((any::<bool>(), any::<u64>()), 0..20),
            ms in (1u64.., 1u64..), risk in prop_oneof![0.0..1.0, Just(f64::MIN_POSITIVE), Just(1.0 - f64::EPSILON)],
        ) {
            prop_assume!(risk > 0.0);
            let (min, max) = (ms.0.min(ms.1), ms.0.max(ms.1));
            let bounds = Bounds { min: Duration::from_millis(min), max: Duration::from_millis(max), risk };
            let [polls_, changes, exposure, surprise] = numbers;
            let mut state = Learned { polls: polls_, changes, exposure, surprise };
            for (changed, after) in polls {
                state = state.polled(changed, Duration::from_millis(after.max(1)), &bounds);
                let ttl = state.ttl(&bounds);
                prop_assert!(bounds.min <= ttl && ttl <= bounds.max);
                let Learned { polls, changes, exposure, surprise } = state;
                prop_assert!([polls, changes, exposure, surprise].iter().all(|n| n.is_finite() && n.is_sign_positive()), "{state:?}");
            }
        }

        /// At equal intervals it is the estimator of the paper, but for the order in which the changes come.
        #[test]
        fn it_is_that_of_the_paper(polls in proptest::collection::vec(any::<bool>(), 4..30), after in 1.0..1e5) {
            let interval = seconds(after);
            let state = polls.iter().fold(Learned::default(), |state, changed| state.counted(*changed, interval));
            let (n, x) = (polls.len() as f64, polls.iter().filter(|changed| **changed).count() as f64);
            prop_assume!(x > 0.0 && x < n - 1.0);
            let theirs = -((n - x + 0.5) / (n + 0.5)).ln() / millis(interval);
            let own = state.rate().unwrap();
            prop_assert!(own > theirs * 0.7 && own < theirs * 1.4, "{own} {theirs} {polls:?}");
        }
    }

    /// Numerically: the first change of an interval is half-way where changes are rare.
    #[test]
    fn the_first_change_is_half_way_where_changes_are_rare() {
        for expected in [1e-12, 1e-6, 0.99e-4, 1.01e-4, 1e-3] {
            let at = until_change(expected * 3.0, 6.0, 2.0);
            assert!((at - 2.0 * (0.5 - expected / 12.0)).abs() < 1e-7, "{expected}: {at}");
        }
        assert_eq!(until_change(1.0, 0.0, 2.0), 1.0);
    }

    #[test]
    fn what_is_old_counts_for_half_and_the_rate_stays() {
        let bounds = bounds(0.05);
        let window = (REMEMBERED / 0.05).clamp(WINDOW.0, WINDOW.1) as f32;
        let full = Learned { polls: window, changes: 8.0, exposure: 1e6, surprise: 1.0 };
        assert_eq!(full.faded(&bounds), Learned { polls: window / 2.0, changes: 4.0, exposure: 5e5, ..full });
        let fuller = Learned { polls: window * 2.0, ..full };
        assert_eq!(fuller.faded(&bounds), Learned { polls: window, changes: 4.0, exposure: 5e5, ..full });
        let young = Learned { polls: window - 1.0, ..full };
        assert_eq!(young.faded(&bounds), young);
        let seldom = Learned { changes: AT_LEAST as f32 * 1.5, ..full };
        assert_eq!(seldom.faded(&bounds), Learned { polls: window / 2.0, ..seldom });
        let most = (REMEMBERED * 86_400_000.0 / -0.95_f64.ln()) as f32;
        let long = Learned { polls: 1.0, exposure: most * 4.0, ..full };
        let faded = long.faded(&bounds);
        assert!((faded.exposure / most - 1.0).abs() < 1e-5 && (faded.changes / 2.0 - 1.0).abs() < 1e-5, "{faded:?}");
    }

    #[test]
    fn a_burst_shortens_within_a_few_reloads_and_fades() {
        let bounds = bounds(0.05);
        let mut state = Learned::default();
        for _ in 0..300 {
            state = state.polled(false, state.ttl(&bounds), &bounds);
        }
        assert_eq!(state.ttl(&bounds), bounds.max);
        let before = state.ttl(&bounds);
        for _ in 0..3 {
            state = state.polled(true, state.ttl(&bounds), &bounds);
        }
        assert!(state.ttl(&bounds) < before / 20, "{:?}", state.ttl(&bounds));
        let reloads = (0..1_000).position(|_| {
            state = state.polled(false, state.ttl(&bounds), &bounds);
            state.ttl(&bounds) > before / 2
        });
        assert!(reloads.is_some_and(|reloads| reloads < 200), "{reloads:?}");
    }

    #[test]
    fn a_new_key_is_like_its_type_once_that_is_known() {
        let bounds = bounds(0.05);
        let mut of_type = Learned::default();
        assert_eq!(of_type.seed(), Learned::default());
        for i in 0..40 {
            of_type = of_type.pooled(i % 20 == 0, seconds(600.0), &bounds);
        }
        assert!(of_type.is_enough());
        let [own, seeded] = [of_type, of_type.seed()].map(|state| state.ttl(&bounds).as_secs_f64());
        assert!((own - seeded).abs() < 1.0 && own > 300.0, "{own} {seeded}");
        // Three changes outweigh it.
        let fast = (0..3).fold(of_type.seed(), |state, _| state.polled(true, seconds(60.0), &bounds));
        assert_eq!(fast.ttl(&bounds), bounds.min);
    }

    /// When the next event of a Poisson process comes.
    fn next(random: &mut StdRng, mean: f64) -> f64 {
        -(1.0 - random.random::<f64>()).ln() * mean
    }

    /// Four weeks of one key: the shares of all requests that were stale, and hits.
    fn four_weeks(seed: u64, risk: f64, writes: f64, reads: f64) -> [f64; 2] {
        let (mut random, bounds) = (StdRng::seed_from_u64(seed), bounds(risk));
        let (mut now, mut written, mut to_come) = (0.0, 0.0, next(&mut random, writes));
        let (mut state, mut held) = (Learned::default(), None::<(f64, f64)>);
        let [mut requests, mut stale, mut hits] = [0.0; 3];
        while now < 28.0 * DAY {
            now += next(&mut random, reads);
            while to_come <= now {
                (written, to_come) = (to_come, to_come + next(&mut random, writes));
            }
            requests += 1.0;
            match held {
                Some((loaded, until)) if now < until => {
                    hits += 1.0;
                    stale += f64::from(u8::from(written > loaded));
                }
                _ => {
                    if let Some((loaded, _)) = held {
                        state = state.polled(written > loaded, seconds(now - loaded), &bounds);
                    }
                    held = Some((now, now + state.ttl(&bounds).as_secs_f64()));
                }
            }
        }
        [stale / requests, hits / requests]
    }

    /// Against the fixed TTL of that risk of who knows the rate: −ln(1 − r)/λ, within the same bounds.
    #[test]
    fn it_keeps_the_risk_and_hits_like_who_knows_the_rate() {
        println!("risk  writes  reads  stale      of risk  hits    best fixed  difference");
        let mut wrong = vec![];
        for risk in [0.01, 0.05, 0.1, 0.2, 0.5] {
            for writes in [600.0, 3_600.0, 6.0 * 3_600.0, DAY] {
                for reads in [60.0, 600.0] {
                    let all: Vec<_> = (0..8).map(|seed| four_weeks(seed, risk, writes, reads)).collect();
                    let [stale, hits] = [0, 1].map(|i| all.iter().map(|one| one[i]).sum::<f64>() / all.len() as f64);
                    let best = (bounds(risk).share() * writes).clamp(30.0, DAY);
                    let fixed = best / (best + reads);
                    let line = format!(
                        "{risk:<5} {writes:<7} {reads:<6} {stale:.5}    {:.2}     {hits:.4}  {fixed:.4}      {:+.4}",
                        stale / risk,
                        hits - fixed
                    );
                    println!("{line}");
                    if stale > 1.2 * risk || hits < 0.98 * fixed - 0.002 {
                        wrong.push(line);
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}
