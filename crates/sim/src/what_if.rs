//! Changes of a scenario, for comparison: fewer nodes, more nodes, another policy.

use crate::bad_input::hint;
use crate::scenario::{Cluster, change_policy, merge};
use crate::world::{ExternalEvent, NodeSpec};
use keel_balance::Name;
use std::str::FromStr;

/// Maximum number of added nodes.
const ADDED_MAX: usize = 10_000;

/// One change: `remove-node=NAME`, `add-node=COUNT` or `policy.KEY=VALUE`.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A node is missing; its machines start on the least loaded others.
    RemoveNode(String),
    /// Additional nodes, like the first one.
    AddNode(usize),
    Policy(toml::Table),
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let examples = "examples: remove-node=n3, add-node=2, policy.margin=0.2";
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} has no value ({examples})"))?;
        match key {
            "remove-node" => Ok(Change::RemoveNode(value.to_owned())),
            "add-node" => match value.parse() {
                Ok(count) if (1..=ADDED_MAX).contains(&count) => Ok(Change::AddNode(count)),
                _ => Err(format!("{value:?} nodes: 1 to {ADDED_MAX} are possible")),
            },
            _ => {
                let key = key.strip_prefix("policy.").ok_or_else(|| {
                    let known = ["remove-node", "add-node", "policy."];
                    let hint = hint(key, known.into_iter());
                    format!("{key:?} is not a change; {hint} ({examples})")
                })?;
                let plain = |value: &str| toml::from_str(&format!("{key} = {value}"));
                // A string may come without its quotes, which shells remove.
                let table = plain(value).or_else(|_| plain(&format!("{value:?}")));
                let table: toml::Table =
                    table.map_err(|_| format!("{text:?} is not a key and value of a policy"))?;
                Ok(Change::Policy(table))
            }
        }
    }
}

/// Changes of a scenario.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WhatIf {
    /// In order of application.
    pub changes: Vec<Change>,
}

impl WhatIf {
    /// Makes the changes.
    ///
    /// # Errors
    /// A sentence: which node or key there is not.
    pub(crate) fn change(&self, cluster: &mut Cluster) -> Result<(), String> {
        // Keys of the policy count together: one alone may contradict another's default.
        let mut policy = toml::Table::new();
        for change in &self.changes {
            match change {
                Change::RemoveNode(name) => remove(cluster, name)?,
                Change::AddNode(count) => add(cluster, *count)?,
                Change::Policy(table) => merge(&mut policy, table),
            }
        }
        let settings = &mut cluster.settings;
        settings.policy = change_policy(&settings.policy, &policy)?;
        for (_, what) in &mut cluster.events {
            if let ExternalEvent::Policy(later) = what {
                **later = change_policy(later, &policy)?;
            }
        }
        Ok(())
    }
}

fn remove(cluster: &mut Cluster, name: &str) -> Result<(), String> {
    let nodes = cluster.nodes.iter().map(|it| &*it.name);
    let Some(gone) = nodes.clone().position(|it| it == name) else {
        return Err(format!("there is no node {name:?}; {}", hint(name, nodes)));
    };
    cluster.nodes[gone].there = false;
    cluster.events.retain(|(_, what)| match what {
        ExternalEvent::NodeFails(node) | ExternalEvent::NodeStarts(node) => *node != gone,
        _ => true,
    });
    let weights = cluster.settings.policy.weights;
    // Load and free memory of each node during placement.
    let mut loads = vec![0.0; cluster.nodes.len()];
    let mut free: Vec<u64> = cluster
        .nodes
        .iter()
        .map(|it| it.capacity.memory_bytes)
        .collect();
    let mut homeless = Vec::new();
    for (number, machine) in cluster.machines.iter().enumerate() {
        if machine.node == gone {
            homeless.push(number);
        } else {
            let factors = machine.factors(0, &cluster.nodes[machine.node].capacity);
            loads[machine.node] += factors.weigh(&cluster.nodes[machine.node].capacity, &weights);
            free[machine.node] = free[machine.node].saturating_sub(machine.memory_bytes);
        }
    }
    for number in homeless {
        let machine = &mut cluster.machines[number];
        let node = (0..cluster.nodes.len())
            .filter(|&node| cluster.nodes[node].there && free[node] >= machine.memory_bytes)
            .min_by(|&one, &other| loads[one].total_cmp(&loads[other]))
            .ok_or_else(|| {
                format!(
                    "without {name:?} no node has the memory for {:?}",
                    machine.name
                )
            })?;
        machine.node = node;
        let capacity = &cluster.nodes[node].capacity;
        loads[node] += machine.factors(0, capacity).weigh(capacity, &weights);
        free[node] -= machine.memory_bytes;
    }
    Ok(())
}

fn add(cluster: &mut Cluster, count: usize) -> Result<(), String> {
    let like = cluster.nodes.iter().position(|it| it.there);
    let like = like.ok_or("there is no node to copy")?;
    for number in 1..=count {
        let name: Name = format!("added-{number}").into();
        let taken = cluster.nodes.iter().any(|it| it.name == name);
        if taken || cluster.machines.iter().any(|it| it.name == name) {
            return Err(format!("there is a {name:?} already"));
        }
        cluster.nodes.push(NodeSpec {
            name,
            capacity: cluster.nodes[like].capacity,
            there: true,
        });
        cluster.power.push(cluster.power[like]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Change;

    #[test]
    fn changes_are_read_as_people_write_them() {
        let policy = |text: &str| Change::Policy(toml::from_str(text).unwrap());
        for (text, change) in [
            ("remove-node=N3", Change::RemoveNode("N3".into())),
            ("add-node=2", Change::AddNode(2)),
            ("policy.margin=0.2", policy("margin = 0.2")),
            ("policy.strategy=pack", policy("strategy = \"pack\"")),
            ("policy.weights.cpu=2.0", policy("weights.cpu = 2.0")),
        ] {
            assert_eq!(text.parse(), Ok(change));
        }
        for (text, says) in [
            ("add-node", "has no value"),
            ("add-node=0", "1 to 10000 are possible"),
            ("add-node=-1", "1 to 10000 are possible"),
            ("remove-nod=n1", "did you mean \"remove-node\"?"),
            ("policy.=1", "not a key and value"),
        ] {
            let error = text.parse::<Change>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
