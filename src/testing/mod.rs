//! For tests of one's own mapping: whether what is served from the cache is what the service would have said. (Feature `testing`.)
//!
//! - [`Twin`] finds out: it asks the service with and without the cache the same, and reports the first difference with the
//!   requests that it takes. [`Requests`] makes requests of the mapping's own routes.
//! - [`Clock`] moves, so that entries age without anybody's sleeping; [`Faulty`] is a store that is slow, behind or gone.
//! - [`assert_hit!`](crate::assert_hit), [`assert_miss!`](crate::assert_miss) and [`assert_fresh!`](crate::assert_fresh) say why not.
//! - [`Cache::settled`] waits until nothing is under way.
//!
//! [`docs::testing`](crate::docs::testing) shows all of it.

mod assertions;
mod clock;
mod compare;
mod difference;
mod faulty;
mod minimise;
mod request;
mod requests;
mod told;
mod twin;

#[doc(hidden)]
pub use assertions::{Expected, assert_told};
pub use clock::Clock;
pub use difference::Difference;
pub use faulty::{Faults, Faulty};
pub use request::{Body, ReadOnly};
pub use requests::Requests;
pub use told::Answer;
pub use twin::{Compared, Twin};

use crate::cache::Cache;

impl Cache {
    /// Waits until nothing is under way behind the clients' backs: loads and fills, refreshes, comparisons of the audit, writes
    /// and their invalidations. Instead of a sleep, in tests. (Feature `testing`.)
    ///
    /// A response whose body has not been read to its end is still under way, in its client's hands. What a store that is gone
    /// has not been told is [delivered](Self::drain) when it is back, and not waited for.
    pub async fn settled(&self) {
        self.0.engine.settled().await;
    }
}
