//! What a mark proves later.

use std::{sync::Arc, time::Duration};

use super::scene::{Flaw, LEASE, Scene, Seen, TIERS, comes, entry, expect, group, never, response, stamps};
use crate::{catalog::Tier, store::Fence};

/// A tag that was not known, and that nobody has dropped since.
pub(super) async fn a_mark_proves_what_stands(scene: &Scene) -> Seen {
    let (known, late) = ([scene.tag("known")], [scene.tag("late-1"), scene.tag("late-2")]);
    let first = scene.here.open(&known).await?.generations;
    for opened in scene.here.marks(&scene.key("nothing"), &known).await? {
        expect(opened.generations == first, || format!("open gave {first:?}, and a look-up {opened:?}"))?;
        let proven = scene.here.extend(&opened, &late).await?;
        expect(proven.is_some(), || "nothing is proven of tags that nobody has touched".to_owned())?;
        let proven = proven.unwrap_or_default();
        never(proven.len() != 2, || format!("{} generations for 2 tags", proven.len()))?;
        never(proven.iter().any(|now| now.is_fenced()), || "a fenced generation is no proof".to_owned())?;
        for handle in scene.handles() {
            let now = handle.open(&late).await?.generations;
            expect(now == proven, || format!("extend gave {proven:?}, and open {now:?}"))?;
        }
    }
    Ok(())
}

/// What is proven late is dropped like what was known before.
pub(super) async fn what_a_mark_proves_falls_with_the_next_drop(scene: &Scene) -> Seen {
    let (known, late, key) = (scene.tag("known"), scene.tag("late"), scene.key("entry"));
    let both = [known.clone(), late.clone()];
    let opened = scene.here.open(&both[..1]).await?;
    let proven = scene.here.extend(&opened, &both[1..]).await?;
    let proven =
        proven.ok_or_else(|| Flaw::Missing("nothing is proven of a tag that nobody has touched".to_owned()))?;
    let generations = [opened.generations, proven].concat();
    let filled = Arc::new(entry(response("with a late tag"), stamps(&both, &generations)));
    scene.here.put(&key, &filled, Tier::default()).await?;
    let found = scene.there.valid(&key, &both, Tier::default()).await?;
    expect(found.is_some(), || "nothing valid was found after a fill with a late tag".to_owned())?;
    scene.elsewhere.drop_tags(&both[1..]).await?;
    for (handle, tier) in scene.handles().into_iter().flat_map(|handle| TIERS.map(|tier| (handle, tier))) {
        let found = handle.valid(&key, &both, tier).await?;
        never(found.is_some(), || format!("tier {tier:?}: it is valid without its late tag"))?;
    }
    Ok(())
}

/// By whom and in whatever way; also of tags that were there before, and through another handle.
pub(super) async fn a_mark_proves_nothing_of_what_was_dropped(scene: &Scene) -> Seen {
    for (i, dropper) in scene.handles().into_iter().enumerate() {
        let (known, late) = (scene.tag("known"), scene.tag(&format!("late-{i}")));
        if i == 1 {
            scene.elsewhere.open(std::slice::from_ref(&late)).await?;
        }
        let mut marks = scene.here.marks(&scene.key("nothing"), std::slice::from_ref(&known)).await?;
        marks.push(scene.here.open(&[]).await?);
        let moments = scene.here.moments(&scene.key("nothing"), &[known.clone(), late.clone()]).await?;
        dropper.drop_tags(std::slice::from_ref(&late)).await?;
        let now = scene.here.open(std::slice::from_ref(&late)).await?;
        never(moments.iter().any(|moment| moment.mark == now.mark), || {
            "a look-up and what was opened after a drop have the same mark".to_owned()
        })?;
        marks.extend(moments);
        for marked in &marks {
            for _ in 0..2 {
                let both = [late.clone(), scene.tag("untouched")];
                let proven = scene.here.extend(marked, &both).await?;
                never(proven.is_some(), || "something is proven of a tag that was dropped since".to_owned())?;
                // Not even when it has a generation again.
                scene.there.open(std::slice::from_ref(&late)).await?;
            }
        }
    }
    Ok(())
}

/// Its end is a drop as well, for a row may have been read as it was before.
pub(super) async fn a_mark_proves_nothing_of_what_was_fenced(scene: &Scene) -> Seen {
    let (known, late) = ([scene.tag("known")], [scene.tag("late")]);
    let fence = Fence::new(Duration::from_secs(60), Duration::ZERO);
    let nothing = scene.key("nothing");
    let mut marks = scene.here.marks(&nothing, &known).await?;
    scene.there.fence(&late, &fence).await?;
    marks.extend(scene.here.marks(&nothing, &known).await?);
    for marked in &marks {
        let proven = scene.here.extend(marked, &late).await?;
        never(proven.is_some(), || "something is proven of a tag that is fenced".to_owned())?;
    }
    scene.there.invalidate(&group(&late), Some(&fence)).await?;
    for marked in &marks {
        let proven = scene.here.extend(marked, &late).await?;
        never(proven.is_some(), || "something is proven of a tag whose fence was lifted since".to_owned())?;
    }
    Ok(())
}

pub(super) async fn a_mark_proves_nothing_of_a_lease_that_ran_out(scene: &Scene) -> Seen {
    let (known, late, probe) = ([scene.tag("known")], [scene.tag("late")], [scene.tag("probe")]);
    let nothing = scene.key("nothing");
    let mut marks = scene.here.marks(&nothing, &known).await?;
    scene.there.fence(&late, &Fence::new(LEASE, Duration::ZERO)).await?;
    marks.extend(scene.here.marks(&nothing, &known).await?);
    // Nobody asks for it meanwhile: another tag, fenced later, tells when it is over.
    scene.there.fence(&probe, &Fence::new(LEASE, Duration::ZERO)).await?;
    comes("the end of a lease", async || {
        Ok(!scene.elsewhere.open(&probe).await?.generations.iter().any(|generation| generation.is_fenced()))
    })
    .await?;
    for marked in &marks {
        for _ in 0..2 {
            let proven = scene.here.extend(marked, &late).await?;
            never(proven.is_some(), || "something is proven of a tag whose fence has run out since".to_owned())?;
            scene.there.open(&late).await?;
        }
    }
    Ok(())
}

/// Of no tag that was there; this rule is alone in the place.
pub(super) async fn a_mark_proves_nothing_after_clear(scene: &Scene) -> Seen {
    let (known, late) = ([scene.tag("known")], [scene.tag("late")]);
    scene.there.open(&late).await?;
    let marks = scene.here.marks(&scene.key("nothing"), &known).await?;
    scene.there.clear().await?;
    for marked in &marks {
        for _ in 0..2 {
            let proven = scene.here.extend(marked, &late).await?;
            never(proven.is_some(), || "something is proven of a tag from before the store was cleared".to_owned())?;
            scene.there.open(&late).await?;
        }
    }
    Ok(())
}
