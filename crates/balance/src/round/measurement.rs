//! Load of the own node and its machines: sampled, smoothed, and compared with the predicted effect
//! of moves.

use super::{Balancer, Command, TrackedMachine, record_invalid_report};
use crate::ledger::Decision;
use crate::load::{Capacity, Factors, NodeSample};

/// Weight of the newest sample in a machine's smoothed factors.
const NEWEST_WEIGHT: f64 = 0.4;
/// Consecutive samples that must deviate by half before the load counts as changed.
const CHANGED_SAMPLES: u32 = 3;
/// Missing samples after which older ones are discarded.
const GAP_SAMPLES: u64 = 10;

impl Balancer {
    pub(super) fn record_sample(
        &mut self,
        mut sample: NodeSample,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        // The node's own numbers may be invalid too. Clamped to 0 they would make it the least
        // loaded node, and all peers would move machines here; so the window is cleared instead.
        let errors = sample.sanitise();
        if !errors.is_empty() {
            if !self.own_sample_invalid {
                record_invalid_report(commands, "this node", errors);
            }
            self.own_sample_invalid = true;
            self.window.clear();
            return;
        }
        self.own_sample_invalid = false;
        let gap_ms = GAP_SAMPLES * self.policy.sample_ms;
        if self.sample.is_some() && now_ms.saturating_sub(self.sampled_ms) > gap_ms {
            self.window.clear();
        }
        self.sampled_ms = now_ms;
        self.samples += 1;
        self.departed.retain(|_, until_ms| *until_ms > now_ms);
        sample
            .machines
            .retain(|machine| !self.departed.contains_key(&machine.name));
        let mut load = sample.base.weigh(&sample.capacity, &self.policy.weights);
        for machine in &mut sample.machines {
            self.track_machine(machine, &sample.capacity, now_ms);
            if !self.is_outgoing(&machine.name) {
                load += machine
                    .factors
                    .weigh(&sample.capacity, &self.policy.weights);
            }
        }
        if let Some(incoming) = &self.incoming
            && !sample.machines.iter().any(|it| it.name == incoming.machine)
        {
            load += incoming.weight;
        }
        // An arrived machine may be missing in a sample that began before.
        let weights = &self.policy.weights;
        self.tracked.retain(|_, tracked| {
            if tracked.seen == self.samples {
                return true;
            }
            let promised = tracked.promised.filter(|(_, until_ms)| *until_ms > now_ms);
            load += promised.map_or(0.0, |(it, _)| it.weigh(&sample.capacity, weights));
            promised.is_some()
        });
        self.window.add(load);
        self.sample = Some(sample);
        self.check_effects(load, commands);
        self.watch_pressure(now_ms);
        commands.extend(self.alert(now_ms).map(Command::Alert));
    }

    /// Updates a machine's history from its sample, and replaces its factors by the effective ones.
    fn track_machine(
        &mut self,
        machine: &mut crate::load::MachineSample,
        capacity: &Capacity,
        now_ms: u64,
    ) {
        let weights = &self.policy.weights;
        if !self.tracked.contains_key(&machine.name) {
            let tracked = TrackedMachine {
                factors: machine.factors,
                level: machine.factors.weigh(capacity, weights),
                level_since_ms: now_ms.saturating_sub(machine.lasted_ms),
                differing: 0,
                seen: 0,
                held_until_ms: 0,
                came_from: None,
                promised: None,
            };
            self.tracked.insert(machine.name.clone(), tracked);
        }
        let Some(tracked) = self.tracked.get_mut(&machine.name) else {
            return;
        };
        tracked.seen = self.samples;
        if let Some((promised, until_ms)) = tracked.promised {
            if now_ms < until_ms {
                machine.factors.cpu_cores = machine.factors.cpu_cores.max(promised.cpu_cores);
                machine.factors.cpu_bound_cores = machine
                    .factors
                    .cpu_bound_cores
                    .max(promised.cpu_bound_cores);
                machine.factors.memory_bytes =
                    machine.factors.memory_bytes.max(promised.memory_bytes);
            } else {
                tracked.promised = None;
            }
        }
        tracked.factors = smooth(&tracked.factors, &machine.factors);
        let weight = machine.factors.weigh(capacity, weights);
        if (weight - tracked.level).abs() > 0.5 * tracked.level.max(0.05) {
            tracked.differing += 1;
            if tracked.differing >= CHANGED_SAMPLES {
                tracked.level = weight;
                tracked.level_since_ms = now_ms;
                tracked.differing = 0;
                tracked.factors = machine.factors;
            }
        } else {
            tracked.differing = 0;
        }
    }

    fn check_effects(&mut self, load: f64, commands: &mut Vec<Command>) {
        let mut done = Vec::new();
        self.checks.retain_mut(|check| {
            check.samples_left = check.samples_left.saturating_sub(1);
            if check.samples_left > 0 {
                return true;
            }
            done.push(Decision::Ended {
                machine: check.machine.clone(),
                target: check.target.clone(),
                outcome: check.outcome.clone(),
                load: Some((check.predicted, load)),
            });
            false
        });
        let done = done.into_iter().map(|it| Command::Record(Box::new(it)));
        commands.extend(done);
    }

    fn watch_pressure(&mut self, now_ms: u64) {
        if self.node_state().is_some_and(|side| side.pressed) {
            self.pressed_since_ms.get_or_insert(now_ms);
        } else {
            self.pressed_since_ms = None;
            self.fruitless_rounds = 0;
        }
    }
}

fn smooth(before: &Factors, now: &Factors) -> Factors {
    let mix = |before: f64, now: f64| before + NEWEST_WEIGHT * (now - before);
    Factors {
        cpu_cores: mix(before.cpu_cores, now.cpu_cores),
        cpu_bound_cores: mix(before.cpu_bound_cores, now.cpu_bound_cores),
        memory_bytes: now.memory_bytes,
        dirty_bytes_per_s: mix(before.dirty_bytes_per_s, now.dirty_bytes_per_s),
        io_bytes_per_s: mix(before.io_bytes_per_s, now.io_bytes_per_s),
        network_bytes_per_s: mix(before.network_bytes_per_s, now.network_bytes_per_s),
        stalled: mix(before.stalled, now.stalled),
    }
}
