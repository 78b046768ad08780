//! For those who watch this node: metrics for Prometheus, and whether the agent lives and is ready.
//!
//! - `/healthz`: 200 while the agent answers
//! - `/readyz`: 200 while the node has its lease and the store answers; 503 with the reasons
//! - `/metrics`: in the text format of Prometheus 0.0.4; names as in `crate::metrics`

use super::super::handles::Handles;
use super::reply::{Shared, problem};
use crate::host::HostMemory;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::future::join_all;
use keel_machine::log::LIFE_BYTES;
use keel_machine::worker::control::{Report, State as WorkerState};
use keel_store::clock::boottime;
use keel_store::keys::Key;
use prometheus::core::Collector;
use prometheus::{CounterVec, Gauge, GaugeVec, Opts, Registry, TextEncoder};
use std::sync::Arc;
use std::time::Duration;

/// How long the store, or a worker, may take: who asks has a time limit of its own.
const PATIENCE: Duration = Duration::from_secs(1);

/// Answers while the agent runs. It needs no token.
#[utoipa::path(
    get,
    path = "/healthz",
    operation_id = "get_liveness",
    tag = "health",
    responses((status = 200, description = "The agent runs", body = String, content_type = "text/plain; charset=utf-8"))
)]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether the node has its lease and the store answers. It needs no token.
#[utoipa::path(
    get,
    path = "/readyz",
    operation_id = "get_readiness",
    tag = "health",
    responses((status = 200, description = "The node is ready", body = String, content_type = "text/plain; charset=utf-8"))
)]
pub(super) async fn readyz(State(at): Shared) -> Response {
    let mut lacks = Vec::new();
    if lease_rest(&at).is_none() {
        lacks.push("this node has no lease: it counts as dead".to_owned());
    }
    let key = Key::Cluster.to_string();
    match tokio::time::timeout(PATIENCE, at.context.store.get(&key)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => lacks.push(error.to_string()),
        Err(_) => lacks.push("the store does not answer".to_owned()),
    }
    match lacks.is_empty() {
        true => "ready\n".into_response(),
        false => problem(StatusCode::SERVICE_UNAVAILABLE, lacks.join("; ")),
    }
}

/// Time until this node's lease ends; `None` if it has none.
fn lease_rest(at: &Handles) -> Option<Duration> {
    let term = (*at.context.lease_term.borrow())?;
    at.context.lease.borrow().as_ref()?;
    term.deadline.checked_sub(boottime())
}

/// Metrics for Prometheus, in the text format 0.0.4.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "get_metrics",
    tag = "health",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain; version=0.0.4"))
)]
pub(super) async fn metrics(State(at): Shared) -> Response {
    let text = match now(&at).await {
        Ok(text) => text,
        Err(error) => {
            return problem(StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
        }
    };
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response()
}

async fn now(at: &Arc<Handles>) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    add_node(&registry, at)?;
    add_store(&registry, at)?;
    add_traffic(&registry, at)?;
    add_machines(&registry, at).await?;
    let mut families = at.context.metrics.gather();
    families.extend(registry.gather());
    TextEncoder::new().encode_to_string(&families)
}

/// A metric, once it is registered.
fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: Result<C, prometheus::Error>,
) -> Result<C, prometheus::Error> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<GaugeVec, prometheus::Error> {
    registered(registry, GaugeVec::new(Opts::new(name, help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str, value: f64) -> Result<(), prometheus::Error> {
    registered(registry, Gauge::new(name, help))?.set(value);
    Ok(())
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<CounterVec, prometheus::Error> {
    registered(registry, CounterVec::new(Opts::new(name, help), labels))
}

fn add_node(registry: &Registry, at: &Handles) -> Result<(), prometheus::Error> {
    let help = "The node, its cluster, and the version of its agent.";
    let info = gauges(
        registry,
        "keel_node_info",
        help,
        &["node", "cluster", "version"],
    )?;
    let cluster = at.context.cluster.to_string();
    let labels = [
        at.context.name.as_str(),
        &cluster,
        env!("CARGO_PKG_VERSION"),
    ];
    info.get_metric_with_label_values(&labels)?.set(1.0);
    let rest = lease_rest(at);
    let help = "Whether this node has its lease.";
    gauge(
        registry,
        "keel_node_has_lease",
        help,
        f64::from(u8::from(rest.is_some())),
    )?;
    let help = "Time until this node's lease ends, unless it is renewed.";
    let seconds = rest.unwrap_or_default().as_secs_f64();
    gauge(registry, "keel_lease_remaining_seconds", help, seconds)?;
    let host = HostMemory::read();
    let help = "Memory of the host.";
    gauge(registry, "keel_node_memory_bytes", help, host.bytes as f64)?;
    let help = "Memory of the host that is available.";
    let available = host.available_bytes as f64;
    gauge(
        registry,
        "keel_node_memory_available_bytes",
        help,
        available,
    )?;
    let help = "CPU time of this agent, without its machines.";
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    let cpu = counters(registry, "keel_agent_cpu_seconds_total", help, &[])?;
    cpu.get_metric_with_label_values::<&str>(&[])?
        .inc_by(seconds);
    let help = "Memory of the agent that is in RAM.";
    let resident = procfs::process::Process::myself()
        .and_then(|own| own.statm())
        .map_or(0.0, |it| it.resident as f64 * procfs::page_size() as f64);
    gauge(registry, "keel_agent_resident_memory_bytes", help, resident)?;
    let help = "Members of the cluster.";
    let members = at.context.members.all().len() as f64;
    gauge(registry, "keel_cluster_nodes", help, members)
}

fn add_store(registry: &Registry, at: &Handles) -> Result<(), prometheus::Error> {
    let status = at.voters.store().map(|store| store.status());
    let is = |is: bool| f64::from(u8::from(is));
    let help = "Whether this node has a copy of the store.";
    gauge(registry, "keel_store_voter", help, is(status.is_some()))?;
    let help = "Whether this node leads the store.";
    gauge(registry, "keel_store_leader", help, is(at.voters.leads()))?;
    let Some(status) = status else {
        return Ok(());
    };
    let help = "Term of the store's leader, as this node knows it.";
    gauge(registry, "keel_store_term", help, status.term as f64)?;
    let help = "Index of the last entry of the store's log that is applied here.";
    gauge(
        registry,
        "keel_store_applied_index",
        help,
        status.applied as f64,
    )?;
    let help = "Nodes that have the store.";
    gauge(
        registry,
        "keel_store_voters",
        help,
        status.voters.len() as f64,
    )
}

fn add_traffic(registry: &Registry, at: &Handles) -> Result<(), prometheus::Error> {
    let help = "Bytes sent to other nodes.";
    let sent = counters(registry, "keel_sent_bytes_total", help, &["peer"])?;
    let help = "Bytes received from other nodes.";
    let received = counters(registry, "keel_received_bytes_total", help, &["peer"])?;
    for (peer, bytes) in at.context.traffic.so_far() {
        let label = [peer.as_str()];
        sent.get_metric_with_label_values(&label)?
            .inc_by(bytes.sent as f64);
        received
            .get_metric_with_label_values(&label)?
            .inc_by(bytes.received as f64);
    }
    Ok(())
}

async fn add_machines(registry: &Registry, at: &Handles) -> Result<(), prometheus::Error> {
    let workers = at.processes.machines.names().into_iter();
    let reports = workers.filter_map(|machine| {
        let worker = at.processes.machines.get(&machine)?;
        Some(async move {
            let report = tokio::time::timeout(PATIENCE, worker.report()).await;
            Some((machine, report.ok()?.ok()?))
        })
    });
    let reports: Vec<_> = join_all(reports).await.into_iter().flatten().collect();
    let runs = |report: &Report| {
        matches!(
            report.state,
            WorkerState::Running { .. } | WorkerState::Filling { .. }
        )
    };
    let running: Vec<_> = reports.iter().filter(|(_, report)| runs(report)).collect();
    let help = "Machines that run on this node.";
    gauge(
        registry,
        "keel_machines_running",
        help,
        running.len() as f64,
    )?;
    let help = "CPU time of a machine on this node.";
    let cpu = counters(
        registry,
        "keel_machine_cpu_seconds_total",
        help,
        &["machine"],
    )?;
    let help = "Memory of a machine.";
    let memory = gauges(registry, "keel_machine_memory_bytes", help, &["machine"])?;
    let help = "Threads of a machine.";
    let threads = gauges(registry, "keel_machine_threads", help, &["machine"])?;
    let help = "Output of a machine since its last failover.";
    let output = counters(
        registry,
        "keel_machine_output_bytes_total",
        help,
        &["machine"],
    )?;
    for (machine, report) in running {
        let label = [machine.as_str()];
        let seconds = report.cpu_micros as f64 / 1e6;
        cpu.get_metric_with_label_values(&label)?.inc_by(seconds);
        memory
            .get_metric_with_label_values(&label)?
            .set(report.memory_bytes as f64);
        threads
            .get_metric_with_label_values(&label)?
            .set(f64::from(report.threads));
        output
            .get_metric_with_label_values(&label)?
            .inc_by((report.log.1 % LIFE_BYTES) as f64);
    }
    Ok(())
}
