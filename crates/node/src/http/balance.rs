//! Requests about balancing.

use super::{Failure, Reply, Shared, machine_name, told_line_by_line};
use crate::balancer::{self, Span, Wanted};
use crate::operate::OperateError;
use crate::rules;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use keel_api::{
    BalanceInfo, DrainInfo, DrainRequest, HISTORY_DEFAULT, HISTORY_MAX, HistoryInfo,
    LEDGER_DEFAULT, LEDGER_MAX, LabelRequest, LedgerInfo, PlanGoal, PlanInfo, PlanRequest,
    PolicyRequest, RulesInfo, WhyNot,
};
use keel_balance::rules::{Labels, Rule};
use keel_cluster::NodeName;
use serde::Deserialize;

pub(super) async fn info(State(agent): Shared) -> Reply<BalanceInfo> {
    Ok(Json(balancer::gather_loads(&agent).await?))
}

pub(super) async fn change_policy(
    State(agent): Shared,
    Json(request): Json<PolicyRequest>,
) -> Reply<serde_json::Value> {
    balancer::change_policy(&agent, &request.policy, request.from).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn confirm(
    State(agent): Shared,
    Path(name): Path<String>,
) -> Reply<serde_json::Value> {
    balancer::confirm(&agent, &machine_name(&name)?).await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
pub(super) struct WhyNotQuery {
    to: String,
}

pub(super) async fn why_not(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<WhyNotQuery>,
) -> Reply<WhyNot> {
    let to = node_name(&query.to)?;
    let machine = machine_name(&name)?;
    Ok(Json(balancer::why_not(&agent, &machine, &to).await?))
}

#[derive(Deserialize)]
pub(super) struct HistoryQuery {
    #[serde(default)]
    since: u64,
    until: Option<u64>,
    points: Option<u32>,
}

impl HistoryQuery {
    fn span(&self, machine: Option<String>) -> Result<Span, OperateError> {
        let points_max = self.points.unwrap_or(HISTORY_DEFAULT);
        if !(1..=HISTORY_MAX).contains(&points_max) {
            let what = format!("{points_max} points: 1 to {HISTORY_MAX} are possible");
            return Err(OperateError::Bad(what));
        }
        let until_unix_ms = self.until.unwrap_or(u64::MAX);
        if self.since > until_unix_ms {
            let what = "a span that ends before it begins".to_owned();
            return Err(OperateError::Bad(what));
        }
        Ok(Span {
            machine,
            since_unix_ms: self.since,
            until_unix_ms,
            points_max,
        })
    }
}

pub(super) async fn node_history(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Reply<HistoryInfo> {
    let node = node_name(&name)?;
    let span = query.span(None)?;
    Ok(Json(balancer::history(&agent, Some(&node), &span).await?))
}

pub(super) async fn machine_history(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Reply<HistoryInfo> {
    let span = query.span(Some(machine_name(&name)?.to_string()))?;
    Ok(Json(balancer::history(&agent, None, &span).await?))
}

#[derive(Deserialize)]
pub(super) struct LedgerQuery {
    machine: Option<String>,
    #[serde(default)]
    since: u64,
    #[serde(default)]
    until: u64,
    limit: Option<u32>,
}

pub(super) async fn ledger(
    State(agent): Shared,
    Query(query): Query<LedgerQuery>,
) -> Result<Json<LedgerInfo>, Failure> {
    let limit = query.limit.unwrap_or(LEDGER_DEFAULT);
    if !(1..=LEDGER_MAX).contains(&limit) {
        let what = format!("a limit of {limit} lines: 1 to {LEDGER_MAX} are possible");
        return Err(OperateError::Bad(what).into());
    }
    if let Some(machine) = &query.machine {
        machine_name(machine)?;
    }
    let wanted = Wanted {
        machine: query.machine,
        since_unix_ms: query.since,
        until_unix_ms: query.until,
        limit,
        among: 0,
    };
    Ok(Json(balancer::gather_ledger(&agent, &wanted).await))
}

fn node_name(text: &str) -> Result<NodeName, OperateError> {
    NodeName::new(text).map_err(|error| OperateError::Bad(error.to_string()))
}

pub(super) async fn make_plan(State(agent): Shared, Json(goal): Json<PlanGoal>) -> Reply<PlanInfo> {
    Ok(Json(balancer::make_plan(&agent, &goal).await?))
}

pub(super) async fn carry_out_plan(
    State(agent): Shared,
    Json(request): Json<PlanRequest>,
) -> Result<Response, Failure> {
    let lines = balancer::carry_out_plan(&agent, request).await?;
    Ok(told_line_by_line(lines))
}

pub(super) async fn drain_info(State(agent): Shared, Path(node): Path<String>) -> Reply<DrainInfo> {
    Ok(Json(
        balancer::drain_info(&agent, &node_name(&node)?).await?,
    ))
}

pub(super) async fn begin_drain(
    State(agent): Shared,
    Path(node): Path<String>,
    Json(request): Json<DrainRequest>,
) -> Reply<serde_json::Value> {
    balancer::begin_drain(&agent, &node_name(&node)?, &request).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn end_drain(
    State(agent): Shared,
    Path(node): Path<String>,
) -> Reply<serde_json::Value> {
    balancer::end_drain(&agent, &node_name(&node)?).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn list_rules(State(agent): Shared) -> Reply<RulesInfo> {
    Ok(Json(rules::list(&agent).await?))
}

pub(super) async fn put_rule(
    State(agent): Shared,
    Json(rule): Json<Rule>,
) -> Reply<serde_json::Value> {
    rules::put(&agent, rule).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn remove_rule(
    State(agent): Shared,
    Path(name): Path<String>,
) -> Reply<serde_json::Value> {
    rules::remove(&agent, &name).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn label(
    State(agent): Shared,
    Json(request): Json<LabelRequest>,
) -> Reply<Labels> {
    Ok(Json(rules::label(&agent, &request).await?))
}
