//! Orders for failpoints, in builds for tests only: this process's own, and those
//! of its machines' workers, present and to come.

use crate::agent::Agent;
use crate::operate::OperateError;
use crate::workers::{PROMPT, Worker};
use keel_api::FailpointRequest;
use keel_machine::failpoint::{self, Injection};
use keel_machine::worker::control::kind;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// What workers that are started later get.
static FOR_WORKERS: Mutex<BTreeMap<&'static str, Injection>> = Mutex::new(BTreeMap::new());

fn for_workers() -> MutexGuard<'static, BTreeMap<&'static str, Injection>> {
    FOR_WORKERS
        .lock()
        .unwrap_or_else(|error| error.into_inner())
}

/// The orders for a new worker, as its environment has them.
pub(crate) fn for_new_worker() -> String {
    let orders = for_workers();
    let orders: Vec<String> = orders
        .iter()
        .map(|(name, order)| format!("{name}={order}"))
        .collect();
    orders.join(";")
}

/// Takes back from a new worker, which is in the table now, the orders that were
/// taken back while it was being started.
pub(crate) async fn refresh(worker: &Worker, given: &str) {
    for (name, _) in given.split(';').filter_map(|part| part.split_once('=')) {
        if !for_workers().contains_key(name) {
            let question = (name.to_owned(), None::<String>);
            let told: Result<(), _> = worker.ask(kind::FAILPOINT, &question, PROMPT).await;
            if let Err(error) = told {
                tracing::debug!(%error, "a worker does not hear of a failpoint");
            }
        }
    }
}

/// Gives an order, or takes it back.
pub(crate) async fn order(
    agent: &Arc<Agent>,
    request: FailpointRequest,
) -> Result<(), OperateError> {
    let failpoint = failpoint::find(&request.name).ok_or_else(|| {
        OperateError::Missing(format!("there is no failpoint {:?}", request.name))
    })?;
    let order: Option<Injection> = request
        .order
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(|error: failpoint::InvalidInjection| OperateError::Bad(error.to_string()))?;
    if !failpoint.site.is_worker() {
        failpoint::set(failpoint.name, order);
        return Ok(());
    }
    match order {
        Some(order) => for_workers().insert(failpoint.name, order),
        None => for_workers().remove(failpoint.name),
    };
    let question = (request.name.clone(), request.order.clone());
    for machine in agent.workers.names() {
        if let Some(worker) = agent.workers.get(&machine) {
            let told: Result<(), _> = worker.ask(kind::FAILPOINT, &question, PROMPT).await;
            if let Err(error) = told {
                tracing::debug!(%machine, %error, "a worker does not hear of a failpoint");
            }
        }
    }
    Ok(())
}
