//! This node's own rounds: whom it asks, what it offers, and what became of it.

use super::messages::{Answer, Question, View};
use super::{
    Avoided, Balancer, Bounds, Check, Command, Confirmed, Explained, Leaving, SETTLE_SAMPLES,
    State, WEIGHED_MAX, offers, tracked_absurd,
};
use crate::Name;
use crate::ledger::{Decision, Outcome, Stay};
use crate::load::{Absurd, Factors, LOAD_MAX, NodeSample};
use crate::policy::{Mode, Strategy};
use crate::select::{Bound, CONSIDERED_MAX, Candidate, Considered, Side, Verdict, select};
use crate::window::{NEWEST, steady_difference};
use rand::RngExt;
use std::collections::HashMap;
use std::mem::discriminant;

/// Samples of a load that is what it is for which a machine is left to those that may give
/// it parts: they look for five, and act in the next, or later on a busy node.
const GUESSED_SAMPLES: u64 = 20;
/// Milliseconds that an answer may take.
const ANSWER_MS: u64 = 2_000;
/// Milliseconds for which a node, or a machine, is left alone after a failed move;
/// doubled by each further failure, so often at most.
const AVOID_MS: u64 = 15_000;
const AVOID_DOUBLINGS_MAX: u32 = 5;
/// Milliseconds for which a proposed move can be confirmed.
const PROPOSAL_MS: u64 = 300_000;
/// Milliseconds for which a node is pressed, and nothing can be done, before that is
/// an alert.
const HELPLESS_MS: u64 = 60_000;
/// Milliseconds after which it is told again that balancing does not help, where loads go
/// up and down around what presses.
const ALERT_AGAIN_MS: u64 = 3_600_000;
/// Rounds in a row in which a pressed node found no target before `pack` lets it use a
/// free one.
const WAKE_ROUNDS: usize = 6;
/// Rounds for which a node is not asked again that was free when it was asked, since
/// `pack` gives it nothing; and how often another one is picked instead.
const FREE_ROUNDS: u64 = 60;
const PICKS_MAX: usize = 16;
/// Most free nodes that are remembered.
const FREE_MAX: usize = 4096;
/// Most reasons that are remembered, one for each other node.
const STAYS_MAX: usize = 128;

impl Balancer {
    fn rest(&mut self, now_ms: u64) {
        self.state = State::Resting;
        let interval = self.policy.interval_ms;
        let jittered = self
            .rng
            .random_range(interval / 2..=interval + interval / 2);
        self.due_ms = now_ms + jittered;
    }

    pub(super) fn begin(&mut self, now_ms: u64, commands: &mut Vec<Command>) {
        self.round += 1;
        let reason = if self.policy.mode == Mode::Off {
            Some(Stay::Off)
        } else if self.peers.is_empty() {
            Some(Stay::Alone)
        } else if self.side().is_none() {
            Some(Stay::Measuring)
        } else if self.known.is_empty() {
            Some(Stay::NoMachines)
        } else {
            None
        };
        if let Some(why) = reason {
            self.stay(None, why, None, Vec::new(), commands);
            self.rest(now_ms);
            return;
        }
        if let Some(confirmed) = self.take_confirmed(now_ms) {
            let Confirmed {
                machine,
                target,
                until_ms,
            } = confirmed;
            self.offer(target, machine, Err(until_ms), now_ms, commands);
            return;
        }
        let Some(peer) = self.pick(now_ms) else {
            self.rest(now_ms);
            return;
        };
        if let Some(avoided) = self.avoided_peers.get(&peer)
            && avoided.until_ms > now_ms
        {
            let for_ms = avoided.until_ms - now_ms;
            let why = Stay::Avoided { for_ms };
            self.stay(Some(peer), why, None, Vec::new(), commands);
            self.rest(now_ms);
            return;
        }
        self.ask(&peer, Question::View, commands);
        self.state = State::Asking {
            peer,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    /// One of the others, by chance, to which nothing goes just now. Where machines are
    /// packed most are free and are given nothing: of those it knows it picks another
    /// one.
    fn pick(&mut self, now_ms: u64) -> Option<Name> {
        let packs = self.policy.strategy == Strategy::Pack && self.helpless < WAKE_ROUNDS;
        let mut free_one = None;
        for _ in 0..PICKS_MAX {
            let number = self.rng.random_range(0..self.peers.len());
            let peer = self.peers.get(number)?;
            if self.leaving.iter().any(|it| it.peer == *peer) {
                continue;
            }
            let free = packs && self.free_peers.get(peer).is_some_and(|it| *it > now_ms);
            if !free {
                return Some(peer.clone());
            }
            free_one = Some(peer.clone());
        }
        free_one
    }

    fn ask(&self, peer: &Name, question: Question, commands: &mut Vec<Command>) {
        commands.push(Command::Ask {
            round: self.round,
            peer: peer.clone(),
            question,
        });
    }

    /// Ends a round without a move.
    pub(super) fn give_up(
        &mut self,
        peer: Name,
        why: Stay,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        if let State::Offering {
            peer,
            machine,
            confirmed_until_ms,
            ..
        } = &self.state
        {
            self.confirmed
                .extend(confirmed_until_ms.map(|until_ms| Confirmed {
                    machine: machine.clone(),
                    target: peer.clone(),
                    until_ms,
                }));
            // It may have granted, and its answer be lost.
            let release = Question::Release {
                machine: machine.clone(),
            };
            commands.push(Command::Ask {
                round: 0,
                peer: peer.clone(),
                question: release,
            });
        }
        self.stay(Some(peer), why, None, Vec::new(), commands);
        self.rest(now_ms);
    }

    /// Records why nothing moves, when that is another reason than the last one.
    fn stay(
        &mut self,
        peer: Option<Name>,
        why: Stay,
        there: Option<Side>,
        considered: Vec<Considered>,
        commands: &mut Vec<Command>,
    ) {
        let no_help = match &why {
            // (That will be.)
            Stay::NoneMayGo { verdict, .. } => *verdict != Verdict::Spreads,
            other => matches!(other, Stay::Level | Stay::KeptFree),
        };
        if no_help && self.leaving.is_empty() {
            self.helpless += 1;
        }
        let verdict = match &why {
            Stay::NoneMayGo { verdict, .. } => Some(discriminant(verdict)),
            _ => None,
        };
        let tag = (discriminant(&why), verdict);
        let key = peer.clone().unwrap_or_else(|| "".into());
        if self.stays.len() >= STAYS_MAX && !self.stays.contains_key(&key) {
            self.stays.clear();
        }
        if self.stays.insert(key, tag) == Some(tag) {
            return;
        }
        let decision = Decision::Stay {
            why,
            peer,
            here: self.side(),
            there,
            considered: nearest(considered),
        };
        commands.push(Command::Record(Box::new(decision)));
    }
}

impl Balancer {
    pub(super) fn answered(
        &mut self,
        answer: Option<Answer>,
        now_ms: u64,
        bounds: &dyn Bounds,
        commands: &mut Vec<Command>,
    ) {
        let state = std::mem::replace(&mut self.state, State::Resting);
        match (state, answer) {
            (State::Asking { peer, .. }, Some(Answer::View(view))) => {
                self.seen(peer, view, now_ms, commands);
            }
            (
                State::Weighing {
                    peer,
                    view,
                    steady,
                    machines,
                    ..
                },
                Some(Answer::Weights(weights)),
            ) => {
                let asked = (view, steady, machines);
                self.weighed(peer, asked, &weights, now_ms, bounds, commands);
            }
            (
                State::Offering {
                    peer,
                    machine,
                    decision,
                    ..
                },
                Some(Answer::Granted),
            ) => self.granted(peer, machine, decision, now_ms, commands),
            (
                State::Offering {
                    peer,
                    machine,
                    confirmed_until_ms: Some(until_ms),
                    ..
                },
                answer @ (None | Some(Answer::Busy)),
            ) => {
                // What a person confirmed is tried again.
                self.confirmed.push(Confirmed {
                    machine,
                    target: peer.clone(),
                    until_ms,
                });
                let why = answer.map_or(Stay::NoAnswer, |_| Stay::Busy);
                self.stay(Some(peer), why, None, Vec::new(), commands);
                self.rest(now_ms);
            }
            // A late or doubled answer to what was asked before, in this round too.
            (state @ State::Resting, _)
            | (state @ State::Weighing { .. }, Some(Answer::View(_)))
            | (state @ State::Offering { .. }, Some(Answer::View(_) | Answer::Weights(_))) => {
                self.state = state;
            }
            (
                State::Asking { peer, .. }
                | State::Weighing { peer, .. }
                | State::Offering { peer, .. },
                answer,
            ) => {
                let why = match answer {
                    None => Stay::NoAnswer,
                    Some(Answer::Busy) => Stay::Busy,
                    Some(Answer::Measuring) => Stay::Measuring,
                    Some(Answer::Refused { why }) => Stay::Refused { why },
                    Some(other) => Stay::Refused {
                        why: format!("it answered something else: {other:?}")
                            .chars()
                            .take(200)
                            .collect(),
                    },
                };
                self.stay(Some(peer), why, None, Vec::new(), commands);
                self.rest(now_ms);
            }
        }
    }

    fn seen(&mut self, peer: Name, mut view: View, now_ms: u64, commands: &mut Vec<Command>) {
        let absurd = view.sanitise();
        if !absurd.is_empty() {
            tracked_absurd(commands, &peer, absurd);
            self.rest(now_ms);
            return;
        }
        if self.policy.strategy == Strategy::Pack {
            self.free_peers.remove(&peer);
            if self.free_peers.len() >= FREE_MAX {
                self.free_peers.clear();
            }
            if view.side.free {
                let until_ms = now_ms + FREE_ROUNDS * self.policy.interval_ms;
                self.free_peers.insert(peer.clone(), until_ms);
            }
        }
        let (why, steady) = match self.compare(&view) {
            Ok(steady) => (None, steady),
            Err(why) => (Some(why), 0.0),
        };
        if let Some(why) = why {
            self.stay(Some(peer), why, Some(view.side), Vec::new(), commands);
            self.rest(now_ms);
            return;
        }
        let Some(sample) = &self.sample else {
            self.rest(now_ms);
            return;
        };
        let (machines, question) = self.weigh_question(sample);
        self.ask(&peer, question, commands);
        self.state = State::Weighing {
            peer,
            view,
            steady,
            machines,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    /// Which machines are to be weighed, the heaviest first, and the question.
    fn weigh_question(&self, sample: &NodeSample) -> (Vec<Name>, Question) {
        let mut machines: Vec<(Name, f64, Factors)> = sample
            .machines
            .iter()
            .filter_map(|it| {
                let known = self.known.get(&it.name)?;
                let weight = self.weigh_here(&known.factors);
                Some((it.name.clone(), weight, known.factors))
            })
            .collect();
        machines.sort_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
        machines.truncate(WEIGHED_MAX);
        let question = Question::Weigh {
            capacity: sample.capacity,
            factors: machines.iter().map(|(_, _, factors)| *factors).collect(),
        };
        let names = machines.into_iter().map(|(name, ..)| name);
        (names.collect(), question)
    }

    /// What to ask another node to explain what would go there; `None` before this one
    /// was measured.
    pub fn question(&self) -> Option<(Vec<Name>, Question)> {
        Some(self.weigh_question(self.sample.as_ref()?))
    }

    /// What a round with another node would come to now, and why; nothing is changed.
    /// `weights` are of `machines`, as [`question`](Self::question) named them.
    pub fn explain(
        &self,
        peer: &Name,
        mut view: View,
        machines: &[Name],
        weights: &[f64],
        now_ms: u64,
        bounds: &dyn Bounds,
    ) -> Option<Explained> {
        view.sanitise();
        let now_ms = now_ms.saturating_add(self.jumped_back_ms);
        let here = self.side()?;
        let stay = self.compare(&view).err();
        let candidates = self.candidates(peer, machines, weights, now_ms, bounds);
        Some(Explained {
            here,
            there: view.side,
            stay,
            considered: select(&here, &view.side, &candidates, &self.model, &self.policy),
        })
    }

    fn candidates(
        &self,
        peer: &Name,
        machines: &[Name],
        weights: &[f64],
        now_ms: u64,
        bounds: &dyn Bounds,
    ) -> Vec<Candidate> {
        // Grains decide of a machine that may have parts, and it is guessed here what they
        // will: so it is left to them for a moment, until they have seen what it does.
        let is_automatic = self.policy.mode == Mode::Automatic;
        let guessed_ms = GUESSED_SAMPLES * self.policy.sample_ms;
        machines
            .iter()
            .zip(weights)
            .filter_map(|(machine, &there)| {
                let known = self.known.get(machine)?;
                let lasted_ms = now_ms.saturating_sub(known.level_since_ms);
                let is_new = is_automatic && lasted_ms < guessed_ms;
                let spreadable = bounds.spreadable(machine);
                Some(Candidate {
                    machine: machine.clone(),
                    factors: known.factors,
                    there,
                    lasted_ms,
                    compile_core_s: bounds.compile_core_s(machine, peer),
                    spreadable: spreadable.filter(|it| it.is_decided || is_new),
                    bound: self.bound(machine, peer, now_ms, bounds),
                })
            })
            .collect()
    }

    /// By how much this node is steadily heavier; why it does not offer.
    fn compare(&self, view: &View) -> Result<f64, Stay> {
        let side = self.side().ok_or(Stay::Measuring)?;
        if view.policy_revision != self.revision {
            return Err(Stay::OtherPolicy);
        }
        let loads: Vec<f64> = self.window.loads().collect();
        let steady = steady_difference(&loads, &view.loads).ok_or(Stay::Measuring)?;
        let wakes = self.helpless >= WAKE_ROUNDS;
        offers(&side, &view.side, (steady, wakes), &self.policy)?;
        if view.busy {
            return Err(Stay::Busy);
        }
        Ok(steady)
    }

    fn bound(
        &self,
        machine: &Name,
        peer: &Name,
        now_ms: u64,
        bounds: &dyn Bounds,
    ) -> Option<Bound> {
        let known = self.known.get(machine)?;
        let confirmed = self.confirmed.iter().any(|it| it.machine == *machine);
        if confirmed || self.is_leaving(machine) {
            return Some(Bound::Moving);
        }
        if let Some(bound) = bounds.bound(machine, peer) {
            return Some(bound);
        }
        if let Some((from, until_ms)) = &known.came_from
            && from == peer
            && *until_ms > now_ms
        {
            let for_ms = until_ms - now_ms;
            return Some(Bound::CoolDown { for_ms });
        }
        if known.held_until_ms > now_ms {
            let for_ms = known.held_until_ms - now_ms;
            return Some(Bound::Held { for_ms });
        }
        let failed = self.avoided_machines.get(machine)?;
        (failed.until_ms > now_ms).then(|| Bound::Failed {
            for_ms: failed.until_ms - now_ms,
        })
    }

    fn weighed(
        &mut self,
        peer: Name,
        (view, steady, machines): (View, f64, Vec<Name>),
        weights: &[f64],
        now_ms: u64,
        bounds: &dyn Bounds,
        commands: &mut Vec<Command>,
    ) {
        let believable = |weight: &f64| (0.0..=LOAD_MAX).contains(weight);
        if weights.len() != machines.len() || !weights.iter().all(believable) {
            let field = Absurd {
                field: "weights".into(),
                found: format!("{} of {} machines", weights.len(), machines.len()),
            };
            tracked_absurd(commands, &peer, vec![field]);
            self.rest(now_ms);
            return;
        }
        // The load may be another one by now.
        let Some(side) = self.side() else {
            self.rest(now_ms);
            return;
        };
        let candidates = self.candidates(&peer, &machines, weights, now_ms, bounds);
        let considered = select(&side, &view.side, &candidates, &self.model, &self.policy);
        let first = considered.first().cloned();
        let Some(first) = first else {
            self.stay(Some(peer), Stay::NoMachines, None, Vec::new(), commands);
            self.rest(now_ms);
            return;
        };
        if first.verdict != Verdict::Chosen {
            let why = Stay::NoneMayGo {
                nearest: first.machine,
                verdict: first.verdict,
            };
            self.stay(Some(peer), why, Some(view.side), considered, commands);
            self.rest(now_ms);
            return;
        }
        let machine = first.machine;
        let decision = Box::new(Decision::Move {
            machine: machine.clone(),
            target: peer.clone(),
            mode: self.policy.mode,
            here: side,
            there: view.side,
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
        self.rest(now_ms);
    }

    fn offer(
        &mut self,
        peer: Name,
        machine: Name,
        decision: Result<Box<Decision>, u64>,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let (Some(side), Some(known)) = (self.side(), self.known.get(&machine)) else {
            self.rest(now_ms);
            return;
        };
        if self.is_leaving(&machine) {
            self.rest(now_ms);
            return;
        }
        let question = Question::Take {
            machine: machine.clone(),
            capacity: side.capacity,
            factors: known.factors,
            load: side.load,
            packs: self.policy.strategy == Strategy::Pack,
        };
        self.ask(&peer, question, commands);
        let (decision, confirmed_until_ms) = match decision {
            Ok(decision) => (Some(decision), None),
            Err(until_ms) => (None, Some(until_ms)),
        };
        self.state = State::Offering {
            peer,
            machine,
            decision,
            confirmed_until_ms,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    fn granted(
        &mut self,
        peer: Name,
        machine: Name,
        decision: Option<Box<Decision>>,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let Some(known) = self.known.get(&machine) else {
            // It ended in between.
            self.state = State::Offering {
                peer: peer.clone(),
                machine,
                decision: None,
                confirmed_until_ms: None,
                deadline_ms: now_ms,
            };
            self.give_up(peer, Stay::NoMachines, now_ms, commands);
            return;
        };
        let factors = known.factors;
        let here = self.weigh_here(&factors);
        self.shift(-here);
        self.proposed.remove(&machine);
        self.stays.clear();
        self.helpless = 0;
        commands.extend(decision.map(Command::Record));
        commands.push(Command::Move {
            machine: machine.clone(),
            target: peer.clone(),
        });
        self.leaving.push(Leaving {
            peer,
            machine,
            here,
            factors,
            left: false,
        });
        // The next one at once: both sides know what this one changes.
        self.rest(now_ms);
        self.due_ms = now_ms.max(self.pause_until_ms);
    }

    pub(super) fn move_ended(
        &mut self,
        ended: &Name,
        outcome: Outcome,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let Some(number) = self.leaving.iter().position(|it| it.machine == *ended) else {
            return;
        };
        let Leaving {
            peer,
            machine,
            here,
            factors,
            left,
        } = self.leaving.swap_remove(number);
        if let Outcome::Moved {
            duration_ms,
            downtime_ms,
            ..
        } = outcome
        {
            self.model.learn(&factors, duration_ms, downtime_ms);
            self.avoided_peers.remove(&peer);
            self.avoided_machines.remove(&machine);
            self.known.remove(&machine);
            if let Some(sample) = &mut self.sample {
                sample.machines.retain(|it| it.name != machine);
            }
            if !left {
                let until_ms = now_ms + SETTLE_SAMPLES * self.policy.sample_ms;
                self.gone.insert(machine.clone(), until_ms);
            }
            self.checks.push(Check {
                machine,
                target: peer,
                outcome,
                predicted: self.load_now().unwrap_or(0.0),
                samples_left: NEWEST,
            });
            // It takes the next one now.
            self.due_ms = self.due_ms.min(now_ms.max(self.pause_until_ms));
            return;
        }
        if !left {
            self.shift(here);
        }
        // What stopped this one would stop the next: no round follows at once.
        self.pause_until_ms = now_ms + self.policy.interval_ms;
        if matches!(outcome, Outcome::Stayed { .. }) {
            avoid(&mut self.avoided_peers, &peer, now_ms);
            avoid(&mut self.avoided_machines, &machine, now_ms);
        }
        commands.push(Command::Ask {
            round: 0,
            peer: peer.clone(),
            question: Question::Release {
                machine: machine.clone(),
            },
        });
        commands.push(Command::Record(Box::new(Decision::Ended {
            machine,
            target: peer,
            outcome,
            load: None,
        })));
        if matches!(self.state, State::Resting) {
            self.rest(now_ms);
        }
    }

    pub(super) fn confirmed(&mut self, machine: &Name, now_ms: u64) {
        let Some((target, until_ms)) = self.proposed.remove(machine) else {
            return;
        };
        if until_ms > now_ms {
            self.confirmed.push(Confirmed {
                machine: machine.clone(),
                target,
                until_ms: now_ms + PROPOSAL_MS,
            });
            if matches!(self.state, State::Resting) {
                self.due_ms = now_ms;
            }
        }
    }

    /// A move that a person confirmed and that can begin now: to a node to which
    /// nothing else goes.
    fn take_confirmed(&mut self, now_ms: u64) -> Option<Confirmed> {
        self.confirmed.retain(|it| it.until_ms > now_ms);
        let leaving = &self.leaving;
        let number = self
            .confirmed
            .iter()
            .position(|it| !leaving.iter().any(|other| other.peer == it.target))?;
        Some(self.confirmed.remove(number))
    }

    /// Moves that wait for a person, with their targets.
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

    /// That this node, pressed for long, found nothing to do with anybody, at most once an hour.
    pub(super) fn alert(&mut self, now_ms: u64) -> Option<String> {
        let since = self.pressed_since_ms?;
        let asked = self.peers.len().clamp(1, 16);
        let lasts = now_ms.saturating_sub(since) >= HELPLESS_MS;
        let told = self
            .alerted_ms
            .is_some_and(|at| now_ms < at + ALERT_AGAIN_MS);
        if told || !lasts || self.helpless < 3 * asked {
            return None;
        }
        self.alerted_ms = Some(now_ms);
        let side = self.side()?;
        Some(format!(
            "this node has been pressed for {} s (load {:.2}) and no move would help: the cluster \
             needs more nodes, fewer machines or lower limits (`keel why MACHINE`)",
            now_ms.saturating_sub(since) / 1000,
            side.load
        ))
    }
}

fn avoid(avoided: &mut HashMap<Name, Avoided>, who: &Name, now_ms: u64) {
    let entry = avoided.entry(who.clone()).or_insert(Avoided {
        until_ms: 0,
        failures: 0,
    });
    let doublings = entry.failures.min(AVOID_DOUBLINGS_MAX);
    entry.until_ms = now_ms + (AVOID_MS << doublings);
    entry.failures += 1;
}

fn nearest(mut considered: Vec<Considered>) -> Vec<Considered> {
    considered.truncate(CONSIDERED_MAX);
    considered
}
