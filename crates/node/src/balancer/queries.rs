//! Queries of users and other nodes: loads, the ledger, why a machine does not move; and commands
//! of users: the policy, confirmed moves.

use super::handle::NodeBalancer;
use super::ledger::LedgerFilter;
use super::peers::{CONFIRM, HISTORY, LEDGER, LOAD, WHY_NOT, ask, ask_all, ask_node};
use super::policy::policy_of;
use super::recorder::HistoryRange;
use crate::error::CommandError;
use crate::records;
use keel_api::{BalanceInfo, HistoryInfo, HistoryPoint, LedgerInfo, NodeLoad, WhyNot};
use keel_balance::Name;
use keel_balance::ledger::Line;
use keel_balance::policy::Policy;
use keel_balance::round::{Event, Request, Response};
use keel_cluster::{MachineName, NodeName};
use keel_store::keys::Key;
use keel_store::{Txn, TxnOutcome};
use std::sync::{Arc, PoisonError};

/// This node's load, as seen by its balancer.
pub(super) async fn load(handle: &NodeBalancer) -> Result<NodeLoad, String> {
    let node = handle.context.name.to_string();
    let traffic = handle.traffic.lock();
    let traffic = traffic.unwrap_or_else(PoisonError::into_inner).clone();
    let load = handle.query(move |balancer, now_ms, _| NodeLoad {
        node,
        traffic,
        side: balancer.node_state(),
        sample: balancer.sample().cloned(),
        policy_revision: balancer.policy().1,
        proposals: balancer.proposals(now_ms),
        model_error: balancer.model().error(),
    });
    load.await
}

/// Loads of all nodes, and the policy.
pub(crate) async fn gather_loads(handle: &Arc<NodeBalancer>) -> Result<BalanceInfo, CommandError> {
    let entry = handle.context.store.get(&Key::Policy.to_string()).await?;
    let (policy, revision) = policy_of(entry.as_ref()).map_err(CommandError::Conflict)?;
    let (mut nodes, silent): (Vec<NodeLoad>, _) =
        ask_all(handle, LOAD, &LedgerFilter::default(), |it, _| async move {
            load(&it).await
        })
        .await;
    nodes.sort_by(|one, other| one.node.cmp(&other.node));
    Ok(BalanceInfo {
        policy,
        revision,
        nodes,
        silent,
    })
}

/// The measured history of a node, or of a machine wherever it was.
///
/// # Errors
/// [`CommandError::NotFound`] if there is no such node, or it does not answer.
pub(crate) async fn history(
    handle: &Arc<NodeBalancer>,
    node: Option<&NodeName>,
    range: &HistoryRange,
) -> Result<HistoryInfo, CommandError> {
    let Some(node) = node else {
        let (told, silent): (Vec<Vec<HistoryPoint>>, _) =
            ask_all(handle, HISTORY, range, |it, range| async move {
                it.recorder.of(range).await
            })
            .await;
        let points = told.into_iter().flatten().collect();
        let points = keel_api::history_in_points(points, range.points_max);
        return Ok(HistoryInfo { points, silent });
    };
    if !handle.context.members.contains(node) {
        let what = format!("there is no node {node:?} (see `keel nodes`)");
        return Err(CommandError::NotFound(what));
    }
    let points = ask_node(
        handle,
        node,
        HISTORY,
        range,
        handle.recorder.of(range.clone()),
    )
    .await?;
    Ok(HistoryInfo {
        points,
        silent: Vec::new(),
    })
}

/// The ledgers of all nodes, oldest line first.
pub(crate) async fn gather_ledger(handle: &Arc<NodeBalancer>, filter: &LedgerFilter) -> LedgerInfo {
    let (told, silent): (Vec<Vec<Line>>, _) =
        ask_all(handle, LEDGER, filter, |it, filter| async move {
            it.ledger.newest(filter).await
        })
        .await;
    let mut lines: Vec<Line> = told.into_iter().flatten().collect();
    // Several nodes may have the same line, which was sent with a machine.
    let order = |line: &Line| (line.at_unix_ms, line.node.clone());
    lines.sort_by_cached_key(|line| (order(line), line.decision.to_string()));
    lines.dedup();
    let excess = lines.len().saturating_sub(filter.limit as usize);
    lines.drain(..excess);
    LedgerInfo { lines, silent }
}

/// Why a machine does not move to a node, queried from any node.
pub(crate) async fn why_not(
    handle: &Arc<NodeBalancer>,
    machine: &MachineName,
    to: &NodeName,
) -> Result<WhyNot, CommandError> {
    let owner = records::get(&*handle.context.store, machine)
        .await?
        .record
        .owner;
    if !handle.context.members.contains(to) {
        let what = format!("there is no node {to:?} (see `keel nodes`)");
        return Err(CommandError::NotFound(what));
    }
    if owner == *to {
        let what = format!("machine {machine:?} is on {to} already");
        return Err(CommandError::Conflict(what));
    }
    let here = why_not_here(handle, machine, to);
    ask_node(handle, &owner, WHY_NOT, &(machine, to), here).await
}

/// The same for a machine that runs here.
pub(super) async fn why_not_here(
    handle: &NodeBalancer,
    machine: &MachineName,
    to: &NodeName,
) -> Result<WhyNot, String> {
    let measuring = || "this node has not measured for long enough; try again in some seconds";
    let asked = handle.query(|balancer, _, _| balancer.weigh_request());
    let (machines, question) = asked.await?.ok_or_else(measuring)?;
    let view = match ask(handle, to.as_str(), &Request::View).await? {
        Response::View(view) => view,
        Response::NotReady => return Err(format!("{to} has not measured for long enough")),
        other => return Err(format!("{to} gave an unexpected answer: {other:?}")),
    };
    let weights = match ask(handle, to.as_str(), &question).await? {
        Response::Weights(weights) => weights,
        other => return Err(format!("{to} gave an unexpected answer: {other:?}")),
    };
    let peer: Name = to.as_str().into();
    let explained = handle.query(move |balancer, now_ms, rules| {
        balancer.explain(&peer, view, &machines, &weights, now_ms, rules)
    });
    let explained = explained.await?.ok_or_else(measuring)?;
    Ok(WhyNot {
        machine: machine.to_string(),
        node: handle.context.name.to_string(),
        to: to.to_string(),
        explained,
    })
}

/// Sets the policy, if its revision is still the one that the change is based on.
pub(crate) async fn change_policy(
    handle: &Arc<NodeBalancer>,
    policy: &Policy,
    from: u64,
) -> Result<(), CommandError> {
    policy
        .check()
        .map_err(|error| CommandError::Invalid(error.to_string()))?;
    let value =
        serde_json::to_vec(policy).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let txn = match from {
        0 => Txn::new().when_absent(Key::Policy),
        revision => Txn::new().when_modified_at(Key::Policy, revision),
    };
    match handle
        .context
        .store
        .txn(txn.put(Key::Policy, value))
        .await?
    {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Refused { .. } => Err(CommandError::Conflict(
            "the policy was changed concurrently; check it, and try again".into(),
        )),
    }
}

/// Confirms a proposed move. The machine's node knows whether the proposal is still valid.
pub(crate) async fn confirm(
    handle: &Arc<NodeBalancer>,
    machine: &MachineName,
) -> Result<(), CommandError> {
    let owner = records::get(&*handle.context.store, machine)
        .await?
        .record
        .owner;
    ask_node(
        handle,
        &owner,
        CONFIRM,
        machine,
        confirm_here(handle, machine),
    )
    .await
}

/// The same for a machine that runs here.
pub(super) async fn confirm_here(
    handle: &NodeBalancer,
    machine: &MachineName,
) -> Result<(), String> {
    let name: Name = machine.as_str().into();
    let asked = name.clone();
    let proposals = handle.query(move |balancer, now_ms, _| balancer.proposals(now_ms));
    let proposed = proposals
        .await?
        .into_iter()
        .any(|(machine, _)| machine == asked);
    if !proposed {
        return Err(format!(
            "no move of {machine:?} waits to be confirmed (see `keel balance`)"
        ));
    }
    handle.tell(Event::Confirmed { machine: name });
    Ok(())
}
