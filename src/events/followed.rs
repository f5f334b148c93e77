//! How far what happens elsewhere is known to have been dropped here.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::clock::Moment;

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Became {
    Applied,
    Ignored,
    Refused,
    Unreadable,
    /// Events that may have been missed.
    Gap,
}

pub(crate) const BECAME: [(Became, &str); 5] = [
    (Became::Applied, "applied"),
    (Became::Ignored, "ignored"),
    (Became::Refused, "refused"),
    (Became::Unreadable, "unreadable"),
    (Became::Gap, "gap"),
];

/// A source that is followed.
#[derive(Debug)]
pub(crate) struct Followed {
    pub(crate) name: String,
    sources: Arc<Shared>,
    /// Everything that changed before has been dropped; `None`: that is not known.
    proven: Mutex<Option<Moment>>,
    /// What is wrong with it.
    trouble: Mutex<Option<String>>,
    /// It is not followed any more, and another of its name may be.
    has_ended: AtomicBool,
    became: [AtomicU64; BECAME.len()],
}

#[derive(Debug)]
struct Shared {
    all: Mutex<Vec<Arc<Followed>>>,
    /// What is proven of each of them.
    proven: Mutex<Option<Moment>>,
}

/// All sources that a cache follows.
#[derive(Debug)]
pub(crate) struct Sources(Arc<Shared>);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Sources {
    fn default() -> Self {
        Self(Arc::new(Shared { all: Mutex::default(), proven: Mutex::default() }))
    }
}

impl Shared {
    /// What is proven is what is proven of all.
    fn settle(&self) {
        let all = locked(&self.all);
        let least = all.iter().map(|source| *locked(&source.proven)).min();
        *locked(&self.proven) = least.flatten();
    }
}

impl Sources {
    /// Adds a source, unless there is one of this name.
    pub(crate) fn add(&self, name: &str) -> Option<Arc<Followed>> {
        let mut all = locked(&self.0.all);
        if all.iter().any(|source| source.name == name && !source.has_ended.load(Ordering::Acquire)) {
            return None;
        }
        all.retain(|source| source.name != name);
        let source = Arc::new(Followed {
            name: name.to_owned(),
            sources: self.0.clone(),
            proven: Mutex::default(),
            trouble: Mutex::default(),
            has_ended: AtomicBool::new(false),
            became: Default::default(),
        });
        all.push(source.clone());
        drop(all);
        self.0.settle();
        Some(source)
    }

    /// How far behind the worst of them may be: everything that changed before has been dropped. `None` if that is not known, or
    /// nothing is followed.
    pub(crate) fn behind(&self) -> Option<Duration> {
        locked(&self.0.proven).map(Moment::elapsed)
    }

    /// Whether any is followed.
    pub(crate) fn any(&self) -> bool {
        !locked(&self.0.all).is_empty()
    }

    #[cfg_attr(not(feature = "stats"), allow(dead_code))]
    pub(crate) fn all(&self) -> Vec<Arc<Followed>> {
        locked(&self.0.all).clone()
    }
}

impl Followed {
    /// Everything that changed before has been dropped.
    pub(crate) fn prove(&self, at: Instant) {
        let mut proven = locked(&self.proven);
        *proven = (*proven).max(Some(Moment::of(at)));
        drop(proven);
        self.sources.settle();
    }

    /// Nothing is proven any more.
    pub(crate) fn lose(&self) {
        *locked(&self.proven) = None;
        self.sources.settle();
    }

    /// Nobody follows it any more.
    pub(crate) fn end(&self) {
        self.lose();
        self.has_ended.store(true, Ordering::Release);
    }

    /// How far behind it may be; `None` if that is not known.
    #[cfg_attr(not(feature = "stats"), allow(dead_code))]
    pub(crate) fn behind(&self) -> Option<Duration> {
        locked(&self.proven).map(Moment::elapsed)
    }

    /// What is wrong, or that nothing is any more. Whether that is news.
    pub(crate) fn trouble(&self, trouble: Option<String>) -> bool {
        let mut known = locked(&self.trouble);
        let is_news = known.is_some() != trouble.is_some();
        *known = trouble;
        is_news
    }

    #[cfg_attr(not(feature = "stats"), allow(dead_code))]
    pub(crate) fn what_is_wrong(&self) -> Option<String> {
        locked(&self.trouble).clone()
    }

    pub(crate) fn count(&self, what: Became, more: usize) {
        self.became[what as usize].fetch_add(more as u64, Ordering::Relaxed);
    }

    #[cfg_attr(not(feature = "stats"), allow(dead_code))]
    pub(crate) fn became(&self) -> [u64; BECAME.len()] {
        self.became.each_ref().map(|count| count.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_proven_is_what_is_proven_of_all() {
        let sources = Sources::default();
        assert_eq!(sources.behind(), None, "nobody is followed");
        let first = sources.add("first").unwrap();
        assert!(sources.add("first").is_none());
        assert_eq!(sources.behind(), None);
        let start = Instant::now();
        first.prove(start);
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(sources.behind(), Some(Duration::from_secs(3)));
        let second = sources.add("second").unwrap();
        assert_eq!(sources.behind(), None, "the second has said nothing");
        second.prove(Instant::now());
        assert_eq!(sources.behind(), Some(Duration::from_secs(3)));
        first.prove(start + Duration::from_secs(2));
        first.prove(start + Duration::from_secs(1));
        assert_eq!(sources.behind(), Some(Duration::from_secs(1)), "an older proof takes nothing back");
        second.lose();
        assert_eq!((sources.behind(), first.behind()), (None, Some(Duration::from_secs(1))));
    }
}
