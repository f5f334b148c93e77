//! What is said only once.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

/// More different warnings of one kind than this are not told apart any longer: what they are about comes from clients.
const MOST: usize = 1_000;

/// So many requests that no route reads are looked at more closely.
const LOOKS: u32 = 32;

/// What has been warned of already.
#[derive(Debug, Default)]
pub(crate) struct Warnings {
    /// By kind.
    said: Mutex<HashMap<&'static str, HashSet<String>>>,
    looks: AtomicU32,
}

impl Warnings {
    /// Whether this has not been said yet.
    pub(crate) fn is_new(&self, kind: &'static str, about: &str) -> bool {
        let mut kinds = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let said = kinds.entry(kind).or_default();
        said.len() < MOST && said.insert(about.to_owned())
    }

    /// Whether a request that no route reads is to be looked at.
    pub(crate) fn looks_again(&self) -> bool {
        self.looks.load(Ordering::Relaxed) < LOOKS && self.looks.fetch_add(1, Ordering::Relaxed) < LOOKS
    }
}
