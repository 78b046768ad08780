//! Constraints of a balancing round: rules, machines that opted out, spanning machines, and the
//! cost of compiling a program at a target. Read from local caches, never by a request.

use super::links::Links;
use super::spreading::Spreading;
use crate::compilation::Code;
use crate::records::{Needs, Placements};
use crate::rules::RuleSnapshot;
use keel_balance::Name;
use keel_balance::cost::Link;
use keel_balance::round::Constraints;
use keel_balance::rules::Violation;
use keel_balance::select::{Constraint, Spreadable};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Rules, nodes and machines of one instant, as rounds see them.
pub(super) struct Snapshot {
    rules: RuleSnapshot,
    opted_out: BTreeSet<Name>,
    /// Machines of this node with parts elsewhere.
    spanning: BTreeSet<Name>,
    /// Machines that may get parts.
    spreadable: BTreeMap<Name, Spreadable>,
    /// Minute of the day, UTC.
    minute: u32,
    code: Arc<Code>,
    links: Links,
}

impl Snapshot {
    pub(super) fn new(
        rules: RuleSnapshot,
        placements: &Placements,
        (spanning, spreading): (BTreeSet<Name>, &Spreading),
        (code, links): (Arc<Code>, Links),
        now_unix_ms: u64,
    ) -> Self {
        let mut spreadable = placements.spreadable();
        spreadable.retain(|machine, it| {
            it.is_decided = spreading.contains(machine);
            !spanning.contains(machine)
        });
        Snapshot {
            rules,
            opted_out: placements.opted_out(),
            spanning,
            spreadable,
            minute: (now_unix_ms / 60_000 % 1440) as u32,
            code,
            links,
        }
    }

    /// Nodes that are alive.
    pub(super) fn nodes(&self) -> &[Name] {
        self.rules.nodes()
    }

    /// Machines of a node that violate a rule there.
    pub(super) fn broken_on(&self, node: &str) -> Vec<(Name, Violation)> {
        self.rules.broken_on(node)
    }

    /// That a node's host cannot run a machine, if that is known.
    pub(super) fn host_forbids(&self, needs: &Needs, node: &str) -> Option<Violation> {
        self.rules.host_forbids(needs, node)
    }

    /// The rule that forbids a machine on a node.
    pub(super) fn forbids(&self, machine: &Name, target: &Name) -> Option<Violation> {
        self.rules.forbids(machine, target)
    }
}

impl Constraints for Snapshot {
    fn constraint(&self, machine: &Name, target: &Name) -> Option<Constraint> {
        if self.opted_out.contains(machine) {
            return Some(Constraint::OptedOut);
        }
        if self.spanning.contains(machine) {
            return Some(Constraint::Spans);
        }
        if self.rules.is_empty() {
            return None;
        }
        let forbidden = self
            .rules
            .forbids_moving(machine, self.minute)
            .or_else(|| self.forbids(machine, target));
        forbidden.map(|broken| Constraint::Rule {
            rule: broken.rule,
            reason: broken.why,
        })
    }

    fn spreadable(&self, machine: &Name) -> Option<Spreadable> {
        self.spreadable.get(machine).copied()
    }

    fn compile_core_s(&self, machine: &Name, target: &Name) -> f64 {
        self.code.compile_core_s(machine, target)
    }

    fn link(&self, peer: &Name) -> Link {
        self.links.to(peer, &self.rules)
    }
}
