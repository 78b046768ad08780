//! Requests to the balancers of other nodes.

use super::handle::NodeBalancer;
use crate::error::CommandError;
use keel_api::Silence;
use keel_balance::policy::Mode;
use keel_balance::round::{Request, Response};
use keel_cluster::NodeName;
use keel_machine::worker::control::{pack, unpack};
use keel_net::RpcError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// `keel_balance::round::Request` → `Response`.
pub(crate) const BALANCE: u16 = 0x030c;
/// [`super::LedgerFilter`], which is ignored → `NodeLoad` as JSON.
pub(crate) const LOAD: u16 = 0x030d;
/// [`super::LedgerFilter`] → list of `Line` as JSON.
pub(crate) const LEDGER: u16 = 0x030e;
/// `(machine, node)` → `WhyNot` as JSON.
pub(crate) const WHY_NOT: u16 = 0x030f;
/// `machine` → `()` as JSON: confirms a proposed move.
pub(crate) const CONFIRM: u16 = 0x0310;
/// nothing → `DrainInfo` as JSON.
pub(crate) const DRAIN: u16 = 0x0311;
/// [`super::HistoryRange`] → list of `HistoryPoint` as JSON.
pub(crate) const HISTORY: u16 = 0x0312;
/// List of `Line`, of an arrived machine → `()` as JSON.
pub(crate) const LEDGER_TRANSFER: u16 = 0x0313;

/// How long another node's balancer may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// How long a node may take to answer a user's question.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends a request to another node's balancer.
pub(super) async fn ask(
    handle: &NodeBalancer,
    peer: &str,
    question: &Request,
) -> Result<Response, String> {
    let peer = NodeName::new(peer).map_err(|error| error.to_string())?;
    let payload = pack(question).map_err(|error| error.to_string())?;
    let answer = handle
        .context
        .peers
        .call(&peer, BALANCE, payload, ANSWER_PATIENCE)
        .await
        .map_err(|error| error.to_string())?;
    unpack(&answer).map_err(|error| error.to_string())
}

/// Queries a node: another one by a request, this one by `here`.
///
/// # Errors
/// [`CommandError`] if it does not answer, or answers with an error.
pub(super) async fn ask_node<Q: Serialize, A: DeserializeOwned>(
    handle: &NodeBalancer,
    node: &NodeName,
    kind: u16,
    question: &Q,
    here: impl Future<Output = Result<A, String>>,
) -> Result<A, CommandError> {
    if *node == handle.context.name {
        return here.await.map_err(CommandError::Conflict);
    }
    let unavailable = |error: String| CommandError::Unavailable(error);
    let payload = pack(question).map_err(|error| unavailable(error.to_string()))?;
    let answer = handle.context.peers.call(node, kind, payload, PATIENCE);
    let json = answer.await.map_err(|error| match error {
        RpcError::Failed { reason, .. } => CommandError::Conflict(reason),
        other => unavailable(other.to_string()),
    })?;
    serde_json::from_slice(&json)
        .map_err(|error| unavailable(format!("{node} gave an unexpected answer: {error}")))
}

/// Queries all nodes; returns their answers, and the nodes that did not answer.
pub(super) async fn ask_all<Q, T, F>(
    handle: &Arc<NodeBalancer>,
    kind: u16,
    question: &Q,
    here: fn(Arc<NodeBalancer>, Q) -> F,
) -> (Vec<T>, Vec<Silence>)
where
    Q: Serialize + Clone + Send + Sync + 'static,
    T: DeserializeOwned + Send + 'static,
    F: Future<Output = Result<T, String>> + Send + 'static,
{
    let mut asked = JoinSet::new();
    for node in handle.context.members.all().keys().cloned() {
        let (handle, question) = (handle.clone(), question.clone());
        asked.spawn(async move {
            let own = here(handle.clone(), question.clone());
            let answer: Result<T, _> = ask_node(&handle, &node, kind, &question, own).await;
            (node, answer)
        });
    }
    let (mut all, mut silent) = (Vec::new(), Vec::new());
    while let Some(joined) = asked.join_next().await {
        match joined {
            Ok((_, Ok(answer))) => all.push(answer),
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

impl NodeBalancer {
    /// Whether the balancer carries out its decisions.
    pub(crate) async fn is_automatic(&self) -> bool {
        let mode = self.query(|it, _, _| it.policy().0.mode).await;
        mode == Ok(Mode::Automatic)
    }

    /// The load of another node, as it reports it.
    pub(crate) async fn load_of(&self, node: &NodeName) -> Option<f64> {
        match ask(self, node.as_str(), &Request::View).await {
            Ok(Response::View(view)) => Some(view.state.load),
            _ => None,
        }
    }
}
