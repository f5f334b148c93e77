//! One process loads a key for all; for stores that say that they are shared.

use futures_util::future::join_all;

use super::scene::{Flaw, HOUR, LEASE, Scene, Seen, comes, expect, never, steady};

/// A store that leaves it at the default, by which everybody is to load, does not hold this.
pub(super) async fn one_claims_at_a_time(scene: &Scene) -> Seen {
    let (key, other) = (scene.key("entry"), scene.key("other"));
    let claims = (0..4).flat_map(|_| scene.handles()).map(|handle| handle.claim(&key, HOUR));
    // Who was refused an answer may have it all the same: then nobody else has.
    let answers = join_all(claims).await;
    let holders = answers.iter().filter(|answer| matches!(answer, Ok(true))).count();
    never(holders > 1, || format!("{holders} of 12 have the same claim at once"))?;
    let is_known = answers.iter().all(Result::is_ok);
    expect(is_known, || format!("claim fails: {:?}", answers.iter().find(|answer| answer.is_err())))?;
    expect(holders == 1, || "nobody has a claim that 12 have asked for".to_owned())?;
    let elsewhere = scene.there.claim(&other, HOUR).await;
    expect(matches!(elsewhere, Ok(true)), || format!("another key's claim: {elsewhere:?}"))?;
    for handle in scene.handles() {
        steady("release", || scene.here.0.release(&key)).await?;
        let next = handle.claim(&key, HOUR).await;
        expect(matches!(next, Ok(true)), || format!("a claim after it was released: {next:?}"))?;
        never(matches!(scene.here.claim(&key, HOUR).await, Ok(true)), || "a claim is given twice".to_owned())?;
    }
    Ok(())
}

/// Whoever had it may be dead.
pub(super) async fn a_claim_ends_with_its_lease(scene: &Scene) -> Seen {
    let key = scene.key("entry");
    let first = scene.here.claim(&key, LEASE).await;
    expect(matches!(first, Ok(true)), || format!("a claim that nobody has: {first:?}"))?;
    comes("the end of a claim", async || {
        scene.there.claim(&key, LEASE).await.map_err(|error| Flaw::Missing(format!("claim fails: {error}")))
    })
    .await
}
