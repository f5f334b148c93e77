//! While a write is under way, nothing is stored of what it changes.

use std::time::Duration;

use tokio::time::Instant;

use super::scene::{Handle, LEASE, Scene, Seen, TIERS, comes, expect, group, never, steady};
use crate::{
    catalog::Tier,
    key::{Key, Tag},
    store::{Fence, Generation, TagGroup},
};

/// Longer than any test takes.
const MINUTE: Duration = Duration::from_secs(60);

async fn is_fenced(handle: &Handle, tag: &Tag) -> Seen<bool> {
    let opened = handle.open(std::slice::from_ref(tag)).await?;
    Ok(opened.generations.iter().all(|generation| generation.is_fenced()))
}

/// To everybody who begins a load. What a look-up gives is compared with what was filled, and may be any other generation.
async fn stands(scene: &Scene, tag: &Tag) -> Seen {
    for handle in scene.handles() {
        never(!is_fenced(handle, tag).await?, || "open gives a fenced tag a generation that is not fenced".to_owned())?;
    }
    Ok(())
}

/// What is seen of a tag while it is fenced, in whatever way.
async fn seen_of(scene: &Scene, tag: &Tag) -> Seen<Vec<Generation>> {
    let (none, tags) = (Key::new([tag.tenant(), b":none::"].concat()), std::slice::from_ref(tag));
    let seen = scene.there.lookup(&none, tags, Tier::Off).await?.generations.into_iter().flatten();
    let opened = scene.here.open(tags).await?.generations;
    Ok(seen.chain(opened).map(Generation::unfenced).collect())
}

/// Lifting a fence is a drop: none of these goes on.
async fn is_over(scene: &Scene, tag: &Tag, meanwhile: &[Generation]) -> Seen {
    is_lifted(scene, tag).await?;
    let after = seen_of(scene, tag).await?;
    never(after.iter().any(|now| meanwhile.contains(now)), || "a fence ended, and its generation goes on".to_owned())
}

async fn is_lifted(scene: &Scene, tag: &Tag) -> Seen {
    comes("the end of a fence", async || Ok(!is_fenced(&scene.there, tag).await?)).await
}

/// Nothing of before is valid, nor ever again.
async fn is_gone(scene: &Scene, key: &Key, tags: &[Tag], old: &[Generation]) -> Seen {
    for handle in scene.handles() {
        for tier in TIERS {
            let found = handle.valid(key, tags, tier).await?;
            never(found.is_some(), || format!("tier {tier:?}: an entry from before a fence is valid"))?;
        }
        never(handle.shows(key, tags, old).await?, || "a generation from before a fence is there again".to_owned())?;
    }
    Ok(())
}

pub(super) async fn a_fence_stands_until_its_writer_comes_back(scene: &Scene) -> Seen {
    let (key, tags) = (scene.key("entry"), [scene.tag("1"), scene.tag("2")]);
    let filled = scene.here.fill(&key, &tags, "before").await?;
    let old: Vec<_> = filled.stamps.iter().map(|stamp| stamp.generation).collect();
    let fence = Fence::new(MINUTE, Duration::ZERO);
    scene.there.fence(&tags, &fence).await?;
    for tag in &tags {
        stands(scene, tag).await?;
    }
    // A load that began before the fence ends behind it.
    scene.here.put(&key, &filled, Tier::default()).await?;
    is_gone(scene, &key, &tags, &old).await?;
    let meanwhile = [seen_of(scene, &tags[0]).await?, seen_of(scene, &tags[1]).await?];
    scene.there.invalidate(&group(&tags), Some(&fence)).await?;
    for (tag, meanwhile) in tags.iter().zip(&meanwhile) {
        is_over(scene, tag, meanwhile).await?;
    }
    is_gone(scene, &key, &tags, &old).await?;
    scene.here.fill(&key, &tags, "after").await?;
    let found = scene.there.valid(&key, &tags, Tier::default()).await?;
    expect(found.is_some(), || "nothing valid is found after a fence was lifted".to_owned())
}

/// Of several writers each lifts its own fence, once or again, and no other.
pub(super) async fn a_writer_lifts_only_its_own_fence(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let [one, other, stranger] = [(); 3].map(|()| Fence::new(MINUTE, Duration::ZERO));
    scene.here.fence(&tags, &one).await?;
    scene.there.fence(&tags, &other).await?;
    scene.elsewhere.invalidate(&group(&tags), Some(&stranger)).await?;
    stands(scene, &tags[0]).await?;
    for _ in 0..2 {
        scene.here.invalidate(&group(&tags), Some(&one)).await?;
        stands(scene, &tags[0]).await?;
    }
    // Again by another.
    scene.elsewhere.fence(&tags, &one).await?;
    scene.there.invalidate(&group(&tags), Some(&other)).await?;
    stands(scene, &tags[0]).await?;
    scene.elsewhere.invalidate(&group(&tags), Some(&one)).await?;
    is_lifted(scene, &tags[0]).await
}

/// Its other tags, and those of others, are not.
pub(super) async fn a_fence_is_lifted_where_it_was_invalidated(scene: &Scene) -> Seen {
    let (tags, free) = ([scene.tag("1"), scene.tag("2")], scene.tag("free"));
    let fence = Fence::new(MINUTE, Duration::ZERO);
    scene.here.fence(&tags, &fence).await?;
    never(is_fenced(&scene.there, &free).await?, || "a tag is fenced that nobody has fenced".to_owned())?;
    scene.here.invalidate(&group(&tags[..1]), Some(&fence)).await?;
    is_lifted(scene, &tags[0]).await?;
    stands(scene, &tags[1]).await
}

/// Of several types and tenants, by one writer.
pub(super) async fn a_fence_may_stand_on_several_tenants(scene: &Scene) -> Seen {
    let tags = [("acme", "thing"), ("other", "thing"), ("acme", "part")].map(|(t, d)| scene.tag_of(t, d, "1"));
    let groups: Vec<_> = tags.iter().map(|tag| TagGroup::new("thing", vec![tag.clone()])).collect();
    let fence = Fence::new(MINUTE, Duration::ZERO);
    steady("fence", || scene.here.0.fence(&groups, &fence)).await?;
    for tag in &tags {
        stands(scene, tag).await?;
    }
    scene.here.invalidate(&groups, Some(&fence)).await?;
    for tag in &tags {
        is_lifted(scene, tag).await?;
    }
    Ok(())
}

/// A writer that never comes back.
pub(super) async fn a_lease_runs_out(scene: &Scene) -> Seen {
    let (key, tags) = (scene.key("entry"), [scene.tag("1")]);
    let filled = scene.here.fill(&key, &tags, "before").await?;
    let old = [filled.stamps[0].generation];
    let raised = Instant::now();
    scene.there.fence(&tags, &Fence::new(LEASE, Duration::ZERO)).await?;
    let seen = stands(scene, &tags[0]).await;
    // On a machine that was busy for so long it may be over.
    if raised.elapsed() < LEASE / 2 {
        seen?;
    }
    // Stored under what was there before, it prolongs nothing.
    scene.here.put(&key, &filled, Tier::default()).await?;
    is_lifted(scene, &tags[0]).await?;
    is_gone(scene, &key, &tags, &old).await?;
    // Where times are told in seconds, one process may take the lease to have run out a second before another does, or before it
    // hears of the time again itself.
    comes("the end of a lease, for who fills", async || {
        let filled = scene.here.fill(&key, &tags, "after").await?;
        if filled.stamps.iter().any(|stamp| stamp.generation.is_fenced()) {
            return Ok(false);
        }
        let found = scene.there.valid(&key, &tags, Tier::default()).await?;
        expect(found.is_some(), || "nothing valid is found after a lease has run out".to_owned())?;
        Ok(true)
    })
    .await
}

/// For as long as replicas of the origin's database lag; then it is over.
pub(super) async fn a_fence_is_held(scene: &Scene) -> Seen {
    let (key, tags) = (scene.key("entry"), [scene.tag("1")]);
    let filled = scene.here.fill(&key, &tags, "before").await?;
    let old = [filled.stamps[0].generation];
    let fence = Fence::new(MINUTE, LEASE);
    scene.there.fence(&tags, &fence).await?;
    let held = Instant::now();
    scene.there.invalidate(&group(&tags), Some(&fence)).await?;
    let seen = stands(scene, &tags[0]).await;
    if held.elapsed() < LEASE / 2 {
        seen?;
    }
    is_lifted(scene, &tags[0]).await?;
    is_gone(scene, &key, &tags, &old).await
}

/// It drops what is stored, and not what writers have said; this rule is alone in the place.
pub(super) async fn a_fence_outlives_clear(scene: &Scene) -> Seen {
    let tags = [scene.tag("1")];
    let fence = Fence::new(MINUTE, Duration::ZERO);
    scene.here.fence(&tags, &fence).await?;
    scene.there.clear().await?;
    stands(scene, &tags[0]).await?;
    scene.here.invalidate(&group(&tags), Some(&fence)).await?;
    is_lifted(scene, &tags[0]).await
}
