//! Placing or moving one machine: what of a rule's holders a transaction compares and writes, or why
//! the rule does not allow it. The transaction is left to the node.

use super::{Holders, Requirement, Rule, Subject, Violation};
use crate::Name;
use std::collections::BTreeSet;

/// The change of one rule's holders by a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub rule: Name,
    /// Domains whose holders must be unchanged since they were read: all that the rule depends on.
    pub reads: BTreeSet<String>,
    /// New holders of the changed domains.
    pub writes: Holders,
}

impl Rule {
    /// The claim for placing a machine on a node: `None` if the rule does not apply or nothing
    /// changes. `holders` are those of all its domains, of live machines; `domains` are all domains
    /// of live nodes.
    ///
    /// # Errors
    /// [`Violation`] if the rule does not allow it.
    pub fn claim(
        &self,
        machine: &Subject,
        node: &Subject,
        holders: &Holders,
        domains: &BTreeSet<String>,
    ) -> Result<Option<Claim>, Violation> {
        if !self.applies_to(machine) {
            return Ok(None);
        }
        let name = &machine.name;
        match &self.requirement {
            Requirement::Pin { nodes } if !nodes.fits(&node.name, &node.labels) => {
                return Err(self.violation(format!("{} is not one of them", node.name)));
            }
            Requirement::Avoid { nodes } if nodes.fits(&node.name, &node.labels) => {
                return Err(self.violation(format!("{} is one of them", node.name)));
            }
            _ if !self.counts() => return Ok(None),
            _ => {}
        }
        let target = self.per().of(&node.name, &node.labels);
        let before: Vec<&String> = holders
            .iter()
            .filter(|(_, machines)| machines.contains(name))
            .map(|(domain, _)| domain)
            .collect();
        if before == [&target] {
            return Ok(None);
        }
        let mut after = holders.clone();
        for machines in after.values_mut() {
            machines.remove(name);
        }
        after
            .entry(target.clone())
            .or_default()
            .insert(name.clone());
        self.check_counts(&target, &after, domains)?;
        let mut writes = Holders::new();
        for domain in before.into_iter().chain([&target]) {
            let machines = after.get(domain).cloned().unwrap_or_default();
            writes.insert(domain.clone(), machines);
        }
        // An `apart` rule depends on the target's domain only; the others on all.
        let reads = match self.requirement {
            Requirement::Apart { .. } => writes.keys().cloned().collect(),
            _ => {
                let all = holders.keys().chain(domains).chain([&target]);
                all.cloned().collect()
            }
        };
        Ok(Some(Claim {
            rule: self.name.clone(),
            reads,
            writes,
        }))
    }

    fn check_counts(
        &self,
        target: &str,
        after: &Holders,
        domains: &BTreeSet<String>,
    ) -> Result<(), Violation> {
        let count = |domain: &str| after.get(domain).map_or(0, BTreeSet::len);
        let used = after
            .values()
            .filter(|machines| !machines.is_empty())
            .count();
        match &self.requirement {
            Requirement::Together { per } if used > 1 => {
                let elsewhere = after
                    .iter()
                    .find(|(domain, machines)| domain.as_str() != target && !machines.is_empty());
                let elsewhere = elsewhere.map_or("", |(domain, _)| domain.as_str());
                Err(self.violation(format!("others are on {per} {elsewhere}")))
            }
            Requirement::Apart { per, max } if count(target) > *max as usize => {
                Err(self.violation(format!("{per} {target} has {} already", count(target) - 1)))
            }
            Requirement::Spread { per, skew } => {
                let least = domains
                    .iter()
                    .map(|domain| count(domain))
                    .min()
                    .unwrap_or(0);
                if count(target) > least + *skew as usize {
                    return Err(self.violation(format!(
                        "{per} {target} would have {}, another one has {least}",
                        count(target)
                    )));
                }
                Ok(())
            }
            Requirement::Licence { nodes_max } if used > *nodes_max as usize => {
                Err(self.violation(format!("{nodes_max} are in use already")))
            }
            _ => Ok(()),
        }
    }
}
