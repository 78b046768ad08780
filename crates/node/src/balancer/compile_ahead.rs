//! Compiles programs before they are needed: those of machines that run here, and those of
//! machines elsewhere that rules allow here.

use super::handle::NodeBalancer;
use crate::compilation::{PROGRAM, program_here};
use keel_balance::Name;
use keel_cluster::{MachineName, NodeName};
use keel_machine::kind::KindName;
use keel_machine::worker::control::{pack, unpack};
use keel_net::{Fingerprint, coarse_timer};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// Pause between two checks of the placement of machines.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a node may take to report a machine's program.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// A machine that runs here or may come here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Eligible {
    name: MachineName,
    owner: NodeName,
    kind: KindName,
    /// Hash of the image that the program is made from.
    image: String,
}

/// Compiles eligible programs until the agent ends.
pub(super) async fn run(handle: Arc<NodeBalancer>) {
    // By the hash of the image: each node produces the same program from it.
    let mut programs: HashMap<String, Fingerprint> = HashMap::new();
    let mut sizes: HashMap<Fingerprint, u64> = HashMap::new();
    loop {
        let mut running = BTreeMap::new();
        for machine in eligible(&handle) {
            let known = programs.get(&machine.image).copied();
            let program = match known {
                Some(program) => Some(program),
                None => program_of(&handle, &machine.owner, &machine.name).await,
            };
            // A machine without a worker is asked again.
            let Some(program) = program else { continue };
            programs.insert(machine.image, program);
            if machine.owner == handle.context.name {
                let known = sizes.get(&program).copied();
                let bytes = match known {
                    Some(bytes) => bytes,
                    None => {
                        let path = handle.context.dir.program(&program.to_string());
                        let found = tokio::fs::metadata(path).await;
                        // (A file that is missing may come.)
                        found.map_or(0, |it| *sizes.entry(program).or_insert(it.len()))
                    }
                };
                running.insert(machine.name, (program, bytes));
            }
            handle.code.prepare(&machine.kind, program, &machine.owner);
        }
        handle.code.set_running(running);
        coarse_timer::sleep(LOOK_EVERY).await;
    }
}

/// The program of a machine, as reported by the node that runs it.
async fn program_of(
    handle: &NodeBalancer,
    owner: &NodeName,
    machine: &MachineName,
) -> Option<Fingerprint> {
    if *owner == handle.context.name {
        return program_here(&handle.processes, machine).await;
    }
    let payload = pack(machine).ok()?;
    let answer = handle
        .context
        .peers
        .call(owner, PROGRAM, payload, ASK_PATIENCE)
        .await
        .ok()?;
    unpack::<Option<Fingerprint>>(&answer).ok()?
}

/// The machines that run here first, then those that rules allow here.
fn eligible(handle: &NodeBalancer) -> Vec<Eligible> {
    let here = Name::from(handle.context.name.as_str());
    let members = handle.context.members.all();
    let nodes = members.keys().map(|node| node.as_str().into()).collect();
    let rules = handle.rules.cache.snapshot_of(nodes);
    let mut found: Vec<Eligible> = handle
        .placements
        .compiled()
        .into_iter()
        .filter_map(|(name, placed)| {
            Some(Eligible {
                name,
                owner: placed.owner,
                kind: placed.needs.kind,
                image: placed.compiled_image?,
            })
        })
        .filter(|it| {
            it.owner == handle.context.name
                || rules.forbids(&it.name.as_str().into(), &here).is_none()
        })
        .collect();
    found.sort_by_key(|it| it.owner != handle.context.name);
    found
}
