//! Voters that are far apart and do not fail: no delay is taken for a failure, neither a constant one
//! nor one that grows because something fills the links.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use super::scenario::Scenario;
use super::world::{Process, World};
use crate::interface::{LeaseId, Store, Txn};

/// As nodes hold and renew their leases; see owners.rs.
const TTL_MS: u64 = 1_500;
const RENEW_EVERY: Duration = Duration::from_millis(300);
/// A renewal is sent later than that by up to so much: at a common time of its thread's timers.
const LATE_MS_MAX: u64 = 64;
/// Age of the newest answered renewal at which a node holds its machines.
const HOLD_AFTER: Duration = Duration::from_millis(1_285);
/// Of so many runs one may have a node that holds its machines for a moment: a confirmation just
/// misses its time while the link fills, and a renewal just missed the one before. Its lease goes on.
const RUNS_FOR_A_HOLD: u64 = 300;
/// Seeds of the simulation with faults for one of these: each of these has four runs.
const SEEDS_FOR_ONE: u64 = 100;
/// How long the store is used.
const TIME: Duration = Duration::from_secs(20);

/// Times of messages in microseconds for a round trip in milliseconds, which vary by a tenth.
fn one_way_us(round_trip_ms: u64) -> std::ops::Range<u64> {
    round_trip_ms * 450..round_trip_ms * 550 + 200
}

/// Renews a lease from the node of a voter until the end, every [`RENEW_EVERY`] and some of them late,
/// whether the last renewal was answered or not. The result is the longest time from when a renewal was sent until the
/// answer to the next one.
async fn renew(
    world: Arc<World>,
    node: String,
    leader: Process,
    until: Instant,
) -> Result<Duration, String> {
    let at = leader.name();
    let ask = async |lease: Option<LeaseId>| {
        let sent = Instant::now();
        if node != at {
            world.travel(&node, &at).await;
        }
        let lease = match lease {
            Some(lease) => leader.store.lease_renew(lease).await.map(|_| lease),
            None => leader.store.lease_grant(TTL_MS).await,
        };
        if node != at {
            world.travel(&at, &node).await;
        }
        let failed = |error| format!("the lease of {node}: {error}");
        Ok::<_, String>((sent, lease.map_err(failed)?))
    };
    let (_, lease) = ask(None).await?;
    let mut newest: Option<Instant> = None;
    let mut longest = Duration::ZERO;
    let mut renewals = FuturesUnordered::new();
    // As planned, and when it is sent.
    let mut planned = Instant::now();
    let mut due = planned;
    while due < until || !renewals.is_empty() {
        tokio::select! {
            () = tokio::time::sleep_until(due), if due < until => {
                renewals.push(ask(Some(lease)));
                planned += RENEW_EVERY;
                due = planned + Duration::from_millis(world.draw(0..LATE_MS_MAX));
            }
            Some(answer) = renewals.next() => {
                longest = longest.max(newest.map_or(Duration::ZERO, |sent| sent.elapsed()));
                newest = newest.max(Some(answer?.0));
            }
        }
    }
    Ok(longest)
}

/// Changes at the leader, one after the other; the longest time of one.
async fn change(leader: Process, until: Instant) -> Result<Duration, String> {
    let mut longest = Duration::ZERO;
    while Instant::now() < until {
        let begun = Instant::now();
        let put = leader.store.txn(Txn::new().put("k", "v")).await;
        put.map_err(|error| format!("a change: {error}"))?;
        longest = longest.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(70)).await;
    }
    Ok(longest)
}

/// Three voters `round_trip_ms` apart, and `queue_ms` more of the second half of the time on. Whether
/// a node would have held its machines.
async fn use_far_apart(seed: u64, round_trip_ms: u64, queue_ms: u64) -> Result<bool, String> {
    let world = World::new(seed, super::setting("KEEL_SIM_SEED").is_some());
    let done = use_in(&world, round_trip_ms, queue_ms).await;
    world.end();
    done
}

async fn use_in(world: &Arc<World>, round_trip_ms: u64, queue_ms: u64) -> Result<bool, String> {
    let disk_us = 200..4_000;
    world.set_times(one_way_us(round_trip_ms), disk_us.clone());
    let mut scenario = Scenario::new(world);
    scenario.begin().await?;
    scenario.grow(3).await?;
    let leader = scenario.leader().ok_or("no leader")?;
    let term = leader.store.status().term;
    let until = Instant::now() + TIME;
    let renewals: Vec<_> = world
        .voter_names()
        .into_iter()
        .map(|node| tokio::spawn(renew(world.clone(), node, leader.clone(), until)))
        .collect();
    let changes = tokio::spawn(change(leader.clone(), until));
    // A link fills within half a second.
    tokio::time::sleep(TIME / 2).await;
    for part in 1..=5 {
        world.set_times(
            one_way_us(round_trip_ms + queue_ms * part / 5),
            disk_us.clone(),
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut terms = BTreeSet::new();
    while Instant::now() < until {
        world.sleep_ms(20..40).await;
        scenario.look()?;
        terms.extend(world.processes().iter().map(|it| it.store.status().term));
    }
    if terms != BTreeSet::from([term]) {
        return Err(format!(
            "a delay was taken for a failure: terms {terms:?}, first {term}"
        ));
    }
    let mut held = false;
    for renewal in renewals {
        let longest = renewal.await.map_err(|error| error.to_string())??;
        if longest > Duration::from_millis(TTL_MS) {
            return Err(format!("a node would have lost its lease: {longest:?}"));
        }
        held |= longest > HOLD_AFTER;
    }
    let longest = changes.await.map_err(|error| error.to_string())??;
    // A round trip to the nearest majority, for a message that is sent twice another one, and up to
    // three writes in a row by disks that are busy, 300 ms each.
    let bound = Duration::from_millis((round_trip_ms + queue_ms) * 22 / 10 + 3 * 300);
    match longest <= bound {
        true => Ok(held),
        false => Err(format!("a change took {longest:?}, more than {bound:?}")),
    }
}

#[test]
fn no_delay_is_taken_for_a_failure() {
    let seeds = match super::setting("KEEL_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..super::setting("KEEL_SIM_SEEDS").map_or(30, |seeds| seeds / SEEDS_FOR_ONE),
    };
    let (mut runs, mut held) = (0, Vec::new());
    for seed in seeds {
        for (round_trip_ms, queue_ms) in [(100, 0), (100, 200), (200, 100), (300, 0)] {
            let used = super::on_own_clock(seed, use_far_apart(seed, round_trip_ms, queue_ms));
            match used {
                Ok(holds) => held.extend(holds.then_some(seed)),
                Err(reason) => panic!(
                    "seed {seed}, {round_trip_ms} ms and {queue_ms} ms of queue: {reason}\n{}",
                    super::repeat(seed, None)
                ),
            }
            runs += 1;
        }
    }
    println!("far apart: {runs} runs, a node held its machines with seeds {held:?}");
    let bound = 1 + runs / RUNS_FOR_A_HOLD;
    assert!(
        held.len() as u64 <= bound,
        "{held:?} of {runs}: more than {bound}"
    );
}
