//! What was filled is found as it was, and nothing else.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::scene::{
    Flaw, HOUR, Scene, Seen, TIERS, comes, difference, entry, expect, group, never, now, response, stamps, steady, text,
};
use crate::{
    catalog::{Lifetime, Tier},
    key::{Key, Tag},
    store::{Entry, Fence, Inquiry, Payload, Search, StoredResponse},
};

/// The rule without which the others say little: a store that never finds anything breaks none of them.
pub(super) async fn it_hits(scene: &Scene) -> Seen {
    let tags = [scene.tag("1"), scene.tag("2")];
    for (i, tier) in TIERS.into_iter().enumerate() {
        let key = scene.key(&format!("entry-{i}"));
        let opened = scene.here.open(&tags).await?;
        let filled = Arc::new(entry(response(format!("entry {i}")), stamps(&tags, &opened.generations)));
        scene.here.put(&key, &filled, tier).await?;
        // Twice: a tier in the process may have it the second time.
        for handle in [&scene.here, &scene.here, &scene.there, &scene.there] {
            let found = handle.valid(&key, &tags, tier).await?;
            expect(found.is_some(), || format!("nothing valid was found with tier {tier:?} after a fill"))?;
        }
    }
    Ok(())
}

/// Fills this under each name, and expects each to be found under its name, through every handle.
async fn is_found_as_it_was(scene: &Scene, entries: Vec<(Key, Payload)>) -> Seen {
    let tags = [scene.tag("1")];
    let generations = scene.here.open(&tags).await?.generations;
    let mut filled = vec![];
    for (key, payload) in entries {
        let life = Lifetime::fresh_for(Some(HOUR));
        let entry = Arc::new(Entry::new(payload, stamps(&tags, &generations), now(), life));
        scene.here.put(&key, &entry, Tier::default()).await?;
        filled.push((key, entry));
    }
    let mut missing = None;
    for (handle, (key, entry)) in scene.handles().into_iter().flat_map(|handle| filled.iter().map(move |f| (handle, f)))
    {
        let what = format!("{key:?}, {} bytes", entry.weight());
        match handle.lookup(key, &tags, Tier::default()).await?.entry {
            Some(found) => {
                let differs = difference(entry, &found);
                never(differs.is_some(), || format!("{what}: {}", differs.unwrap_or_default()))?;
            }
            None => missing = Some(what),
        }
    }
    missing.map_or(Ok(()), |what| Err(Flaw::Missing(format!("not found: {what}"))))
}

/// Responses, values, and what leads to a response that varies; with status, headers, trailers and body.
pub(super) async fn every_kind_of_entry_is_found_as_it_was(scene: &Scene) -> Seen {
    let mut bare = response("no trailers");
    bare.trailers = None;
    let names = ["accept-language", "x-user"].map(HeaderName::from_static);
    let entries = vec![
        (scene.key("response"), Payload::Response(response("with trailers"))),
        (scene.key("bare"), Payload::Response(bare)),
        (scene.key("value"), Payload::Value(Bytes::from_static(b"\0\xff\r\nEND\r\n"))),
        (scene.key("vary"), Payload::Vary(names.into())),
    ];
    is_found_as_it_was(scene, entries).await
}

/// Of this size; what can be compressed, or what cannot.
fn body(size: usize, is_noise: bool) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let noise = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    if is_noise { (0..size).map(noise).collect() } else { vec![b'a'; size] }
}

pub(super) async fn bodies_are_found_whole(scene: &Scene) -> Seen {
    let sizes = [0, 1, 1_000, 64 << 10].into_iter().flat_map(|size| [(size, false), (size, true)]);
    let named = |(size, is_noise)| {
        let key = scene.key(&format!("{size}-{is_noise}"));
        (key, Payload::Response(response(body(size, is_noise))))
    };
    is_found_as_it_was(scene, sizes.map(named).collect()).await
}

/// A store may refuse what is large, or not keep it; but what it gives is what was filled.
pub(super) async fn a_large_body_is_found_whole_or_not_at_all(scene: &Scene) -> Seen {
    let (key, tags) = (scene.key("large"), [scene.tag("1")]);
    let before = scene.here.fill(&key, &tags, "small").await?;
    let large = Arc::new(entry(response(body(900 << 10, true)), before.stamps.clone()));
    let refused = scene.here.0.fill(&key, large.clone(), Tier::default(), now()).await.is_err();
    for handle in scene.handles() {
        let Some(found) = handle.lookup(&key, &tags, Tier::default()).await?.entry else { continue };
        let differs = difference(&large, &found);
        // What was there before it was refused is still valid.
        let is_before = difference(&before, &found).is_none();
        never(differs.is_some() && !(refused && is_before), || format!("900 KiB: {}", differs.unwrap_or_default()))?;
    }
    Ok(())
}

/// Bytes over 127, empty values, the same name again and again, many of them, long ones.
pub(super) async fn odd_headers_are_found_as_they_were(scene: &Scene) -> Seen {
    let mut odd = HeaderMap::new();
    for value in [&b"caf\xc3\xa9"[..], b"\xff\xfe\x80", b"", b"a\tb", b"a, b; c=\"d\""] {
        odd.append("x-odd", HeaderValue::from_bytes(value).map_err(|e| Flaw::Wrong(e.to_string()))?);
    }
    let mut many = HeaderMap::new();
    for i in 0..500_u16 {
        let name = HeaderName::from_bytes(format!("x-{i}").as_bytes()).map_err(|e| Flaw::Wrong(e.to_string()))?;
        many.append(name, i.into());
        many.append("x-many", i.into());
    }
    let mut long = HeaderMap::new();
    let value = HeaderValue::from_str(&"x".repeat(16 << 10)).map_err(|e| Flaw::Wrong(e.to_string()))?;
    long.insert("x-long", value);
    let entries = [("odd", odd), ("many", many), ("long", long)];
    let with = |headers: HeaderMap| StoredResponse { headers: headers.into(), ..response("with headers") };
    let entries = entries.map(|(name, headers)| (scene.key(name), Payload::Response(with(headers))));
    is_found_as_it_was(scene, entries.into()).await
}

/// Long ones that differ only at their end, such as differ only in case, in an escape, or in being longer; other tenants.
fn odd_keys(scene: &Scene) -> Vec<Key> {
    let long = |length: usize, end: &str| scene.key(&format!("{}{end}", "k".repeat(length)));
    let mut keys = vec![];
    for length in [100, 190, 250, 500, 950] {
        keys.extend(["a", "b", "ab"].map(|end| long(length, end)));
    }
    keys.extend(
        ["a", "A", "a%20", "a%2520", "a%C3%A9", "~a", "a*", "a?", "[a]", "a:b", "a:", "a=b,c"].map(|n| scene.key(n)),
    );
    keys.extend(["b", "%C3%A9", "~"].map(|tenant| scene.key_of(tenant, "a")));
    keys
}

pub(super) async fn each_key_has_its_own_entry(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let generations = scene.here.open(&tags).await?.generations;
    // Each tenant has tags of its own; what is stored under none is always valid, and does for its key.
    let keys = odd_keys(scene);
    for (i, key) in keys.iter().enumerate() {
        let own = if key.tenant() == scene.first_tenant() { stamps(&tags, &generations) } else { Box::default() };
        let entry = Arc::new(entry(response(format!("body {i}")), own));
        scene.here.put(key, &entry, Tier::default()).await?;
    }
    let mut missing = None;
    for handle in [&scene.here, &scene.there] {
        for (i, key) in keys.iter().enumerate() {
            match handle.lookup(key, &[], Tier::Off).await?.entry {
                Some(found) => {
                    never(text(&found) != format!("body {i}"), || format!("{key:?} gave {:?}", text(&found)))?
                }
                None => missing = Some(key),
            }
        }
    }
    let unknown = scene.here.lookup(&scene.key("unknown"), &tags, Tier::Off).await?.entry;
    never(unknown.is_some(), || "an entry under a key that was never filled".to_owned())?;
    expect(missing.is_none(), || format!("nothing under {missing:?}"))
}

/// Tags that differ in little: to drop one drops no other, and an entry falls with each of its own.
pub(super) async fn each_tag_has_its_own_generation(scene: &Scene) -> Seen {
    let (long, other) = ("t".repeat(120), "t".repeat(119));
    let ids = ["a", "A", "a ", "a%", "%20", "é", "*", &long, &other, "", "a:b", "a=b"];
    let mut tags: Vec<Tag> = ids.iter().map(|id| scene.tag(id)).collect();
    tags.extend(["thing2", "thin", "%", &long].map(|data_type| scene.tag_of("acme", data_type, "a")));
    for (i, tag) in tags.iter().enumerate() {
        let before = scene.here.open(&tags).await?.generations;
        scene.there.drop_tags(std::slice::from_ref(tag)).await?;
        let after = scene.here.open(&tags).await?.generations;
        never(before[i] == after[i], || format!("{tag:?} was dropped, and has the generation it had"))?;
        let fallen = (0..tags.len()).find(|at| *at != i && before[*at] != after[*at]);
        expect(fallen.is_none(), || format!("with {tag:?} fell {:?}", fallen.map(|at| &tags[at])))?;
    }
    Ok(())
}

/// An entry that is to be kept for longer than some stores can count is kept all the same.
pub(super) async fn what_is_kept_for_long_is_found(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let generations = scene.here.open(&tags).await?.generations;
    let day = 24 * HOUR;
    let times =
        [Some(10 * HOUR / 3_600), Some(HOUR), Some(30 * day + HOUR), Some(400 * day), Some(100_000 * day), None];
    for (i, fresh) in times.into_iter().enumerate() {
        let (key, life) = (scene.key(&i.to_string()), Lifetime::fresh_for(fresh));
        let payload = Payload::Response(response("kept"));
        let entry = Arc::new(Entry::new(payload, stamps(&tags, &generations), now(), life));
        scene.here.put(&key, &entry, Tier::default()).await?;
        for handle in [&scene.here, &scene.there] {
            let found = handle.valid(&key, &tags, Tier::Off).await?;
            let is_fresh = found.is_some_and(|entry| entry.is_fresh(now()));
            expect(is_fresh, || format!("what is fresh for {fresh:?} (none: for ever) was not found fresh"))?;
        }
    }
    Ok(())
}

/// What has ended before it is filled may be there or not, and is no reason to fail.
pub(super) async fn what_is_over_is_not_fresh(scene: &Scene) -> Seen {
    let (key, tags) = (scene.key("over"), [scene.tag("1")]);
    let generations = scene.here.open(&tags).await?.generations;
    let life = Lifetime { age: HOUR, ..Lifetime::fresh_for(Some(HOUR / 2)) };
    let over = Entry::new(Payload::Response(response("over")), stamps(&tags, &generations), now(), life);
    scene.here.put(&key, &Arc::new(over), Tier::default()).await?;
    for handle in scene.handles() {
        let found = handle.lookup(&key, &tags, Tier::default()).await?.entry;
        never(found.is_some_and(|entry| entry.is_fresh(now())), || "what had expired is fresh again".to_owned())?;
        never(handle.0.peek(key.as_bytes(), now()).is_some(), || "what had expired is answered at once".to_owned())?;
    }
    Ok(())
}

/// What a tier answers with at once is what was filled, and in the process that drops it no longer is.
pub(super) async fn a_peek_tells_only_what_is_current(scene: &Scene) -> Seen {
    let tags = [scene.tag("1"), scene.tag("2")];
    for (i, tier) in TIERS.into_iter().enumerate() {
        let key = scene.key(&i.to_string());
        let filled = scene.here.fill(&key, &tags, "peeked at").await?;
        for handle in [&scene.here, &scene.there] {
            handle.ask(Inquiry::new(&key, &tags, tier, now())).await?;
            if let Some(found) = handle.0.peek(key.as_bytes(), now()) {
                let differs = difference(&filled, &found);
                never(differs.is_some(), || format!("peek: {}", differs.unwrap_or_default()))?;
            }
        }
        scene.here.drop_tags(&tags[1..]).await?;
        let found = scene.here.0.peek(key.as_bytes(), now());
        never(found.is_some(), || format!("tier {tier:?}: what this process has dropped is answered at once"))?;
        // Elsewhere it may be for as long as it takes to be said.
        comes("a peek elsewhere sees a drop", async || Ok(scene.there.0.peek(key.as_bytes(), now()).is_none())).await?;
    }
    Ok(())
}

/// What a process holds is what was filled, and is current until any of its tags is dropped or fenced, by whomever.
pub(super) async fn what_is_held_is_current_until_it_is_dropped(scene: &Scene) -> Seen {
    let tags = [scene.tag("1"), scene.tag("2")];
    for (i, tier) in TIERS.into_iter().enumerate() {
        for (n, fence) in
            [None, None, Some(Fence::new(Duration::from_secs(30), Duration::ZERO))].into_iter().enumerate()
        {
            let key = scene.key(&format!("{i}-{n}"));
            let filled = scene.here.fill(&key, &tags, "held").await?;
            // A store may hold it once it was asked for.
            scene.here.valid(&key, &tags, tier).await?;
            let Some(held) = scene.here.0.held(key.as_bytes(), tier) else { continue };
            let differs = difference(&filled, &held);
            never(differs.is_some(), || format!("held: {}", differs.unwrap_or_default()))?;
            let is_current = || steady("is_current", || scene.here.0.is_current(key.as_bytes(), &held));
            expect(is_current().await?, || format!("tier {tier:?}: what was just filled is not current"))?;
            match &fence {
                None => scene.there.drop_tags(&tags[n..=n]).await?,
                Some(fence) => scene.there.fence(&tags[1..], fence).await?,
            }
            never(is_current().await?, || format!("tier {tier:?}: it is current although a tag of it was dropped"))?;
            if let Some(fence) = &fence {
                scene.there.invalidate(&group(&tags[1..]), Some(fence)).await?;
            }
        }
    }
    Ok(())
}

/// Those who look on find keys that are there, and only such as they ask for; a store may find none.
pub(super) async fn a_search_finds_what_is_asked_for(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    for name in ["red-1", "red-2", "red-3", "blue-1"] {
        scene.here.fill(&scene.key(name), &tags, name).await?;
    }
    let (prefix, words) = (scene.first_tenant(), [b"red".to_vec()]);
    let search = Search { prefix: &prefix, words: &words, most: 2 };
    let found = steady("search", || scene.there.0.search(search)).await?;
    never(found.len() > 2, || format!("{} keys, where 2 were wanted at most", found.len()))?;
    let other = found.iter().find(|key| !search.accepts(key.as_bytes()));
    never(other.is_some(), || format!("{other:?} was found, which nobody has asked for"))
}
