//! Rounds that this node initiates: the choice of a peer, the offer, and its outcome.

use super::messages::{Request, Response, View};
use super::{
    Backoff, Balancer, Command, ConfirmedMove, Constraints, EffectCheck, Explained, OutgoingMove,
    SETTLE_SAMPLES, State, WEIGHED_MAX, check_offer, record_invalid_report,
};
use crate::Name;
use crate::cost::Link;
use crate::ledger::{Decision, NoMoveReason, Outcome};
use crate::load::{Factors, LOAD_MAX, NodeSample, ValidationError};
use crate::policy::{Mode, Strategy};
use crate::select::{
    CONSIDERED_MAX, Candidate, Considered, Constraint, NodeState, Verdict, select,
};
use crate::window::{NEWEST, steady_difference};
use rand::RngExt;
use std::collections::HashMap;
use std::mem::discriminant;

/// Samples of a constant load during which a machine that may span is left to fine-grained
/// balancing: that takes five samples to decide, and acts in the next, or later on a busy node.
const GUESSED_SAMPLES: u64 = 20;
/// Response timeout, in milliseconds.
const ANSWER_MS: u64 = 2_000;
/// Backoff of a node or a machine after a failed move, in milliseconds; doubled by each further
/// failure, up to a maximum.
const BACKOFF_MS: u64 = 15_000;
const BACKOFF_DOUBLINGS_MAX: u32 = 5;
/// Time within which a user can confirm a proposed move, in milliseconds.
const PROPOSAL_MS: u64 = 300_000;
/// Time for which a node is pressed without a useful move before it alerts, in milliseconds.
const ALERT_AFTER_MS: u64 = 60_000;
/// Minimum interval between two alerts, in milliseconds, where the load oscillates around the
/// pressure threshold.
const ALERT_AGAIN_MS: u64 = 3_600_000;
/// Consecutive rounds without a target after which a pressed node may use a free node under `pack`.
const WAKE_ROUNDS: usize = 6;
/// Rounds for which a free peer is not asked again, since `pack` gives it nothing; and the number
/// of further picks in its place.
const FREE_ROUNDS: u64 = 60;
const PICKS_MAX: usize = 16;
/// A far peer that was drawn is asked once in this many times.
const FAR_EACH: u32 = 16;
/// Maximum number of remembered free nodes.
const FREE_MAX: usize = 4096;
/// Maximum number of remembered reasons, one per peer.
const REASONS_MAX: usize = 128;

impl Balancer {
    fn schedule_round(&mut self, now_ms: u64) {
        self.state = State::Idle;
        let interval = self.policy.interval_ms;
        let jittered = self
            .rng
            .random_range(interval / 2..=interval + interval / 2);
        self.due_ms = now_ms + jittered;
    }

    pub(super) fn begin_round(
        &mut self,
        now_ms: u64,
        constraints: &dyn Constraints,
        commands: &mut Vec<Command>,
    ) {
        self.round += 1;
        let reason = if self.policy.mode == Mode::Off {
            Some(NoMoveReason::Off)
        } else if self.peers.is_empty() {
            Some(NoMoveReason::NoPeers)
        } else if self.node_state().is_none() {
            Some(NoMoveReason::InsufficientSamples)
        } else if self.tracked.is_empty() {
            Some(NoMoveReason::NoMachines)
        } else {
            None
        };
        if let Some(why) = reason {
            self.record_no_move(None, why, None, Vec::new(), commands);
            self.schedule_round(now_ms);
            return;
        }
        if let Some(confirmed) = self.take_confirmed(now_ms) {
            let ConfirmedMove {
                machine,
                target,
                until_ms,
            } = confirmed;
            self.offer(target, machine, Err(until_ms), now_ms, commands);
            return;
        }
        let Some(peer) = self.pick_peer(now_ms, constraints) else {
            self.schedule_round(now_ms);
            return;
        };
        if let Some(backoff) = self.peer_backoffs.get(&peer)
            && backoff.until_ms > now_ms
        {
            let for_ms = backoff.until_ms - now_ms;
            let why = NoMoveReason::Backoff { for_ms };
            self.record_no_move(Some(peer), why, None, Vec::new(), commands);
            self.schedule_round(now_ms);
            return;
        }
        self.send_request(&peer, Request::View, commands);
        self.state = State::AwaitingView {
            peer,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    /// A random peer without an outgoing move to it. Under `pack` most nodes are free and get
    /// nothing: known free ones are picked last. Far ones are asked seldom, until near ones could not
    /// help for some rounds.
    fn pick_peer(&mut self, now_ms: u64, constraints: &dyn Constraints) -> Option<Name> {
        let has_helped = self.fruitless_rounds < WAKE_ROUNDS;
        let packs = self.policy.strategy == Strategy::Pack && has_helped;
        let mut later_one = None;
        for _ in 0..PICKS_MAX {
            let number = self.rng.random_range(0..self.peers.len());
            let peer = self.peers.get(number)?;
            if self.outgoing.iter().any(|it| it.peer == *peer) {
                continue;
            }
            let free = packs && self.free_peers.get(peer).is_some_and(|it| *it > now_ms);
            let passed_over = has_helped
                && constraints.link(peer).is_far()
                && self.rng.random_range(0..FAR_EACH) != 0;
            if !free && !passed_over {
                return Some(peer.clone());
            }
            later_one = Some(peer.clone());
        }
        later_one
    }

    fn send_request(&self, peer: &Name, request: Request, commands: &mut Vec<Command>) {
        commands.push(Command::SendRequest {
            round: self.round,
            peer: peer.clone(),
            request,
        });
    }

    /// Ends a round without a move.
    pub(super) fn abandon_round(
        &mut self,
        peer: Name,
        why: NoMoveReason,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        if let State::AwaitingGrant {
            peer,
            machine,
            confirmed_until_ms,
            ..
        } = &self.state
        {
            self.confirmed
                .extend(confirmed_until_ms.map(|until_ms| ConfirmedMove {
                    machine: machine.clone(),
                    target: peer.clone(),
                    until_ms,
                }));
            // The grant may have been lost.
            let release = Request::Release {
                machine: machine.clone(),
            };
            commands.push(Command::SendRequest {
                round: 0,
                peer: peer.clone(),
                request: release,
            });
        }
        self.record_no_move(Some(peer), why, None, Vec::new(), commands);
        self.schedule_round(now_ms);
    }

    /// Records why nothing moves, if the reason differs from the last one for this peer.
    fn record_no_move(
        &mut self,
        peer: Option<Name>,
        why: NoMoveReason,
        there: Option<NodeState>,
        considered: Vec<Considered>,
        commands: &mut Vec<Command>,
    ) {
        let no_help = match &why {
            // (A split will relieve it.)
            NoMoveReason::NoEligibleMachine { verdict, .. } => *verdict != Verdict::Spreads,
            other => matches!(other, NoMoveReason::Level | NoMoveReason::ReservedFree),
        };
        if no_help && self.outgoing.is_empty() {
            self.fruitless_rounds += 1;
        }
        let verdict = match &why {
            NoMoveReason::NoEligibleMachine { verdict, .. } => Some(discriminant(verdict)),
            _ => None,
        };
        let tag = (discriminant(&why), verdict);
        let key = peer.clone().unwrap_or_else(|| "".into());
        if self.last_reasons.len() >= REASONS_MAX && !self.last_reasons.contains_key(&key) {
            self.last_reasons.clear();
        }
        if self.last_reasons.insert(key, tag) == Some(tag) {
            return;
        }
        let decision = Decision::NoMove {
            why,
            peer,
            here: self.node_state(),
            there,
            considered: nearest(considered),
        };
        commands.push(Command::Record(Box::new(decision)));
    }
}

impl Balancer {
    pub(super) fn response_received(
        &mut self,
        response: Option<Response>,
        now_ms: u64,
        constraints: &dyn Constraints,
        commands: &mut Vec<Command>,
    ) {
        let state = std::mem::replace(&mut self.state, State::Idle);
        match (state, response) {
            (State::AwaitingView { peer, .. }, Some(Response::View(view))) => {
                self.view_received(peer, view, now_ms, commands);
            }
            (
                State::AwaitingWeights {
                    peer,
                    view,
                    steady,
                    machines,
                    ..
                },
                Some(Response::Weights(weights)),
            ) => {
                let asked = (view, steady, machines);
                self.weights_received(peer, asked, &weights, now_ms, constraints, commands);
            }
            (
                State::AwaitingGrant {
                    peer,
                    machine,
                    decision,
                    ..
                },
                Some(Response::Granted),
            ) => {
                let link = constraints.link(&peer);
                self.grant_received((peer, link), machine, decision, now_ms, commands);
            }
            (
                State::AwaitingGrant {
                    peer,
                    machine,
                    confirmed_until_ms: Some(until_ms),
                    ..
                },
                response @ (None | Some(Response::Busy)),
            ) => {
                // A confirmed move is retried.
                self.confirmed.push(ConfirmedMove {
                    machine,
                    target: peer.clone(),
                    until_ms,
                });
                let why = response.map_or(NoMoveReason::NoAnswer, |_| NoMoveReason::Busy);
                self.record_no_move(Some(peer), why, None, Vec::new(), commands);
                self.schedule_round(now_ms);
            }
            // A late or duplicated response to an earlier request, possibly of this round.
            (state @ State::Idle, _)
            | (state @ State::AwaitingWeights { .. }, Some(Response::View(_)))
            | (
                state @ State::AwaitingGrant { .. },
                Some(Response::View(_) | Response::Weights(_)),
            ) => {
                self.state = state;
            }
            (
                State::AwaitingView { peer, .. }
                | State::AwaitingWeights { peer, .. }
                | State::AwaitingGrant { peer, .. },
                response,
            ) => {
                let why = match response {
                    None => NoMoveReason::NoAnswer,
                    Some(Response::Busy) => NoMoveReason::Busy,
                    Some(Response::NotReady) => NoMoveReason::InsufficientSamples,
                    Some(Response::Refused { why }) => NoMoveReason::Refused { why },
                    Some(other) => NoMoveReason::Refused {
                        why: format!("it answered something else: {other:?}")
                            .chars()
                            .take(200)
                            .collect(),
                    },
                };
                self.record_no_move(Some(peer), why, None, Vec::new(), commands);
                self.schedule_round(now_ms);
            }
        }
    }

    fn view_received(
        &mut self,
        peer: Name,
        mut view: View,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let errors = view.sanitise();
        if !errors.is_empty() {
            record_invalid_report(commands, &peer, errors);
            self.schedule_round(now_ms);
            return;
        }
        if self.policy.strategy == Strategy::Pack {
            self.free_peers.remove(&peer);
            if self.free_peers.len() >= FREE_MAX {
                self.free_peers.clear();
            }
            if view.state.free {
                let until_ms = now_ms + FREE_ROUNDS * self.policy.interval_ms;
                self.free_peers.insert(peer.clone(), until_ms);
            }
        }
        let (why, steady) = match self.compare(&view) {
            Ok(steady) => (None, steady),
            Err(why) => (Some(why), 0.0),
        };
        if let Some(why) = why {
            self.record_no_move(Some(peer), why, Some(view.state), Vec::new(), commands);
            self.schedule_round(now_ms);
            return;
        }
        let Some(sample) = &self.sample else {
            self.schedule_round(now_ms);
            return;
        };
        let (machines, request) = self.weigh_request_of(sample);
        self.send_request(&peer, request, commands);
        self.state = State::AwaitingWeights {
            peer,
            view,
            steady,
            machines,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    /// The machines to evaluate, heaviest first, and the request.
    fn weigh_request_of(&self, sample: &NodeSample) -> (Vec<Name>, Request) {
        let mut machines: Vec<(Name, f64, Factors)> = sample
            .machines
            .iter()
            .filter_map(|it| {
                let tracked = self.tracked.get(&it.name)?;
                let weight = self.local_weight(&tracked.factors);
                Some((it.name.clone(), weight, tracked.factors))
            })
            .collect();
        machines.sort_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
        machines.truncate(WEIGHED_MAX);
        let request = Request::Weigh {
            capacity: sample.capacity,
            factors: machines.iter().map(|(_, _, factors)| *factors).collect(),
        };
        let names = machines.into_iter().map(|(name, ..)| name);
        (names.collect(), request)
    }

    /// The request whose response explains what would move to a peer; `None` before this node was
    /// measured.
    pub fn weigh_request(&self) -> Option<(Vec<Name>, Request)> {
        Some(self.weigh_request_of(self.sample.as_ref()?))
    }

    /// Simulates a round with a peer, without side effects. `weights` belong to `machines`, as
    /// returned by [`weigh_request`](Self::weigh_request).
    pub fn explain(
        &self,
        peer: &Name,
        mut view: View,
        machines: &[Name],
        weights: &[f64],
        now_ms: u64,
        constraints: &dyn Constraints,
    ) -> Option<Explained> {
        view.sanitise();
        let now_ms = now_ms.saturating_add(self.jumped_back_ms);
        let here = self.node_state()?;
        let no_move = self.compare(&view).err();
        let candidates = self.candidates(peer, machines, weights, now_ms, constraints);
        Some(Explained {
            here,
            there: view.state,
            no_move,
            considered: select(&here, &view.state, &candidates, &self.model, &self.policy),
        })
    }

    fn candidates(
        &self,
        peer: &Name,
        machines: &[Name],
        weights: &[f64],
        now_ms: u64,
        constraints: &dyn Constraints,
    ) -> Vec<Candidate> {
        // Fine-grained balancing decides about a machine that may span, and its decision can only
        // be guessed here: so a machine with a new load is left to it for a short time.
        let is_automatic = self.policy.mode == Mode::Automatic;
        let guessed_ms = GUESSED_SAMPLES * self.policy.sample_ms;
        machines
            .iter()
            .zip(weights)
            .filter_map(|(machine, &there)| {
                let tracked = self.tracked.get(machine)?;
                let lasted_ms = now_ms.saturating_sub(tracked.level_since_ms);
                let is_new = is_automatic && lasted_ms < guessed_ms;
                let spreadable = constraints.spreadable(machine);
                Some(Candidate {
                    machine: machine.clone(),
                    factors: tracked.factors,
                    there,
                    lasted_ms,
                    compile_core_s: constraints.compile_core_s(machine, peer),
                    link: constraints.link(peer),
                    spreadable: spreadable.filter(|it| it.is_decided || is_new),
                    constraint: self.constraint(machine, peer, now_ms, constraints),
                })
            })
            .collect()
    }

    /// The sustained load difference, or the reason why this node does not offer.
    fn compare(&self, view: &View) -> Result<f64, NoMoveReason> {
        let side = self.node_state().ok_or(NoMoveReason::InsufficientSamples)?;
        if view.policy_revision != self.revision {
            return Err(NoMoveReason::OtherPolicy);
        }
        let loads: Vec<f64> = self.window.loads().collect();
        let steady =
            steady_difference(&loads, &view.loads).ok_or(NoMoveReason::InsufficientSamples)?;
        let wakes = self.fruitless_rounds >= WAKE_ROUNDS;
        check_offer(&side, &view.state, (steady, wakes), &self.policy)?;
        if view.busy {
            return Err(NoMoveReason::Busy);
        }
        Ok(steady)
    }

    fn constraint(
        &self,
        machine: &Name,
        peer: &Name,
        now_ms: u64,
        constraints: &dyn Constraints,
    ) -> Option<Constraint> {
        let tracked = self.tracked.get(machine)?;
        let confirmed = self.confirmed.iter().any(|it| it.machine == *machine);
        if confirmed || self.is_outgoing(machine) {
            return Some(Constraint::Moving);
        }
        if let Some(constraint) = constraints.constraint(machine, peer) {
            return Some(constraint);
        }
        if let Some((from, until_ms)) = &tracked.came_from
            && from == peer
            && *until_ms > now_ms
        {
            let for_ms = until_ms - now_ms;
            return Some(Constraint::CoolDown { for_ms });
        }
        if tracked.held_until_ms > now_ms {
            let for_ms = tracked.held_until_ms - now_ms;
            return Some(Constraint::Held { for_ms });
        }
        let failed = self.machine_backoffs.get(machine)?;
        (failed.until_ms > now_ms).then(|| Constraint::Failed {
            for_ms: failed.until_ms - now_ms,
        })
    }

    fn weights_received(
        &mut self,
        peer: Name,
        (view, steady, machines): (View, f64, Vec<Name>),
        weights: &[f64],
        now_ms: u64,
        constraints: &dyn Constraints,
        commands: &mut Vec<Command>,
    ) {
        let believable = |weight: &f64| (0.0..=LOAD_MAX).contains(weight);
        if weights.len() != machines.len() || !weights.iter().all(believable) {
            let field = ValidationError {
                field: "weights".into(),
                found: format!("{} of {} machines", weights.len(), machines.len()),
            };
            record_invalid_report(commands, &peer, vec![field]);
            self.schedule_round(now_ms);
            return;
        }
        // The load may have changed meanwhile.
        let Some(side) = self.node_state() else {
            self.schedule_round(now_ms);
            return;
        };
        let candidates = self.candidates(&peer, &machines, weights, now_ms, constraints);
        let considered = select(&side, &view.state, &candidates, &self.model, &self.policy);
        let first = considered.first().cloned();
        let Some(first) = first else {
            self.record_no_move(
                Some(peer),
                NoMoveReason::NoMachines,
                None,
                Vec::new(),
                commands,
            );
            self.schedule_round(now_ms);
            return;
        };
        if first.verdict != Verdict::Chosen {
            let why = NoMoveReason::NoEligibleMachine {
                nearest: first.machine,
                verdict: first.verdict,
            };
            self.record_no_move(Some(peer), why, Some(view.state), considered, commands);
            self.schedule_round(now_ms);
            return;
        }
        let machine = first.machine;
        let decision = Box::new(Decision::Move {
            machine: machine.clone(),
            target: peer.clone(),
            mode: self.policy.mode,
            here: side,
            there: view.state,
            steady,
            considered: nearest(considered),
        });
        if self.policy.mode == Mode::Automatic {
            self.offer(peer, machine, Ok(decision), now_ms, commands);
            return;
        }
        self.proposed.retain(|_, (_, until_ms)| *until_ms > now_ms);
        let until_ms = now_ms + PROPOSAL_MS;
        let before = self.proposed.insert(machine, (peer.clone(), until_ms));
        if before.is_none_or(|(target, _)| target != peer) {
            commands.push(Command::Record(decision));
        }
        self.schedule_round(now_ms);
    }

    fn offer(
        &mut self,
        peer: Name,
        machine: Name,
        decision: Result<Box<Decision>, u64>,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let (Some(side), Some(tracked)) = (self.node_state(), self.tracked.get(&machine)) else {
            self.schedule_round(now_ms);
            return;
        };
        if self.is_outgoing(&machine) {
            self.schedule_round(now_ms);
            return;
        }
        let request = Request::Reserve {
            machine: machine.clone(),
            capacity: side.capacity,
            factors: tracked.factors,
            load: side.load,
            packs: self.policy.strategy == Strategy::Pack,
        };
        self.send_request(&peer, request, commands);
        let (decision, confirmed_until_ms) = match decision {
            Ok(decision) => (Some(decision), None),
            Err(until_ms) => (None, Some(until_ms)),
        };
        self.state = State::AwaitingGrant {
            peer,
            machine,
            decision,
            confirmed_until_ms,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    fn grant_received(
        &mut self,
        (peer, link): (Name, Link),
        machine: Name,
        decision: Option<Box<Decision>>,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let Some(tracked) = self.tracked.get(&machine) else {
            // The machine ended meanwhile.
            self.state = State::AwaitingGrant {
                peer: peer.clone(),
                machine,
                decision: None,
                confirmed_until_ms: None,
                deadline_ms: now_ms,
            };
            self.abandon_round(peer, NoMoveReason::NoMachines, now_ms, commands);
            return;
        };
        let factors = tracked.factors;
        let here = self.local_weight(&factors);
        self.shift_load(-here);
        self.proposed.remove(&machine);
        self.last_reasons.clear();
        self.fruitless_rounds = 0;
        commands.extend(decision.map(Command::Record));
        commands.push(Command::Move {
            machine: machine.clone(),
            target: peer.clone(),
        });
        self.outgoing.push(OutgoingMove {
            peer,
            machine,
            here,
            factors,
            link,
            left: false,
        });
        // The next round may follow immediately: both sides account for this move.
        self.schedule_round(now_ms);
        self.due_ms = now_ms.max(self.pause_until_ms);
    }

    pub(super) fn move_ended(
        &mut self,
        ended: &Name,
        outcome: Outcome,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let Some(number) = self.outgoing.iter().position(|it| it.machine == *ended) else {
            return;
        };
        let OutgoingMove {
            peer,
            machine,
            here,
            factors,
            link,
            left,
        } = self.outgoing.swap_remove(number);
        if let Outcome::Moved {
            duration_ms,
            downtime_ms,
            ..
        } = outcome
        {
            self.model.learn(&factors, &link, duration_ms, downtime_ms);
            self.peer_backoffs.remove(&peer);
            self.machine_backoffs.remove(&machine);
            self.tracked.remove(&machine);
            if let Some(sample) = &mut self.sample {
                sample.machines.retain(|it| it.name != machine);
            }
            if !left {
                let until_ms = now_ms + SETTLE_SAMPLES * self.policy.sample_ms;
                self.departed.insert(machine.clone(), until_ms);
            }
            self.checks.push(EffectCheck {
                machine,
                target: peer,
                outcome,
                predicted: self.current_load().unwrap_or(0.0),
                samples_left: NEWEST,
            });
            // The target can accept the next machine.
            self.due_ms = self.due_ms.min(now_ms.max(self.pause_until_ms));
            return;
        }
        if !left {
            self.shift_load(here);
        }
        // The same obstacle would stop the next move: no immediate round.
        self.pause_until_ms = now_ms + self.policy.interval_ms;
        if matches!(outcome, Outcome::Stayed { .. }) {
            extend_backoff(&mut self.peer_backoffs, &peer, now_ms);
            extend_backoff(&mut self.machine_backoffs, &machine, now_ms);
        }
        commands.push(Command::SendRequest {
            round: 0,
            peer: peer.clone(),
            request: Request::Release {
                machine: machine.clone(),
            },
        });
        commands.push(Command::Record(Box::new(Decision::Ended {
            machine,
            target: peer,
            outcome,
            load: None,
        })));
        if matches!(self.state, State::Idle) {
            self.schedule_round(now_ms);
        }
    }

    pub(super) fn confirmed(&mut self, machine: &Name, now_ms: u64) {
        let Some((target, until_ms)) = self.proposed.remove(machine) else {
            return;
        };
        if until_ms > now_ms {
            self.confirmed.push(ConfirmedMove {
                machine: machine.clone(),
                target,
                until_ms: now_ms + PROPOSAL_MS,
            });
            if matches!(self.state, State::Idle) {
                self.due_ms = now_ms;
            }
        }
    }

    /// A confirmed move that can start now: its target has no other incoming move of this node.
    fn take_confirmed(&mut self, now_ms: u64) -> Option<ConfirmedMove> {
        self.confirmed.retain(|it| it.until_ms > now_ms);
        let outgoing = &self.outgoing;
        let number = self
            .confirmed
            .iter()
            .position(|it| !outgoing.iter().any(|other| other.peer == it.target))?;
        Some(self.confirmed.remove(number))
    }

    /// Proposed moves that await confirmation, with their targets.
    pub fn proposals(&self, now_ms: u64) -> Vec<(Name, Name)> {
        let now_ms = now_ms.saturating_add(self.jumped_back_ms);
        let live = self.proposed.iter();
        let mut live: Vec<(Name, Name)> = live
            .filter(|(_, (_, until_ms))| *until_ms > now_ms)
            .map(|(machine, (target, _))| (machine.clone(), target.clone()))
            .collect();
        live.sort();
        live
    }

    /// Alert text if this node has been pressed for long and no peer could relieve it; at most once
    /// per hour.
    pub(super) fn alert(&mut self, now_ms: u64) -> Option<String> {
        let since = self.pressed_since_ms?;
        let asked = self.peers.len().clamp(1, 16);
        let lasts = now_ms.saturating_sub(since) >= ALERT_AFTER_MS;
        let told = self
            .alerted_ms
            .is_some_and(|at| now_ms < at + ALERT_AGAIN_MS);
        if told || !lasts || self.fruitless_rounds < 3 * asked {
            return None;
        }
        self.alerted_ms = Some(now_ms);
        let side = self.node_state()?;
        Some(format!(
            "this node has been pressed for {} s (load {:.2}) and no move would help: the cluster \
             needs more nodes, fewer machines or lower limits (`keel why MACHINE`)",
            now_ms.saturating_sub(since) / 1000,
            side.load
        ))
    }
}

fn extend_backoff(backoff: &mut HashMap<Name, Backoff>, who: &Name, now_ms: u64) {
    let entry = backoff.entry(who.clone()).or_insert(Backoff {
        until_ms: 0,
        failures: 0,
    });
    let doublings = entry.failures.min(BACKOFF_DOUBLINGS_MAX);
    entry.until_ms = now_ms + (BACKOFF_MS << doublings);
    entry.failures += 1;
}

fn nearest(mut considered: Vec<Considered>) -> Vec<Considered> {
    considered.truncate(CONSIDERED_MAX);
    considered
}
