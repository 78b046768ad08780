//! The rules, drains and labels, and what hosts execute and offer: a watch on the store. The
//! transaction of a move decides; the cache avoids attempts that it would refuse, and finds machines
//! that violate a rule.

use super::rule_set::{Drain, RuleSet};
use crate::context::Context;
use crate::records::{AliveNodes, Needs, Placements};
use keel_balance::Name;
use keel_balance::rules::{
    Holders, Rule, Subject, Violation, domains_of, forbidden, holders_of, violations_of,
};
use keel_machine::kind::{Features, KindName};
use keel_store::Change;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Pause before the watch is restarted.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// The rules, followed.
pub(crate) struct RuleCache {
    context: Arc<Context>,
    set: Mutex<RuleSet>,
    /// A drain began, changed or ended.
    drains: Notify,
    placements: Arc<Placements>,
    alive: Arc<AliveNodes>,
}

impl RuleCache {
    pub(super) fn new(
        context: Arc<Context>,
        placements: Arc<Placements>,
        alive: Arc<AliveNodes>,
    ) -> Self {
        RuleCache {
            context,
            set: Mutex::default(),
            drains: Notify::new(),
            placements,
            alive,
        }
    }

    fn locked(&self) -> MutexGuard<'_, RuleSet> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that was seen.
    pub(crate) fn set(&self) -> RuleSet {
        self.locked().clone()
    }

    /// The drain of a node, with its deadline, if it has one.
    pub(crate) fn drain_of(&self, node: &str) -> Option<Drain> {
        self.locked().drains.get(node).cloned()
    }

    /// Waits until a drain has begun, changed or ended since the last call; for one caller.
    pub(crate) async fn drains_changed(&self) {
        self.drains.notified().await;
    }

    /// Rules, this node and those that are alive, and machines of this instant.
    pub(crate) fn snapshot(&self) -> RuleSnapshot {
        let here = Name::from(self.context.name.as_str());
        let mut nodes: Vec<Name> = vec![here];
        let alive = self.alive.now();
        let others = alive.iter().filter(|node| **node != self.context.name);
        nodes.extend(others.map(|node| Name::from(node.as_str())));
        self.snapshot_of(nodes)
    }

    /// The same with the given nodes.
    pub(crate) fn snapshot_of(&self, nodes: Vec<Name>) -> RuleSnapshot {
        RuleSnapshot::new(self.set(), self.placements.clone(), nodes)
    }

    /// Why rules or drains forbid a machine on a node, if they do.
    pub(crate) fn forbids(&self, machine: &str, node: &str) -> Option<String> {
        let forbidden = self.snapshot().forbids(&machine.into(), &node.into());
        forbidden.map(|broken| broken.why)
    }

    /// That a node's host cannot run a machine, if that is known.
    pub(crate) fn host_forbids(&self, needs: &Needs, node: &str) -> Option<String> {
        let forbidden = self.locked().hosts.forbids(needs, node);
        forbidden.map(|broken| broken.why)
    }

    /// What hosts offer to a machine of a kind on the nodes where it may run, as far as it is known.
    pub(crate) fn offers_for(&self, machine: &str, kind: &KindName) -> Vec<(Name, Features)> {
        self.locked().offers_for(machine, kind)
    }
}

impl RuleCache {
    /// Follows the store until the agent ends.
    pub(crate) fn follow(self: &Arc<Self>) {
        for prefix in [
            Key::Rules.to_string(),
            keys::NODE_LABELS.to_owned(),
            keys::MACHINE_LABELS.to_owned(),
            keys::DRAINS.to_owned(),
            keys::NODES.to_owned(),
        ] {
            let cache = self.clone();
            tokio::spawn(async move { cache.follow_prefix(&prefix).await });
        }
    }

    async fn follow_prefix(&self, prefix: &str) {
        loop {
            if let Err(error) = self.follow_once(prefix).await {
                tracing::warn!(%error, "cannot follow the rules, trying again");
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    async fn follow_once(&self, prefix: &str) -> Result<(), StoreError> {
        let store = &self.context.store;
        let listing = store.list(prefix).await?;
        {
            let mut set = self.locked();
            set.forget(prefix, &listing.entries);
            for entry in &listing.entries {
                set.take(&entry.key, Some(entry));
            }
        }
        self.tell(prefix);
        let mut watch = store.watch(prefix, listing.revision + 1).await?;
        while let Some(changes) = watch.next().await {
            let changes = changes?.changes;
            let mut set = self.locked();
            for change in &changes {
                match change {
                    Change::Put(entry) => set.take(&entry.key, Some(entry)),
                    Change::Delete { key } => set.take(key, None),
                }
            }
            drop(set);
            self.tell(prefix);
        }
        Ok(())
    }

    fn tell(&self, prefix: &str) {
        if prefix == keys::DRAINS {
            self.drains.notify_one();
        }
    }
}

/// Holders and domains of all rules.
struct Held {
    holders: BTreeMap<Name, Holders>,
    domains: BTreeMap<Name, BTreeSet<String>>,
}

/// Rules, nodes and machines of one instant.
pub(crate) struct RuleSnapshot {
    set: RuleSet,
    alive: Vec<Name>,
    placed: Vec<(Subject, Name)>,
    nodes: Vec<Subject>,
    /// For what machines need, which never changes; only where hosts differ.
    placements: Option<Arc<Placements>>,
    held: OnceCell<Held>,
}

impl RuleSnapshot {
    fn new(set: RuleSet, placements: Arc<Placements>, alive: Vec<Name>) -> Self {
        // Without rules no placement is needed.
        let (placed, nodes) = if set.rules.is_empty() {
            (Vec::new(), Vec::new())
        } else {
            let placed = placements.live().into_iter();
            (
                placed
                    .map(|(machine, node)| (set.machine(&machine), node))
                    .collect(),
                alive.iter().map(|node| set.node(node)).collect(),
            )
        };
        RuleSnapshot {
            placements: set.hosts.differ().then_some(placements),
            set,
            alive,
            placed,
            nodes,
            held: OnceCell::new(),
        }
    }

    /// Whether no machine is restricted.
    pub(crate) fn is_empty(&self) -> bool {
        self.set.rules.is_empty() && self.set.drains.is_empty() && self.placements.is_none()
    }

    /// Nodes that are alive.
    pub(crate) fn nodes(&self) -> &[Name] {
        &self.alive
    }

    /// Whether two nodes are labelled to be in different failure domains.
    pub(crate) fn are_apart(&self, one: &str, other: &str) -> bool {
        self.set.are_apart(one, other)
    }

    /// The rule that forbids moving a machine in this minute of the day, UTC.
    pub(crate) fn forbids_moving(&self, machine: &Name, minute: u32) -> Option<Violation> {
        let thing = self.set.machine(machine);
        let mut rules = self.set.rules.iter();
        rules.find_map(|rule: &Rule| rule.forbids_moving(&thing, minute))
    }

    /// Machines of a node that violate a rule there.
    pub(crate) fn broken_on(&self, node: &str) -> Vec<(Name, Violation)> {
        if self.set.rules.is_empty() {
            return Vec::new();
        }
        let here = |machine: &Name| {
            let mut placed = self.placed.iter();
            placed.any(|(it, at)| it.name == *machine && **at == *node)
        };
        let mut broken = violations_of(&self.set.rules, &self.placed, &self.nodes);
        broken.retain(|(machine, _)| here(machine));
        broken
    }

    /// That a node's host cannot run a machine, if that is known.
    pub(crate) fn host_forbids(&self, needs: &Needs, node: &str) -> Option<Violation> {
        self.set.hosts.forbids(needs, node)
    }

    /// The rule, drain or host that forbids a machine on a node.
    pub(crate) fn forbids(&self, machine: &Name, target: &Name) -> Option<Violation> {
        if self.set.drains.contains_key(target) {
            return Some(Violation {
                rule: "drain".into(),
                why: format!("{target} is being drained"),
            });
        }
        let placed = self.placements.as_ref().and_then(|all| all.get(machine));
        let by_host = placed.and_then(|placed| self.host_forbids(&placed.needs, target));
        if by_host.is_some() {
            return by_host;
        }
        let thing = self.set.machine(machine);
        let node = self.set.node(target);
        if !self.set.rules.iter().any(|it| it.applies_to(&thing)) {
            return None;
        }
        let held = self.held.get_or_init(|| {
            let rules = &self.set.rules;
            Held {
                holders: holders_of(rules, &self.placed, &self.nodes),
                domains: domains_of(rules, &self.nodes),
            }
        });
        let (holders, domains) = (&held.holders, &held.domains);
        forbidden(&self.set.rules, &thing, &node, holders, domains)
    }
}
