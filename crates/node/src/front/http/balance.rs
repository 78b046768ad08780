//! Requests about balancing.

use super::reply::{Failure, Reply, Shared, line_by_line, machine_name};
use crate::balancer::{self, HistoryRange, LedgerFilter};
use crate::error::CommandError;
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

pub(super) async fn info(State(at): Shared) -> Reply<BalanceInfo> {
    Ok(Json(balancer::gather_loads(&at.balancer).await?))
}

pub(super) async fn change_policy(
    State(at): Shared,
    Json(request): Json<PolicyRequest>,
) -> Reply<serde_json::Value> {
    balancer::change_policy(&at.balancer, &request.policy, request.from).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn confirm(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<serde_json::Value> {
    balancer::confirm(&at.balancer, &machine_name(&name)?).await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
pub(super) struct WhyNotQuery {
    to: String,
}

pub(super) async fn why_not(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<WhyNotQuery>,
) -> Reply<WhyNot> {
    let to = node_name(&query.to)?;
    let machine = machine_name(&name)?;
    Ok(Json(balancer::why_not(&at.balancer, &machine, &to).await?))
}

#[derive(Deserialize)]
pub(super) struct HistoryQuery {
    #[serde(default)]
    since: u64,
    until: Option<u64>,
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

pub(super) async fn machine_history(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Reply<HistoryInfo> {
    let range = query.range(Some(machine_name(&name)?.to_string()))?;
    Ok(Json(balancer::history(&at.balancer, None, &range).await?))
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

pub(super) async fn make_plan(State(at): Shared, Json(goal): Json<PlanGoal>) -> Reply<PlanInfo> {
    Ok(Json(balancer::make_plan(&at.balancer, &goal).await?))
}

pub(super) async fn carry_out_plan(
    State(at): Shared,
    Json(request): Json<PlanRequest>,
) -> Result<Response, Failure> {
    let lines = balancer::carry_out_plan(&at.balancer, request).await?;
    Ok(line_by_line(lines))
}

pub(super) async fn drain_info(State(at): Shared, Path(node): Path<String>) -> Reply<DrainInfo> {
    Ok(Json(
        balancer::drain_info(&at.balancer, &node_name(&node)?).await?,
    ))
}

pub(super) async fn begin_drain(
    State(at): Shared,
    Path(node): Path<String>,
    Json(request): Json<DrainRequest>,
) -> Reply<serde_json::Value> {
    balancer::begin_drain(&at.balancer, &node_name(&node)?, &request).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn end_drain(
    State(at): Shared,
    Path(node): Path<String>,
) -> Reply<serde_json::Value> {
    balancer::end_drain(&at.balancer, &node_name(&node)?).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn list_rules(State(at): Shared) -> Reply<RulesInfo> {
    Ok(Json(at.rules.list().await?))
}

pub(super) async fn put_rule(
    State(at): Shared,
    Json(rule): Json<Rule>,
) -> Reply<serde_json::Value> {
    at.rules.put(rule).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn remove_rule(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<serde_json::Value> {
    at.rules.remove(&name).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn label(State(at): Shared, Json(request): Json<LabelRequest>) -> Reply<Labels> {
    Ok(Json(at.rules.label(&request).await?))
}
