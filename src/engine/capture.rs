//! The generations that a load begins under: those that its look-up has read. What had none then is given one while the load is under
//! way, so that its client does not wait for that; it counts if nothing was dropped in between.

use std::sync::OnceLock;

use crate::store::{Generation, Lookup, Mark, Opened};

#[derive(Clone, Debug)]
pub(crate) struct Capture {
    /// What the look-up has read, if some of them were absent; else nothing.
    seen: Vec<Option<Generation>>,
    /// When.
    mark: Mark,
    /// All of them, as soon as they are known.
    all: OnceLock<Vec<Generation>>,
}

impl Capture {
    /// Of what was made where there was none.
    pub(super) fn opened(opened: Opened) -> Self {
        Self { seen: vec![], mark: opened.mark, all: opened.generations.into() }
    }

    /// Of a look-up for so many tags, if the store has marked when that was. Whether a fence still stands is for
    /// [`open`](crate::store::Store::open) to find out.
    pub(super) fn looked_up(found: Lookup, tags: usize) -> Option<Self> {
        let (mark, seen) = (found.mark?, found.generations);
        if seen.len() != tags || seen.iter().flatten().any(|generation| generation.is_fenced()) {
            return None;
        }
        Some(match seen.iter().copied().collect::<Option<Vec<_>>>() {
            Some(generations) => Self::opened(Opened::new(generations, mark)),
            None => Self { seen, mark, all: OnceLock::new() },
        })
    }

    /// When they were read.
    pub(super) fn mark(&self) -> Mark {
        self.mark
    }

    /// All of them, if they are known.
    pub(super) fn generations(&self) -> Option<&[Generation]> {
        self.all.get().map(Vec::as_slice)
    }

    /// Whether some are yet to be made.
    pub(super) fn is_open(&self) -> bool {
        self.all.get().is_none()
    }

    /// What is known of them.
    pub(super) fn known(&self) -> Vec<Option<Generation>> {
        self.generations().map_or_else(|| self.seen.clone(), |all| all.iter().copied().map(Some).collect())
    }

    /// Whether each of them was absent, if some were.
    pub(super) fn absent(&self) -> impl Iterator<Item = bool> {
        self.seen.iter().map(Option::is_none)
    }

    /// Those that were absent have been made. If anything may have been dropped meanwhile, there is none under which something may be
    /// stored, or which somebody else has read.
    pub(super) fn settle(&self, opened: Option<Opened>) {
        let made = opened.filter(|opened| opened.mark == self.mark);
        let mut made = made.into_iter().flat_map(|opened| opened.generations);
        let mut next = || made.next().unwrap_or_else(|| Generation::unique().fenced());
        self.all.get_or_init(|| self.seen.iter().map(|seen| seen.unwrap_or_else(&mut next)).collect());
    }

    /// Whether nothing can have been dropped between these two: both have the same generations; or both have read that the same are
    /// absent, and the mark, which falls with each drop, is the same.
    pub(super) fn is_equal(&self, other: &Self) -> bool {
        let both = self.generations().zip(other.generations());
        let is_same_moment = || !self.seen.is_empty() && self.mark == other.mark && self.seen == other.seen;
        both.is_some_and(|(own, others)| own == others) || is_same_moment()
    }

    /// Whether it may turn out to be equal to this, when what was absent is made.
    pub(super) fn may_become(&self, other: &Self) -> bool {
        let could_be = |(seen, known): (&Option<_>, &_)| seen.is_none_or(|seen| seen == *known);
        self.is_open() && other.generations().is_some_and(|known| self.seen.iter().zip(known).all(could_be))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        collections::HashSet,
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::SeqCst},
        },
        task::Poll,
        time::Duration,
    };

    use tokio::{sync::Semaphore, task::yield_now, time::timeout};

    use super::*;
    use crate::{
        catalog::{DataType, Tier},
        clock::Millis,
        engine::{
            beside,
            flight::Landed,
            lookup::{
                Begin,
                tests::{Bench, SECOND, fresh_for, tag, value},
            },
        },
        key::{Key, Tag},
        store::{Entry, Fence, Inquiry, MemoryStore, Store, StoreError, StoreFuture, TagGroup},
        sync::{Mutex, MutexGuard},
    };

    const MINUTE: Duration = Duration::from_secs(60);

    /// Marks look-ups, as a store does that is far away, and answers to [`open`](Store::open) when it is let.
    pub(in crate::engine) struct Marking {
        memory: Arc<MemoryStore>,
        /// Those that have a generation: the one in process knows one of each.
        opened: Mutex<HashSet<Tag>>,
        /// The mark that it always gives.
        believes: Option<Mark>,
        /// How often it was asked to open some, and how often it may answer, or refuses to.
        asked: Arc<AtomicUsize>,
        answers: Option<Arc<Semaphore>>,
        refuses: bool,
    }

    impl Marking {
        /// Whose marks say whether something was dropped in between, or do not.
        pub(in crate::engine) fn new(memory: Arc<MemoryStore>, marks: bool) -> Self {
            let believes = (!marks).then_some(Mark(0));
            Self { memory, opened: Mutex::default(), believes, asked: Arc::default(), answers: None, refuses: false }
        }

        fn opened(&self) -> MutexGuard<'_, HashSet<Tag>> {
            self.opened.lock().unwrap()
        }
    }

    /// Others go first.
    pub(in crate::engine) async fn pause() {
        let mut is_first = true;
        poll_fn(|cx| {
            cx.waker().wake_by_ref();
            if std::mem::take(&mut is_first) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    impl Store for Marking {
        fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
            self.memory.peek(key, now)
        }
        fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
            Box::pin(async move {
                // What is dropped in between, was dropped after the mark.
                let mark = self.memory.open(&[]).await?.mark;
                let mut found = self.memory.lookup(inquiry).await?;
                let opened = self.opened();
                for (now, tag) in found.generations.iter_mut().zip(inquiry.tags) {
                    *now = now.filter(|_| opened.contains(tag));
                }
                Ok(found.marked(Some(self.believes.unwrap_or(mark))))
            })
        }
        fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
            Box::pin(async move {
                self.asked.fetch_add(1, SeqCst);
                if self.refuses {
                    return Err(StoreError::new("not me"));
                }
                // What is beside it goes on meanwhile.
                pause().await;
                let generations = self.memory.open(tags).await?.generations;
                // What is dropped in between, was dropped before the mark.
                let mark = self.memory.open(&[]).await?.mark;
                let opened = Opened::new(generations, self.believes.unwrap_or(mark));
                self.opened().extend(tags.iter().cloned());
                if let Some(answers) = &self.answers {
                    answers.acquire().await.unwrap().forget();
                }
                Ok(opened)
            })
        }
        fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
            self.memory.extend(mark, tags)
        }
        fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
            self.memory.fill(key, entry, tier, now)
        }
        fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
            let dropped = groups.iter().flat_map(|group| &group.tags);
            dropped.for_each(|tag| _ = self.opened().remove(tag));
            self.memory.invalidate(groups, fence)
        }
        fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
            self.memory.fence(groups, fence)
        }
        fn clear(&self) -> StoreFuture<'_, ()> {
            self.memory.clear()
        }
    }

    /// Over such a store, and how often it has been asked and may answer.
    fn bench(refuses: bool) -> (Bench, Arc<AtomicUsize>, Arc<Semaphore>) {
        let (asked, answers) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let memory = Arc::new(MemoryStore::new(1 << 20));
        let store =
            Marking { refuses, asked: asked.clone(), answers: Some(answers.clone()), ..Marking::new(memory, true) };
        (Bench::of(DataType::new("doc", MINUTE), store), asked, answers)
    }

    #[tokio::test]
    async fn a_load_does_not_wait_until_what_was_absent_is_made() {
        let (bench, asked, answers) = bench(false);
        let mut leader = bench.lead().await;
        assert_eq!(asked.load(SeqCst), 0);
        let Begin::Follow(same, _) = bench.begin().await else { panic!("who has seen the same does not wait with it") };
        assert_eq!(beside(Some(&mut leader), async { "at once" }).await, "at once");
        assert!(leader.is_open() && asked.load(SeqCst) == 0);
        for _ in 0..2 {
            beside(Some(&mut leader), yield_now()).await;
            assert!(leader.is_open() && asked.load(SeqCst) == 1);
        }
        // It is there by now, and nobody else knows yet by whom.
        let Begin::Follow(other, _) = bench.begin().await else { panic!("two load the same") };
        answers.add_permits(1);
        beside(Some(&mut leader), yield_now()).await;
        assert!(!leader.is_open());
        let Begin::Follow(late, _) = bench.begin().await else { panic!("two load the same") };
        leader.seal(value(), vec![], fresh_for(MINUTE), None).await.unwrap().store().await;
        for waits in [same, other, late] {
            assert!(matches!(bench.engine.follow(waits).await, Landed::Done(_)));
        }
        assert!(matches!(bench.begin().await, Begin::Hit(_)) && asked.load(SeqCst) == 1);
    }

    /// Nobody is given what was loaded before a drop who began after it, and it is not stored; what is loaded after it is.
    #[tokio::test]
    async fn what_was_dropped_in_between_is_not_stored() {
        let (bench, asked, answers) = bench(false);
        answers.add_permits(9);
        let leader = bench.lead().await;
        let Begin::Follow(before, _) = bench.begin().await else { panic!("it is not joined") };
        bench.drop(tag("1")).await;
        let next = bench.lead().await;
        next.seal(value(), vec![], fresh_for(MINUTE), None).await.unwrap().store().await;
        let sealed = leader.seal(value(), vec![], fresh_for(MINUTE), None).await.unwrap();
        assert!(!sealed.is_kept() && matches!(bench.engine.follow(before).await, Landed::Done(_)));
        sealed.store().await;
        let Begin::Hit(entry) = bench.begin().await else { panic!("it is not stored") };
        assert!(!entry.stamps.iter().any(|stamp| stamp.generation.is_fenced()) && asked.load(SeqCst) == 2);
    }

    /// Who has read a generation that somebody may just be making waits; if it turns out to be another's, for nothing.
    #[tokio::test(start_paused = true)]
    async fn what_turns_out_not_to_be_equal_is_loaded_again() {
        let (bench, _, answers) = bench(false);
        answers.add_permits(9);
        let mut leader = bench.lead().await;
        bench.drop(tag("1")).await;
        bench.engine.store.open(&bench.tags).await.unwrap();
        let Begin::Follow(after, _) = bench.begin().await else { panic!("it may be equal") };
        let engine = bench.engine.clone();
        let waits = tokio::spawn(async move { matches!(engine.follow(after).await, Landed::Unshareable) });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        leader.making().unwrap().await;
        assert!(timeout(SECOND, waits).await.unwrap().unwrap(), "although that load is still under way");
        leader.seal(value(), vec![], fresh_for(MINUTE), None).await.unwrap().store().await;
        assert!(matches!(bench.begin().await, Begin::Lead(_)));
    }

    /// A store that refuses keeps nobody from the response.
    #[tokio::test]
    async fn what_is_refused_is_not_stored() {
        let (bench, _, _) = bench(true);
        let mut leader = bench.lead().await;
        let Begin::Follow(waits, _) = bench.begin().await else { panic!("it is not joined") };
        beside(Some(&mut leader), yield_now()).await;
        assert!(!leader.is_open());
        let sealed = leader.seal(value(), vec![], fresh_for(MINUTE), None).await.unwrap();
        assert!(!sealed.is_kept() && matches!(bench.engine.follow(waits).await, Landed::Done(_)));
    }

    /// What each of two has read, and whether nothing can have been dropped in between.
    #[test]
    fn captures_are_equal_only_if_nothing_was_dropped_in_between() {
        let looked_up = |seen: &[u128], mark| {
            let seen = seen.iter().map(|g| Some(Generation(*g)).filter(|g| g.0 > 0)).collect();
            Capture::looked_up(Lookup::new(None, seen).marked(Some(Mark(mark))), 2).unwrap()
        };
        let made = |seen: &[u128], mark, generations: &[u128], at| {
            let capture = looked_up(seen, mark);
            let generations = generations.iter().copied().map(Generation).collect();
            capture.settle(Some(Opened::new(generations, Mark(at))));
            capture
        };
        for (one, other, is_equal, may_become) in [
            (looked_up(&[7, 8], 1), looked_up(&[7, 8], 2), true, false),
            (looked_up(&[7, 8], 1), looked_up(&[7, 9], 1), false, false),
            (looked_up(&[7, 0], 1), looked_up(&[7, 0], 1), true, false),
            (looked_up(&[7, 0], 1), looked_up(&[7, 0], 2), false, false),
            (looked_up(&[7, 0], 1), looked_up(&[0, 8], 1), false, false),
            (looked_up(&[7, 0], 1), looked_up(&[7, 8], 2), false, true),
            (looked_up(&[7, 0], 1), looked_up(&[6, 8], 1), false, false),
            (made(&[7, 0], 1, &[8], 1), looked_up(&[7, 8], 2), true, false),
            (made(&[7, 0], 1, &[8], 1), looked_up(&[7, 9], 1), false, false),
            (made(&[7, 0], 1, &[8], 1), made(&[0, 0], 2, &[7, 8], 2), true, false),
            // Something was dropped before they were made.
            (made(&[7, 0], 1, &[8], 2), looked_up(&[7, 8], 2), false, false),
            (made(&[7, 0], 1, &[8], 2), looked_up(&[7, 0], 1), true, false),
            (made(&[7, 0], 1, &[8], 2), made(&[0, 0], 2, &[7, 8], 2), false, false),
            (made(&[7, 0], 1, &[], 1), made(&[7, 0], 2, &[], 2), false, false),
        ] {
            assert_eq!(one.is_equal(&other), is_equal, "{one:?} {other:?}");
            assert_eq!(one.may_become(&other), may_become, "{one:?} {other:?}");
        }
        let fenced = Lookup::new(None, vec![None, Some(Generation(7).fenced())]).marked(Some(Mark(1)));
        assert!(Capture::looked_up(fenced, 2).is_none());
        assert!(Capture::looked_up(Lookup::new(None, vec![None, None]), 2).is_none(), "no mark");
        assert!(Capture::looked_up(Lookup::new(None, vec![]).marked(Some(Mark(1))), 2).is_none(), "too few");
    }
}
