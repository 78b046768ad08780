//! Measures the dirty rate of the machines of this node, one after the other.

use super::dirty_rate::EVERY;
use super::handle::NodeBalancer;
use keel_cluster::MachineName;
use keel_machine::moves::prediction::Activity;
use keel_machine::worker::control::kind;
use keel_net::coarse_timer;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Measures this node's machines until the agent ends.
pub(super) async fn follow(handle: Arc<NodeBalancer>) {
    let rates = handle.dirty_rates.clone();
    loop {
        coarse_timer::sleep(EVERY).await;
        if !handle.processes.exclusion.moves().is_empty() {
            continue;
        }
        let here = handle.processes.machines.processes().into_iter();
        let here: Vec<MachineName> = here.map(|(machine, _)| machine).collect();
        let Some(machine) = rates.next(&here, Instant::now()) else {
            continue;
        };
        let Some(worker) = handle.processes.machines.get(&machine) else {
            continue;
        };
        let activity: Result<Activity, _> = worker.ask(kind::ACTIVITY, &(), PATIENCE).await;
        let activity = activity.inspect_err(|error| {
            tracing::debug!(%machine, %error, "the dirty rate was not measured");
        });
        let bytes_per_s = activity.ok().map(|it| it.bytes_per_s() as f64);
        rates.record(&machine, bytes_per_s, Instant::now());
    }
}
