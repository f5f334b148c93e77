//! How far the log has been read, and how one knows that something of it was not.

use std::{fmt, str::FromStr};

use pgwire_replication::Lsn;

/// A position in the log of one server, in one of its histories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// What a server is given when it is made, and keeps.
    pub(crate) system: String,
    /// Another one since each failover or restored backup.
    pub(crate) timeline: u32,
    pub(crate) lsn: Lsn,
}

impl Place {
    /// Whether positions of both can be compared.
    pub(crate) fn is_history_of(&self, other: &Self) -> bool {
        self.system == other.system && self.timeline == other.timeline
    }

    /// Why events may have been missed between this, up to where all was acknowledged, and `start`, where a slot goes on
    /// while the server's log ends at `end`.
    pub(crate) fn gap(&self, start: &Self, end: Lsn) -> Option<&'static str> {
        if self.system != start.system {
            Some("another server answers")
        } else if self.timeline != start.timeline {
            Some("the server is in another timeline: a failover, or a restored backup")
        } else if start.lsn > self.lsn {
            Some("the slot begins after what was read: it was lost, or made anew")
        } else if end < self.lsn {
            Some("the server's log ends before what was read: an old copy of it was restored")
        } else {
            None
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.system, self.timeline, self.lsn)
    }
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split(' ');
        let (Some(system), Some(timeline), Some(lsn), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        let timeline = timeline.parse().map_err(|_| ())?;
        Ok(Self { system: system.to_owned(), timeline, lsn: Lsn::parse(lsn).map_err(|_| ())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_seen() {
        let place = |text: &str| text.parse::<Place>().unwrap();
        let noted = place("7 1 1/20");
        assert_eq!(place(&noted.to_string()), noted);
        let (start, end) = (place("7 1 1/10"), Lsn(0x1_0000_0030));
        assert_eq!(noted.gap(&start, end), None);
        assert_eq!(noted.gap(&noted, noted.lsn), None);
        for (start, end) in
            [(place("8 1 1/10"), end), (place("7 2 1/10"), end), (place("7 1 1/21"), end), (start, Lsn(0x1_0000_001f))]
        {
            assert!(noted.gap(&start, end).is_some(), "{start} {end}");
        }
        for text in ["", "7 1", "7 x 1/2", "7 1 12", "7 1 1/2 3"] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
