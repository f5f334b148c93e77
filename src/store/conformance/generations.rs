//! A generation is the same for everybody until it is dropped, and never again.

use std::{collections::HashSet, time::Duration};

use futures_util::future::join_all;

use super::scene::{Flaw, HOUR, Handle, Scene, Seen, TIERS, comes, expect, group, never, steady};
use crate::{
    catalog::Tier,
    key::Tag,
    store::{Exchange, Fence, Generation, TagGroup},
};

pub(super) async fn an_absent_generation_is_created_for_everybody(scene: &Scene) -> Seen {
    let tags: Vec<_> = ["1", "2", "3"].iter().map(|id| scene.tag(id)).collect();
    let opened = scene.here.open(&tags).await?.generations;
    never(opened.iter().any(|generation| generation.is_fenced()), || {
        "a fenced generation, without a fence".to_owned()
    })?;
    for handle in scene.handles() {
        let again = handle.open(&tags).await?.generations;
        expect(again == opened, || format!("opened again, {again:?} instead of {opened:?}"))?;
        let seen = handle.lookup(&scene.key("none"), &tags, Tier::Off).await?.generations;
        let opened: Vec<_> = opened.iter().copied().map(Some).collect();
        expect(seen == opened, || format!("looked up, {seen:?} instead of {opened:?}"))?;
    }
    Ok(())
}

pub(super) async fn opens_at_once_agree(scene: &Scene) -> Seen {
    let tags: Vec<_> = (0..16).map(|i| scene.tag(&i.to_string())).collect();
    for tags in tags.chunks(4) {
        let opens = (0..4).flat_map(|_| scene.handles()).map(|handle| handle.open(tags));
        let all: Vec<_> = join_all(opens).await.into_iter().collect::<Result<_, _>>()?;
        let different = all.iter().map(|opened| &opened.generations).collect::<HashSet<_>>().len();
        expect(different == 1, || format!("12 opens at once gave {different} different answers"))?;
    }
    Ok(())
}

/// None, one and many, in another order, and such as are absent in between.
pub(super) async fn what_is_asked_is_answered_in_order(scene: &Scene) -> Seen {
    let tags: Vec<_> = (0..64).map(|i| scene.tag(&i.to_string())).collect();
    let key = scene.key("entry");
    scene.here.open(&[]).await?;
    let none = scene.here.lookup(&key, &[], Tier::Off).await?;
    never(none.entry.is_some(), || "an entry where none was filled".to_owned())?;
    let opened = scene.here.open(&tags).await?.generations;
    for count in [1, 2, 64] {
        let turned: Vec<_> = tags[..count].iter().rev().cloned().collect();
        let expected: Vec<_> = opened[..count].iter().rev().copied().collect();
        let again = scene.there.open(&turned).await?.generations;
        expect(again == expected, || format!("open gave {count} tags' generations in another order"))?;
        for tier in TIERS {
            let seen = scene.there.lookup(&key, &turned, tier).await?.generations;
            let seen: Vec<_> = seen.into_iter().flatten().collect();
            expect(seen == expected, || {
                format!("tier {tier:?}: lookup gave {count} tags' generations in another order")
            })?;
        }
    }
    let absent = scene.tag("absent");
    let mixed = [tags[5].clone(), absent, tags[9].clone()];
    let seen = scene.here.lookup(&key, &mixed, Tier::Off).await?.generations;
    expect(seen[0] == Some(opened[5]) && seen[2] == Some(opened[9]), || format!("beside an absent tag: {seen:?}"))?;
    never(seen[1].is_some_and(Generation::is_fenced), || "an absent tag looks fenced".to_owned())
}

/// Dropped by one process, a generation is seen by none, whoever fills under it or opens its tag; nor is its entry valid.
pub(super) async fn a_dropped_generation_never_comes_back(scene: &Scene) -> Seen {
    let tags = [scene.tag("1"), scene.tag("2")];
    let mut gone: HashSet<Generation> = HashSet::new();
    for round in 0..12 {
        let key = scene.key(&format!("entry-{round}"));
        let [one, other] = if round % 2 == 0 { [&scene.here, &scene.there] } else { [&scene.there, &scene.here] };
        let filled = one.fill(&key, &tags, "before").await?;
        other.valid(&key, &tags, TIERS[round % TIERS.len()]).await?;
        one.drop_tags(&tags).await?;
        let old: Vec<_> = filled.stamps.iter().map(|stamp| stamp.generation).collect();
        gone.extend(&old);
        // What was loaded before is stored after.
        other.put(&key, &filled, Tier::default()).await?;
        let opens = join_all(scene.handles().map(|handle| handle.open(&tags))).await;
        for opened in opens {
            let back = opened?.generations.into_iter().find(|generation| gone.contains(generation));
            never(back.is_some(), || format!("open gave {back:?}, which was dropped"))?;
        }
        for handle in scene.handles() {
            never(handle.shows(&key, &tags, &old).await?, || format!("{old:?} is there again after it was dropped"))?;
            for tier in TIERS {
                let found = handle.valid(&key, &tags, tier).await?;
                never(found.is_some(), || format!("tier {tier:?}: an entry is valid whose tags were dropped"))?;
            }
        }
    }
    Ok(())
}

/// Of an entry with three tags each is enough.
pub(super) async fn an_entry_falls_with_each_of_its_tags(scene: &Scene) -> Seen {
    let tags: Vec<_> = ["1", "2", "3"].iter().map(|id| scene.tag(id)).collect();
    for (i, tag) in tags.iter().enumerate() {
        let key = scene.key(&i.to_string());
        scene.here.fill(&key, &tags, "of three").await?;
        let found = scene.there.valid(&key, &tags, Tier::default()).await?;
        expect(found.is_some(), || "nothing valid was found after a fill".to_owned())?;
        scene.here.drop_tags(std::slice::from_ref(tag)).await?;
        for (handle, tier) in scene.handles().into_iter().flat_map(|handle| TIERS.map(|tier| (handle, tier))) {
            let found = handle.valid(&key, &tags, tier).await?;
            never(found.is_some(), || format!("tier {tier:?}: it is valid without its tag {i}"))?;
        }
    }
    Ok(())
}

fn groups(scene: &Scene) -> Vec<TagGroup> {
    let tags = |tenant: &str, data_type: &str| {
        ["1", "2", "3"].iter().map(|id| scene.tag_of(tenant, data_type, id)).collect::<Vec<_>>()
    };
    vec![
        TagGroup::new("thing", [tags("acme", "thing"), tags("other", "thing")].concat()),
        TagGroup::new("part", tags("acme", "part")),
        TagGroup::new("empty", vec![]),
        TagGroup::new("whole", tags("third", "whole")),
    ]
}

/// Of several types and tenants at once; again and again, and also such as nobody knows.
pub(super) async fn an_invalidation_drops_all_tags_of_all_groups(scene: &Scene) -> Seen {
    let groups = groups(scene);
    // Before there is anything.
    scene.here.invalidate(&groups, None).await?;
    let opens = |tags: Vec<Tag>| async move { scene.there.open(&tags).await.map(|opened| opened.generations) };
    // One tenant at a time, as requests are.
    let tenants = ["acme", "other", "third"].map(|tenant| {
        let of_tenant = |tag: &&Tag| tag.tenant() == scene.tag_of(tenant, "thing", "1").tenant();
        groups.iter().flat_map(|group| &group.tags).filter(of_tenant).cloned().collect::<Vec<_>>()
    });
    for _ in 0..3 {
        let before: Vec<_> = join_all(tenants.clone().map(opens)).await.into_iter().collect::<Result<_, _>>()?;
        scene.here.invalidate(&groups, None).await?;
        scene.here.invalidate(&groups, None).await?;
        let after: Vec<_> = join_all(tenants.clone().map(opens)).await.into_iter().collect::<Result<_, _>>()?;
        for ((tag, before), after) in tenants.concat().iter().zip(before.concat()).zip(after.concat()) {
            never(before == after, || format!("{tag:?} was dropped among others, and has the generation it had"))?;
        }
    }
    scene.here.invalidate(&[], None).await.map(drop)
}

/// As many as a cascade may have, with a fence and without; some of them twice.
pub(super) async fn many_tags_are_dropped_at_once(scene: &Scene) -> Seen {
    let mut tags: Vec<_> = (0..1_000).map(|i| scene.tag(&i.to_string())).collect();
    let some: Vec<_> = tags.iter().step_by(37).cloned().collect();
    tags.extend_from_within(..10);
    let fence = Fence::new(HOUR, Duration::ZERO);
    let mut before = scene.here.open(&some).await?.generations;
    for is_fenced in [false, true, false] {
        if is_fenced {
            scene.here.fence(&tags, &fence).await?;
            let open =
                scene.there.open(&some).await?.generations.into_iter().find(|generation| !generation.is_fenced());
            never(open.is_some(), || "one of 1,000 fenced tags has a generation that is not".to_owned())?;
        }
        scene.here.invalidate(&group(&tags), is_fenced.then_some(&fence)).await?;
        let after = scene.there.open(&some).await?.generations;
        let same = before.iter().zip(&after).find(|(before, after)| before == after);
        never(same.is_some(), || "one of 1,000 tags was dropped, and has the generation it had".to_owned())?;
        before = after;
    }
    let fenced = before.iter().find(|generation| generation.is_fenced());
    expect(fenced.is_none(), || "one of 1,000 tags is still fenced after its writer has come back".to_owned())
}

/// For the report alone: nothing where there is nothing, and something where there is; never an error.
pub(super) async fn counts_are_about_right(scene: &Scene) -> Seen {
    let (some, none) = ([scene.tag("1"), scene.tag("2")], [scene.tag_of("acme", "part", "1")]);
    for i in 0..5 {
        scene.here.fill(&scene.key(&i.to_string()), &some[..1 + i % 2], "counted").await?;
    }
    let groups = [TagGroup::new("part", none.to_vec()), TagGroup::new("thing", some.to_vec())];
    // Who does not count says nothing.
    let known = steady("count", || scene.there.0.count(&groups)).await?;
    let is_right = known.is_empty() || matches!(known[..], [0, some] if some > 0);
    expect(is_right, || format!("count: {known:?} where there are none and 5"))?;
    let dropped = scene.there.invalidate(&groups, None).await?;
    expect(matches!(dropped[..], [0, some] if some > 0), || {
        format!("invalidate: {dropped:?} where there were none and 5")
    })?;
    let again = scene.there.invalidate(&groups, None).await?;
    expect(again == [0, 0], || format!("invalidate: {again:?} where all had been dropped"))
}

/// Nothing is valid after it, of whatever tenant; this rule is alone in the place.
pub(super) async fn clear_drops_all_tenants(scene: &Scene) -> Seen {
    let mut filled = vec![];
    for tenant in ["acme", "other", "third"] {
        let (key, tags) = (scene.key_of(tenant, "entry"), [scene.tag_of(tenant, "thing", "1")]);
        let entry = scene.here.fill(&key, &tags, tenant).await?;
        for handle in scene.handles() {
            let found = handle.valid(&key, &tags, Tier::default()).await?;
            expect(found.is_some(), || "nothing valid was found after a fill".to_owned())?;
        }
        filled.push((key, tags, entry));
    }
    scene.there.clear().await?;
    for (key, tags, entry) in &filled {
        scene.elsewhere.put(key, entry, Tier::default()).await?;
        for (handle, tier) in scene.handles().into_iter().flat_map(|handle| TIERS.map(|tier| (handle, tier))) {
            let found = handle.valid(key, tags, tier).await?;
            never(found.is_some(), || format!("tier {tier:?}: {key:?} is valid after the store was cleared"))?;
            never(handle.shows(key, tags, &[entry.stamps[0].generation]).await?, || {
                format!("{:?} has the generation that it had before the store was cleared", tags[0])
            })?;
        }
    }
    let (key, tags, _) = &filled[0];
    scene.here.fill(key, tags, "after").await?;
    let found = scene.there.valid(key, tags, Tier::default()).await?;
    expect(found.is_some(), || "nothing valid is found after the store was cleared and filled again".to_owned())
}

/// A store has all of it or nothing.
pub(super) async fn members_of_a_fleet_hear_each_other(scene: &Scene) -> Seen {
    let (fleet, other) = (format!("{}{{*}}", scene.service()), format!("{}-other{{*}}", scene.service()));
    let gone = ["b".to_owned()];
    let say = |fleet, member, said, gone, hears| Exchange { fleet, member, said, gone, hears };
    let exchange = async |handle: &Handle, exchange: Exchange<'_>| {
        let mut heard = steady("exchange", || handle.0.exchange(exchange)).await?;
        heard.sort();
        Ok::<_, Flaw>(heard)
    };
    exchange(&scene.here, say(&fleet, "a", b"I", &[], false)).await?;
    exchange(&scene.there, say(&other, "a", b"another fleet", &[], false)).await?;
    let heard = exchange(&scene.there, say(&fleet, "b", b"me", &[], true)).await?;
    if heard.is_empty() {
        return Ok(());
    }
    expect(heard == [b"I".to_vec(), b"me".to_vec()], || format!("heard {heard:?} of the two that have spoken"))?;
    let heard = exchange(&scene.here, say(&fleet, "a", b"again", &gone, true)).await?;
    expect(heard == [b"again".to_vec()], || format!("heard {heard:?}, where one spoke again and the other is gone"))
}

/// A store that keeps no notes at all may do so.
pub(super) async fn a_note_is_kept_as_it_was_written_last(scene: &Scene) -> Seen {
    let [name, other] = ["", "-other"].map(|kind| format!("{}{{*}}:note{kind}", scene.service()));
    let read = async |name: &str| steady("noted", || scene.there.0.noted(name)).await;
    expect(read(&name).await?.is_none(), || "there is a note that nobody has written".to_owned())?;
    for note in [&b"first"[..], b"", b"\0\r\n{}\xff"] {
        steady("note", || scene.here.0.note(&name, note)).await?;
        let found = read(&name).await?;
        expect(found.as_deref().is_none_or(|found| found == note), || format!("{found:?} instead of {note:?}"))?;
    }
    expect(read(&other).await?.is_none(), || "a note has another's name".to_owned())
}

/// There is nothing left to deliver, and the store says that it is well.
pub(super) async fn a_store_that_works_says_so(scene: &Scene) -> Seen {
    let left = steady("drain", || scene.here.0.drain(Duration::from_secs(1))).await?;
    expect(left == 0, || format!("{left} tags are not delivered"))?;
    scene.here.invalidate(&group(&[scene.tag("1")]), None).await?;
    // Of several places, some may be connected to only now.
    comes("that it is well", async || Ok(scene.here.0.health().takes_invalidations())).await.map_err(
        |flaw| match flaw {
            Flaw::Missing(_) => Flaw::Missing(format!("it says of itself: {}", scene.here.0.health())),
            wrong => wrong,
        },
    )
}
