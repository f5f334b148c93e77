//! What a recorder of the `metrics` facade has been told already.

use std::collections::BTreeMap;

use metrics::{Label, counter, histogram};

use super::snapshot::OfHistogram;

/// What a recorder has been told.
#[derive(Debug, Default)]
pub(super) struct Told {
    counters: BTreeMap<(&'static str, Vec<String>), u64>,
    histograms: BTreeMap<(&'static str, Vec<String>), OfHistogram>,
}

/// A name, and labels with their values.
pub(super) type Labels<'a> = &'a [(&'static str, &'a str)];

pub(super) fn labels(labels: Labels<'_>) -> Vec<Label> {
    labels.iter().map(|(name, value)| Label::new(*name, (*value).to_owned())).collect()
}

fn key(labels: Labels<'_>) -> Vec<String> {
    labels.iter().map(|(_, value)| (*value).to_owned()).collect()
}

impl Told {
    /// Also of nothing: a counter that begins with one shows no increase.
    pub(super) fn count(&mut self, name: &'static str, of: Labels<'_>, now: u64) {
        let told = self.counters.entry((name, key(of))).or_default();
        let more = now.saturating_sub(*told);
        *told = now.max(*told);
        counter!(name, labels(of)).increment(more);
    }

    pub(super) fn histogram(
        &mut self,
        name: &'static str,
        of: Labels<'_>,
        now: &OfHistogram,
        bounds: &[u64],
        unit: f64,
    ) {
        if now.count() == 0 {
            return;
        }
        let told = self.histograms.entry((name, key(of))).or_default();
        told.counts.resize(now.counts.len(), 0);
        let more: Vec<_> = now.counts.iter().zip(&told.counts).map(|(now, told)| now.saturating_sub(*told)).collect();
        let sum = now.sum.saturating_sub(told.sum) as f64;
        *told = now.clone();
        // The middle of each bucket, moved so that the sum is right, as far as each stays where it is.
        let bucket = |at: usize| {
            let lower = if at == 0 { 0 } else { bounds[at - 1] };
            (lower as f64, bounds.get(at).copied().unwrap_or(now.max.max(lower + 1)) as f64)
        };
        let middle = |at: usize| (bucket(at).0 + bucket(at).1) / 2.0;
        let guessed: f64 = more.iter().enumerate().map(|(at, count)| middle(at) * *count as f64).sum();
        let histogram = histogram!(name, labels(of));
        for (at, count) in more.iter().enumerate().filter(|(_, count)| **count > 0) {
            let (lower, upper) = bucket(at);
            let value = (middle(at) * sum / guessed).clamp(lower + (upper - lower) / 1_000.0, upper);
            histogram.record_many(value * unit, usize::try_from(*count).unwrap_or(usize::MAX));
        }
    }
}
