//! Other nodes' rounds: what they are answered, and what comes from there.

use super::messages::{Answer, Question, View};
use super::{Arriving, Balancer, Known, SETTLE_SAMPLES, WEIGHED_MAX};
use crate::Name;
use crate::ledger::Stay;
use crate::load::{Capacity, Factors, LOAD_MAX};
use crate::policy::Mode;

/// Milliseconds after which promised room is free again if nothing began to come.
const GRANT_MS: u64 = 5_000;

impl Balancer {
    pub(super) fn answer(&mut self, peer: &Name, question: Question, now_ms: u64) -> Answer {
        let Some(side) = self.side() else {
            return Answer::Measuring;
        };
        match question {
            Question::View => Answer::View(View {
                policy_revision: self.revision,
                side,
                loads: self.window.loads().collect(),
                busy: self.arriving.is_some(),
            }),
            Question::Weigh {
                mut capacity,
                mut factors,
            } => {
                capacity.sanitise();
                factors.truncate(WEIGHED_MAX);
                let weigh = |factors: &mut Factors| {
                    factors.sanitise();
                    let there = factors.on(&capacity, &side.capacity);
                    there.weigh(&side.capacity, &self.policy.weights)
                };
                Answer::Weights(factors.iter_mut().map(weigh).collect())
            }
            Question::Take {
                machine,
                capacity,
                factors,
                load,
                packs,
            } => self.take(peer, (machine, capacity, factors), (load, packs), now_ms),
            Question::Release { machine } => {
                if self.arriving.as_ref().is_some_and(|it| it.from == *peer) {
                    self.release(&machine);
                }
                Answer::Released
            }
        }
    }

    fn take(
        &mut self,
        peer: &Name,
        (machine, mut capacity, mut factors): (Name, Capacity, Factors),
        (load, packs): (f64, bool),
        now_ms: u64,
    ) -> Answer {
        let Some(side) = self.side() else {
            return Answer::Measuring;
        };
        if let Some(arriving) = &self.arriving {
            let again = arriving.machine == machine && arriving.from == *peer;
            return if again { Answer::Granted } else { Answer::Busy };
        }
        if self.policy.mode == Mode::Off {
            return Answer::Refused {
                why: Stay::Off.to_string(),
            };
        }
        let mut absurd = capacity.sanitise();
        absurd.extend(factors.sanitise());
        if !absurd.is_empty() || !(0.0..=LOAD_MAX).contains(&load) {
            return Answer::Refused {
                why: "its numbers are absurd".into(),
            };
        }
        let there = factors.on(&capacity, &side.capacity);
        let weight = there.weigh(&side.capacity, &self.policy.weights);
        let kept = side.capacity.memory_bytes as f64 * self.policy.memory_headroom;
        let free = side.memory_free_bytes.saturating_sub(kept as u64);
        if factors.memory_bytes > free {
            return Answer::Refused {
                why: format!(
                    "{:.1} GiB of memory are free",
                    free as f64 / f64::from(1 << 30)
                ),
            };
        }
        let most = if packs && !side.free {
            self.policy.fill_load
        } else {
            load
        };
        if side.load + weight > most {
            return Answer::Refused {
                why: format!("its load has risen to {:.2} meanwhile", side.load),
            };
        }
        self.shift(weight);
        self.arriving = Some(Arriving {
            machine,
            from: peer.clone(),
            factors: there,
            weight,
            until_ms: now_ms + GRANT_MS,
        });
        Answer::Granted
    }

    /// Nothing came of what was granted.
    pub(super) fn release(&mut self, machine: &Name) {
        if self
            .arriving
            .as_ref()
            .is_some_and(|it| it.machine == *machine)
            && let Some(arriving) = self.arriving.take()
        {
            self.shift(-arriving.weight);
        }
    }

    pub(super) fn arrived(&mut self, machine: Name, from: Name, now_ms: u64) {
        self.gone.remove(&machine);
        let granted = self.arriving.take_if(|it| it.machine == machine);
        let settled_ms = now_ms + SETTLE_SAMPLES * self.policy.sample_ms;
        let promised = granted.map(|it| (it.factors, settled_ms));
        let level = promised.map_or(0.0, |(factors, _)| self.weigh_here(&factors));
        self.known.insert(
            machine,
            Known {
                factors: promised.map(|(factors, _)| factors).unwrap_or_default(),
                level,
                level_since_ms: now_ms,
                differing: 0,
                seen: 0,
                held_until_ms: now_ms + self.policy.hold_ms,
                came_from: Some((from, now_ms + self.policy.cool_down_ms)),
                promised,
            },
        );
    }
}
