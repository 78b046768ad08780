//! Requests about balancing.

use super::reply::{Failure, Reply, Shared, line_by_line, machine_name};
use crate::balancer::{self, HistoryRange, LedgerFilter};
use crate::error::CommandError;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use keel_api::{
    BalanceInfo, DrainInfo, DrainRequest, HISTORY_DEFAULT, HISTORY_MAX, HistoryInfo,
    LEDGER_DEFAULT, LEDGER_MAX, LabelRequest, LedgerInfo, Nothing, PlanGoal, PlanInfo, PlanLine,
    PlanRequest, PolicyRequest, RulesInfo, WhyNot,
};
use keel_balance::rules::{Labels, Rule};
use keel_cluster::NodeName;
use serde::Deserialize;
use utoipa::IntoParams;

/// The policy of balancing, and the loads of nodes and machines.
#[utoipa::path(
    get,
    path = "/v1/balance",
    operation_id = "get_balance",
    tag = "balancing",
    responses((status = 200, description = "Success", body = BalanceInfo))
)]
pub(super) async fn info(State(at): Shared) -> Reply<BalanceInfo> {
    Ok(Json(balancer::gather_loads(&at.balancer).await?))
}

/// Replaces the policy of balancing.
#[utoipa::path(
    post,
    path = "/v1/balance/policy",
    operation_id = "set_policy",
    tag = "balancing",
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn change_policy(
    State(at): Shared,
    Json(request): Json<PolicyRequest>,
) -> Reply<Nothing> {
    balancer::change_policy(&at.balancer, &request.policy, request.from).await?;
    Ok(Json(Nothing {}))
}

/// Makes a move that balancing proposes and that waits for confirmation.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/confirm-move",
    operation_id = "confirm_move",
    tag = "balancing",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn confirm(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    balancer::confirm(&at.balancer, &machine_name(&name)?).await?;
    Ok(Json(Nothing {}))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct WhyNotQuery {
    /// The possible target.
    to: String,
}

/// Why a machine does not move to a node now, or that it would.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/why-not",
    operation_id = "explain_no_move",
    tag = "balancing",
    params(("name", description = "Name of the machine."), WhyNotQuery),
    responses((status = 200, description = "Success", body = WhyNot))
)]
pub(super) async fn why_not(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<WhyNotQuery>,
) -> Reply<WhyNot> {
    let to = node_name(&query.to)?;
    let machine = machine_name(&name)?;
    Ok(Json(balancer::why_not(&at.balancer, &machine, &to).await?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct HistoryQuery {
    /// Begin, in milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    since: u64,
    /// End, in milliseconds since 1970-01-01 UTC; now if absent.
    until: Option<u64>,
    /// The most points: 1 to 10000; 24 if absent.
    points: Option<u32>,
}

impl HistoryQuery {
    fn range(&self, machine: Option<String>) -> Result<HistoryRange, CommandError> {
        let points_max = self.points.unwrap_or(HISTORY_DEFAULT);
        if !(1..=HISTORY_MAX).contains(&points_max) {
            let what = format!("{points_max} points: 1 to {HISTORY_MAX} are possible");
            return Err(CommandError::Invalid(what));
        }
        let until_unix_ms = self.until.unwrap_or(u64::MAX);
        if self.since > until_unix_ms {
            let what = "a span that ends before it begins".to_owned();
            return Err(CommandError::Invalid(what));
        }
        Ok(HistoryRange {
            machine,
            since_unix_ms: self.since,
            until_unix_ms,
            points_max,
        })
    }
}

/// Measured loads of a node over time.
#[utoipa::path(
    get,
    path = "/v1/nodes/{name}/history",
    operation_id = "get_node_history",
    tag = "nodes",
    params(("name", description = "Name of the node."), HistoryQuery),
    responses((status = 200, description = "Success", body = HistoryInfo))
)]
pub(super) async fn node_history(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Reply<HistoryInfo> {
    let node = node_name(&name)?;
    let range = query.range(None)?;
    Ok(Json(
        balancer::history(&at.balancer, Some(&node), &range).await?,
    ))
}

/// Measured loads of a machine over time, on all its nodes.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/history",
    operation_id = "get_machine_history",
    tag = "machines",
    params(("name", description = "Name of the machine."), HistoryQuery),
    responses((status = 200, description = "Success", body = HistoryInfo))
)]
pub(super) async fn machine_history(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Reply<HistoryInfo> {
    let range = query.range(Some(machine_name(&name)?.to_string()))?;
    Ok(Json(balancer::history(&at.balancer, None, &range).await?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LedgerQuery {
    /// Only decisions about this machine.
    machine: Option<String>,
    /// Only decisions since this time, in milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    since: u64,
    /// Only decisions until this time, in milliseconds since 1970-01-01 UTC; 0 for no limit.
    #[serde(default)]
    until: u64,
    /// The most decisions, of which the newest are answered: 1 to 10000; 200 if absent.
    limit: Option<u32>,
}

/// Decisions of balancing, oldest first.
#[utoipa::path(
    get,
    path = "/v1/ledger",
    operation_id = "list_decisions",
    tag = "balancing",
    params(LedgerQuery),
    responses((status = 200, description = "Success", body = LedgerInfo))
)]
pub(super) async fn ledger(
    State(at): Shared,
    Query(query): Query<LedgerQuery>,
) -> Result<Json<LedgerInfo>, Failure> {
    let limit = query.limit.unwrap_or(LEDGER_DEFAULT);
    if !(1..=LEDGER_MAX).contains(&limit) {
        let what = format!("a limit of {limit} lines: 1 to {LEDGER_MAX} are possible");
        return Err(CommandError::Invalid(what).into());
    }
    if let Some(machine) = &query.machine {
        machine_name(machine)?;
    }
    let filter = LedgerFilter {
        machine: query.machine,
        since_unix_ms: query.since,
        until_unix_ms: query.until,
        limit,
        among: 0,
    };
    Ok(Json(balancer::gather_ledger(&at.balancer, &filter).await))
}

fn node_name(text: &str) -> Result<NodeName, CommandError> {
    NodeName::new(text).map_err(|error| CommandError::Invalid(error.to_string()))
}

/// Plans moves for a goal. Nothing is moved.
#[utoipa::path(
    post,
    path = "/v1/plan",
    operation_id = "make_plan",
    tag = "plans",
    responses((status = 200, description = "Success", body = PlanInfo))
)]
pub(super) async fn make_plan(State(at): Shared, Json(goal): Json<PlanGoal>) -> Reply<PlanInfo> {
    Ok(Json(balancer::make_plan(&at.balancer, &goal).await?))
}

/// Carries out a plan, if no machine of it has moved or restarted since it was made.
///
/// The answer is one `PlanLine` per line.
#[utoipa::path(
    post,
    path = "/v1/plan/run",
    operation_id = "carry_out_plan",
    tag = "plans",
    responses((status = 200, description = "Lines of progress", body = PlanLine, content_type = "application/x-ndjson"))
)]
pub(super) async fn carry_out_plan(
    State(at): Shared,
    Json(request): Json<PlanRequest>,
) -> Result<Response, Failure> {
    let lines = balancer::carry_out_plan(&at.balancer, request).await?;
    Ok(line_by_line(lines))
}

/// The drain of a node, and its progress.
#[utoipa::path(
    get,
    path = "/v1/nodes/{name}/drain",
    operation_id = "get_drain",
    tag = "nodes",
    params(("name", description = "Name of the node.")),
    responses((status = 200, description = "Success", body = DrainInfo))
)]
pub(super) async fn drain_info(State(at): Shared, Path(node): Path<String>) -> Reply<DrainInfo> {
    Ok(Json(
        balancer::drain_info(&at.balancer, &node_name(&node)?).await?,
    ))
}

/// Begins to drain a node: its machines leave, and no others are placed there.
#[utoipa::path(
    post,
    path = "/v1/nodes/{name}/drain",
    operation_id = "begin_drain",
    tag = "nodes",
    params(("name", description = "Name of the node.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn begin_drain(
    State(at): Shared,
    Path(node): Path<String>,
    Json(request): Json<DrainRequest>,
) -> Reply<Nothing> {
    balancer::begin_drain(&at.balancer, &node_name(&node)?, &request).await?;
    Ok(Json(Nothing {}))
}

/// Ends the drain of a node, which is open to machines again.
#[utoipa::path(
    delete,
    path = "/v1/nodes/{name}/drain",
    operation_id = "end_drain",
    tag = "nodes",
    params(("name", description = "Name of the node.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn end_drain(State(at): Shared, Path(node): Path<String>) -> Reply<Nothing> {
    balancer::end_drain(&at.balancer, &node_name(&node)?).await?;
    Ok(Json(Nothing {}))
}

/// The placement rules, who holds them, and violations.
#[utoipa::path(
    get,
    path = "/v1/rules",
    operation_id = "list_rules",
    tag = "rules",
    responses((status = 200, description = "Success", body = RulesInfo))
)]
pub(super) async fn list_rules(State(at): Shared) -> Reply<RulesInfo> {
    Ok(Json(at.rules.list().await?))
}

/// Creates a placement rule, or replaces the one with its name.
#[utoipa::path(
    post,
    path = "/v1/rules",
    operation_id = "put_rule",
    tag = "rules",
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn put_rule(State(at): Shared, Json(rule): Json<Rule>) -> Reply<Nothing> {
    at.rules.put(rule).await?;
    Ok(Json(Nothing {}))
}

/// Removes a placement rule.
#[utoipa::path(
    delete,
    path = "/v1/rules/{name}",
    operation_id = "remove_rule",
    tag = "rules",
    params(("name", description = "Name of the rule.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove_rule(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    at.rules.remove(&name).await?;
    Ok(Json(Nothing {}))
}

/// Sets labels of a node or a machine, and answers all of its labels.
#[utoipa::path(
    post,
    path = "/v1/labels",
    operation_id = "set_labels",
    tag = "rules",
    responses((status = 200, description = "Success", body = std::collections::BTreeMap<String, String>))
)]
pub(super) async fn label(State(at): Shared, Json(request): Json<LabelRequest>) -> Reply<Labels> {
    Ok(Json(at.rules.label(&request).await?))
}
