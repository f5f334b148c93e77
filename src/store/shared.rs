//! One store for several caches of a process: each holds an `Arc` of it.

use std::{sync::Arc, time::Duration};

use super::{
    Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, Millis, Opened, Search, Store, StoreFuture,
    TagGroup, Usage,
};
use crate::{
    catalog::Tier,
    key::{Key, Tag},
};

/// Every method is the store's own, also those that have a default.
impl<S: Store + ?Sized> Store for Arc<S> {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        (**self).peek(key, now)
    }

    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        (**self).held(key, tier)
    }

    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        (**self).is_current(key, entry)
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        (**self).lookup(inquiry)
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        (**self).open(tags)
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        (**self).extend(mark, tags)
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        (**self).fill(key, entry, tier, now)
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        (**self).invalidate(groups, fence)
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        (**self).fence(groups, fence)
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        (**self).claim(key, lease)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        (**self).release(key)
    }

    fn refuses(&self, tier: Tier) -> Option<&'static str> {
        (**self).refuses(tier)
    }

    fn is_shared(&self) -> bool {
        (**self).is_shared()
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        (**self).clear()
    }

    fn health(&self) -> Health {
        (**self).health()
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        (**self).count(groups)
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        (**self).search(search)
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        (**self).exchange(exchange)
    }

    fn behind(&self) -> Option<Duration> {
        (**self).behind()
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        (**self).note(name, note)
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        (**self).noted(name)
    }

    fn usage(&self) -> Usage {
        (**self).usage()
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        (**self).drain(within)
    }
}

#[cfg(test)]
mod tests {
    /// Also those that are added to the trait, with a default.
    #[test]
    fn every_method_is_forwarded() {
        let (store, shared) = (include_str!("mod.rs"), include_str!("shared.rs"));
        let methods = store.split("pub trait Store").nth(1).unwrap().split("\n}\n").next().unwrap();
        let methods: Vec<_> = methods.split("\n    fn ").skip(1).map(|m| m.split(['<', '(']).next().unwrap()).collect();
        assert!(methods.len() >= 17, "{methods:?}");
        for method in methods {
            assert!(shared.contains(&format!("        (**self).{method}(")), "{method}");
        }
    }
}
