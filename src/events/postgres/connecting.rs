//! From nothing to a process that reads, or one that stands by.

use std::sync::Arc;

use super::{
    control::Control,
    failed::{Failed, IN_USE, within},
    memory::{Memory, gap},
    place::Place,
    reading::Reading,
    settings::Settings,
    standby::Standby,
    stream::Stream,
};
use crate::events::Notes;

/// What a process is to the fleet's slot.
pub(super) enum Role {
    Reads(Box<Reading>),
    StandsBy(Box<Standby>),
}

/// What is known before.
pub(super) struct Before {
    pub(super) settings: Arc<Settings>,
    pub(super) notes: Option<Notes>,
    /// How far this process has read.
    pub(super) own: Option<Place>,
    /// The slot cannot be read any more, whatever the server says of it.
    pub(super) is_broken: bool,
}

/// Connects, and reads the slot, unless another process does; makes it, if it is not there or has lost its log.
pub(super) async fn connect(before: Before) -> Result<Role, Failed> {
    let Before { settings, notes, own, is_broken } = before;
    let control = Control::connect(&settings).await?;
    control.publish().await?;
    match control.slot().await? {
        Some(slot) if slot.is_active => return Ok(stand_by(settings, control, notes)),
        Some(slot) if slot.is_lost || is_broken => {
            control.drop_slot(!is_broken).await?;
            control.create_slot().await?;
        }
        Some(_) => {}
        None => control.create_slot().await?,
    }
    let stream = match Stream::open(&settings, &control).await {
        Err(failed) if failed.is(IN_USE) => return Ok(stand_by(settings, control, notes)),
        opened => opened?,
    };
    // Now that nobody else can move it.
    let slot = control.slot().await?.ok_or_else(|| Failed::new("connecting", "the slot is not on the same server"))?;
    let here = control.clone().flushed(false).await?.place;
    if !here.is_history_of(&stream.place) || !slot.is_active {
        return Err(Failed::new("connecting", "two servers answer at the same address"));
    }
    let noted = within(settings.timeout, "reading the fleet's note", Memory::read(notes.as_ref())).await?;
    let gap = gap([noted, own], &Place { lsn: slot.confirmed, ..here.clone() }, here.lsn);
    Ok(Role::Reads(Box::new(Reading::new(settings, control, stream, slot.confirmed, gap))))
}

fn stand_by(settings: Arc<Settings>, control: Control, notes: Option<Notes>) -> Role {
    Role::StandsBy(Box::new(Standby::new(settings, control, notes)))
}
