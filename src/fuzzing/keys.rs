//! Keys and tags: whatever they are made of can be read from them again, so that no two identities have one.

use percent_encoding::percent_decode;
use sha2::{Digest, Sha256};

use super::input::Input;
use crate::key::{Key, KeyBuf, Space, Tag, Tenant, bounded, push_escaped, push_ids, push_type};

/// What identifies an entry.
#[derive(Debug, PartialEq, Eq)]
struct Parts {
    tenant: Vec<u8>,
    data_type: String,
    resource: Option<Vec<u8>>,
    scope: Vec<(String, Vec<u8>)>,
    variant: Vec<u8>,
}

impl Parts {
    fn read(input: &mut Input<'_>) -> Self {
        let (tenant, data_type) = (input.part(), input.text());
        let resource = (!input.byte().is_multiple_of(4)).then(|| input.part());
        let scope = (0..input.byte() % 4).map(|_| (input.text(), input.part())).collect();
        Self { tenant, data_type, resource, scope, variant: input.part() }
    }

    fn key(&self, space: &Space) -> KeyBuf {
        let mut key = KeyBuf::new();
        space.push_entry(&mut key, &self.tenant);
        push_type(&mut key, &self.data_type);
        push_ids(&mut key, self.resource.as_deref(), self.scope.iter().map(|(e, id)| (e.as_str(), &id[..])));
        push_escaped(&mut key, &self.variant);
        key
    }

    /// That a key says all of this, and nothing else.
    fn check(&self, key: &[u8]) {
        let (tenant, rest) = between(key, b"svc{", b"}@2:");
        let tenant = if tenant == b"~" { b"" } else { tenant };
        is_spelled(tenant, &self.tenant);
        let (data_type, rest) = between(rest, b"", b":");
        is_spelled(data_type, self.data_type.as_bytes());
        let (resource, rest) = between(rest, b"", b":");
        match &self.resource {
            None => assert!(resource.is_empty()),
            Some(id) => is_spelled(resource.strip_prefix(b"=").unwrap(), id),
        }
        let (scope, variant) = between(rest, b"", b":");
        let mut scope = scope.split(|&b| b == b',').filter(|one| !one.is_empty());
        for (entity, id) in &self.scope {
            let (named, of) = between(scope.next().unwrap(), b"", b"=");
            is_spelled(named, entity.as_bytes());
            is_spelled(of, id);
        }
        assert!(scope.next().is_none());
        is_spelled(variant, &self.variant);
    }
}

/// What is before the end, and after it.
fn between<'a>(text: &'a [u8], begin: &[u8], end: &[u8]) -> (&'a [u8], &'a [u8]) {
    let text = text.strip_prefix(begin).unwrap();
    let at = text.windows(end.len()).position(|window| window == end).unwrap();
    (&text[..at], &text[at + end.len()..])
}

/// A part, or the hash of one that is long.
fn is_spelled(spelled: &[u8], part: &[u8]) {
    match spelled.strip_prefix(b"~") {
        None => assert_eq!(percent_decode(spelled).collect::<Vec<_>>(), part),
        Some(hash) => {
            assert!(part.len() > 128);
            let digest: String = Sha256::digest(part).iter().map(|byte| format!("{byte:02X}")).collect();
            assert_eq!(hash, digest.as_bytes());
        }
    }
}

fn is_canonical(name: &[u8], tenant: &Tenant) {
    assert!(name.iter().all(u8::is_ascii_graphic), "{}", name.escape_ascii());
    assert!(!name.iter().any(|c| b"\"\\*?[]^".contains(c)) || name.ends_with(b":*"), "{}", name.escape_ascii());
    assert_eq!(name.iter().filter(|&&c| c == b'{' || c == b'}').count(), 2);
    assert!(name.starts_with(tenant.head()));
}

pub(super) fn keys(data: &[u8]) {
    let mut input = Input(data);
    let space = Space::new("svc", "2").unwrap();
    let parts = [Parts::read(&mut input), Parts::read(&mut input)];
    let keys = parts.each_ref().map(|parts| {
        let (whole, tenant) = (parts.key(&space), space.tenant(&parts.tenant[..]));
        parts.check(&whole);
        let key = Key::new(bounded(whole.clone()));
        is_canonical(key.as_bytes(), &tenant);
        assert_eq!(key.tenant(), tenant.head());
        // Room for the hash, whatever the beginning is.
        assert!(key.as_bytes().len() <= 1_024 && (whole.len() > 1_024 || whole == key.as_bytes()));
        key
    });
    assert_eq!(parts[0] == parts[1], keys[0] == keys[1]);
    tags(&space, &parts);
}

fn tags(space: &Space, parts: &[Parts; 2]) {
    let named = |parts: &Parts| {
        let tenant = space.tenant(&parts.tenant[..]);
        let all = ((parts.tenant.clone(), parts.data_type.clone(), None), Tag::all(tenant.head(), &parts.data_type));
        let of = |(entity, id): &(String, Vec<u8>)| {
            let tag = Tag::entity(tenant.head(), &parts.data_type, entity, id);
            is_canonical(tag.as_bytes(), &tenant);
            assert_eq!(tag.tenant(), tenant.head());
            assert_eq!(tag.label().as_bytes(), &tag.as_bytes()[tenant.head().len() + 1..]);
            ((parts.tenant.clone(), parts.data_type.clone(), Some((entity.clone(), id.clone()))), tag)
        };
        is_canonical(all.1.as_bytes(), &tenant);
        parts.scope.iter().map(of).chain([all]).collect::<Vec<_>>()
    };
    let tags: Vec<_> = parts.iter().flat_map(named).collect();
    for (a, one) in &tags {
        for (b, other) in &tags {
            assert_eq!(a == b, one == other, "{one:?} {other:?}");
        }
    }
}
