//! Commands on a machine are carried out by the agent of its owner. This module finds the owner
//! from any node.
//!
//! A command is a type of the layer that carries it out ([`MachineCommand`]). The layer's handle
//! calls [`at_owner`] with the method for this node; the rpc front calls the same method for other
//! nodes.

use super::machine::get;
use crate::context::Context;
use crate::error::CommandError;
use keel_cluster::MachineName;
use keel_machine::kind::Kind;
use keel_machine::spec::Spec;
use keel_machine::worker::control::{pack, unpack};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Default time limit of an owner's answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A command on a machine, carried out by the agent of its owner.
pub(crate) trait MachineCommand: Serialize + DeserializeOwned + Send {
    /// Number of the request between agents.
    const KIND: u16;
    /// Time limit of the owner's answer.
    const PATIENCE: Duration = PATIENCE;
    /// Whether the command or its answer has much data.
    const IS_BULK: bool = false;
    /// The owner's answer.
    type Answer: Serialize + DeserializeOwned + Send;

    /// The machine, whose owner carries out the command.
    fn machine(&self) -> &MachineName;

    /// What the machine itself may add to the time limit.
    fn extra_patience(_kind: &dyn Kind, _spec: &Spec) -> Duration {
        Duration::ZERO
    }
}

/// Has a command carried out by the owner of its machine: by `here` on this node, by a request on
/// another one.
///
/// # Errors
/// [`CommandError`] of the owner, or if it does not answer.
pub(crate) async fn at_owner<C, F>(
    context: &Context,
    command: C,
    here: impl FnOnce(C) -> F,
) -> Result<C::Answer, CommandError>
where
    C: MachineCommand,
    F: Future<Output = Result<C::Answer, CommandError>>,
{
    let record = get(&*context.store, command.machine()).await?.record;
    let owner = record.owner;
    if owner == context.name {
        return here(command).await;
    }
    let kind = context.kinds.of(&record.spec);
    let extra = kind.map_or(Duration::ZERO, |kind| C::extra_patience(kind, &record.spec));
    let patience = C::PATIENCE + extra;
    let invalid = |error: String| CommandError::Invalid(error);
    let unavailable = |error: String| CommandError::Unavailable(error);
    let payload = pack(&command).map_err(|error| invalid(error.to_string()))?;
    let peers = &context.peers;
    let answer = match C::IS_BULK {
        true => peers.bulk_call(&owner, C::KIND, payload, patience).await,
        false => peers.call(&owner, C::KIND, payload, patience).await,
    };
    let answer = answer.map_err(|error| unavailable(error.to_string()))?;
    unpack(&answer).map_err(|error| unavailable(error.to_string()))?
}
