//! What the hosts of nodes execute and offer, as their records say it, and which machines can run
//! there: like rules, but made by hosts. What a record says may be outdated: a host says it when its
//! agent starts.

use crate::records::{Needs, NodeRecord};
use keel_balance::Name;
use keel_balance::rules::{Requirement, Rule, Selector, Violation};
use keel_machine::kind::{Features, KindName, some_of};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What forbids a machine on a node whose host does not execute its kind, as rules have names.
const KIND: &str = "kind";
/// What forbids a machine on a node whose host does not offer what it needs.
const FEATURES: &str = "features";

/// What a host executes and offers.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    executes: BTreeSet<KindName>,
    offers: BTreeMap<KindName, Features>,
}

impl Host {
    /// What forbids a machine here: the name of the rule, and why, to follow the node's name.
    fn forbids(&self, needs: &Needs) -> Option<(&'static str, String)> {
        let kind = &needs.kind;
        if !self.executes.contains(kind) {
            let why = format!("does not execute machines of kind {kind}");
            return Some((KIND, why));
        }
        let nothing = Features::new();
        // An agent that says nothing of it may be of a version that cannot read what the machine needs.
        let offers = self.offers.get(kind).unwrap_or(&nothing);
        let mut missing = needs.features.difference(offers).peekable();
        missing.peek()?;
        Some((FEATURES, format!("lacks {}", some_of(missing))))
    }
}

/// The hosts of the nodes of which it is known. Equal ones are kept once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hosts(BTreeMap<Name, Arc<Host>>);

impl Hosts {
    /// Takes what a node's record says; `None` if there is none.
    pub(super) fn take(&mut self, node: Name, record: Option<NodeRecord>) {
        let host = record.and_then(|record| {
            Some(Host {
                executes: record.executes?,
                offers: record.offers,
            })
        });
        let Some(host) = host else {
            self.0.remove(&node);
            return;
        };
        let known = self.0.values().find(|known| ***known == host).cloned();
        self.0.insert(node, known.unwrap_or_else(|| Arc::new(host)));
    }

    /// Keeps only what is known of these nodes.
    pub(super) fn retain(&mut self, is_kept: impl Fn(&Name) -> bool) {
        self.0.retain(|node, _| is_kept(node));
    }

    /// Whether they differ, so that it matters on which of them a machine is.
    pub(super) fn differ(&self) -> bool {
        let mut all = self.0.values();
        let first = all.next();
        all.any(|host| Some(host) != first)
    }

    /// That a node's host cannot run a machine, if that is known.
    pub(crate) fn forbids(&self, needs: &Needs, node: &str) -> Option<Violation> {
        let (rule, why) = self.0.get(node)?.forbids(needs)?;
        Some(Violation {
            rule: rule.into(),
            why: format!("the host of {node} {why}"),
        })
    }

    /// What hosts offer to machines of a kind, by node, as far as it is known.
    pub(super) fn offers(&self, kind: &KindName) -> impl Iterator<Item = (&Name, &Features)> {
        let all = self.0.iter();
        all.filter_map(move |(node, host)| Some((node, host.offers.get(kind)?)))
    }

    /// The same as rules, for machines with what they need.
    pub(crate) fn as_rules(&self, machines: &BTreeMap<Needs, Vec<String>>) -> Vec<Rule> {
        let of = |names: Vec<String>| Selector {
            names,
            ..Selector::default()
        };
        let mut rules = Vec::new();
        // An empty selector would select everything.
        for (needs, machines) in machines.iter().filter(|(_, all)| !all.is_empty()) {
            let mut forbidden: BTreeMap<&str, Vec<String>> = BTreeMap::new();
            for (node, host) in &self.0 {
                if let Some((rule, _)) = host.forbids(needs) {
                    forbidden.entry(rule).or_default().push(node.to_string());
                }
            }
            rules.extend(forbidden.into_iter().map(|(rule, nodes)| Rule {
                name: rule.into(),
                machines: of(machines.clone()),
                requirement: Requirement::Avoid { nodes: of(nodes) },
            }));
        }
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(executes: Option<&[&str]>, offers: &[&str]) -> NodeRecord {
        let kinds = |all: &[&str]| all.iter().map(|it| it.parse().unwrap()).collect();
        let offers: Features = offers.iter().map(|it| (*it).to_owned()).collect();
        NodeRecord {
            address: String::new(),
            cpus: 1,
            memory_bytes: 1,
            features: Vec::new(),
            lacks: Vec::new(),
            kinds: Vec::new(),
            executes: executes.map(kinds),
            offers: match offers.is_empty() {
                true => BTreeMap::new(),
                false => BTreeMap::from([("qemu".parse().unwrap(), offers)]),
            },
            version: String::new(),
        }
    }

    fn needs(kind: &str, features: &[&str]) -> Needs {
        let features = features.iter().map(|it| (*it).to_owned());
        Needs {
            kind: kind.parse().unwrap(),
            features: Arc::new(features.collect()),
        }
    }

    #[test]
    fn a_host_forbids_what_it_does_not_execute_or_lacks() {
        let both: &[&str] = &["qemu", "wasm"];
        let mut hosts = Hosts::default();
        hosts.take("a".into(), Some(record(Some(both), &["tcg", "tcg:avx"])));
        hosts.take("c".into(), Some(record(None, &[])));
        assert!(!hosts.differ());
        hosts.take("e".into(), Some(record(Some(both), &["tcg", "tcg:avx"])));
        assert!(!hosts.differ());
        assert!(Arc::ptr_eq(&hosts.0["a"], &hosts.0["e"]), "kept once");
        hosts.take("b".into(), Some(record(Some(&["wasm"]), &[])));
        assert!(hosts.differ());
        // Of an older agent.
        hosts.take("f".into(), Some(record(Some(both), &[])));
        hosts.take("g".into(), Some(record(Some(both), &["tcg"])));
        let (wasm, plain) = (needs("wasm", &[]), needs("qemu", &["tcg"]));
        let fast = needs("qemu", &["tcg", "tcg:avx"]);
        for (needs, allowed) in [(&wasm, "abcdefg"), (&plain, "acdeg"), (&fast, "acde")] {
            for node in ["a", "b", "c", "d", "e", "f", "g"] {
                let forbidden = hosts.forbids(needs, node);
                assert_eq!(
                    forbidden.is_none(),
                    allowed.contains(node),
                    "{needs:?} {node}"
                );
            }
        }
        let broken = hosts.forbids(&plain, "b").unwrap();
        assert_eq!(&*broken.rule, KIND);
        assert!(broken.why.contains("host of b does not execute"));
        let broken = hosts.forbids(&fast, "g").unwrap();
        assert_eq!(&*broken.rule, FEATURES);
        assert_eq!(broken.why, "the host of g lacks tcg:avx");
        let offered: Vec<&str> = hosts.offers(&fast.kind).map(|(node, _)| &**node).collect();
        assert_eq!(offered, ["a", "e", "g"]);

        let machines = BTreeMap::from([
            (fast, vec!["s".to_owned()]),
            (plain, Vec::new()),
            (wasm, vec!["w".to_owned()]),
        ]);
        let rules = hosts.as_rules(&machines);
        let shown: Vec<String> = rules
            .iter()
            .map(|rule| format!("{} {}", rule.name, rule.requirement))
            .collect();
        assert_eq!(shown, ["features not on f g", "kind not on b"]);
        assert!(rules.iter().all(|rule| rule.machines.names == ["s"]));
        hosts.retain(|node| **node == *"a");
        assert!(!hosts.differ());
    }
}
