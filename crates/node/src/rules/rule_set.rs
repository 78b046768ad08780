//! Rules, the labels that they select by, and what else decides where machines may be, at one instant
//! of the store.

use crate::records::NodeRecord;
use keel_balance::Name;
use keel_balance::rules::{Labels, Requirement, Rule, Selector, Subject, Violation};
use keel_cluster::failover::ZONE;
use keel_cluster::{MachineName, NodeName};
use keel_machine::kind::KindName;
use keel_machine::spec::Record;
use keel_store::Store;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{Compare, KeyValue, Revision};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What forbids a machine on a node whose host does not execute its kind, as rules have names.
const KIND: &str = "kind";

/// Rules, the labels that they select by, drains, and the kinds that hosts execute, at one instant of
/// the store.
#[derive(Debug, Clone, Default)]
pub(crate) struct RuleSet {
    pub(crate) rules: Vec<Rule>,
    revision: Option<Revision>,
    node_labels: BTreeMap<Name, Labels>,
    machine_labels: BTreeMap<Name, Labels>,
    /// Nodes that are being drained.
    pub(crate) drains: BTreeMap<Name, Drain>,
    /// Of the nodes of which that is known, the kinds that their hosts execute.
    executed: BTreeMap<Name, Arc<BTreeSet<KindName>>>,
}

/// The drain of a node in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Drain {
    /// Its start, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// Its deadline.
    pub(crate) deadline_unix_ms: Option<u64>,
}

impl RuleSet {
    /// Applies an entry of the store, if it is one of these; `None` deletes.
    pub(crate) fn take(&mut self, key: &str, entry: Option<&KeyValue>) {
        let read = |entry: &KeyValue| {
            read_entry::<Labels>(entry).unwrap_or_else(|error| {
                tracing::error!(key, error, "cannot decode labels; they are ignored");
                Labels::new()
            })
        };
        match key.parse() {
            Ok(Key::Rules) => match entry.map(read_entry::<Vec<Rule>>) {
                Some(Ok(rules)) => {
                    self.rules = rules;
                    self.revision = entry.map(|it| it.modified);
                }
                // The earlier ones stay in force.
                Some(Err(error)) => tracing::error!(error, "cannot decode the rules"),
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
            Ok(Key::Node(node)) => {
                let node: Name = node.as_str().into();
                let record = entry.and_then(|entry| {
                    keel_store::encoding::decode::<NodeRecord>("a node's record", &entry.value).ok()
                });
                match record.and_then(|record| record.executes) {
                    Some(kinds) => self.executed.insert(node, Arc::new(kinds)),
                    None => self.executed.remove(&node),
                };
            }
            Ok(Key::Drain(node)) => {
                let node: Name = node.as_str().into();
                match entry {
                    // An unreadable entry drains the node all the same.
                    Some(entry) => {
                        let drain = read_entry(entry).unwrap_or_else(|error| {
                            tracing::error!(error, "cannot decode the start of a drain");
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

    /// Forgets what a list of all entries under a prefix does not have: its deletion was not seen.
    pub(super) fn forget(&mut self, prefix: &str, listed: &[KeyValue]) {
        let listed: BTreeSet<&str> = listed.iter().map(|entry| entry.key.as_str()).collect();
        let is_gone = |key: Key| {
            let key = key.to_string();
            key.starts_with(prefix) && !listed.contains(key.as_str())
        };
        let node = |name: &Name| NodeName::new(name).ok();
        self.node_labels
            .retain(|it, _| !node(it).is_some_and(|it| is_gone(Key::NodeLabels(it))));
        self.drains
            .retain(|it, _| !node(it).is_some_and(|it| is_gone(Key::Drain(it))));
        self.executed
            .retain(|it, _| !node(it).is_some_and(|it| is_gone(Key::Node(it))));
        self.machine_labels.retain(|it, _| {
            let machine = MachineName::new(it).ok();
            !machine.is_some_and(|it| is_gone(Key::MachineLabels(it)))
        });
        if is_gone(Key::Rules) {
            (self.rules, self.revision) = (Vec::new(), None);
        }
    }

    /// Whether two nodes are labelled to be in different failure domains.
    pub(super) fn are_apart(&self, one: &str, other: &str) -> bool {
        let zone = |node: &str| self.node_labels.get(node)?.get(ZONE);
        match (zone(one), zone(other)) {
            (Some(one), Some(other)) => one != other,
            _ => false,
        }
    }

    /// Whether hosts execute different kinds.
    pub(super) fn kinds_differ(&self) -> bool {
        let mut all = self.executed.values();
        let first = all.next();
        all.any(|kinds| Some(kinds) != first)
    }

    /// That a node's host does not execute machines of a kind, if that is known. It may be outdated:
    /// a host says it when its agent starts.
    pub(crate) fn lacks_kind(&self, kind: &KindName, node: &str) -> Option<Violation> {
        let lacks = !self.executed.get(node)?.contains(kind);
        lacks.then(|| Violation {
            rule: KIND.into(),
            why: format!("the host of {node} does not execute machines of kind {kind}"),
        })
    }

    /// The same as rules, for machines each with its kind.
    pub(crate) fn kind_rules(&self, machines: &BTreeMap<KindName, Vec<String>>) -> Vec<Rule> {
        let rules = machines.iter().filter_map(|(kind, machines)| {
            let lacking = self.executed.iter().filter(|(_, it)| !it.contains(kind));
            let lacking: Vec<String> = lacking.map(|(node, _)| node.to_string()).collect();
            // An empty selector would select everything.
            let matters = !lacking.is_empty() && !machines.is_empty();
            let of = |names: Vec<String>| Selector {
                names,
                ..Selector::default()
            };
            matters.then(|| Rule {
                name: KIND.into(),
                machines: of(machines.clone()),
                requirement: Requirement::Avoid { nodes: of(lacking) },
            })
        });
        rules.collect()
    }

    pub(crate) fn node(&self, name: &str) -> Subject {
        thing(name, &self.node_labels)
    }

    pub(crate) fn machine(&self, name: &str) -> Subject {
        thing(name, &self.machine_labels)
    }

    pub(super) async fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let mut set = RuleSet::default();
        let rules = Key::Rules.to_string();
        set.take(&rules, store.get(&rules).await?.as_ref());
        if set.rules.is_empty() {
            return Ok(set);
        }
        for prefix in [keys::NODE_LABELS, keys::MACHINE_LABELS] {
            for entry in store.list(prefix).await?.entries {
                set.take(&entry.key, Some(&entry));
            }
        }
        Ok(set)
    }

    /// A compare that the rules are unchanged.
    pub(super) fn unchanged(&self) -> (Compare, String) {
        let key = Key::Rules.to_string();
        let compare = match self.revision {
            Some(revision) => Compare::ModifiedAt { key, revision },
            None => Compare::Absent { key },
        };
        (compare, "(a rule was changed)".to_owned())
    }
}

fn thing(name: &str, labels: &BTreeMap<Name, Labels>) -> Subject {
    Subject {
        name: name.into(),
        labels: labels.get(name).cloned().unwrap_or_default(),
    }
}

pub(super) fn read_entry<T: DeserializeOwned>(entry: &KeyValue) -> Result<T, String> {
    serde_json::from_slice(&entry.value).map_err(|error| format!("{}: {error}", entry.key))
}

/// Live machines with their nodes.
pub(super) fn placed(set: &RuleSet, records: &[Record]) -> Vec<(Subject, Name)> {
    records
        .iter()
        .filter(|record| !record.status.ended())
        .map(|record| {
            let machine = set.machine(record.name.as_str());
            (machine, record.owner.as_str().into())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_balance::rules::{Requirement, Selector};

    fn entry(key: Key, value: &str) -> KeyValue {
        KeyValue {
            key: key.to_string(),
            value: value.into(),
            created: 1,
            modified: 1,
            lease: None,
        }
    }

    fn set(entries: &[KeyValue]) -> RuleSet {
        let mut set = RuleSet::default();
        for entry in entries {
            set.take(&entry.key, Some(entry));
        }
        set
    }

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    /// A watch that began again did not see what was deleted meanwhile.
    #[test]
    fn what_a_list_lacks_is_forgotten() {
        let m = Key::MachineLabels("m".parse().unwrap());
        let rules = serde_json::to_string(&[Rule {
            name: "r".into(),
            machines: Selector::default(),
            requirement: Requirement::Stay,
        }]);
        let entries = [
            entry(Key::NodeLabels(node("a")), r#"{"zone":"x"}"#),
            entry(Key::NodeLabels(node("b")), r#"{"zone":"y"}"#),
            entry(m, r#"{"app":"web"}"#),
            entry(Key::Drain(node("a")), "unreadable"),
            entry(Key::Rules, &rules.unwrap()),
        ];
        let mut set = set(&entries);
        assert_eq!((set.rules.len(), set.drains.len()), (1, 1));
        set.forget(keys::NODE_LABELS, &entries[..1]);
        assert!(set.node("b").labels.is_empty() && !set.node("a").labels.is_empty());
        assert!(!set.machine("m").labels.is_empty());
        set.forget(keys::DRAINS, &[]);
        assert!(set.drains.is_empty());
        set.forget(&Key::Rules.to_string(), &entries[4..]);
        assert_eq!(set.rules.len(), 1);
        set.forget(&Key::Rules.to_string(), &[]);
        assert!(set.rules.is_empty() && !set.machine("m").labels.is_empty());
        set.forget(keys::MACHINE_LABELS, &[]);
        assert!(set.machine("m").labels.is_empty());
    }

    #[test]
    fn a_node_lacks_what_its_host_does_not_execute() {
        let record = |executes: Option<&[&str]>| {
            let kinds = |all: &[&str]| all.iter().map(|it| it.parse().unwrap()).collect();
            let record = NodeRecord {
                address: String::new(),
                cpus: 1,
                memory_bytes: 1,
                features: Vec::new(),
                lacks: Vec::new(),
                kinds: Vec::new(),
                executes: executes.map(kinds),
                version: String::new(),
            };
            keel_store::encoding::encode("a node's record", &record).unwrap()
        };
        let entry = |name: &str, executes: Option<&[&str]>| KeyValue {
            value: record(executes),
            ..entry(Key::Node(node(name)), "")
        };
        let both: &[&str] = &["qemu", "wasm"];
        let mut entries = vec![entry("a", Some(both)), entry("c", None)];
        assert!(!set(&entries).kinds_differ());
        entries.push(entry("b", Some(&["wasm"])));
        let mut set = set(&entries);
        assert!(set.kinds_differ());
        let (qemu, wasm): (KindName, KindName) = ("qemu".parse().unwrap(), "wasm".parse().unwrap());
        let lacks = set.lacks_kind(&qemu, "b").unwrap();
        assert!(
            lacks.why.contains("host of b does not execute"),
            "{}",
            lacks.why
        );
        for (kind, node) in [(&qemu, "a"), (&qemu, "c"), (&qemu, "d"), (&wasm, "b")] {
            assert_eq!(set.lacks_kind(kind, node), None, "{kind} on {node}");
        }
        let machines = BTreeMap::from([
            (qemu.clone(), vec!["s".to_owned()]),
            (wasm, vec!["w".to_owned()]),
        ]);
        let rules = set.kind_rules(&machines);
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].requirement.to_string(), "not on b");
        assert!(rules[0].applies_to(&set.machine("s")) && !rules[0].applies_to(&set.machine("w")));
        assert!(
            set.kind_rules(&BTreeMap::from([(qemu, Vec::new())]))
                .is_empty()
        );
        set.forget(keys::NODES, &entries[..1]);
        assert!(!set.kinds_differ());
    }

    #[test]
    fn nodes_are_apart_if_their_labels_say_so() {
        let set = set(&[
            entry(Key::NodeLabels(node("a")), r#"{"zone":"x"}"#),
            entry(Key::NodeLabels(node("b")), r#"{"zone":"y"}"#),
            entry(Key::NodeLabels(node("c")), r#"{"zone":"x"}"#),
            entry(Key::NodeLabels(node("d")), "{}"),
        ]);
        assert!(set.are_apart("a", "b"));
        assert!(!set.are_apart("a", "c") && !set.are_apart("a", "d") && !set.are_apart("d", "e"));
    }
}
