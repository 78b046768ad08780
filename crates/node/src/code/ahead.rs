//! What is compiled before anybody waits for it: the programs of machines that run
//! here, and of machines elsewhere that rules would let come here.

use crate::agent::Agent;
use crate::service::kind as node_kind;
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::{pack, unpack};
use keel_net::Fingerprint;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// Pause between two looks at where machines are.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a machine's program may take to be named.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// Looks again and again until the agent ends.
pub(super) async fn run(agent: Arc<Agent>) {
    // By the module as its author built it: each node makes the same program of it.
    let mut programs: HashMap<String, Fingerprint> = HashMap::new();
    loop {
        let mut running = BTreeMap::new();
        for machine in crate::balancer::may_run_here(&agent) {
            let known = programs.get(&machine.module).copied();
            let program = match known {
                Some(program) => Some(program),
                None => program_of(&agent, &machine.owner, &machine.name).await,
            };
            // (One that has no worker yet is asked for again.)
            let Some(program) = program else { continue };
            if !machine.module.is_empty() {
                programs.insert(machine.module, program);
            }
            if machine.owner == agent.name {
                let path = agent.dir.program(&program.to_string());
                let bytes = tokio::fs::metadata(path).await.map_or(0, |it| it.len());
                running.insert(machine.name, (program, bytes));
            }
            agent.code.prepare(program, &machine.owner);
        }
        agent.code.set_running(running);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The program of a machine, as the node that runs it knows it.
async fn program_of(agent: &Agent, owner: &NodeName, machine: &MachineName) -> Option<Fingerprint> {
    if *owner == agent.name {
        return program_here(agent, machine).await;
    }
    let payload = pack(machine).ok()?;
    let answer = agent
        .peers
        .call(owner, node_kind::PROGRAM, payload, ASK_PATIENCE)
        .await
        .ok()?;
    unpack::<Option<Fingerprint>>(&answer).ok()?
}

/// The program of a machine that runs here.
pub(crate) async fn program_here(agent: &Agent, machine: &MachineName) -> Option<Fingerprint> {
    let worker = agent.workers.get(machine)?;
    // (A worker that is busy says it next time: others are asked for meanwhile.)
    let report = tokio::time::timeout(ASK_PATIENCE, worker.report()).await;
    Some(Fingerprint(report.ok()?.ok()?.program?))
}
