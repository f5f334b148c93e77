//! Runs a target with an input, and counts the memory that it takes.

use tower_cache_aside::fuzzing::TARGETS;

fn measure(run: &mut dyn FnMut()) -> u64 {
    allocation_counter::measure(run).bytes_max
}

/// Checks one input.
///
/// # Panics
/// What the target says of all inputs is not true of this one.
pub fn check(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    target.check(data, measure);
}
