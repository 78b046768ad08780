//! Rules, the labels that they select by, and what else decides where machines may be, at one instant
//! of the store.

use super::hosts::Hosts;
use crate::records::NodeRecord;
use keel_balance::Name;
use keel_balance::rules::{Holders, Labels, Rule, Subject};
use keel_cluster::failover::ZONE;
use keel_cluster::{MachineName, NodeName};
use keel_machine::kind::{Features, KindName};
use keel_machine::spec::Record;
use keel_store::Store;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{Compare, KeyValue, Revision};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Rules, the labels that they select by, drains, and what hosts execute, at one instant of the store.
#[derive(Debug, Clone, Default)]
pub(crate) struct RuleSet {
    pub(crate) rules: Vec<Rule>,
    revision: Option<Revision>,
    node_labels: BTreeMap<Name, Labels>,
    machine_labels: BTreeMap<Name, Labels>,
    /// Nodes that are being drained.
    pub(crate) drains: BTreeMap<Name, Drain>,
    pub(crate) hosts: Hosts,
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
                self.hosts.take(node, record);
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
        self.hosts
            .retain(|it| !node(it).is_some_and(|it| is_gone(Key::Node(it))));
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

    /// Whether a rule forbids a machine on a node for good, whatever else is placed where.
    fn forbids_for_good(&self, machine: &Subject, node: &Subject) -> bool {
        let lasting = self.rules.iter();
        let mut lasting = lasting.filter(|rule| !rule.counts() && rule.applies_to(machine));
        let (nobody, nowhere) = (Holders::new(), BTreeSet::new());
        lasting.any(|rule| rule.claim(machine, node, &nobody, &nowhere).is_err())
    }

    /// What hosts offer to a machine of a kind on the nodes where it may run, as far as it is known.
    pub(super) fn offers_for(&self, machine: &str, kind: &KindName) -> Vec<(Name, Features)> {
        let machine = self.machine(machine);
        let offers = self.hosts.offers(kind);
        let may = offers.filter(|(node, _)| !self.forbids_for_good(&machine, &self.node(node)));
        may.map(|(node, features)| (node.clone(), features.clone()))
            .collect()
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
