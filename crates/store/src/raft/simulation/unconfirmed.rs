//! A voter that was elected and then reaches nobody: it must not say that it serves, or clients would
//! wait for it instead of asking another one.

use std::time::Duration;

use super::on_own_clock;
use super::scenario::Scenario;
use super::world::{Process, World};

const SEEDS: u64 = 20;
/// How often it is looked: shorter than a message takes.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// Time for another voter to be elected.
const ELECTION: Duration = Duration::from_secs(10);
/// Longer than a leader asks a quorum that does not answer.
const SILENCE: Duration = Duration::from_secs(5);

/// Cuts a voter off when it has just been elected; whether it was before it served.
async fn elect_and_cut(seed: u64) -> Result<bool, String> {
    let world = World::new(seed, false);
    let done = async {
        let mut scenario = Scenario::new(&world);
        scenario.begin().await?;
        scenario.grow(3).await?;
        let first = scenario.leader().ok_or("no leader")?;
        let term = first.store.status().term;
        world.end_process(&first.name(), false);
        let leads = |it: &Process| {
            let status = it.store.status();
            status.term > term && status.leader == Some(status.id)
        };
        let searched = tokio::time::Instant::now();
        let elected = loop {
            if let Some(elected) = world.processes().into_iter().find(leads) {
                break elected;
            }
            if searched.elapsed() > ELECTION {
                return Err("no voter was elected".into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let name = elected.name();
        for other in world.names() {
            world.cut(&name, &other);
            world.cut(&other, &name);
        }
        if elected.store.is_serving() {
            return Ok(false);
        }
        let cut = tokio::time::Instant::now();
        while cut.elapsed() < SILENCE {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if elected.store.is_serving() {
                return Err(format!("{name} serves, and nobody answers it"));
            }
        }
        Ok(true)
    };
    let done = done.await;
    world.end();
    done
}

#[test]
fn a_leader_that_no_quorum_confirmed_does_not_serve() {
    let mut cut_in_time = 0;
    for seed in 0..SEEDS {
        match on_own_clock(seed, elect_and_cut(seed)) {
            Ok(in_time) => cut_in_time += u64::from(in_time),
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    assert!(cut_in_time > SEEDS / 2, "{cut_in_time} of {SEEDS}");
}
