//! What the fuzzers of `fuzz/` run: a property of each thing that is made of bytes from outside, be they a client's, a
//! handler's, a server's, or those of a file. Compiled for them, and for the test which replays what they have kept.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod events;
mod http;
mod input;
mod keys;
mod mapping;
mod messages;
mod requests;
mod store;

/// What is run with each input.
pub struct Target {
    pub name: &'static str,
    run: fn(&[u8]),
    /// How much memory it may take, besides a little, for each byte of its input. What that claims to be long does not count.
    per_byte: u64,
}

const A_LITTLE: u64 = 2 << 20;
const PER_BYTE: u64 = 2 << 10;
/// Of serde, each sequence that is open may take a MiB, and it begins with three bytes (MessagePack's `array 16`).
const PER_BYTE_OF_VALUES: u64 = (1 << 20) / 3;
/// Of the client library, which is asked what it makes of the same: of what is garbled it keeps all that it might have expected.
const PER_BYTE_OF_RESP: u64 = 8 << 10;

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run, per_byte: PER_BYTE }
}

pub const TARGETS: &[Target] = &[
    target("admin", messages::admin),
    target("bodies", messages::bodies),
    target("conditions", http::conditions),
    target("config", mapping::config),
    target("dates", http::dates),
    target("directives", http::directives),
    target("entries", events::entries),
    target("entry", store::entry),
    target("events", events::events),
    target("frames", store::frames),
    target("grpc", messages::grpc),
    target("keys", keys::keys),
    target("locations", http::locations),
    target("log", events::log),
    target("patterns", mapping::patterns),
    target("records", events::records),
    target("replies", store::replies),
    target("requests", requests::requests),
    Target { name: "resp", run: store::resp, per_byte: PER_BYTE_OF_RESP },
    target("tags", mapping::tags),
    Target { name: "values", run: messages::values, per_byte: PER_BYTE_OF_VALUES },
];

impl Target {
    /// Runs it with an input, in bounds of memory: `measure` runs what it is given, and says how many bytes that had
    /// allocated at most.
    ///
    /// # Panics
    /// The property does not hold.
    pub fn check(&self, input: &[u8], measure: impl Fn(&mut dyn FnMut()) -> u64) {
        let most = measure(&mut || (self.run)(input));
        let allowed = A_LITTLE + self.per_byte * input.len() as u64;
        assert!(most <= allowed, "{}: {most} bytes of memory for {} of input", self.name, input.len());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
        path::Path,
    };

    use super::*;

    /// A panic has to wait until it is counted what was allocated before it: else the next input would be a part of this one.
    fn measure(run: &mut dyn FnMut()) -> u64 {
        let mut ran = Ok(());
        let most = allocation_counter::measure(|| ran = catch_unwind(AssertUnwindSafe(run))).bytes_max;
        ran.unwrap_or_else(|panic| resume_unwind(panic));
        most
    }

    #[test]
    fn what_the_fuzzers_have_kept_is_replayed() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let mut names: Vec<_> = fs::read_dir(fuzz.join("corpus")).unwrap().map(|d| d.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
        let mut failed = vec![];
        for target in TARGETS {
            assert!(fuzz.join("fuzz_targets").join(target.name).with_extension("rs").exists(), "{}", target.name);
            let files: Vec<_> = fs::read_dir(fuzz.join("corpus").join(target.name)).unwrap().collect();
            let mut size = 0;
            for file in &files {
                let path = file.as_ref().unwrap().path();
                let input = fs::read(&path).unwrap();
                size += input.len();
                if catch_unwind(|| target.check(&input, measure)).is_err() {
                    failed.push(path);
                }
            }
            assert!((10..=100).contains(&files.len()), "{}: {} inputs", target.name, files.len());
            assert!(size <= 200 << 10, "{}: {size} bytes", target.name);
        }
        assert!(failed.is_empty(), "{failed:#?}");
    }

    /// The bound on memory is one.
    #[test]
    #[should_panic(expected = "bytes of memory")]
    fn an_allocation_that_an_input_claims_is_noticed() {
        let run = |input: &[u8]| drop(vec![1_u8; usize::from(input[0]) << 20]);
        target("claims", run).check(&[5], measure);
    }
}
