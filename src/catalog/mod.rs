//! The catalogue: which data types there are, how long each lives, and what a mutation of one drops.
//!
//! Everything here is plain data that says *what*, from code or from a file; the engine and the layers compile it once,
//! when the cache is built, and refuse what cannot work.

mod cascade;
mod cascades;
mod drops;
mod policy;
mod resolver;
mod ttl;
mod types;

pub use cascade::Cascade;
pub(crate) use cascades::{Cascades, FenceTimes};
pub(crate) use drops::{Drops, Target};
pub(crate) use policy::Policy;
pub use policy::{Coalesce, DataType, Freshness, Tier};
pub(crate) use resolver::{Resolver, ResolverError, Resolvers};
pub(crate) use ttl::Lifetime;
pub use ttl::Ttl;
pub(crate) use types::Catalogue;
