//! The catalogue: which data types there are, how long each lives, and what a mutation of one drops.
//!
//! Everything here is plain data that says *what*, from code or from a file; the engine and the layers compile it once,
//! when the cache is built, and refuse what cannot work.

mod adaptive;
mod cascade;
mod cascades;
mod change;
mod drops;
mod entities;
mod policy;
mod resolver;
mod ttl;
mod types;

pub(crate) use adaptive::{Bounds, Learned};
pub use cascade::Cascade;
pub(crate) use cascades::{By, Cascades, FenceTimes, Named, Reached};
pub(crate) use change::Change;
pub(crate) use drops::Drops;
pub use entities::Canonical;
pub(crate) use entities::{Entities, spelled};
pub(crate) use policy::Policy;
pub use policy::{Coalesce, DataType, Freshness, Tier};
pub(crate) use resolver::{PATIENCE, Resolver, ResolverError, Resolvers};
pub(crate) use ttl::Lifetime;
pub use ttl::Ttl;
pub(crate) use types::Catalogue;
