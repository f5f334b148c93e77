//! For tests of one's own mapping. (Feature `testing`.)

mod clock;

pub use clock::Clock;
