//! What was counted, handed to the recorder of the `metrics` facade.

use metrics::gauge;

use super::{
    counts::{BYTES, NANOS},
    observer::{Observer, locked},
    snapshot::{ByReason, HANDLINGS, OfType, Snapshot},
    told::{Told, labels},
};

/// The bounds of the buckets of durations, in seconds: what an exporter's should be.
pub const DURATION_BUCKETS: [f64; 14] =
    [0.000_01, 0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0];

/// The bounds of the buckets of sizes, in bytes: what an exporter's should be.
pub const SIZE_BUCKETS: [f64; 8] = [256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 102_400.0, 262_144.0, 1_048_576.0];

const NANO: f64 = 1e-9;

impl Observer {
    /// Tells a recorder what has been counted since the last time.
    pub(crate) fn export(&self, snapshot: impl FnOnce() -> Snapshot) -> Snapshot {
        let told = &mut *locked(&self.told);
        // Within the lock: an older one would be counted twice.
        let snapshot = snapshot();
        self.tell(told, &snapshot);
        snapshot
    }

    fn tell(&self, told: &mut Told, snapshot: &Snapshot) {
        let service = self.service();
        for (data_type, of_type) in &snapshot.types {
            export_type(told, service, data_type, of_type);
            export_requests(told, (service, data_type), of_type.by_reason(), snapshot);
        }
        for (source, durations) in &snapshot.invalidations {
            let of = [("service", service), ("source", source)];
            told.histogram("cache_aside_invalidation_duration_seconds", &of, durations, &NANOS, NANO);
        }
        for (data_type, of_type) in &snapshot.invalidated {
            for (source, count) in of_type {
                let of = [("service", service), ("data_type", data_type), ("source", source)];
                told.count("cache_aside_invalidated_entries_total", &of, *count);
            }
        }
        for (data_type, of_type) in &snapshot.audits {
            for result in ["ok", "stale", "not_reproducible"] {
                let of = [("service", service), ("data_type", data_type), ("result", result)];
                told.count("cache_aside_audits_total", &of, of_type.get(result).copied().unwrap_or_default());
            }
        }
        for (source, of_source) in &snapshot.sources {
            for (result, count) in &of_source.became {
                let of = [("service", service), ("source", source), ("result", result)];
                told.count("cache_aside_events_total", &of, *count);
            }
            // What is not known may be anything.
            let behind = of_source.behind_ms.map_or(f64::INFINITY, |behind| behind as f64 / 1_000.0);
            gauge!("cache_aside_event_lag_seconds", labels(&[("service", service), ("source", source)])).set(behind);
        }
        let of = [("service", service)];
        told.count("cache_aside_unmapped_writes_total", &of, snapshot.unmapped);
        for (cause, count) in &snapshot.warmed {
            told.count("cache_aside_warmed_total", &[("service", service), ("cause", cause)], *count);
        }
        told.count("cache_aside_overdue_waits_total", &of, snapshot.overdue);
        for (kind, count) in &snapshot.store_errors {
            told.count("cache_aside_store_errors_total", &[("service", service), ("kind", kind)], *count);
        }
        told.count("cache_aside_evictions_total", &[("service", service), ("cause", "capacity")], snapshot.evictions);
        told.count("cache_aside_evicted_misses_total", &of, snapshot.evicted_misses);
        for (name, value) in [
            ("cache_aside_store_up", f64::from(u8::from(snapshot.health.0 != "down"))),
            ("cache_aside_journal_tags", snapshot.journal as f64),
            ("cache_aside_eviction_age_seconds", snapshot.eviction_age_ms as f64 / 1_000.0),
            ("cache_aside_store_bytes", snapshot.store_bytes as f64),
            ("cache_aside_store_capacity_bytes", snapshot.store_capacity as f64),
        ] {
            gauge!(name, labels(&of)).set(value);
        }
    }
}

/// How many requests a type had, and why. Where tenants have labels, by tenant: those without share one.
fn export_requests(told: &mut Told, (service, data_type): (&str, &str), all: ByReason, snapshot: &Snapshot) {
    let mut count = |tenant: Option<&str>, all: &ByReason| {
        for (outcome, reasons) in all {
            for (reason, count) in reasons {
                let labels = [("data_type", data_type), ("outcome", outcome), ("reason", reason)];
                let labels: Vec<_> = [("service", service)]
                    .into_iter()
                    .chain(tenant.map(|name| ("tenant", name)))
                    .chain(labels)
                    .collect();
                told.count("cache_aside_requests_total", &labels, *count);
            }
        }
    };
    if !snapshot.has_labels {
        return count(None, &all);
    }
    let mut others = all;
    for (tenant, types) in &snapshot.labelled {
        let Some(of_tenant) = types.get(data_type) else { continue };
        count(Some(tenant), of_tenant);
        for (outcome, reasons) in of_tenant {
            for (reason, count) in reasons {
                let other = others.get_mut(outcome).and_then(|reasons| reasons.get_mut(reason));
                other.into_iter().for_each(|other| *other = other.saturating_sub(*count));
            }
        }
    }
    count(Some("other"), &others);
}

fn export_type(told: &mut Told, service: &str, data_type: &str, of_type: &OfType) {
    for handling in HANDLINGS {
        let outcome = handling.as_str();
        let durations = &of_type.handled[handling as usize];
        let of = [("service", service), ("data_type", data_type), ("outcome", outcome)];
        told.histogram("cache_aside_request_duration_seconds", &of, durations, &NANOS, NANO);
    }
    for (result, loads) in ["ok", "error"].iter().zip(&of_type.loads) {
        let of = [("service", service), ("data_type", data_type), ("result", result)];
        told.histogram("cache_aside_load_duration_seconds", &of, loads, &NANOS, NANO);
    }
    let of = [("service", service), ("data_type", data_type)];
    told.histogram("cache_aside_entry_bytes", &of, &of_type.bytes, &BYTES, 1.0);
    told.count("cache_aside_origin_seconds_saved_total", &of, of_type.saved_ms / 1_000);
    told.count("cache_aside_drift_total", &of, of_type.drift);
    for (tier, count) in ["process", "store"].iter().zip(of_type.found()) {
        let of = [("service", service), ("data_type", data_type), ("tier", tier)];
        told.count("cache_aside_hits_total", &of, count);
    }
    for (from, bytes) in ["process", "store", "inner"].iter().zip(of_type.sent) {
        let of = [("service", service), ("data_type", data_type), ("from", from)];
        told.count("cache_aside_sent_bytes_total", &of, bytes);
    }
}
