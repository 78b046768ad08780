//! A leader whose service of requests stands still while its voter goes on: no lease ends whose holder
//! renews it, and one whose holder is gone ends soon after.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use super::scenario::Scenario;
use super::world::{Process, World};
use crate::interface::{Store, StoreError, Txn};

/// As nodes hold and renew their leases; see owners.rs.
const TTL: Duration = Duration::from_millis(1_500);
const RENEW_EVERY: Duration = Duration::from_millis(300);
/// What a lease may last longer than its time, where everything is near: its end is found and
/// confirmed, and written by disks that are busy.
const END_WITHIN: Duration = Duration::from_millis(1_000);
/// A pause of the service after which connections count as lost: holders get their full time again.
const LOST_AFTER: Duration = Duration::from_millis(500);
/// Seeds of the simulation with faults for one of these.
const SEEDS_FOR_ONE: u64 = 25;

/// Renews a lease from another computer until `until`, whether earlier renewals are answered or not. An
/// error if the store says that it ended.
async fn renew(world: Arc<World>, leader: Process, until: Instant) -> Result<(), String> {
    let name = leader.name();
    let lease = leader.store.lease_grant(TTL.as_millis() as u64).await;
    let lease = lease.map_err(|error| error.to_string())?;
    let put = Txn::new().put_leased("alive", "", lease);
    let put = leader.store.txn(put).await;
    put.map_err(|error| error.to_string())?;
    let mut renewals = FuturesUnordered::new();
    let mut due = Instant::now();
    while Instant::now() < until {
        tokio::select! {
            () = tokio::time::sleep_until(due) => {
                due += RENEW_EVERY;
                let (world, leader, name) = (&world, &leader, &name);
                renewals.push(async move {
                    world.travel("outside", name).await;
                    world.served(name).await;
                    leader.store.lease_renew(lease).await
                });
            }
            Some(answer) = renewals.next() => match answer {
                Ok(_) => {}
                Err(error @ StoreError::NoSuchLease { .. }) => return Err(error.to_string()),
                Err(error) => return Err(format!("a renewal: {error}")),
            },
        }
    }
    Ok(())
}

/// Pauses of the service at random while one node renews its lease; then it is gone.
async fn pause_service(seed: u64) -> Result<(), String> {
    let world = World::new(seed, super::setting("KEEL_SIM_SEED").is_some());
    let done = pause_service_in(&world).await;
    world.end();
    done
}

async fn pause_service_in(world: &Arc<World>) -> Result<(), String> {
    let mut scenario = Scenario::new(world);
    scenario.begin().await?;
    if world.chance(0.5) {
        scenario.grow(3).await?;
    }
    let leader = scenario.leader().ok_or("no leader")?;
    let name = leader.name();
    let until = Instant::now() + Duration::from_secs(15);
    let renewing = tokio::spawn(renew(world.clone(), leader.clone(), until));
    while Instant::now() + Duration::from_secs(4) < until {
        world.sleep_ms(200..2_000).await;
        let pause = Duration::from_millis(world.draw(100..4_000));
        world.note(|| format!("{name} serves nothing for {pause:?}"));
        world.stop_service(&name, pause);
        tokio::time::sleep(pause).await;
    }
    renewing.await.map_err(|error| error.to_string())??;
    // The last pause may be at the end of the lease, and as long as it counts as none.
    let pause = Duration::from_millis(world.draw(0..400));
    let at = Instant::now() + TTL - LOST_AFTER;
    tokio::time::sleep_until(at).await;
    world.stop_service(&name, pause);
    let bound = TTL + pause + END_WITHIN;
    let gone_since = Instant::now();
    while leader
        .store
        .list("alive")
        .await
        .is_ok_and(|it| !it.entries.is_empty())
    {
        if gone_since.elapsed() > bound {
            return Err(format!("its lease did not end within {bound:?}"));
        }
        world.sleep_ms(5..20).await;
    }
    Ok(())
}

#[test]
fn a_pause_of_the_service_ends_no_lease() {
    let seeds = match super::setting("KEEL_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..super::setting("KEEL_SIM_SEEDS").map_or(40, |seeds| seeds / SEEDS_FOR_ONE),
    };
    for seed in seeds {
        if let Err(reason) = super::on_own_clock(seed, pause_service(seed)) {
            panic!("seed {seed}: {reason}\n{}", super::repeat(seed, None));
        }
    }
}
