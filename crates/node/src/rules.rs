//! Placement rules in the store: reading and changing them, and what a transaction
//! that places a machine must compare and write so that they hold whoever places it,
//! balancer or not.
//!
//! Who may be where is computed from the machines' records; the keys of a rule's
//! domains (`rule/ID/DOMAIN`) are what of two placements at the same time lets one
//! fail: each is read before the records are, compared, and written.

use crate::agent::Agent;
use crate::operate::OperateError;
use keel_balance::Name;
use keel_balance::rules::{
    Broken, Claim, Labels, RULES_MAX, Rule, Thing, broken_by, conflict, holders_of,
};
use keel_cluster::keys::{self, Key};
use keel_cluster::store::{Compare, KeyValue, Op, Revision, Txn, TxnOutcome};
use keel_cluster::{MachineName, NodeName, Store, StoreError};
use keel_machine::spec::Record;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Labels that a node or machine may have.
const LABELS_MAX: usize = 64;

/// Why a machine is not placed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0}")]
    Broken(Broken),
    #[error("node {0:?} is being drained (`keel undrain {0}` opens it again)")]
    Draining(NodeName),
    #[error("{0}")]
    Damaged(String),
}

/// What a placement adds to its transaction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims {
    compare: Vec<(Compare, String)>,
    then: Vec<Op>,
}

impl Claims {
    /// Adds them, behind what is there.
    pub(crate) fn add_to(&self, mut txn: Txn) -> Txn {
        let compares = self.compare.iter().map(|(compare, _)| compare.clone());
        txn.compare.extend(compares);
        txn.then.extend(self.then.iter().cloned());
        txn
    }

    /// The rule that others changed meanwhile, of a transaction to which these were
    /// added behind `before` compares, and whose `failed`-th did not hold.
    pub(crate) fn raced(&self, failed: usize, before: usize) -> Option<&str> {
        let (_, rule) = self.compare.get(failed.checked_sub(before)?)?;
        Some(rule)
    }
}

/// Rules and what they select by, as the store has them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Book {
    pub(crate) rules: Vec<Rule>,
    revision: Option<Revision>,
    node_labels: BTreeMap<Name, Labels>,
    machine_labels: BTreeMap<Name, Labels>,
    /// Nodes that are being emptied.
    pub(crate) drains: BTreeMap<Name, Drain>,
}

/// That a node is to be emptied, as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Drain {
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// Until when it is to be empty.
    pub(crate) deadline_unix_ms: Option<u64>,
}

impl Book {
    /// Takes an entry of the store, if it is one of these; `None` deletes.
    pub(crate) fn take(&mut self, key: &str, entry: Option<&KeyValue>) {
        let read = |entry: &KeyValue| {
            read::<Labels>(entry).unwrap_or_else(|error| {
                tracing::error!(key, error, "labels that cannot be read count as none");
                Labels::new()
            })
        };
        match key.parse() {
            Ok(Key::Rules) => match entry.map(self::read::<Vec<Rule>>) {
                Some(Ok(rules)) => {
                    self.rules = rules;
                    self.revision = entry.map(|it| it.modified);
                }
                // Those of before go on.
                Some(Err(error)) => tracing::error!(error, "the rules cannot be read"),
                None => (self.rules, self.revision) = (Vec::new(), None),
            },
            Ok(Key::NodeLabels(node)) => {
                let labels = entry.map(read).unwrap_or_default();
                self.node_labels.insert(node.as_str().into(), labels);
            }
            Ok(Key::MachineLabels(machine)) => {
                let labels = entry.map(read).unwrap_or_default();
                self.machine_labels.insert(machine.as_str().into(), labels);
            }
            Ok(Key::Drain(node)) => {
                let node: Name = node.as_str().into();
                match entry {
                    // What cannot be read closes the node all the same.
                    Some(entry) => {
                        let drain = self::read(entry).unwrap_or_else(|error| {
                            tracing::error!(error, "since when a node is drained is not known");
                            Drain {
                                since_unix_ms: 0,
                                deadline_unix_ms: None,
                            }
                        });
                        self.drains.insert(node, drain)
                    }
                    None => self.drains.remove(&node),
                };
            }
            _ => {}
        }
    }

    pub(crate) fn node(&self, name: &str) -> Thing {
        thing(name, &self.node_labels)
    }

    pub(crate) fn machine(&self, name: &str) -> Thing {
        thing(name, &self.machine_labels)
    }

    async fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let mut book = Book::default();
        let rules = Key::Rules.to_string();
        book.take(&rules, store.get(&rules).await?.as_ref());
        if book.rules.is_empty() {
            return Ok(book);
        }
        for prefix in [keys::NODE_LABELS, keys::MACHINE_LABELS] {
            for entry in store.list(prefix).await?.entries {
                book.take(&entry.key, Some(&entry));
            }
        }
        Ok(book)
    }

    /// That the rules are still these.
    fn unchanged(&self) -> (Compare, String) {
        let key = Key::Rules.to_string();
        let compare = match self.revision {
            Some(revision) => Compare::ModifiedAt { key, revision },
            None => Compare::Absent { key },
        };
        (compare, "(a rule was changed)".to_owned())
    }
}

fn thing(name: &str, labels: &BTreeMap<Name, Labels>) -> Thing {
    Thing {
        name: name.into(),
        labels: labels.get(name).cloned().unwrap_or_default(),
    }
}

fn read<T: DeserializeOwned>(entry: &KeyValue) -> Result<T, String> {
    serde_json::from_slice(&entry.value).map_err(|error| format!("{}: {error}", entry.key))
}

/// What it takes to place a machine on a node.
///
/// # Errors
/// [`ClaimError::Broken`] if a rule does not allow it.
pub(crate) async fn claim(
    agent: &Agent,
    machine: &MachineName,
    target: &NodeName,
) -> Result<Claims, ClaimError> {
    let members: Vec<NodeName> = agent.members.all().keys().cloned().collect();
    claim_in(&*agent.store, &members, machine, target).await
}

async fn claim_in(
    store: &dyn Store,
    members: &[NodeName],
    machine: &MachineName,
    target: &NodeName,
) -> Result<Claims, ClaimError> {
    let drain = Key::Drain(target.clone()).to_string();
    if store.get(&drain).await?.is_some() {
        return Err(ClaimError::Draining(target.clone()));
    }
    let book = Book::load(store).await?;
    let open = (Compare::Absent { key: drain }, "(a drain)".to_owned());
    let mut claims = Claims {
        compare: vec![book.unchanged(), open],
        then: Vec::new(),
    };
    let this = book.machine(machine.as_str());
    let node = book.node(target.as_str());
    let about: Vec<&Rule> = book.rules.iter().filter(|it| it.is_about(&this)).collect();
    if about.is_empty() {
        return Ok(claims);
    }
    // Before the records: whoever changes one of them later changes these too.
    let mut revisions: BTreeMap<String, Revision> = BTreeMap::new();
    for rule in &about {
        let name = rule_name(&rule.name)?;
        for entry in store.list(&keys::domains_of(&name)).await?.entries {
            revisions.insert(entry.key, entry.modified);
        }
    }
    let placed = placed(&book, &crate::record::all(store).await.map_err(damaged)?);
    let nodes: Vec<Thing> = members.iter().map(|it| book.node(it.as_str())).collect();
    let holders = holders_of(&book.rules, &placed, &nodes);
    let alive = crate::record::alive(store).await?;
    for rule in about {
        let domains: BTreeSet<String> = nodes
            .iter()
            .filter(|it| alive.iter().any(|alive| alive.as_str() == &*it.name))
            .map(|it| rule.per().of(&it.name, &it.labels))
            .collect();
        let held = holders.get(&rule.name).cloned().unwrap_or_default();
        let claim = rule.claim(&this, &node, &held, &domains);
        if let Some(claim) = claim.map_err(ClaimError::Broken)? {
            claims.add(&claim, &revisions)?;
        }
    }
    Ok(claims)
}

fn damaged(error: impl std::fmt::Display) -> ClaimError {
    ClaimError::Damaged(error.to_string())
}

fn rule_name(name: &str) -> Result<MachineName, ClaimError> {
    MachineName::new(name).map_err(damaged)
}

impl Claims {
    fn add(
        &mut self,
        claim: &Claim,
        revisions: &BTreeMap<String, Revision>,
    ) -> Result<(), ClaimError> {
        let rule = rule_name(&claim.rule)?;
        let key = |domain: &String| {
            let domain = MachineName::new(domain).map_err(damaged)?;
            Ok::<_, ClaimError>(Key::Rule(rule.clone(), domain).to_string())
        };
        for domain in &claim.reads {
            let key = key(domain)?;
            let compare = match revisions.get(&key) {
                Some(&revision) => Compare::ModifiedAt { key, revision },
                None => Compare::Absent { key },
            };
            self.compare.push((compare, claim.rule.to_string()));
        }
        for (domain, machines) in &claim.writes {
            let value = serde_json::to_vec(machines).map_err(damaged)?;
            self.then.push(Op::Put {
                key: key(domain)?,
                value,
                lease: None,
            });
        }
        Ok(())
    }
}

/// Live machines with their nodes.
fn placed(book: &Book, records: &[Record]) -> Vec<(Thing, Name)> {
    records
        .iter()
        .filter(|record| !record.status.ended())
        .map(|record| {
            let machine = book.machine(record.name.as_str());
            (machine, record.owner.as_str().into())
        })
        .collect()
}

fn nodes(agent: &Agent, book: &Book) -> Vec<Thing> {
    let members = agent.members.all();
    members
        .keys()
        .map(|node| book.node(node.as_str()))
        .collect()
}

/// All rules, and the machines that break one where they are.
pub(crate) async fn list(agent: &Agent) -> Result<keel_api::RulesInfo, OperateError> {
    let book = Book::load(&*agent.store).await?;
    let placed = placed(&book, &crate::record::all(&*agent.store).await?);
    let nodes = nodes(agent, &book);
    Ok(keel_api::RulesInfo {
        broken: broken_by(&book.rules, &placed, &nodes),
        holders: holders_of(&book.rules, &placed, &nodes),
        rules: book.rules,
    })
}

/// Adds a rule, or changes the one of its name.
pub(crate) async fn put(agent: &Agent, rule: Rule) -> Result<(), OperateError> {
    MachineName::new(&rule.name).map_err(|error| OperateError::Bad(error.to_string()))?;
    rule.check().map_err(OperateError::Bad)?;
    change(agent, |rules| {
        match rules.iter_mut().find(|it| it.name == rule.name) {
            Some(known) => *known = rule.clone(),
            None => rules.push(rule.clone()),
        }
        Ok(())
    })
    .await
}

/// Removes a rule.
pub(crate) async fn remove(agent: &Agent, name: &str) -> Result<(), OperateError> {
    change(agent, |rules| {
        let before = rules.len();
        rules.retain(|rule| *rule.name != *name);
        if rules.len() == before {
            let what = format!("there is no rule {name:?} (see `keel rule ls`)");
            return Err(OperateError::Missing(what));
        }
        Ok(())
    })
    .await
}

async fn change(
    agent: &Agent,
    change: impl Fn(&mut Vec<Rule>) -> Result<(), OperateError>,
) -> Result<(), OperateError> {
    let store = &*agent.store;
    for _ in 0..8 {
        let mut book = Book::load(store).await?;
        if book.rules.is_empty() {
            // Labels are read only where there are rules.
            for prefix in [keys::NODE_LABELS, keys::MACHINE_LABELS] {
                for entry in store.list(prefix).await?.entries {
                    book.take(&entry.key, Some(&entry));
                }
            }
        }
        let (unchanged, _) = book.unchanged();
        change(&mut book.rules)?;
        if book.rules.len() > RULES_MAX {
            let what = format!("a cluster may have {RULES_MAX} rules");
            return Err(OperateError::Conflict(what));
        }
        let placed = placed(&book, &crate::record::all(store).await?);
        let machines: Vec<Thing> = placed.into_iter().map(|(machine, _)| machine).collect();
        if let Some(names) = conflict(&book.rules, &machines, &nodes(agent, &book)) {
            let what = format!(
                "these rules cannot be kept together by the machines and nodes that there are: {} (see `keel rule ls`)",
                names.join(", ")
            );
            return Err(OperateError::Conflict(what));
        }
        let value = serde_json::to_vec(&book.rules)
            .map_err(|error| OperateError::Bad(error.to_string()))?;
        let txn = Txn::new().when(unchanged).put(Key::Rules, value);
        match store.txn(txn).await? {
            TxnOutcome::Committed { .. } => return Ok(()),
            TxnOutcome::Refused { .. } => {}
        }
    }
    Err(OperateError::Conflict(
        "the rules are being changed by others all the time; try again".into(),
    ))
}

/// Sets labels of a node or machine; empty values remove them.
pub(crate) async fn label(
    agent: &Agent,
    request: &keel_api::LabelRequest,
) -> Result<Labels, OperateError> {
    let bad = |what: String| OperateError::Bad(what);
    let name = &request.name;
    let key = if request.node {
        let node = NodeName::new(name).map_err(|error| bad(error.to_string()))?;
        if !agent.members.contains(&node) {
            let what = format!("there is no node {name:?} (see `keel nodes`)");
            return Err(OperateError::Missing(what));
        }
        Key::NodeLabels(node)
    } else {
        let machine = MachineName::new(name).map_err(|error| bad(error.to_string()))?;
        crate::record::get(&*agent.store, &machine).await?;
        Key::MachineLabels(machine)
    };
    let found = agent.store.get(&key.to_string()).await?;
    let mut labels: Labels = match &found {
        Some(entry) => read(entry).map_err(OperateError::Conflict)?,
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
    match agent.store.txn(txn.put(key, value)).await? {
        TxnOutcome::Committed { .. } => Ok(labels),
        TxnOutcome::Refused { .. } => Err(OperateError::Conflict(
            "its labels were changed by somebody else just now; try again".into(),
        )),
    }
}

/// Both are parts of keys: they have the form of names.
pub(crate) fn check_label(label: &str, value: &str) -> Result<(), OperateError> {
    let check = |text: &str| MachineName::new(text).map(drop);
    let checked = check(label).and_then(|()| {
        if value.is_empty() {
            Ok(())
        } else {
            check(value)
        }
    });
    checked.map_err(|error| OperateError::Bad(format!("label {label}={value}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::VersionedRecord;
    use crate::record::tests::record;
    use keel_balance::rules::{Domain, Says, Selector};
    use keel_cluster::store::{Change, RedbOptions, RedbStore};
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};
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

    fn rule(name: &str, says: Says) -> Rule {
        Rule {
            name: name.into(),
            machines: Selector {
                names: vec![format!("{name}-*")],
                labels: Labels::new(),
            },
            says,
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
                Says::Apart {
                    per: Domain::Node,
                    max: 1,
                },
            ),
            rule(
                "db",
                Says::Spread {
                    per: zone(),
                    skew: 1,
                },
            ),
            rule("lic", Says::Licence { nodes_max: 3 }),
            rule("pin", Says::Pin { nodes: pinned }),
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
        let value = crate::record::encode(&record(it, to)).unwrap();
        let txn = claims.add_to(txn).put(key, value);
        store.txn(txn).await.unwrap().is_committed()
    }

    /// A hundred nodes place and move machines at the same time, while others are
    /// drained and opened: at no revision of the store is a rule broken, nor comes
    /// anything to a node that is being drained.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_a_thousand_offers_at_once_none_breaks_a_rule_at_any_revision() {
        let folder = tempfile::tempdir().unwrap();
        let options = RedbOptions::default();
        let store = RedbStore::open(&folder.path().join("store"), options).unwrap();
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
        let mut book = Book::load(&*store).await.unwrap();
        let things: Vec<Thing> = members.iter().map(|it| book.node(it.as_str())).collect();
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
                        let drained = book.drains.contains_key(record.owner.as_str());
                        assert!(!drained, "revision {seen}: {} came", entry.key);
                        at.insert(entry.key, record);
                    }
                    Change::Put(entry) => book.take(&entry.key, Some(&entry)),
                    Change::Delete { key } => book.take(&key, None),
                }
            }
            let records: Vec<Record> = at.values().cloned().collect();
            let broken = broken_by(&book.rules, &placed(&book, &records), &things);
            assert!(broken.is_empty(), "revision {seen}: {broken:?}");
        }
        assert!(at.len() > MACHINES / 2, "{}", at.len());
    }
}
