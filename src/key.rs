//! Keys and tags: the names under which entries and generations are stored.
//!
//! Both are canonical byte strings that begin with the service's name and the tenant in braces, so that on a Redis cluster
//! everything of one tenant shares a hash slot. Every part that comes from outside (tenant, ids, query, header values) is escaped to
//! `A-Z a-z 0-9 . _ -`, and the separators are outside that alphabet: no id can forge another's key, and two different
//! (tenant, type, resource, scope, variant) never give the same bytes. A part of more than 128 bytes is replaced by
//! `~` and its SHA-256, so keys stay short whatever clients send.

use std::{borrow::Cow, cell::Cell, fmt, sync::Arc};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use smallvec::SmallVec;

use crate::error::ConfigError;

/// Longer parts are hashed.
const MAX_PART: usize = 128;

/// Longer keys are hashed, but for their beginning: service, tenant and data type.
const MAX_KEY: usize = 1_024;
const KEPT: usize = 896;

/// A key being built.
pub(crate) type KeyBuf = Vec<u8>;

/// What a thread keeps of what it built its last key in, at most.
const SPARE: usize = 4 * MAX_KEY;

thread_local! {
    /// What the last key was built in: a hit needs none for longer.
    static LAST: Cell<KeyBuf> = const { Cell::new(KeyBuf::new()) };
}

/// Something to build a key in.
pub(crate) fn buffer() -> KeyBuf {
    LAST.try_with(Cell::take).unwrap_or_default()
}

/// It is built, and needed no more.
pub(crate) fn give_back(mut buf: KeyBuf) {
    if buf.capacity() <= SPARE {
        buf.clear();
        // Where the thread ends there is no next one.
        let _ = LAST.try_with(|last| last.set(buf));
    }
}

const HEX: &[u8; 16] = b"0123456789ABCDEF";

const CLEAN: [bool; 256] = {
    let mut table = [false; 256];
    let mut i = 0;
    while i < 256 {
        let c = i as u8;
        table[i] = c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        i += 1;
    }
    table
};

/// Appends `part`, escaped.
pub(crate) fn push_escaped(buf: &mut KeyBuf, part: &[u8]) {
    if part.len() > MAX_PART {
        return push_secret(buf, part);
    }
    let mut rest = part;
    while let Some(at) = rest.iter().position(|&c| !CLEAN[usize::from(c)]) {
        buf.extend_from_slice(&rest[..at]);
        let c = rest[at];
        buf.extend_from_slice(&[b'%', HEX[usize::from(c >> 4)], HEX[usize::from(c & 15)]]);
        rest = &rest[at + 1..];
    }
    buf.extend_from_slice(rest);
}

/// Appends the hash of a part that is not to be read in the names of keys.
pub(crate) fn push_secret(buf: &mut KeyBuf, part: &[u8]) {
    buf.push(b'~');
    for byte in Sha256::digest(part) {
        buf.push(HEX[usize::from(byte >> 4)]);
        buf.push(HEX[usize::from(byte & 15)]);
    }
}

/// A key of at most so many bytes, whatever clients send: of what is longer the end is hashed.
pub(crate) fn bounded(mut key: KeyBuf) -> KeyBuf {
    if key.len() > MAX_KEY {
        let all = std::mem::take(&mut key);
        key.extend_from_slice(&all[..KEPT]);
        // No part is spelled like this.
        key.push(b'~');
        push_secret(&mut key, &all);
    }
    key
}

/// What the keys and tags of one service begin with: services that share a store share nothing else.
///
/// Entries have a version besides, so that two shapes of them do not meet; tags have none, so that a write through either
/// version drops both.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    service: Arc<str>,
    version: Arc<str>,
}

impl Space {
    /// The space of a service. Its name is part of every key, and no name may forge another's.
    pub(crate) fn new(service: &str, version: &str) -> Result<Self, ConfigError> {
        let is_plain = |name: &str| name.len() <= MAX_PART && name.bytes().all(|c| CLEAN[usize::from(c)]);
        if service.is_empty() || !is_plain(service) {
            return Err(ConfigError::new(format!(
                "service name `{service}`: name it with letters, digits, `.`, `_` and `-`; it tells this service's \
                 entries from those of others in a shared store"
            )));
        }
        if !is_plain(version) {
            return Err(ConfigError::new(format!(
                "version `{version}`: write it with letters, digits, `.`, `_` and `-`, such as 2"
            )));
        }
        Ok(Self { service: service.into(), version: version.into() })
    }

    pub(crate) fn service(&self) -> &str {
        &self.service
    }

    fn push_tenant(&self, buf: &mut KeyBuf, name: &[u8]) {
        buf.extend_from_slice(self.service.as_bytes());
        buf.push(b'{');
        if name.is_empty() {
            // With nothing in braces a cluster would look at the whole key. No name is spelled like this.
            buf.push(b'~');
        }
        push_escaped(buf, name);
        buf.push(b'}');
    }

    fn push_version(&self, buf: &mut KeyBuf) {
        if !self.version.is_empty() {
            buf.push(b'@');
            buf.extend_from_slice(self.version.as_bytes());
        }
    }

    /// Begins the key of an entry.
    pub(crate) fn push_entry(&self, buf: &mut KeyBuf, tenant: &[u8]) {
        self.push_tenant(buf, tenant);
        self.push_version(buf);
    }

    pub(crate) fn tenant(&self, name: impl AsRef<[u8]>) -> Tenant {
        let name = name.as_ref();
        let mut both = KeyBuf::with_capacity(self.service.len() + 2 * name.len() + 3);
        both.extend_from_slice(name);
        self.push_tenant(&mut both, name);
        let both = Bytes::from(both);
        Tenant { name: both.slice(..name.len()), head: both.slice(name.len()..) }
    }
}

/// A tenant: its name as it came, and what its keys and tags begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tenant {
    name: Bytes,
    head: Bytes,
}

impl Tenant {
    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }

    /// What keys and tags of this tenant begin with: `service{tenant}`.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head
    }
}

/// Goes on with `:type:`.
pub(crate) fn push_type(buf: &mut KeyBuf, data_type: &str) {
    buf.push(b':');
    push_escaped(buf, data_type.as_bytes());
    buf.push(b':');
}

/// Goes on with the ids; what follows is the variant. `scope` must be sorted by entity name.
pub(crate) fn push_ids<'a>(
    buf: &mut KeyBuf,
    resource: Option<&[u8]>,
    scope: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) {
    if let Some(resource) = resource {
        buf.push(b'=');
        push_escaped(buf, resource);
    }
    buf.push(b':');
    for (i, (entity, id)) in scope.into_iter().enumerate() {
        if i > 0 {
            buf.push(b',');
        }
        push_escaped(buf, entity.as_bytes());
        buf.push(b'=');
        push_escaped(buf, id);
    }
    buf.push(b':');
}

/// What ends the tag of everything of a type.
const ALL: u8 = b'*';

/// Ends the tag of an entity.
fn push_entity(buf: &mut KeyBuf, entity: &str, id: &[u8]) {
    push_escaped(buf, entity.as_bytes());
    buf.push(b'=');
    push_escaped(buf, id);
}

/// The key that has been built for this tenant, and the tags of an entry of this type: of these entities, and of all. They share one
/// allocation. The type is [as keys have it](push_type).
pub(crate) fn key_and_tags<'e>(
    key: KeyBuf,
    name: &[u8],
    type_part: &[u8],
    entities: impl Iterator<Item = (&'e str, Cow<'e, [u8]>)>,
) -> (Key, Tags, Tenant) {
    let (end, mut buf) = (key.len(), key);
    let mut head = SmallVec::<[u8; 128]>::from_slice(tenant_of(&buf));
    head.extend_from_slice(type_part);
    let mut ends = SmallVec::<[usize; 4]>::new();
    for (entity, id) in entities {
        buf.extend_from_slice(&head);
        push_entity(&mut buf, entity, &id);
        ends.push(buf.len());
    }
    buf.extend_from_slice(&head);
    buf.push(ALL);
    ends.push(buf.len());
    // One of which keys hold only the hash is not to be held as long as these.
    let own = (name.len() > MAX_PART).then(|| Bytes::copy_from_slice(name));
    if own.is_none() {
        buf.extend_from_slice(name);
    }
    let all = shared(&buf);
    give_back(buf);
    let (mut tags, mut begin) = (Tags::with_capacity(ends.len()), end);
    for end in ends {
        tags.push(Tag(all.slice(begin..end)));
        begin = end;
    }
    let name = own.unwrap_or_else(|| all.slice(begin..));
    let tenant = Tenant { name, head: all.slice(..head.len() - type_part.len()) };
    (Key(all.slice(..end)), tags, tenant)
}

/// The name of an entry: tenant, data type, resource, scope and variant, in canonical bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Key(pub(crate) Bytes);

/// The unit of invalidation: (tenant, data type, `entity=id`) or (tenant, data type, `*`), in canonical bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Tag(pub(crate) Bytes);

/// A copy for many, at most 64 bytes longer than it is, for it may be held for long; most often in one allocation with the count of
/// those who have it, which otherwise is another.
fn shared(bytes: &[u8]) -> Bytes {
    match bytes.len() {
        ..=64 => Bytes::from_owner(SmallVec::<[u8; 64]>::from_slice(bytes)),
        65..=96 => Bytes::from_owner(SmallVec::<[u8; 96]>::from_slice(bytes)),
        97..=128 => Bytes::from_owner(SmallVec::<[u8; 128]>::from_slice(bytes)),
        193..=256 => Bytes::from_owner(SmallVec::<[u8; 256]>::from_slice(bytes)),
        _ => Bytes::copy_from_slice(bytes),
    }
}

/// Those that a request names: most often its entity's, and that of all of the type.
pub(crate) type Tags = SmallVec<[Tag; 2]>;

impl Key {
    pub(crate) fn new(bytes: KeyBuf) -> Self {
        Self(bytes.into())
    }

    /// The canonical bytes: printable ASCII that begins with `service{tenant}:`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The service and the tenant in braces: what all keys and tags of that tenant begin with.
    pub fn tenant(&self) -> &[u8] {
        tenant_of(&self.0)
    }
}

/// What a key or tag begins with: the service and the tenant in braces.
pub(crate) fn tenant_of(name: &[u8]) -> &[u8] {
    let end = name.iter().position(|&c| c == b'}').map_or(0, |at| at + 1);
    &name[..end]
}

impl Tag {
    /// The tag of every entry of `data_type` that belongs to the entity with this id. `head` is what all tags of the tenant
    /// begin with.
    pub(crate) fn entity(head: &[u8], data_type: &str, entity: &str, id: &[u8]) -> Self {
        let mut buf = KeyBuf::with_capacity(head.len() + data_type.len() + entity.len() + id.len() + 3);
        buf.extend_from_slice(head);
        push_type(&mut buf, data_type);
        push_entity(&mut buf, entity, id);
        Self(buf.into())
    }

    /// The tag of every entry of `data_type`.
    pub(crate) fn all(head: &[u8], data_type: &str) -> Self {
        let mut buf = KeyBuf::with_capacity(head.len() + data_type.len() + 3);
        buf.extend_from_slice(head);
        push_type(&mut buf, data_type);
        buf.push(ALL);
        Self(buf.into())
    }

    /// Whether it is of all entries of its type. (No id is spelled like that.)
    pub(crate) fn is_all(&self) -> bool {
        self.0.last() == Some(&ALL)
    }

    /// The canonical bytes: printable ASCII that begins with `service{tenant}:`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The kind of entity that it is about; nothing, if it is of all entries of its type.
    #[cfg(feature = "memcached")]
    pub(crate) fn about(&self) -> &[u8] {
        let begin = self.0.iter().rposition(|&c| c == b':').map_or(0, |at| at + 1);
        let rest = &self.0[begin..];
        rest.iter().position(|&c| c == b'=').map_or(&[], |end| &rest[..end])
    }

    /// What people call it: `agent:agent=a1`, without service and tenant.
    #[cfg(feature = "stats")]
    pub(crate) fn label(&self) -> String {
        String::from_utf8_lossy(self.named()).into_owned()
    }

    /// The same as it is.
    #[cfg(feature = "stats")]
    pub(crate) fn named(&self) -> &[u8] {
        let rest = self.0.get(self.tenant().len()..).unwrap_or_default();
        rest.strip_prefix(b":").unwrap_or(rest)
    }

    /// The service and the tenant in braces: what all keys and tags of that tenant begin with.
    pub fn tenant(&self) -> &[u8] {
        tenant_of(&self.0)
    }
}

macro_rules! show_bytes {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0.escape_ascii())
            }
        }
    )*};
}
show_bytes!(Key, Tag);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> Space {
        Space::new("s", "").unwrap()
    }

    type Parts = (Vec<u8>, String, Option<Vec<u8>>, Vec<(String, Vec<u8>)>);

    fn key((tenant, data_type, resource, scope): &Parts) -> Vec<u8> {
        let mut buf = KeyBuf::new();
        space().push_tenant(&mut buf, tenant);
        push_type(&mut buf, data_type);
        push_ids(&mut buf, resource.as_deref(), scope.iter().map(|(e, i)| (e.as_str(), &i[..])));
        buf
    }

    /// Bytes that separators are made of come up often; so do lengths around the hashing bound.
    fn id() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            "[a:*{}=%,~ ]{0,6}".prop_map(String::into_bytes),
            proptest::collection::vec(any::<u8>(), 0..8),
            (120usize..140).prop_map(|n| vec![b'x'; n]),
            Just(vec![b'%'; 10_000]),
        ]
    }

    fn parts() -> impl Strategy<Value = Parts> {
        let text = || "[a:*{}=%,~\0]{0,4}";
        (id(), text(), proptest::option::of(id()), proptest::collection::vec((text(), id()), 0..3))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn keys_are_injective(a in parts(), b in parts()) {
            prop_assert_eq!(a == b, key(&a) == key(&b));
        }

        #[test]
        fn tags_are_injective(a in (id(), "[a:*]{0,3}", "[a:=*]{0,3}", id()), b in (id(), "[a:*]{0,3}", "[a:=*]{0,3}", id())) {
            let tag = |(t, d, e, i): &(Vec<u8>, String, String, Vec<u8>)| Tag::entity(space().tenant(&t[..]).head(), d, e, i);
            prop_assert_eq!(a == b, tag(&a) == tag(&b));
            prop_assert_ne!(tag(&a), Tag::all(space().tenant(&b.0[..]).head(), &b.1));
        }

        #[test]
        fn keys_are_short_and_printable(a in parts()) {
            let key = key(&a);
            prop_assert!(key.iter().all(|c| c.is_ascii_graphic()));
            prop_assert!(key.len() < 3_000);
            prop_assert_eq!(key.iter().filter(|&&c| c == b'{' || c == b'}').count(), 2);
        }
    }

    /// On a cluster nothing in braces would mean the whole key, and each key another slot.
    #[test]
    fn there_is_something_in_braces_even_without_a_name() {
        assert_eq!(space().tenant("").head(), b"s{~}");
        assert_ne!(space().tenant("~").head(), b"s{~}");
    }

    #[test]
    fn a_hashed_part_is_not_its_own_spelling() {
        let long = vec![b'x'; 200];
        let hashed = key(&(long, "t".into(), None, vec![]));
        let spelled = hashed[2..hashed.iter().position(|&c| c == b'}').unwrap()].to_vec();
        assert_ne!(hashed, key(&(spelled, "t".into(), None, vec![])));
    }
}
