//! The faults of the simulation, by name. A seed draws some of them, or one alone is repeated.

use std::time::Duration;

use tokio::time::Instant;

use super::scenario::{CHANGE, OWNERS, Scenario};
use super::world::Process;

/// A kind of fault. Those of one computer are at the voter that leads in at least half of all cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// A voter's process is killed, and starts again.
    Kill,
    /// A voter's computer loses power, and what its disk did not have yet.
    PowerLoss,
    /// All voters' computers lose power, and return one by one; some only later.
    PowerLossOfAll,
    /// A computer stands still, and goes on without having noticed.
    Pause,
    /// The requests of clients wait at a voter's computer, and its voter goes on.
    ServicePause,
    /// A computer reaches no other one, and no other one reaches it.
    Partition,
    /// A computer sends, and gets nothing, or the other way round.
    OneWayPartition,
    /// A fifth of all messages is lost.
    Loss,
    /// Links and disks are slow.
    Delay,
    /// A voter's disk has no room.
    DiskFull,
    /// A voter is replaced by one at a new computer; perhaps something fails in the middle of it.
    VoterReplacement,
}

/// All faults, with their names for the command line.
pub(super) const FAULTS: [(&str, Fault); 11] = [
    ("kill", Fault::Kill),
    ("power-loss", Fault::PowerLoss),
    ("power-loss-of-all", Fault::PowerLossOfAll),
    ("pause", Fault::Pause),
    ("service-pause", Fault::ServicePause),
    ("partition", Fault::Partition),
    ("one-way-partition", Fault::OneWayPartition),
    ("loss", Fault::Loss),
    ("delay", Fault::Delay),
    ("disk-full", Fault::DiskFull),
    ("voter-replacement", Fault::VoterReplacement),
];

impl Scenario {
    /// Ends a process; what was full has room when it begins again.
    async fn end(&self, name: &str, loses_power: bool) {
        self.world.note(|| {
            let how = if loses_power {
                "loses power"
            } else {
                "is killed"
            };
            format!("{name} {how}")
        });
        self.world.end_process(name, loses_power);
    }

    fn count(&mut self, fault: Fault) {
        *self.run.faults.entry(fault).or_default() += 1;
    }

    /// One fault, and for most its end.
    pub(super) async fn fault(&mut self, fault: Fault, voters: usize) -> Result<(), String> {
        let world = self.world.clone();
        let leader = self.leader();
        // Every second time the voter that matters most.
        let voter = match leader {
            Some(leader) if world.chance(0.5) => leader.name(),
            _ => self.any_voter(),
        };
        // What stands still or is cut off may also be a node that runs the machine.
        let any = match world.chance(0.4) {
            true => world.pick(&OWNERS).unwrap_or("").to_owned(),
            false => voter.clone(),
        };
        // A replacement counts once it is begun.
        if fault != Fault::VoterReplacement {
            self.count(fault);
        }
        match fault {
            Fault::Kill | Fault::PowerLoss => {
                self.end(&voter, fault == Fault::PowerLoss).await;
                world.sleep_ms(1..2_500).await;
                self.boot(&voter).await?;
            }
            Fault::PowerLossOfAll => {
                let names = world.voter_names();
                for name in &names {
                    self.end(name, true).await;
                }
                for name in names {
                    world.sleep_ms(1..400).await;
                    // One may stay away for a while.
                    if world.chance(0.8) {
                        self.boot(&name).await?;
                    }
                }
            }
            Fault::Pause => {
                let time = Duration::from_millis(world.draw(50..4_000));
                world.note(|| format!("{any} stands still for {time:?}"));
                world.stand_still(&any, time);
                world.sleep_ms(1..2_000).await;
            }
            Fault::ServicePause => {
                let time = Duration::from_millis(world.draw(50..4_000));
                world.note(|| format!("{voter} serves nothing for {time:?}"));
                world.stop_service(&voter, time);
                world.sleep_ms(1..2_000).await;
            }
            Fault::Partition => {
                world.note(|| format!("{any} is cut off"));
                for other in world.names() {
                    world.cut(&any, &other);
                    world.cut(&other, &any);
                }
                world.sleep_ms(50..3_000).await;
                world.restore_links();
                world.note(|| "all links work".into());
            }
            Fault::OneWayPartition => {
                let sends = world.chance(0.5);
                let what = if sends { "sends" } else { "gets" };
                world.note(|| format!("{any} {what} nothing"));
                for other in world.names() {
                    match sends {
                        true => world.cut(&any, &other),
                        false => world.cut(&other, &any),
                    }
                }
                world.sleep_ms(50..3_000).await;
                world.restore_links();
                world.note(|| "all links work".into());
            }
            Fault::Loss => {
                world.note(|| "messages are lost".into());
                world.set_loss(0.2);
                world.sleep_ms(500..3_000).await;
                world.heal();
            }
            Fault::Delay => {
                world.note(|| "everything is slow".into());
                world.set_times(5_000..60_000, 5_000..80_000);
                world.sleep_ms(500..3_000).await;
                world.heal();
            }
            Fault::DiskFull => {
                world.note(|| format!("the disk of {voter} is full"));
                world.set_full(&voter, true);
                world.sleep_ms(50..1_500).await;
                self.look()?;
                let stopped = |it: Process| it.store.stopped().is_some();
                if world.process(&voter).is_some_and(stopped) {
                    self.end(&voter, false).await;
                }
                world.set_full(&voter, false);
                self.boot(&voter).await?;
            }
            Fault::VoterReplacement => self.replace_voter(voters).await?,
        }
        Ok(())
    }

    /// Replaces a random voter by one at a new computer, as far as it goes in a while.
    async fn replace_voter(&mut self, voters: usize) -> Result<(), String> {
        let begun = Instant::now();
        let world = self.world.clone();
        while begun.elapsed() < CHANGE / 4 {
            world.sleep_ms(20..100).await;
            let Some(leader) = self.leader() else {
                continue;
            };
            let status = leader.store.status();
            let is_ready = status.voters.len() == voters && !status.is_changing;
            if !is_ready || !status.learners.is_empty() {
                continue;
            }
            let Ok(id) = self.add_learner().await else {
                return Ok(());
            };
            let mut group: Vec<u64> = status.voters.keys().copied().collect();
            let Some(old) = world.pick(&group) else {
                return Ok(());
            };
            group.retain(|id| *id != old);
            group.push(id);
            world.note(|| format!("voter {id} for voter {old}"));
            let Some(leader) = self.leader() else {
                return Ok(());
            };
            // In the middle of it something may happen.
            if world.chance(0.3) {
                let name = self.any_voter();
                self.end(&name, true).await;
            }
            let setting = leader.store.set_voters(group.into_iter().collect());
            tokio::time::timeout(CHANGE / 4, setting).await.ok();
            self.count(Fault::VoterReplacement);
            return Ok(());
        }
        Ok(())
    }
}
