//! placeholder
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod cache;
mod catalog;
mod engine;
mod key;
mod layer;
mod route;
pub mod store;

pub use cache::{Cache, CacheBuilder, Invalidation};
pub use catalog::{Cascade, Config, ConfigError, DataType, Ttl};
pub use engine::{EntryBuilder, Fetch, Generate, Invalidated, Report, Source};
pub use key::{Key, Tag};
pub use layer::{
    CacheAside, CacheAsideLayer, CacheBody, CacheTags, Invalidate, InvalidateBody, InvalidateLayer, ResponseFuture,
};
pub use route::{Credentials, Mutation, Query, Route};
