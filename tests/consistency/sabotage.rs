//! Rules of the protocol, broken on purpose: what checks schedules is itself checked by them.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use tower_cache_aside::{
    Key, Tag, Tier,
    store::{
        Entry, Fence, Guard, Health, Inquiry, Lookup, Mark, Millis, Opened, Store, StoreError, StoreFuture, TagGroup,
    },
};

use crate::{line::Line, plan::Over};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sabotage {
    None,
    /// Entries are valid whatever became of their generations.
    SkipTheCheck,
    /// Entries are filled under the generations there are after the load.
    CaptureAfterTheLoad,
    /// Reads get the generations that an earlier read got, and so join its flight.
    JoinAnyFlight,
    /// Late tags are said not to have been dropped.
    BelieveLateTags,
    /// What could not be delivered is not delivered later.
    ForgetTheJournal,
    /// The store is read while there are invalidations that it has not been told of.
    ReadWhileUndelivered,
    /// A write is answered before the store has its invalidation.
    AcknowledgeEarly,
    /// Fences are said to stand, and do not.
    RaiseNoFence,
    /// A handler that failed is taken for one that refused.
    FailureIsNoWrite,
    /// A process ends with what it has not delivered.
    DrainNothing,
    /// The store is waited for as long as it takes.
    WaitForEver,
    /// A server that takes over cannot be told from the one before.
    ForgetTheReign,
    /// Nobody hears of dropped generations, and all are believed to.
    TellNobody,
    /// What the warmer loads is stored under the generations there are after its load, which nobody joins.
    WarmerCapturesAfterTheLoad,
    /// The warmer stores what it has read the time before: after a write, what was there before the write.
    WarmerRefillsFromBefore,
}

impl Sabotage {
    pub const ALL: [Self; 15] = [
        Self::SkipTheCheck,
        Self::CaptureAfterTheLoad,
        Self::JoinAnyFlight,
        Self::BelieveLateTags,
        Self::ForgetTheJournal,
        Self::ReadWhileUndelivered,
        Self::AcknowledgeEarly,
        Self::RaiseNoFence,
        Self::FailureIsNoWrite,
        Self::DrainNothing,
        Self::WaitForEver,
        Self::ForgetTheReign,
        Self::TellNobody,
        Self::WarmerCapturesAfterTheLoad,
        Self::WarmerRefillsFromBefore,
    ];
}

impl Sabotage {
    /// Whether it changes anything there.
    pub fn is_of(self, over: Over, warms: bool) -> bool {
        match self {
            Self::None | Self::FailureIsNoWrite => true,
            Self::WarmerRefillsFromBefore => warms,
            Self::WarmerCapturesAfterTheLoad => warms && over == Over::Lines,
            Self::ForgetTheReign => matches!(over, Over::Redis(_)),
            Self::TellNobody => over == Over::Redis(Tier::On),
            Self::SkipTheCheck | Self::CaptureAfterTheLoad | Self::JoinAnyFlight | Self::BelieveLateTags => {
                !matches!(over, Over::Redis(_))
            }
            _ => over == Over::Lines,
        }
    }
}

/// The guard of a connection, got round in places.
pub struct Loose {
    pub guard: Guard<Line>,
    pub line: Line,
    pub sabotage: Sabotage,
}

async fn soon<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let budget = Duration::from_millis(50);
    timeout(budget, call).await.unwrap_or_else(|_| Err(StoreError::unreachable("no answer")))
}

impl Store for Loose {
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        match self.sabotage {
            Sabotage::ReadWhileUndelivered => Box::pin(soon(self.line.lookup(inquiry))),
            Sabotage::WaitForEver => self.line.lookup(inquiry),
            _ => self.guard.lookup(inquiry),
        }
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        match self.sabotage {
            Sabotage::ReadWhileUndelivered => Box::pin(soon(self.line.open(tags))),
            _ => self.guard.open(tags),
        }
    }

    fn extend<'a>(
        &'a self,
        mark: Mark,
        tags: &'a [Tag],
    ) -> StoreFuture<'a, Option<Vec<tower_cache_aside::store::Generation>>> {
        self.guard.extend(mark, tags)
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        self.guard.fill(key, entry, tier, now)
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        match self.sabotage {
            Sabotage::ForgetTheJournal => Box::pin(soon(self.line.invalidate(groups, fence))),
            Sabotage::AcknowledgeEarly => {
                let (line, groups, fence) = (self.line.clone(), groups.to_vec(), fence.cloned());
                tokio::spawn(async move { line.invalidate(&groups, fence.as_ref()).await.is_ok() });
                Box::pin(std::future::ready(Ok(vec![0; 8])))
            }
            _ => self.guard.invalidate(groups, fence),
        }
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.guard.fence(groups, fence)
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        self.guard.claim(key, lease)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.guard.release(key)
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        self.guard.clear()
    }

    fn health(&self) -> Health {
        self.guard.health()
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        if self.sabotage == Sabotage::DrainNothing {
            return Box::pin(std::future::ready(Ok(0)));
        }
        self.guard.drain(within)
    }
}
