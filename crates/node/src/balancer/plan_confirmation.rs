//! Checks that a plan which a user confirmed is the one that was shown, and that the cluster has
//! not changed since. Otherwise no step is carried out: a partly outdated plan is not the plan
//! that the user confirmed.

use super::handle::NodeBalancer;
use crate::error::CommandError;
use crate::records::{self, RecordError};
use keel_api::{PlanRequest, PlanStep, PlannedMachine};
use keel_cluster::{MachineName, NodeName};
use keel_store::keys::Key;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Hexadecimal digits of an id.
const ID_DIGITS: usize = 16;
/// The most steps of a request.
const STEPS_MAX: usize = 100_000;

/// The id of a list of steps and of the machines that they were made for. It does not cover
/// predictions.
pub(super) fn id(steps: &[PlanStep], machines: &[PlannedMachine]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut word = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    for step in steps {
        for name in [&step.machine, &step.from, &step.to] {
            word(name);
        }
        word(&format!("{} {}", step.wave, step.hop));
    }
    word("machines");
    for it in machines {
        for name in [&it.machine, &it.node, &it.epoch] {
            word(name);
        }
    }
    hasher.finalize().to_hex()[..ID_DIGITS].to_owned()
}

/// # Errors
/// [`CommandError::Invalid`] if the steps do not match the id, or there are no machines;
/// [`CommandError::Conflict`] with everything that has changed since.
pub(super) async fn check(
    handle: &Arc<NodeBalancer>,
    plan: &PlanRequest,
) -> Result<(), CommandError> {
    let bad = |what: &str| Err(CommandError::Invalid(format!("{what}; nothing was moved")));
    if plan.steps.len() > STEPS_MAX {
        return bad("the plan has too many steps");
    }
    if plan.id != id(&plan.steps, &plan.machines) {
        return bad("these are not the steps of the plan with that id");
    }
    let known: BTreeMap<&str, &PlannedMachine> = plan
        .machines
        .iter()
        .map(|it| (it.machine.as_str(), it))
        .collect();
    if plan
        .steps
        .iter()
        .any(|step| !known.contains_key(&*step.machine))
    {
        return bad("the plan does not say where each of its machines was");
    }
    let mut changes = Vec::new();
    for it in known.values() {
        changes.extend(machine_change(handle, it).await?);
    }
    let alive = records::alive(&*handle.context.store).await?;
    let targets: BTreeSet<&str> = plan.steps.iter().map(|step| step.to.as_str()).collect();
    for target in targets {
        let node =
            NodeName::new(target).map_err(|error| CommandError::Invalid(error.to_string()))?;
        let drained = Key::Drain(node.clone()).to_string();
        if !handle.context.members.contains(&node) {
            changes.push(format!("node {target} is no member"));
        } else if !alive.contains(&node) {
            changes.push(format!("node {target} does not answer"));
        } else if handle.context.store.get(&drained).await?.is_some() {
            changes.push(format!("node {target} is being drained"));
        }
    }
    match changes.is_empty() {
        true => Ok(()),
        false => Err(CommandError::Conflict(format!(
            "the cluster changed since the plan was made, so nothing was moved: {} \
             (`keel balance --plan` makes a new plan)",
            changes.join(", ")
        ))),
    }
}

/// Change of a machine since a plan was made, if any.
async fn machine_change(
    handle: &NodeBalancer,
    planned: &PlannedMachine,
) -> Result<Option<String>, CommandError> {
    let name = &planned.machine;
    let machine =
        MachineName::new(name).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let record = match records::get(&*handle.context.store, &machine).await {
        Ok(found) => found.record,
        Err(RecordError::NoMachine(_)) => return Ok(Some(format!("machine {name} was removed"))),
        Err(error) => return Err(error.into()),
    };
    Ok(if record.status.ended() {
        Some(format!("machine {name} is {}", record.status.word()))
    } else if record.owner.as_str() != planned.node {
        Some(format!(
            "machine {name} moved from {} to {}",
            planned.node, record.owner
        ))
    } else if record.epoch.to_string() != planned.epoch {
        Some(format!(
            "machine {name} was moved, or started again, on {}",
            planned.node
        ))
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_balance::cost::Estimate;

    fn step(machine: &str, to: &str) -> PlanStep {
        let nothing = Estimate::default();
        PlanStep {
            machine: machine.into(),
            from: "a".into(),
            to: to.into(),
            wave: 0,
            hop: false,
            bytes: 7,
            duration_ms: nothing,
            downtime_ms: nothing,
        }
    }

    #[test]
    fn an_id_is_of_steps_and_of_where_machines_were() {
        let machine = |epoch: &str| PlannedMachine {
            machine: "m".into(),
            node: "a".into(),
            epoch: epoch.into(),
        };
        let first = id(&[step("m", "b")], &[machine("1.1")]);
        assert_eq!(first.len(), ID_DIGITS);
        let again = PlanStep {
            bytes: 8,
            ..step("m", "b")
        };
        assert_eq!(
            first,
            id(&[again], &[machine("1.1")]),
            "predictions do not count"
        );
        for other in [
            id(&[step("m", "c")], &[machine("1.1")]),
            id(&[step("n", "b")], &[machine("1.1")]),
            id(&[step("m", "b")], &[machine("1.2")]),
            id(&[step("m", "b"), step("m", "c")], &[machine("1.1")]),
            id(&[step("m", "b")], &[]),
        ] {
            assert_ne!(first, other);
        }
    }
}
