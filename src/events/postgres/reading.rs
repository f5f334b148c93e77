//! This process reads the log.

use std::sync::Arc;

use futures_util::FutureExt;
use pgwire_replication::Lsn;

use super::{
    control::Control,
    failed::{Failed, within},
    gathered::Gathered,
    kept::Kept,
    memory::Memory,
    place::Place,
    proofs::Proofs,
    settings::Settings,
    sight::Sight,
    snapshot::Snapshot,
    stream::Stream,
};
use crate::events::{Batch, Received};

pub(super) struct Reading {
    settings: Arc<Settings>,
    control: Control,
    stream: Stream,
    /// What may have been missed before it began.
    gap: Option<&'static str>,
    gathered: Gathered,
    /// Up to where what was given last is.
    given: Lsn,
    /// What was given early, if it was.
    sight: Option<Sight>,
    acknowledged: Lsn,
    looking: Kept<Snapshot>,
    proofs: Proofs,
}

impl Reading {
    /// From `start` on, where the slot is.
    pub(super) fn new(
        settings: Arc<Settings>,
        control: Control,
        stream: Stream,
        start: Lsn,
        gap: Option<&'static str>,
    ) -> Self {
        // A gap's acknowledgement is to be remembered, though the slot is there already.
        let acknowledged = if gap.is_some() { Lsn(0) } else { start };
        let (gathered, given) = (Gathered::at(start), start);
        let (looking, proofs) = (Kept::default(), Proofs::new(true));
        Self { settings, control, stream, gap, gathered, given, sight: None, acknowledged, looking, proofs }
    }

    /// What comes next. It may be dropped, and has lost nothing.
    pub(super) async fn next(&mut self, memory: &mut Memory) -> Result<Received, Failed> {
        loop {
            if let Some(reason) = self.gap.take() {
                return Ok(Received::Gap(reason.to_owned()));
            }
            // First, as what comes may never end.
            self.proofs.ask(&self.control).now_or_never().transpose()?;
            if let Some(at) = self.proofs.reached(&self.at(self.acknowledged)) {
                return Ok(Received::Proof(at));
            }
            while self.gathered.has_room()
                && let Some(event) = self.stream.ready()
            {
                self.gathered.take(event?);
            }
            if self.gathered.is_due() {
                return self.give().await.map(Received::Events);
            }
            if let Some(reason) = self.gathered.truncated.take() {
                self.given = self.gathered.to;
                return Ok(Received::Gap(reason));
            }
            // Nothing has been given since that is not acknowledged.
            if self.proofs.is_reached(&self.at(self.gathered.to)) {
                self.acknowledge(self.gathered.to, memory).await?;
                continue;
            }
            tokio::select! {
                biased;
                event = self.stream.next() => self.gathered.take(event?),
                flushed = self.proofs.ask(&self.control) => drop(flushed?),
            }
        }
    }

    fn at(&self, lsn: Lsn) -> Place {
        Place { lsn, ..self.stream.place.clone() }
    }

    /// What has been gathered, as soon as it is known whether everybody sees it.
    async fn give(&mut self) -> Result<Batch, Failed> {
        if !self.looking.has_begun() {
            let control = self.control.clone();
            self.looking.begin(async move { control.snapshot().await });
        }
        let snapshot = self.looking.end().await?;
        let Gathered { events, unreadable, mut xids, to, .. } = self.gathered.give();
        self.given = to;
        let batch = unreadable.into_iter().fold(Batch::new(events), Batch::unreadable);
        xids.retain(|xid| !snapshot.sees(*xid));
        if xids.is_empty() {
            return Ok(batch);
        }
        self.sight = Some(Sight::new(self.settings.clone(), self.control.clone(), self.at(to), xids));
        Ok(batch.early())
    }

    /// The early batch that was given just now.
    pub(super) fn sight(&mut self) -> Option<Sight> {
        self.sight.take()
    }

    /// What was given last is done with.
    pub(super) async fn ack(&mut self, memory: &mut Memory) -> Result<(), Failed> {
        self.acknowledge(self.given, memory).await
    }

    /// Remembers it first: a slot that is ahead of what is remembered is another one.
    async fn acknowledge(&mut self, to: Lsn, memory: &mut Memory) -> Result<(), Failed> {
        if to > self.acknowledged {
            within(self.settings.timeout, "writing the fleet's note", memory.write(self.at(to))).await?;
            self.stream.acknowledge(to);
            self.acknowledged = to;
        }
        Ok(())
    }
}
