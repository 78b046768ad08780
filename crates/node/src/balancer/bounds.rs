//! Rules as rounds see them: from what was followed, never by asking. The transaction
//! of the move itself decides; this keeps what it would refuse from being tried, and
//! finds machines that break a rule where they are.

use super::grains::Spreading;
use super::placements::Placements;
use crate::code::Code;
use crate::rules::{Book, Drain};
use keel_balance::Name;
use keel_balance::round::Constraints;
use keel_balance::rules::{
    Holders, Subject, Violation, domains_of, forbidden, holders_of, violations_of,
};
use keel_balance::select::{Constraint, Spreadable};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// The rules, followed.
#[derive(Debug, Clone, Default)]
pub(super) struct Followed(Arc<Mutex<Book>>);

impl Followed {
    pub(super) fn change(&self, change: impl FnOnce(&mut Book)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn book(&self) -> Book {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether a node is being emptied, and until when.
    pub(super) fn drain_of(&self, node: &str) -> Option<Drain> {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        book.drains.get(node).cloned()
    }
}

/// Holders and domains of all rules.
struct Held {
    holders: BTreeMap<Name, Holders>,
    domains: BTreeMap<Name, BTreeSet<String>>,
}

/// Rules, nodes and machines of one instant.
pub(super) struct Snapshot {
    book: Book,
    alive: Vec<Name>,
    opted_out: BTreeSet<Name>,
    /// Machines of this node with parts elsewhere.
    spanning: BTreeSet<Name>,
    /// Machines that may get parts.
    spreadable: BTreeMap<Name, Spreadable>,
    placed: Vec<(Subject, Name)>,
    nodes: Vec<Subject>,
    /// Minute of the day, UTC.
    minute: u32,
    code: Arc<Code>,
    held: OnceCell<Held>,
}

impl Snapshot {
    pub(super) fn new(
        followed: &Followed,
        placements: &Placements,
        nodes: &[Name],
        (spanning, spreading): (BTreeSet<Name>, &Spreading),
        code: Arc<Code>,
        now_unix_ms: u64,
    ) -> Self {
        let book = followed.book();
        let alive = nodes.to_vec();
        // Where there are no rules nothing needs to be known.
        let (placed, nodes) = if book.rules.is_empty() {
            (Vec::new(), Vec::new())
        } else {
            let placed = placements.live().into_iter();
            (
                placed
                    .map(|(machine, node)| (book.machine(&machine), node))
                    .collect(),
                nodes.iter().map(|node| book.node(node)).collect(),
            )
        };
        let mut spreadable = placements.spreadable();
        spreadable.retain(|machine, it| {
            it.is_decided = spreading.contains(machine);
            !spanning.contains(machine)
        });
        Snapshot {
            book,
            alive,
            opted_out: placements.opted_out(),
            spanning,
            spreadable,
            placed,
            nodes,
            minute: (now_unix_ms / 60_000 % 1440) as u32,
            code,
            held: OnceCell::new(),
        }
    }

    /// Nodes that are alive.
    pub(super) fn nodes(&self) -> &[Name] {
        &self.alive
    }

    /// Machines of a node that break a rule where they are.
    pub(super) fn broken_on(&self, node: &str) -> Vec<(Name, Violation)> {
        if self.book.rules.is_empty() {
            return Vec::new();
        }
        let here = |machine: &Name| {
            let mut placed = self.placed.iter();
            placed.any(|(it, at)| it.name == *machine && **at == *node)
        };
        let mut broken = violations_of(&self.book.rules, &self.placed, &self.nodes);
        broken.retain(|(machine, _)| here(machine));
        broken
    }

    /// The rule that does not allow a machine on a node.
    pub(super) fn forbids(&self, machine: &Name, target: &Name) -> Option<Violation> {
        if self.book.drains.contains_key(target) {
            return Some(Violation {
                rule: "drain".into(),
                why: format!("{target} is being drained"),
            });
        }
        let thing = self.book.machine(machine);
        let node = self.book.node(target);
        if !self.book.rules.iter().any(|it| it.applies_to(&thing)) {
            return None;
        }
        let held = self.held.get_or_init(|| {
            let rules = &self.book.rules;
            Held {
                holders: holders_of(rules, &self.placed, &self.nodes),
                domains: domains_of(rules, &self.nodes),
            }
        });
        let (holders, domains) = (&held.holders, &held.domains);
        forbidden(&self.book.rules, &thing, &node, holders, domains)
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
        if self.book.rules.is_empty() && self.book.drains.is_empty() {
            return None;
        }
        let thing = self.book.machine(machine);
        let mut rules = self.book.rules.iter();
        let forbidden = rules
            .find_map(|rule| rule.forbids_moving(&thing, self.minute))
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
}
