//! The rules of the cluster: reads and changes them, and builds the claims of a placement.

use super::cache::RuleCache;
use super::claims::{ClaimError, Claims, claim_in};
use super::rule_set::{RuleSet, placed, read_entry};
use crate::context::Context;
use crate::error::CommandError;
use crate::records::{AliveNodes, Placements};
use keel_balance::rules::{Labels, RULES_MAX, Rule, Subject, conflict, holders_of, violations_of};
use keel_cluster::{MachineName, NodeName};
use keel_store::keys::{self, Key};
use keel_store::{Txn, TxnOutcome};
use std::sync::Arc;

/// The most labels of a node or machine.
const LABELS_MAX: usize = 64;

/// The rules of the cluster.
pub(crate) struct Rules {
    context: Arc<Context>,
    /// The rules in the store, followed.
    pub(crate) cache: Arc<RuleCache>,
}

impl Rules {
    pub(crate) fn new(
        context: Arc<Context>,
        placements: Arc<Placements>,
        alive: Arc<AliveNodes>,
    ) -> Self {
        let cache = Arc::new(RuleCache::new(context.clone(), placements, alive));
        Rules { context, cache }
    }

    /// The compares and writes of a transaction that places a machine on a node.
    ///
    /// # Errors
    /// [`ClaimError::Broken`] if a rule forbids it.
    pub(crate) async fn claim(
        &self,
        machine: &MachineName,
        target: &NodeName,
    ) -> Result<Claims, ClaimError> {
        let members: Vec<NodeName> = self.context.members.all().keys().cloned().collect();
        claim_in(&*self.context.store, &members, machine, target).await
    }

    /// All rules, and the machines that violate one.
    pub(crate) async fn list(&self) -> Result<keel_api::RulesInfo, CommandError> {
        let set = RuleSet::load(&*self.context.store).await?;
        let placed = placed(&set, &crate::records::all(&*self.context.store).await?);
        let nodes = self.nodes(&set);
        Ok(keel_api::RulesInfo {
            broken: violations_of(&set.rules, &placed, &nodes),
            holders: holders_of(&set.rules, &placed, &nodes),
            rules: set.rules,
        })
    }

    /// Adds a rule, or replaces the one with its name.
    pub(crate) async fn put(&self, rule: Rule) -> Result<(), CommandError> {
        MachineName::new(&rule.name).map_err(|error| CommandError::Invalid(error.to_string()))?;
        rule.check().map_err(CommandError::Invalid)?;
        self.change(|rules| {
            match rules.iter_mut().find(|it| it.name == rule.name) {
                Some(known) => *known = rule.clone(),
                None => rules.push(rule.clone()),
            }
            Ok(())
        })
        .await
    }

    /// Removes a rule.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), CommandError> {
        self.change(|rules| {
            let before = rules.len();
            rules.retain(|rule| *rule.name != *name);
            if rules.len() == before {
                let what = format!("there is no rule {name:?} (see `keel rule ls`)");
                return Err(CommandError::NotFound(what));
            }
            Ok(())
        })
        .await
    }

    async fn change(
        &self,
        change: impl Fn(&mut Vec<Rule>) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        let store = &*self.context.store;
        for _ in 0..8 {
            let mut set = RuleSet::load(store).await?;
            if set.rules.is_empty() {
                // Labels are read only if there are rules.
                for prefix in [keys::NODE_LABELS, keys::MACHINE_LABELS] {
                    for entry in store.list(prefix).await?.entries {
                        set.take(&entry.key, Some(&entry));
                    }
                }
            }
            let (unchanged, _) = set.unchanged();
            change(&mut set.rules)?;
            if set.rules.len() > RULES_MAX {
                let what = format!("a cluster may have {RULES_MAX} rules");
                return Err(CommandError::Conflict(what));
            }
            let placed = placed(&set, &crate::records::all(store).await?);
            let machines: Vec<Subject> = placed.into_iter().map(|(machine, _)| machine).collect();
            if let Some(names) = conflict(&set.rules, &machines, &self.nodes(&set)) {
                let what = format!(
                    "these rules cannot all be satisfied by the present machines and nodes: {} (see `keel rule ls`)",
                    names.join(", ")
                );
                return Err(CommandError::Conflict(what));
            }
            let value = serde_json::to_vec(&set.rules)
                .map_err(|error| CommandError::Invalid(error.to_string()))?;
            let txn = Txn::new().when(unchanged).put(Key::Rules, value);
            match store.txn(txn).await? {
                TxnOutcome::Committed { .. } => return Ok(()),
                TxnOutcome::Refused { .. } => {}
            }
        }
        Err(CommandError::Conflict(
            "the rules are being changed concurrently; try again".into(),
        ))
    }

    /// Sets labels of a node or machine; empty values remove them.
    pub(crate) async fn label(
        &self,
        request: &keel_api::LabelRequest,
    ) -> Result<Labels, CommandError> {
        let bad = |what: String| CommandError::Invalid(what);
        let name = &request.name;
        let key = if request.node {
            let node = NodeName::new(name).map_err(|error| bad(error.to_string()))?;
            if !self.context.members.contains(&node) {
                let what = format!("there is no node {name:?} (see `keel nodes`)");
                return Err(CommandError::NotFound(what));
            }
            Key::NodeLabels(node)
        } else {
            let machine = MachineName::new(name).map_err(|error| bad(error.to_string()))?;
            crate::records::get(&*self.context.store, &machine).await?;
            Key::MachineLabels(machine)
        };
        let found = self.context.store.get(&key.to_string()).await?;
        let mut labels: Labels = match &found {
            Some(entry) => read_entry(entry).map_err(CommandError::Conflict)?,
            None => Labels::new(),
        };
        for (label, value) in &request.labels {
            check_label(label, value)?;
            if value.is_empty() {
                labels.remove(label);
            } else {
                labels.insert(label.clone(), value.clone());
            }
        }
        if labels.len() > LABELS_MAX {
            return Err(bad(format!("{name:?} may have {LABELS_MAX} labels")));
        }
        if request.labels.is_empty() {
            return Ok(labels);
        }
        let value = serde_json::to_vec(&labels).map_err(|error| bad(error.to_string()))?;
        let txn = match found {
            Some(entry) => Txn::new().when_modified_at(key.clone(), entry.modified),
            None => Txn::new().when_absent(key.clone()),
        };
        match self.context.store.txn(txn.put(key, value)).await? {
            TxnOutcome::Committed { .. } => Ok(labels),
            TxnOutcome::Refused { .. } => Err(CommandError::Conflict(
                "its labels were changed concurrently; try again".into(),
            )),
        }
    }

    fn nodes(&self, set: &RuleSet) -> Vec<Subject> {
        let members = self.context.members.all();
        members.keys().map(|node| set.node(node.as_str())).collect()
    }
}

/// Both are parts of keys, so they have the form of names.
pub(crate) fn check_label(label: &str, value: &str) -> Result<(), CommandError> {
    let check = |text: &str| MachineName::new(text).map(drop);
    let checked = check(label).and_then(|()| {
        if value.is_empty() {
            Ok(())
        } else {
            check(value)
        }
    });
    checked.map_err(|error| CommandError::Invalid(format!("label {label}={value}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::VersionedRecord;
    use crate::records::tests::record;
    use keel_balance::rules::{Domain, Requirement, Selector};
    use keel_machine::spec::Record;
    use keel_store::Store;
    use keel_store::{Change, RaftStore};
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const NODES: usize = 100;
    const OFFERS: usize = 1_000;
    const MACHINES: usize = 120;

    fn node(number: usize) -> NodeName {
        NodeName::new(&format!("n{number}")).unwrap()
    }

    fn machine(number: usize) -> MachineName {
        let kind = ["web", "db", "lic", "pin", "free", "free"][number % 6];
        MachineName::new(&format!("{kind}-{number}")).unwrap()
    }

    fn rule(name: &str, requirement: Requirement) -> Rule {
        Rule {
            name: name.into(),
            machines: Selector {
                names: vec![format!("{name}-*")],
                labels: Labels::new(),
            },
            requirement,
        }
    }

    fn rules() -> Vec<Rule> {
        let zone = || Domain::Label("zone".into());
        let pinned = Selector {
            names: vec!["n1*".into()],
            labels: Labels::new(),
        };
        vec![
            rule(
                "web",
                Requirement::Apart {
                    per: Domain::Node,
                    max: 1,
                },
            ),
            rule(
                "db",
                Requirement::Spread {
                    per: zone(),
                    skew: 1,
                },
            ),
            rule("lic", Requirement::Licence { nodes_max: 3 }),
            rule("pin", Requirement::Pin { nodes: pinned }),
        ]
    }

    /// Places or moves a machine as agents do: claims, then one transaction.
    async fn offer(store: &dyn Store, members: &[NodeName], it: MachineName, to: NodeName) -> bool {
        let Ok(claims) = claim_in(store, members, &it, &to).await else {
            return false;
        };
        let key = Key::Machine(it.clone());
        let found = store.get(&key.to_string()).await.unwrap();
        let txn = match found {
            Some(entry) => Txn::new().when_modified_at(key.clone(), entry.modified),
            None => Txn::new().when_absent(key.clone()),
        };
        let value = crate::records::encode(&record(it, to)).unwrap();
        let txn = claims.add_to(txn).put(key, value);
        store.txn(txn).await.unwrap().is_committed()
    }

    /// A hundred nodes place and move machines concurrently, while others are drained and opened.
    /// At no revision of the store is a rule violated, and no machine is placed on a node that is
    /// being drained.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_a_thousand_offers_at_once_none_breaks_a_rule_at_any_revision() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = RaftStore::open_alone(&path).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(store);
        let members: Arc<Vec<NodeName>> = Arc::new((0..NODES).map(node).collect());
        let labels = |number: usize| Labels::from([("zone".into(), format!("z{}", number % 5))]);
        let json = |value: &Labels| serde_json::to_vec(value).unwrap();
        let value = serde_json::to_vec(&rules()).unwrap();
        store.txn(Txn::new().put(Key::Rules, value)).await.unwrap();
        for number in 0..NODES {
            let txn = Txn::new()
                .put(Key::Alive(node(number)), Vec::new())
                .put(Key::NodeLabels(node(number)), json(&labels(number)));
            store.txn(txn).await.unwrap();
        }
        let first = store.revision().await.unwrap() + 1;

        let won = Arc::new(AtomicUsize::new(0));
        let mut nodes = tokio::task::JoinSet::new();
        for number in 0..NODES {
            let (store, members, won) = (store.clone(), members.clone(), won.clone());
            nodes.spawn(async move {
                let mut random = SmallRng::seed_from_u64(number as u64);
                for _ in 0..OFFERS / NODES {
                    let it = machine(random.random_range(0..MACHINES));
                    let to = node(random.random_range(0..NODES));
                    if offer(&*store, &members, it, to).await {
                        won.fetch_add(1, Ordering::Relaxed);
                    }
                    if number < 5 {
                        let drained = Key::Drain(node(random.random_range(0..NODES)));
                        let close = Txn::new().put(drained.clone(), b"{}".to_vec());
                        store.txn(close).await.unwrap();
                        tokio::task::yield_now().await;
                        let open = Txn::new().delete(drained.to_string());
                        store.txn(open).await.unwrap();
                    }
                }
            });
        }
        while let Some(joined) = nodes.join_next().await {
            joined.unwrap();
        }
        assert!(won.load(Ordering::Relaxed) > OFFERS / 10, "{won:?}");

        let last = store.revision().await.unwrap();
        let mut set = RuleSet::load(&*store).await.unwrap();
        let things: Vec<Subject> = members.iter().map(|it| set.node(it.as_str())).collect();
        let mut at: BTreeMap<String, Record> = BTreeMap::new();
        let mut watch = store.watch("", first).await.unwrap();
        let mut seen = first - 1;
        while seen < last {
            let changes = watch.next().await.unwrap().unwrap();
            seen = changes.revision;
            for change in changes.changes {
                match change {
                    Change::Put(entry) if entry.key.starts_with(keys::MACHINES) => {
                        let record = VersionedRecord::read(&entry).unwrap().record;
                        let drained = set.drains.contains_key(record.owner.as_str());
                        assert!(!drained, "revision {seen}: {} came", entry.key);
                        at.insert(entry.key, record);
                    }
                    Change::Put(entry) => set.take(&entry.key, Some(&entry)),
                    Change::Delete { key } => set.take(&key, None),
                }
            }
            let records: Vec<Record> = at.values().cloned().collect();
            let broken = violations_of(&set.rules, &placed(&set, &records), &things);
            assert!(broken.is_empty(), "revision {seen}: {broken:?}");
        }
        assert!(at.len() > MACHINES / 2, "{}", at.len());
    }
}
