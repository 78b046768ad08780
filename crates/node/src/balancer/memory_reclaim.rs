//! Asks the systems of this node for memory when the node runs out of it, and gives it to them again
//! later; `keel_balance::memory_reclaim` decides how much.

use super::handle::NodeBalancer;
use crate::processes::WorkerHandle;
use futures::future::join_all;
use keel_balance::memory_reclaim::{NodeMemory, SystemMemory, Told, reclaim};
use keel_balance::policy::Mode;
use keel_cluster::MachineName;
use keel_machine::worker::control::{GuestMemory, kind};
use keel_net::coarse_timer;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// How often systems are asked how much they use.
const EVERY: Duration = Duration::from_secs(5);
/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A system of this node.
struct System {
    machine: MachineName,
    worker: WorkerHandle,
    memory: SystemMemory,
}

/// What a worker says.
enum Look {
    Of(System),
    /// Its machine has nothing to give back.
    Nothing(u64),
    /// It does not say it now.
    NotNow,
}

/// Follows the memory of this node's systems until the agent ends.
pub(super) async fn follow(handle: Arc<NodeBalancer>) {
    // Workers whose machines have nothing to give back.
    let mut others = HashSet::new();
    loop {
        coarse_timer::sleep(EVERY).await;
        let systems = look(&handle, &mut others).await;
        if systems.is_empty() {
            continue;
        }
        let node = handle.query(|balancer, _, _| {
            let (policy, node) = (balancer.policy().0, balancer.node_state()?);
            Some(NodeMemory {
                capacity_bytes: node.capacity.memory_bytes,
                free_bytes: node.memory_free_bytes,
                // A policy that only suggests takes nothing away.
                headroom: match policy.mode {
                    Mode::Automatic => policy.memory_headroom,
                    _ => 0.0,
                },
            })
        });
        match node.await {
            Ok(Some(node)) => ask(node, &systems).await,
            // It has not measured for long enough.
            Ok(None) => {}
            Err(_) => return,
        }
    }
}

/// The systems here that can give memory back.
async fn look(handle: &NodeBalancer, others: &mut HashSet<u64>) -> Vec<System> {
    let machines = handle.processes.machines.names().into_iter();
    let workers = machines.filter_map(|machine| {
        let worker = handle.processes.machines.get(&machine)?;
        Some((machine, worker))
    });
    let workers: Vec<_> = workers.collect();
    others.retain(|other| workers.iter().any(|(_, worker)| worker.id() == *other));
    let asked = workers.into_iter().filter(|(machine, worker)| {
        !others.contains(&worker.id()) && !handle.processes.exclusion.is_moving(machine)
    });
    let looks = asked.map(|(machine, worker)| look_at(machine, worker));
    let mut systems = Vec::new();
    for look in join_all(looks).await {
        match look {
            Look::Of(system) => systems.push(system),
            Look::Nothing(worker) => _ = others.insert(worker),
            Look::NotNow => {}
        }
    }
    systems
}

async fn look_at(machine: MachineName, worker: WorkerHandle) -> Look {
    let memory: Result<Option<GuestMemory>, _> = worker.ask(kind::MEMORY, &(), PATIENCE).await;
    match memory {
        Ok(Some(memory)) => Look::Of(System {
            memory: SystemMemory {
                memory_bytes: memory.memory_bytes,
                told: match (memory.available_bytes, memory.free_bytes) {
                    _ if memory.is_silent => Told::Silent,
                    (Some(available_bytes), Some(free_bytes)) => Told::Now {
                        available_bytes,
                        free_bytes,
                    },
                    _ => Told::NotYet,
                },
                given_back_bytes: memory.given_back_bytes,
                asked_bytes: memory.asked_bytes,
            },
            machine,
            worker,
        }),
        Ok(None) => Look::Nothing(worker.id()),
        Err(error) => {
            tracing::debug!(%machine, %error, "its memory is not known now");
            Look::NotNow
        }
    }
}

/// Has them give memory back, or gives it to them again.
async fn ask(node: NodeMemory, systems: &[System]) {
    let memory: Vec<SystemMemory> = systems.iter().map(|system| system.memory).collect();
    let wanted = systems.iter().zip(reclaim(node, &memory));
    let asked = wanted.filter_map(|(system, wanted)| Some(ask_one(node, system, wanted?)));
    join_all(asked).await;
}

async fn ask_one(node: NodeMemory, system: &System, wanted_bytes: u64) {
    let System {
        machine, memory, ..
    } = system;
    let asked = system.worker.ask(kind::GIVE_BACK, &wanted_bytes, PATIENCE);
    let asked: Result<(), _> = asked.await;
    match asked {
        Ok(()) => tracing::info!(
            %machine,
            wanted_bytes,
            given_back_bytes = memory.given_back_bytes,
            told = ?memory.told,
            free_bytes = node.free_bytes,
            headroom = node.headroom,
            "changed how much memory the system is to give back to this node"
        ),
        Err(error) => tracing::debug!(%machine, %error, "the system is not asked for memory now"),
    }
}
