//! What another region drops is dropped here as well, by one process of this region at a time.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{sleep, timeout};

use super::{
    peer::{Peer, Shared},
    record::{FIELD, Kind, Record},
};
use crate::store::{Fence, Store, StoreError, StreamEntry, StreamRead, StreamReader, TagGroup};

/// A peer whose stream says nothing for so long is asked anew.
const SILENCE: Duration = Duration::from_secs(30);

/// So many tags are dropped in one step: it has to be over in time.
pub(crate) const MOST: usize = 1_000;

/// No fence of another region stands longer.
pub(crate) const LONGEST: Duration = Duration::from_secs(86_400);

/// How long is waited after an error, the first time and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The region is not there any more.
pub(super) struct Gone;

/// What some entries come to.
#[derive(Debug)]
pub(crate) enum Step {
    Drop(Fence, TagGroup),
    Fence(Fence, TagGroup),
    Everything,
}

/// Follows a peer's stream for as long as there is the store.
pub(super) async fn relay(shared: Weak<Shared>, peer: Arc<Peer>, mut reader: StreamReader) {
    let mut relay = Relay { shared, peer, pause: PAUSES.0 };
    if relay.connects().await.is_err() {
        return;
    }
    while relay.round(&mut reader).await.is_ok() {}
}

struct Relay {
    shared: Weak<Shared>,
    peer: Arc<Peer>,
    pause: Duration,
}

impl Relay {
    /// Before its own region's store is there, there is nothing to be done.
    async fn connects(&self) -> Result<(), Gone> {
        while !self.shared()?.local.health().takes_invalidations() {
            sleep(PAUSES.0).await;
        }
        Ok(())
    }

    async fn round(&mut self, reader: &mut StreamReader) -> Result<(), Gone> {
        let read = timeout(SILENCE, reader.next()).await;
        self.shared()?;
        let done = match read {
            Err(_) => return self.fails(format!("it says nothing for {SILENCE:?}")).await,
            Ok(Err(trouble)) => return self.fails(trouble.to_string()).await,
            Ok(Ok(StreamRead::Proof(at))) => {
                self.pause = PAUSES.0;
                self.peer.mend();
                self.peer.prove(at);
                return Ok(());
            }
            Ok(Ok(StreamRead::Torn(why))) => {
                self.peer.tear(&why, false);
                return Ok(());
            }
            Ok(Ok(StreamRead::Gap(why))) => self.all_of_it(&why).await,
            Ok(Ok(StreamRead::Entries(entries))) => self.take(entries).await,
        };
        done?;
        match reader.ack().await {
            Ok(()) => {
                self.peer.mend();
                Ok(())
            }
            Err(trouble) => self.fails(trouble.to_string()).await,
        }
    }

    fn shared(&self) -> Result<Arc<Shared>, Gone> {
        self.shared.upgrade().ok_or(Gone)
    }

    /// Says what is wrong, and waits for a while.
    async fn fails(&mut self, why: String) -> Result<(), Gone> {
        self.shared()?;
        self.peer.trouble(why);
        sleep(self.pause).await;
        self.pause = (2 * self.pause).min(PAUSES.1);
        Ok(())
    }

    /// Something may have been missed: nothing is read until everything is dropped.
    async fn all_of_it(&mut self, why: &str) -> Result<(), Gone> {
        self.peer.tear(why, true);
        self.everything().await
    }

    /// And once more when the replica has heard of it, too: what is stored meanwhile may be from before.
    async fn everything(&mut self) -> Result<(), Gone> {
        self.until(&Step::Everything).await?;
        let hold = self.shared()?.hold;
        if !hold.is_zero() {
            sleep(hold).await;
            self.until(&Step::Everything).await?;
        }
        self.peer.mend();
        Ok(())
    }

    async fn take(&mut self, entries: Vec<StreamEntry>) -> Result<(), Gone> {
        let hold = self.shared()?.hold;
        for step in steps(&entries, self.peer.writer(), hold) {
            if matches!(step, Step::Everything) {
                self.peer.tear("it has dropped everything, or says what is not understood here", true);
                self.everything().await?;
            } else {
                self.until(&step).await?;
            }
            self.peer.count(1);
        }
        Ok(())
    }

    /// Until the region's own store has acknowledged it.
    async fn until(&mut self, step: &Step) -> Result<(), Gone> {
        loop {
            match self.step(step).await {
                Ok(()) => return Ok(()),
                Err(error) => self.fails(format!("this region does not take what it drops: {error}")).await?,
            }
        }
    }

    async fn step(&self, step: &Step) -> Result<(), StoreError> {
        let Ok(shared) = self.shared() else { return Ok(()) };
        match step {
            Step::Drop(fence, group) => shared.local.drop_here(std::slice::from_ref(group), fence).await,
            Step::Fence(fence, group) => shared.local.fence_here(std::slice::from_ref(group), fence).await,
            Step::Everything => shared.local.clear_here().await,
        }
    }
}

/// In their order; drops of one kind that follow each other are one. What is not understood is everything. `own` is who holds what
/// was not fenced there.
pub(crate) fn steps(entries: &[StreamEntry], own: u128, hold: Duration) -> Vec<Step> {
    let mut steps: Vec<Step> = vec![];
    for entry in entries {
        let record = match &entry.fields[..] {
            [(field, value)] if field == FIELD => Record::decode(Bytes::copy_from_slice(value)),
            _ => None,
        };
        let Some(Record { kind, writer, stands, tags }) = record else {
            steps.push(Step::Everything);
            continue;
        };
        let (stands, group) = (stands.min(LONGEST), TagGroup::new("region", tags));
        // What nobody fenced is held for nobody else to lift.
        let writer = if writer == Fence::NOBODY.writer { own } else { writer };
        match kind {
            Kind::Beat => {}
            Kind::Clear => steps.push(Step::Everything),
            Kind::Fence => steps.push(Step::Fence(Fence { writer, lease: stands, hold: Duration::ZERO }, group)),
            Kind::Drop => {
                let fence = Fence { writer, lease: Duration::ZERO, hold: hold.max(stands) };
                match steps.last_mut() {
                    Some(Step::Drop(last, tags))
                        if (last.writer, last.hold) == (fence.writer, fence.hold)
                            && tags.tags.len() + group.tags.len() <= MOST =>
                    {
                        tags.tags.extend(group.tags);
                    }
                    _ => steps.push(Step::Drop(fence, group)),
                }
            }
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Tag;

    const HOLD: Duration = Duration::from_secs(5);

    fn drops(writer: u128, stands: Duration, count: usize) -> StreamEntry {
        let tag = |i: usize| Tag::entity(b"s{t}", "doc", "doc", i.to_string().as_bytes());
        let record = Record { kind: Kind::Drop, writer, stands, tags: (0..count).map(tag).collect() };
        StreamEntry::of(vec![(FIELD.to_vec(), record.bytes())])
    }

    /// Of each step: who holds what, for how long, and how many tags.
    fn told(entries: &[StreamEntry]) -> Vec<(u128, Duration, usize)> {
        let steps = steps(entries, 7, HOLD).into_iter();
        steps
            .map(|step| match step {
                Step::Drop(fence, group) => (fence.writer, fence.hold, group.tags.len()),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    /// As far as they are of one writer, held for as long, and no more than can be dropped in time.
    #[test]
    fn drops_that_follow_each_other_are_one() {
        let (nobody, long) = (Fence::NOBODY.writer, HOLD * 2);
        assert_eq!(told(&[drops(nobody, HOLD, 2), drops(nobody, HOLD, 3)]), [(7, HOLD, 5)]);
        assert_eq!(told(&[drops(1, HOLD, 2), drops(2, HOLD, 3)]), [(1, HOLD, 2), (2, HOLD, 3)]);
        assert_eq!(told(&[drops(1, HOLD, 2), drops(1, long, 3)]), [(1, HOLD, 2), (1, long, 3)]);
        let full = [drops(1, HOLD, MOST - 1), drops(1, HOLD, 1), drops(1, HOLD, 1)];
        assert_eq!(told(&full), [(1, HOLD, MOST), (1, HOLD, 1)]);
    }
}
