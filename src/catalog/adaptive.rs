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
