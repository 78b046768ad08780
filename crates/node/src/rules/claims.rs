//! The compares and writes of a transaction that places a machine, which keep the rules, with or
//! without a balancer.

use super::rule_set::{RuleSet, placed};
use crate::error::CommandError;
use keel_balance::rules::{Claim, Rule, Subject, Violation, holders_of};
use keel_cluster::{MachineName, NodeName};
use keel_store::Store;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{Compare, Op, Revision, Txn};
use std::collections::{BTreeMap, BTreeSet};

/// Why a machine cannot be placed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0}")]
    Broken(Violation),
    #[error("node {0:?} is being drained (`keel undrain {0}` ends the drain)")]
    Draining(NodeName),
    #[error("{0}")]
    Damaged(String),
}

/// The compares and writes that a placement adds to its transaction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims {
    compare: Vec<(Compare, String)>,
    then: Vec<Op>,
}

impl Claims {
    /// Appends them to a transaction.
    pub(crate) fn add_to(&self, mut txn: Txn) -> Txn {
        let compares = self.compare.iter().map(|(compare, _)| compare.clone());
        txn.compare.extend(compares);
        txn.then.extend(self.then.iter().cloned());
        txn
    }

    /// The rule that was changed concurrently, if these claims were appended behind `before`
    /// compares and the `failed`-th one did not hold.
    pub(crate) fn raced(&self, failed: usize, before: usize) -> Option<&str> {
        let (_, rule) = self.compare.get(failed.checked_sub(before)?)?;
        Some(rule)
    }
}

impl From<ClaimError> for CommandError {
    fn from(error: ClaimError) -> Self {
        match error {
            ClaimError::Store(error) => error.into(),
            error @ (ClaimError::Broken(_) | ClaimError::Draining(_) | ClaimError::Damaged(_)) => {
                CommandError::Conflict(error.to_string())
            }
        }
    }
}

/// The claims for placing a machine on a node.
///
/// # Errors
/// [`ClaimError::Broken`] if a rule forbids it.
pub(super) async fn claim_in(
    store: &dyn Store,
    members: &[NodeName],
    machine: &MachineName,
    target: &NodeName,
) -> Result<Claims, ClaimError> {
    let drain = Key::Drain(target.clone()).to_string();
    if store.get(&drain).await?.is_some() {
        return Err(ClaimError::Draining(target.clone()));
    }
    let set = RuleSet::load(store).await?;
    let open = (Compare::Absent { key: drain }, "(a drain)".to_owned());
    let mut claims = Claims {
        compare: vec![set.unchanged(), open],
        then: Vec::new(),
    };
    let this = set.machine(machine.as_str());
    let node = set.node(target.as_str());
    let about: Vec<&Rule> = set.rules.iter().filter(|it| it.applies_to(&this)).collect();
    if about.is_empty() {
        return Ok(claims);
    }
    // Before the records: each change of a record later changes these keys too.
    let mut revisions: BTreeMap<String, Revision> = BTreeMap::new();
    for rule in &about {
        let name = rule_name(&rule.name)?;
        for entry in store.list(&keys::domains_of(&name)).await?.entries {
            revisions.insert(entry.key, entry.modified);
        }
    }
    let placed = placed(&set, &crate::records::all(store).await.map_err(damaged)?);
    let nodes: Vec<Subject> = members.iter().map(|it| set.node(it.as_str())).collect();
    let holders = holders_of(&set.rules, &placed, &nodes);
    let alive = crate::records::alive(store).await?;
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
