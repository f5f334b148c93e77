//! What tries a small program in many orders of its steps: at random, with few preemptions (PCT), or in all of them.
//!
//! A step is a use of a lock, an atomic or a channel of [`shared`]. Not tried, therefore: what orderings weaker than `SeqCst`
//! allow besides; and what happens within a call of `quick_cache`, which is one step here, as it is one under its lock.
//!
//! A failure prints its schedule; with that in `SHUTTLE_SCHEDULE` the same test replays it. `SHUTTLE_TRIES` and
//! `SHUTTLE_RANDOM_SEED` try more and other orders.

use std::{
    cell::Cell,
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use shuttle::{
    Config, Runner,
    scheduler::{DfsScheduler, PctScheduler, RandomScheduler, ReplayScheduler, Scheduler},
};

/// What stands in for std, tokio and `quick_cache`.
pub(crate) mod shared {
    use std::{
        hash::{BuildHasher, Hash},
        ops::Add,
        time::Duration,
    };

    /// Not seeded: the same schedule is the same run.
    pub(crate) use foldhash::fast::FixedState as RandomState;
    use quick_cache::{Equivalent, Lifecycle, Options, Weighter, sync};
    pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
    #[cfg(any(feature = "redis", feature = "memcached", feature = "testing"))]
    pub(crate) use shuttle_tokio::{
        runtime::Handle,
        time::{sleep, timeout},
    };
    pub(crate) use shuttle_tokio::{sync::Notify, task_local, time::timeout_at};

    /// A clock that stands still until a program [advances](super::advance) it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub(crate) struct Instant(Duration);

    impl Instant {
        pub(crate) fn now() -> Self {
            Self(super::NOW.get())
        }

        pub(crate) fn elapsed(&self) -> Duration {
            super::NOW.get() - self.0
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;

        fn add(self, by: Duration) -> Self {
            Self(self.0 + by)
        }
    }

    /// One call after another: whoever waited for a lock that shuttle does not know of would stop the others as well.
    pub(crate) struct Cache<K, V, W, B, L>(Mutex<sync::Cache<K, V, W, B, L>>);

    impl<K, V, W, B, L> Cache<K, V, W, B, L>
    where
        K: Eq + Hash,
        V: Clone,
        W: Weighter<K, V> + Clone,
        B: BuildHasher + Clone,
        L: Lifecycle<K, V> + Clone,
    {
        pub(crate) fn with(items: usize, capacity: u64, weighter: W, hasher: B, lifecycle: L) -> Self {
            Self(Mutex::new(sync::Cache::with(items, capacity, weighter, hasher, lifecycle)))
        }

        pub(crate) fn with_options(options: Options, weighter: W, hasher: B, lifecycle: L) -> Self {
            Self(Mutex::new(sync::Cache::with_options(options, weighter, hasher, lifecycle)))
        }

        fn inner(&self) -> MutexGuard<'_, sync::Cache<K, V, W, B, L>> {
            self.0.lock().unwrap()
        }

        pub(crate) fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> Option<V> {
            self.inner().get(key)
        }

        pub(crate) fn insert(&self, key: K, value: V) {
            self.inner().insert(key, value);
        }

        #[cfg(any(feature = "redis", feature = "memcached"))]
        pub(crate) fn remove_if<Q: Hash + Equivalent<K> + ?Sized>(
            &self,
            key: &Q,
            is_it: impl FnOnce(&V) -> bool,
        ) -> Option<(K, V)> {
            self.inner().remove_if(key, is_it)
        }

        pub(crate) fn iter(&self) -> impl Iterator<Item = (K, V)>
        where
            K: Clone,
        {
            self.inner().iter().collect::<Vec<_>>().into_iter()
        }

        pub(crate) fn clear(&self) {
            self.inner().clear();
        }

        pub(crate) fn len(&self) -> usize {
            self.inner().len()
        }

        pub(crate) fn weight(&self) -> u64 {
            self.inner().weight()
        }

        pub(crate) fn capacity(&self) -> u64 {
            self.inner().capacity()
        }
    }
}

/// So many orders are tried at random, and as many with few preemptions.
const TRIES: usize = 2_000;

/// How many preemptions a fault may need to be found by PCT.
const PREEMPTIONS: usize = 4;

/// The same orders in every run.
const SEED: u64 = 17;

std::thread_local! {
    /// All threads of a program are one to the machine.
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static TRIED: Cell<usize> = const { Cell::new(0) };
}

/// Time goes by.
pub(crate) fn advance(by: Duration) {
    shuttle::thread::yield_now();
    NOW.set(NOW.get() + by);
}

fn run(scheduler: impl Scheduler + 'static, program: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 19;
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(move || {
        TRIED.set(TRIED.get() + 1);
        NOW.set(Duration::ZERO);
        shuttle_tokio::time::clear_triggers();
        program();
    });
}

fn run_many(program: fn(), times: usize) {
    let tries = times * env::var("SHUTTLE_TRIES").map_or(TRIES, |tries| tries.parse().unwrap());
    run(PctScheduler::new_from_seed(SEED, PREEMPTIONS, tries), program);
    run(RandomScheduler::new_from_seed(SEED, tries), program);
}

/// Says how many orders there were, and how long they took.
fn counted(how: impl FnOnce()) -> usize {
    let start = std::time::Instant::now();
    TRIED.set(0);
    how();
    println!("{} orders in {:.1?}", TRIED.get(), start.elapsed());
    TRIED.get()
}

/// No order of many breaks the program.
pub(crate) fn holds(program: fn()) {
    match env::var("SHUTTLE_SCHEDULE") {
        Ok(schedule) => run(ReplayScheduler::new_from_encoded(&schedule), program),
        Err(_) => _ = counted(|| run_many(program, 1)),
    }
}

/// No order at all breaks the program, and there are at most so many.
pub(crate) fn holds_always(program: fn(), most: usize) {
    // What is drawn by lot within tokio's channels is always the same.
    let tried = counted(|| run(DfsScheduler::new(Some(most), true), program));
    assert!(tried < most, "there are more");
}

/// Some order of them breaks a program with a fault, and it ends in these words.
pub(crate) fn breaks(program: fn(), words: &str) {
    counted(|| {
        let broken = catch_unwind(AssertUnwindSafe(|| run_many(program, 10)));
        let broken = broken.expect_err("the planted fault was not found");
        let text = broken.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| broken.downcast_ref::<&str>().copied()).unwrap_or_default();
        assert!(text.contains(words), "another fault was found: {text}");
    });
}

/// What a test of the protocol has in its database.
#[derive(Default)]
pub(crate) struct Row {
    value: shared::atomic::AtomicU64,
    acknowledged: shared::atomic::AtomicU64,
}

impl Row {
    pub(crate) fn read(&self) -> u64 {
        self.value.load(shared::atomic::Ordering::SeqCst)
    }

    /// What every read that begins now must see.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(shared::atomic::Ordering::SeqCst)
    }

    /// Commits one more, drops what that has made stale, and acknowledges it.
    pub(crate) fn write(&self, drop: impl FnOnce()) {
        let value = self.value.fetch_add(1, shared::atomic::Ordering::SeqCst) + 1;
        drop();
        self.acknowledged.fetch_max(value, shared::atomic::Ordering::SeqCst);
    }
}
