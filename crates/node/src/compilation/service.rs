//! Compiles the programs that moves and the balancer request, and tracks the programs of the
//! machines that run here.

use super::compilations::Code;
use super::{process, publish};
use crate::context::Context;
use crate::images::Images;
use crate::processes::Processes;
use keel_cluster::MachineName;
use keel_net::Fingerprint;
use std::sync::Arc;
use std::time::Duration;

/// Request between agents: `(kind, program)` → [`super::CodeState`]. A machine is to move here, and the
/// asking node has its module.
pub(crate) const CODE: u16 = 0x031c;
/// Request between agents: `machine` → `Option<Fingerprint>`: the program of a machine that
/// runs here.
pub(crate) const PROGRAM: u16 = 0x031d;

/// How long a worker may take to report its program.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// Carries out compilations until the agent ends.
pub(crate) async fn run(context: Arc<Context>, images: Arc<Images>, code: Arc<Code>) {
    for program in process::compiled_before(&context).await {
        code.set_ready(program);
    }
    tokio::spawn(publish::publish(context.clone(), code.clone()));
    tokio::spawn(publish::follow(context.clone(), code.clone()));
    loop {
        let begun = code.inner().begin();
        for (job, wanted) in begun {
            let (context, images, code) = (context.clone(), images.clone(), code.clone());
            tokio::spawn(async move {
                let compiled = process::compile(&context, &images, &code, &job, wanted).await;
                code.done(job.program, compiled);
            });
        }
        code.work.notified().await;
    }
}

/// The program of a machine that runs here.
pub(crate) async fn program_here(
    processes: &Processes,
    machine: &MachineName,
) -> Option<Fingerprint> {
    let worker = processes.machines.get(machine)?;
    // A busy worker is asked again next time; the others are asked meanwhile.
    let report = tokio::time::timeout(ASK_PATIENCE, worker.report()).await;
    Some(Fingerprint(report.ok()?.ok()?.program?))
}
