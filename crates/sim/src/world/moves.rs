//! Moves in flight: their duration, their bytes, and their end.

use super::{CompletedMove, QueuedEvent, World};
use keel_balance::Name;
use keel_balance::ledger::Outcome;
use keel_balance::round::Event;
use rand::RngExt;

/// Duration of a move before its first byte, in milliseconds.
const SETUP_MS: u64 = 100;
/// Concurrent outgoing moves of a node, and the limit for large machines among them.
const MOVES_PER_SOURCE_MAX: usize = 4;
const LARGE_MOVES_PER_SOURCE_MAX: usize = 2;
const LARGE_BYTES: u64 = 256 << 20;
/// Maximum delay of the store's notifications, in milliseconds.
const STORE_LAG_MS: u64 = 200;
/// Downtime of a move, in milliseconds.
const DOWNTIME_MS: f64 = 4.0;
/// Maximum share of a pre-copy round that is dirtied again during it.
const REWRITTEN_SHARE_MAX: f64 = 0.8;

#[derive(Debug)]
pub(super) struct InFlightMove {
    machine: usize,
    source: usize,
    target: usize,
    /// Incarnations of source and target at the start.
    is_incarnation: (u32, u32),
    duration_ms: u64,
    fails: bool,
    /// Whether it repairs a rule instead of ending a round.
    repairs: bool,
}

impl World {
    pub(super) fn begin_move(&mut self, source: usize, machine: &Name, target: &Name) {
        let number = self.machine_numbers[machine];
        let target = self.node_numbers[target];
        let most = self.settings.policy.moves_at_once(self.nodes.len());
        let it = &self.machines[number];
        let refused = if !(it.runs && it.node == source) || it.moves {
            Some(Outcome::Stayed {
                why: "it does not run here any more".into(),
            })
        } else if !self.nodes[target].alive {
            Some(Outcome::Stayed {
                why: "the target is gone".into(),
            })
        } else if self.moving >= most as usize || self.move_limit_reached(source, number) {
            self.capped += 1;
            Some(Outcome::Capped)
        } else {
            None
        };
        if let Some(outcome) = refused {
            let event = Event::MoveEnded {
                machine: machine.clone(),
                outcome,
            };
            let incarnation = self.nodes[source].incarnation;
            self.queue.put(
                self.now_ms + 1,
                QueuedEvent::Deliver(source, incarnation, event),
            );
            return;
        }
        self.start_move(number, source, target, false);
    }

    /// Whether the node's limit of outgoing moves is reached, of large ones or of all.
    fn move_limit_reached(&self, node: usize, machine: usize) -> bool {
        let large = |machine: usize| self.machines[machine].spec.memory_bytes >= LARGE_BYTES;
        let leaving = self.nodes[node].machines.iter();
        let leaving: Vec<usize> = leaving
            .copied()
            .filter(|it| self.machines[*it].moves)
            .collect();
        let of_large = leaving.iter().filter(|it| large(**it)).count();
        leaving.len() >= MOVES_PER_SOURCE_MAX
            || large(machine) && of_large >= LARGE_MOVES_PER_SOURCE_MAX
    }

    pub(super) fn start_move(
        &mut self,
        number: usize,
        source: usize,
        target: usize,
        repairs: bool,
    ) {
        let chance = self.settings.network.moves_failed;
        let fails = chance > 0.0 && self.rng.random_bool(chance);
        let duration_ms = self.duration_ms(number);
        self.moving += 1;
        self.machines[number].moves = true;
        let coming = Event::Arriving {
            machine: self.machines[number].spec.name.clone(),
        };
        self.step(target, coming);
        let in_flight = InFlightMove {
            machine: number,
            source,
            target,
            is_incarnation: (
                self.nodes[source].incarnation,
                self.nodes[target].incarnation,
            ),
            duration_ms,
            fails,
            repairs,
        };
        self.queue
            .put(self.now_ms + duration_ms, QueuedEvent::MoveOver(in_flight));
    }

    fn bytes(&self, machine: usize) -> f64 {
        let spec = &self.machines[machine].spec;
        let rate = self.settings.network.bytes_per_s;
        let again = (spec.dirty_bytes_per_s / rate).min(REWRITTEN_SHARE_MAX);
        spec.memory_bytes as f64 / (1.0 - again)
    }

    fn duration_ms(&self, machine: usize) -> u64 {
        let rate = self.settings.network.bytes_per_s;
        SETUP_MS + (self.bytes(machine) / rate * 1e3) as u64
    }

    pub(super) fn finish_move(&mut self, in_flight: &InFlightMove) {
        let &InFlightMove {
            machine,
            source,
            target,
            duration_ms,
            ..
        } = in_flight;
        self.moving -= 1;
        self.machines[machine].moves = false;
        if in_flight.repairs {
            self.finish_repair(source);
        }
        let name = self.machines[machine].spec.name.clone();
        let source_lives = self.is_incarnation(source, in_flight.is_incarnation.0);
        let target_lives = self.is_incarnation(target, in_flight.is_incarnation.1);
        let there = self.machines[machine].runs && self.machines[machine].node == source;
        let target_name = self.nodes[target].name.clone();
        let forbidden = self.rule_set.forbids(&name, &target_name);
        if in_flight.fails || !source_lives || !target_lives || !there || forbidden.is_some() {
            self.failed += u64::from(forbidden.is_none());
            self.raced += u64::from(forbidden.is_some());
            let gone = Event::ArrivalFailed {
                machine: name.clone(),
            };
            let why = if there {
                "the connection was lost"
            } else {
                "the machine ended"
            };
            let outcome = match forbidden {
                Some(broken) => Outcome::Raced {
                    rule: broken.rule.to_string(),
                },
                None => Outcome::Stayed { why: why.into() },
            };
            let ended = Event::MoveEnded {
                machine: name,
                outcome,
            };
            if target_lives {
                self.step(target, gone);
            }
            if source_lives && !in_flight.repairs {
                self.step(source, ended);
            }
            return;
        }
        let bytes = self.bytes(machine);
        self.nodes[source].machines.retain(|it| *it != machine);
        self.nodes[target].machines.push(machine);
        self.machines[machine].node = target;
        self.machines[machine].since_ms = self.now_ms;
        self.repairs += u64::from(in_flight.repairs);
        self.update_placements();
        self.moves.push(CompletedMove {
            at_ms: self.now_ms,
            machine,
            source,
            target,
            bytes,
        });
        let arrived = Event::Arrived {
            machine: name.clone(),
            from: self.nodes[source].name.clone(),
        };
        self.step(target, arrived);
        let left = Event::Departed {
            machine: name.clone(),
        };
        // The store's notification and the end of the move arrive in any order, delayed.
        let (store_ms, over_ms) = (
            self.rng.random_range(0..=STORE_LAG_MS),
            self.rng.random_range(0..=STORE_LAG_MS),
        );
        let outcome = Outcome::Moved {
            duration_ms: duration_ms as f64,
            downtime_ms: DOWNTIME_MS,
            bytes: bytes as u64,
        };
        let ended = Event::MoveEnded {
            machine: name,
            outcome,
        };
        let incarnation = in_flight.is_incarnation.0;
        let ended = (!in_flight.repairs).then_some((over_ms, ended));
        for (after_ms, event) in [(store_ms, left)].into_iter().chain(ended) {
            let tell = QueuedEvent::Deliver(source, incarnation, event);
            self.queue.put(self.now_ms + after_ms, tell);
        }
    }
}
