//! What users and other nodes ask of balancers: loads, the ledger, why something does
//! not move; and what users change: the policy, confirmed moves.

use super::{Span, Wanted, ask, policy_of};
use crate::agent::Agent;
use crate::operate::OperateError;
use crate::service::kind as node_kind;
use keel_api::{BalanceInfo, HistoryInfo, HistoryPoint, LedgerInfo, NodeLoad, Silence, WhyNot};
use keel_balance::Name;
use keel_balance::ledger::Line;
use keel_balance::policy::Policy;
use keel_balance::round::{Event, Request, Response};
use keel_cluster::keys::Key;
use keel_cluster::store::{Txn, TxnOutcome};
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::{pack, unpack};
use keel_net::{Bytes, RpcError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

/// How long a node may take to tell.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers a user or another node, as JSON: so that older and newer versions
/// understand each other.
pub(crate) async fn answer(agent: &Agent, kind: u16, payload: Bytes) -> Result<Vec<u8>, String> {
    let json = match kind {
        node_kind::LOAD => serde_json::to_vec(&load(agent).await?),
        node_kind::LEDGER => {
            let wanted: Wanted = unpack(&payload).map_err(|error| error.to_string())?;
            let lines = agent.balancer.ledger().newest(wanted).await?;
            serde_json::to_vec(&lines)
        }
        node_kind::LEDGER_ALONG => {
            let json: Vec<u8> = unpack(&payload).map_err(|error| error.to_string())?;
            let lines = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
            serde_json::to_vec(&agent.balancer.ledger().take_along(lines).await?)
        }
        node_kind::HISTORY => {
            let span = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&agent.balancer.recorder.of(span).await?)
        }
        node_kind::WHY_NOT => {
            let (machine, to) = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&why_not_here(agent, &machine, &to).await?)
        }
        node_kind::CONFIRM => {
            let machine = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&confirm_here(agent, &machine).await?)
        }
        node_kind::DRAIN => serde_json::to_vec(&super::drain::info_here(agent).await?),
        other => {
            return Err(format!(
                "the balancer knows no request of kind {other:#06x}"
            ));
        }
    };
    json.map_err(|error| error.to_string())
}

/// Asks a node, this one or another.
pub(super) async fn ask_node<Q: Serialize, A: DeserializeOwned>(
    agent: &Agent,
    node: &NodeName,
    kind: u16,
    question: &Q,
) -> Result<A, OperateError> {
    let away = |error: String| OperateError::Away(error);
    let payload = pack(question).map_err(|error| away(error.to_string()))?;
    let json = if *node == agent.name {
        let answer = answer(agent, kind, payload).await;
        answer.map_err(OperateError::Conflict)?.into()
    } else {
        let answer = agent.peers.call(node, kind, payload, PATIENCE).await;
        answer.map_err(|error| match error {
            RpcError::Failed { reason, .. } => OperateError::Conflict(reason),
            other => away(other.to_string()),
        })?
    };
    serde_json::from_slice(&json)
        .map_err(|error| away(format!("{node} answered something else: {error}")))
}

/// Asks all nodes; what they told, and who did not answer.
async fn of_all<Q, T>(agent: &Arc<Agent>, kind: u16, question: &Q) -> (Vec<T>, Vec<Silence>)
where
    Q: Serialize + Clone + Send + Sync + 'static,
    T: DeserializeOwned + Send + 'static,
{
    let mut asked = JoinSet::new();
    for node in agent.members.all().keys().cloned() {
        let (agent, question) = (agent.clone(), question.clone());
        asked.spawn(async move {
            let told: Result<T, _> = ask_node(&agent, &node, kind, &question).await;
            (node, told)
        });
    }
    let (mut all, mut silent) = (Vec::new(), Vec::new());
    while let Some(joined) = asked.join_next().await {
        match joined {
            Ok((_, Ok(told))) => all.push(told),
            Ok((node, Err(error))) => silent.push(Silence {
                node: node.to_string(),
                reason: error.to_string(),
            }),
            Err(_) => {}
        }
    }
    silent.sort_by(|one, other| one.node.cmp(&other.node));
    (all, silent)
}

/// This node's load, as its balancer sees it.
pub(super) async fn load(agent: &Agent) -> Result<NodeLoad, String> {
    let node = agent.name.to_string();
    let traffic = agent.balancer.traffic.lock();
    let traffic = traffic.unwrap_or_else(PoisonError::into_inner).clone();
    let load = agent.balancer.look(move |balancer, now_ms, _| NodeLoad {
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
pub(crate) async fn gather_loads(agent: &Arc<Agent>) -> Result<BalanceInfo, OperateError> {
    let entry = agent.store.get(&Key::Policy.to_string()).await?;
    let (policy, revision) = policy_of(entry.as_ref()).map_err(OperateError::Conflict)?;
    let (mut nodes, silent) =
        of_all::<_, NodeLoad>(agent, node_kind::LOAD, &Wanted::default()).await;
    nodes.sort_by(|one, other| one.node.cmp(&other.node));
    Ok(BalanceInfo {
        policy,
        revision,
        nodes,
        silent,
    })
}

/// What a node was measured to be, or a machine wherever it was.
///
/// # Errors
/// [`OperateError::Missing`] if there is no such node, or it does not answer.
pub(crate) async fn history(
    agent: &Arc<Agent>,
    node: Option<&NodeName>,
    span: &Span,
) -> Result<HistoryInfo, OperateError> {
    let Some(node) = node else {
        let (told, silent) = of_all::<_, Vec<HistoryPoint>>(agent, node_kind::HISTORY, span).await;
        let points = told.into_iter().flatten().collect();
        let points = keel_api::history_in_points(points, span.points_max);
        return Ok(HistoryInfo { points, silent });
    };
    if !agent.members.contains(node) {
        let what = format!("there is no node {node:?} (see `keel nodes`)");
        return Err(OperateError::Missing(what));
    }
    let points = ask_node(agent, node, node_kind::HISTORY, span).await?;
    Ok(HistoryInfo {
        points,
        silent: Vec::new(),
    })
}

/// The ledgers of all nodes, oldest line first.
pub(crate) async fn gather_ledger(agent: &Arc<Agent>, wanted: &Wanted) -> LedgerInfo {
    let (told, silent) = of_all::<_, Vec<Line>>(agent, node_kind::LEDGER, wanted).await;
    let mut lines: Vec<Line> = told.into_iter().flatten().collect();
    // Some nodes have lines of others, which came with machines.
    let order = |line: &Line| (line.at_unix_ms, line.node.clone());
    lines.sort_by_cached_key(|line| (order(line), line.decision.to_string()));
    lines.dedup();
    let excess = lines.len().saturating_sub(wanted.limit as usize);
    lines.drain(..excess);
    LedgerInfo { lines, silent }
}

/// Why a machine does not go to a node, asked of any node.
pub(crate) async fn why_not(
    agent: &Arc<Agent>,
    machine: &MachineName,
    to: &NodeName,
) -> Result<WhyNot, OperateError> {
    let owner = crate::record::get(&*agent.store, machine)
        .await?
        .record
        .owner;
    if !agent.members.contains(to) {
        let what = format!("there is no node {to:?} (see `keel nodes`)");
        return Err(OperateError::Missing(what));
    }
    if owner == *to {
        let what = format!("machine {machine:?} is on {to} already");
        return Err(OperateError::Conflict(what));
    }
    ask_node(agent, &owner, node_kind::WHY_NOT, &(machine, to)).await
}

/// The same of a machine that runs here.
async fn why_not_here(
    agent: &Agent,
    machine: &MachineName,
    to: &NodeName,
) -> Result<WhyNot, String> {
    let measuring = || "this node has not measured for long enough; try again in some seconds";
    let asked = agent
        .balancer
        .look(|balancer, _, _| balancer.weigh_request());
    let (machines, question) = asked.await?.ok_or_else(measuring)?;
    let view = match ask(agent, to.as_str(), &Request::View).await? {
        Response::View(view) => view,
        Response::NotReady => return Err(format!("{to} has not measured for long enough")),
        other => return Err(format!("{to} answered something else: {other:?}")),
    };
    let weights = match ask(agent, to.as_str(), &question).await? {
        Response::Weights(weights) => weights,
        other => return Err(format!("{to} answered something else: {other:?}")),
    };
    let peer: Name = to.as_str().into();
    let explained = agent.balancer.look(move |balancer, now_ms, rules| {
        balancer.explain(&peer, view, &machines, &weights, now_ms, rules)
    });
    let explained = explained.await?.ok_or_else(measuring)?;
    Ok(WhyNot {
        machine: machine.to_string(),
        node: agent.name.to_string(),
        to: to.to_string(),
        explained,
    })
}

/// Sets the policy, if it is still of the revision that the change was made from.
pub(crate) async fn change_policy(
    agent: &Arc<Agent>,
    policy: &Policy,
    from: u64,
) -> Result<(), OperateError> {
    policy
        .check()
        .map_err(|error| OperateError::Bad(error.to_string()))?;
    let value = serde_json::to_vec(policy).map_err(|error| OperateError::Bad(error.to_string()))?;
    let txn = match from {
        0 => Txn::new().when_absent(Key::Policy),
        revision => Txn::new().when_modified_at(Key::Policy, revision),
    };
    match agent.store.txn(txn.put(Key::Policy, value)).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Refused { .. } => Err(OperateError::Conflict(
            "the policy was changed by somebody else just now; look at it, and try again".into(),
        )),
    }
}

/// A proposed move is to be made. The machine's node knows whether it still is one.
pub(crate) async fn confirm(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), OperateError> {
    let owner = crate::record::get(&*agent.store, machine)
        .await?
        .record
        .owner;
    ask_node(agent, &owner, node_kind::CONFIRM, machine).await
}

/// The same of a machine that runs here.
async fn confirm_here(agent: &Agent, machine: &MachineName) -> Result<(), String> {
    let name: Name = machine.as_str().into();
    let asked = name.clone();
    let proposals = agent
        .balancer
        .look(move |balancer, now_ms, _| balancer.proposals(now_ms));
    let proposed = proposals
        .await?
        .into_iter()
        .any(|(machine, _)| machine == asked);
    if !proposed {
        return Err(format!(
            "no move of {machine:?} waits to be confirmed (see `keel balance`)"
        ));
    }
    agent.balancer.tell(Event::Confirmed { machine: name });
    Ok(())
}
