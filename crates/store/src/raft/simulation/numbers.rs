//! The numbers of voters: a copy that left the group has an old log and an old vote, so no other one
//! may ever have its number.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::on_own_clock;
use super::scenario::Scenario;
use super::world::World;

/// Seeds of this test.
const SEEDS: u64 = 20;
/// How long a change may take.
const PATIENCE: Duration = Duration::from_secs(60);

async fn run(seed: u64) -> Result<(), String> {
    let world = World::new(seed, false);
    let mut scenario = Scenario::new(&world);
    scenario.begin().await?;
    let mut given = BTreeSet::from([1]);
    for _ in 0..3 {
        let id = scenario.add_learner().await?;
        if !given.insert(id) {
            return Err(format!("number {id} was given twice"));
        }
        // The newest, and so the one with the highest number, leaves again.
        let begun = Instant::now();
        loop {
            if begun.elapsed() > PATIENCE {
                return Err(format!("copy {id} did not leave in time"));
            }
            world.sleep_ms(5..20).await;
            let Some(leader) = scenario.leader() else {
                continue;
            };
            let removed = leader.store.remove_learners(BTreeSet::from([id])).await;
            if removed.is_ok() && !leader.store.status().learners.contains_key(&id) {
                break;
            }
        }
    }
    world.end();
    Ok(())
}

#[test]
fn the_number_of_a_copy_that_left_is_not_given_again() {
    for seed in 0..SEEDS {
        let done = on_own_clock(seed, run(seed));
        done.unwrap_or_else(|reason| panic!("seed {seed}: {reason}"));
    }
}
