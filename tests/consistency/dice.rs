//! Time and chance of one schedule. What happens is a function of the seed, of the moment and of what is asked, and not of
//! what was asked before: so an action can be taken out of a schedule without changing what becomes of the others.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, sleep};

pub struct Dice {
    seed: u64,
    start: Instant,
    /// How often each was asked within this millisecond.
    asked: Mutex<(u64, HashMap<u64, u64>)>,
}

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { seed, start: Instant::now(), asked: Mutex::default() }
    }

    /// Milliseconds since the schedule began.
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    pub fn instant(&self, at: u64) -> Instant {
        self.start + Duration::from_millis(at)
    }

    /// What a wall clock says that is ahead by so many milliseconds.
    pub fn wall(&self, ahead: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000 + ahead) + self.start.elapsed()
    }

    /// A number below `n`.
    pub fn roll(&self, what: u64, n: u64) -> u64 {
        let now = self.now();
        let mut asked = self.asked.lock().unwrap();
        if asked.0 != now {
            *asked = (now, HashMap::new());
        }
        let count = asked.1.entry(what).or_default();
        *count += 1;
        mix(mix(mix(self.seed ^ now) ^ what) ^ *count) % n
    }

    /// Stops for a moment: usually others come first, and sometimes time passes.
    pub async fn pause(&self, what: u64) {
        match self.roll(what, 16) {
            often @ 0..=10 => {
                for _ in 0..often % 4 {
                    tokio::task::yield_now().await;
                }
            }
            11..=14 => sleep(Duration::from_millis(1 + self.roll(what, 4))).await,
            _ => sleep(Duration::from_millis(5 + self.roll(what, 14))).await,
        }
    }
}

/// The finalizer of `splitmix64`.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
