//! The protocol as models that are small enough to be checked whole (stateright): every order of every step. The comments
//! name the functions that do the steps. Each rule of the protocol, taken out, gives a counterexample; so does each limit that
//! the documentation states, as a rule that is the user's part.
//!
//! | | what it is about |
//! | --- | --- |
//! | [`core`] | look-up, open, board, load, seal, store, drops; late tags, followers, losses, readers that vanish |
//! | [`fences`] | fences with leases: writers that are killed at any point, undelivered drops, replicas that lag |
//! | [`tier`] | the tier in process: pushes, heartbeats, connections that die in silence, a store that is flushed |
//! | [`reign`] | the journal; servers that take over without the last drops, and back, are restarted, or cut off |
//! | [`deployment`] | old and new code side by side, when a tag is added |
//!
//! `cargo test --all-features --test model -- --nocapture` says how many states that are, how long it took, and the shortest
//! way to a fault without each rule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod core;
mod deployment;
mod fences;
mod reign;
mod tier;
mod vocabulary;
