//! Responses to rounds of other nodes, and incoming machines.

use super::messages::{Request, Response, View};
use super::{Balancer, IncomingMove, SETTLE_SAMPLES, TrackedMachine, WEIGHED_MAX};
use crate::Name;
use crate::ledger::NoMoveReason;
use crate::load::{Capacity, Factors, LOAD_MAX};
use crate::policy::Mode;

/// Lifetime of a reservation whose move has not started, in milliseconds.
const GRANT_MS: u64 = 5_000;

impl Balancer {
    pub(super) fn respond(&mut self, peer: &Name, request: Request, now_ms: u64) -> Response {
        let Some(side) = self.node_state() else {
            return Response::NotReady;
        };
        match request {
            Request::View => Response::View(View {
                policy_revision: self.revision,
                state: side,
                loads: self.window.loads().collect(),
                busy: self.incoming.is_some(),
            }),
            Request::Weigh {
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
                Response::Weights(factors.iter_mut().map(weigh).collect())
            }
            Request::Reserve {
                machine,
                capacity,
                factors,
                load,
                packs,
            } => self.reserve(peer, (machine, capacity, factors), (load, packs), now_ms),
            Request::Release { machine } => {
                if self.incoming.as_ref().is_some_and(|it| it.from == *peer) {
                    self.release(&machine);
                }
                Response::Released
            }
        }
    }

    fn reserve(
        &mut self,
        peer: &Name,
        (machine, mut capacity, mut factors): (Name, Capacity, Factors),
        (load, packs): (f64, bool),
        now_ms: u64,
    ) -> Response {
        let Some(side) = self.node_state() else {
            return Response::NotReady;
        };
        if let Some(incoming) = &self.incoming {
            let again = incoming.machine == machine && incoming.from == *peer;
            return if again {
                Response::Granted
            } else {
                Response::Busy
            };
        }
        if self.policy.mode == Mode::Off {
            return Response::Refused {
                why: NoMoveReason::Off.to_string(),
            };
        }
        let mut errors = capacity.sanitise();
        errors.extend(factors.sanitise());
        if !errors.is_empty() || !(0.0..=LOAD_MAX).contains(&load) {
            return Response::Refused {
                why: "its numbers are invalid".into(),
            };
        }
        let there = factors.on(&capacity, &side.capacity);
        let weight = there.weigh(&side.capacity, &self.policy.weights);
        let kept = side.capacity.memory_bytes as f64 * self.policy.memory_headroom;
        let free = side.memory_free_bytes.saturating_sub(kept as u64);
        if factors.memory_bytes > free {
            return Response::Refused {
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
            return Response::Refused {
                why: format!("its load has risen to {:.2} meanwhile", side.load),
            };
        }
        self.shift_load(weight);
        self.incoming = Some(IncomingMove {
            machine,
            from: peer.clone(),
            factors: there,
            weight,
            until_ms: now_ms + GRANT_MS,
        });
        Response::Granted
    }

    /// Drops a reservation whose move will not happen.
    pub(super) fn release(&mut self, machine: &Name) {
        if self
            .incoming
            .as_ref()
            .is_some_and(|it| it.machine == *machine)
            && let Some(incoming) = self.incoming.take()
        {
            self.shift_load(-incoming.weight);
        }
    }

    pub(super) fn arrived(&mut self, machine: Name, from: Name, now_ms: u64) {
        self.departed.remove(&machine);
        let granted = self.incoming.take_if(|it| it.machine == machine);
        let settled_ms = now_ms + SETTLE_SAMPLES * self.policy.sample_ms;
        let promised = granted.map(|it| (it.factors, settled_ms));
        let level = promised.map_or(0.0, |(factors, _)| self.local_weight(&factors));
        self.tracked.insert(
            machine,
            TrackedMachine {
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
