//! The locks, atomics, channels and clocks of what threads share in the store, the flights and the counts: std's and tokio's.
//!
//! In tests built with `--cfg shuttle` they are shuttle's, which runs a small program in one order of its steps after another;
//! `bash .ci/shuttle` does so, and [`tried`] says what that leaves out.

#[cfg(all(test, shuttle))]
pub(crate) mod tried;

#[cfg(not(all(test, shuttle)))]
mod real {
    pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

    pub(crate) use foldhash::fast::RandomState;
    pub(crate) use quick_cache::sync::Cache;
    #[cfg(any(feature = "redis", feature = "memcached", feature = "testing"))]
    pub(crate) use tokio::{
        runtime::Handle,
        time::{sleep, timeout},
    };
    pub(crate) use tokio::{
        sync::Notify,
        task_local,
        time::{Instant, timeout_at},
    };
}

#[cfg(not(all(test, shuttle)))]
pub(crate) use real::*;
#[cfg(all(test, shuttle))]
pub(crate) use tried::shared::*;
