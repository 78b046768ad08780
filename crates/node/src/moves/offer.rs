//! Messages from a source to a target, and their answers.

use super::directory_proofs::Proofs;
use crate::context::Context;
use crate::host::needed_features;
use crate::spanning::ROOM_BYTES_MIN;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::spec::{Record, Spec, Status};
use keel_machine::worker::control::Report;
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};

/// [`Offer`] → `MoveEndpoint`.
pub(crate) const OFFER: u16 = 0x0301;
/// `(machine, epoch)` → [`Arrival`].
pub(crate) const ARRIVAL: u16 = 0x0303;
/// `machine` → `()`: the source withdraws an offer.
pub(crate) const WITHDRAW: u16 = 0x0304;
/// [`super::MoveOrder`] → stream of `MoveLine`.
pub(crate) const MOVE: u16 = 0x0306;
/// `machine` → `bool`: whether a source still has the frozen copy.
pub(crate) const HELD: u16 = 0x0308;
/// Any bytes → `()`: measures the throughput of a link.
pub(crate) const TRIAL: u16 = 0x030a;
/// [`Offer`] → `()`: whether it would be accepted; nothing is reserved.
pub(crate) const WOULD_ACCEPT: u16 = 0x030b;

/// A source's offer of a machine to a target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) machine: MachineName,
    pub(crate) spec: Spec,
    /// The program that runs, if its kind has one.
    pub(crate) program: Option<Fingerprint>,
    pub(crate) epoch: Epoch,
    /// Revision of the machine's record: the reservation holds only for it.
    pub(crate) revision: u64,
    /// Certificate of the source's worker.
    pub(crate) worker: Fingerprint,
    /// Size of each memory in 64 KiB pages.
    pub(crate) memory_pages: Vec<u64>,
    /// Bytes in the volumes that move with the machine, and in its own disk.
    pub(crate) volume_bytes: u64,
    /// CPU features of the cluster's baseline, which the target must have. Those of the source's
    /// compiled code do not matter.
    pub(crate) features: Vec<String>,
    /// A file that the source just created in each writable volume, with its content: proof that
    /// the target sees the same directory.
    pub(crate) proofs: Vec<Option<(String, String)>>,
    /// Whether the move is post-copy.
    pub(crate) post_copy: bool,
    /// Up to where readers may see its output.
    #[serde(default)]
    pub(crate) shown_output: u64,
    /// The source's trace of the move, if there is one.
    #[serde(default)]
    pub(crate) traceparent: Option<String>,
}

/// State of a machine that was handed over to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Arrival {
    /// It runs here, or ran and ended.
    Resumed,
    /// It does not, and never will.
    Without,
}

/// Builds the offer for a target.
pub(super) async fn offer_of(
    context: &Context,
    record: &Record,
    revision: u64,
    report: &Report,
    worker: Fingerprint,
    proofs: &Proofs,
    post_copy: bool,
) -> Result<Offer, String> {
    // The contents of cluster volumes are not transferred.
    let own = record.spec.own_volumes();
    let volumes = report.volumes.iter();
    let volumes = volumes.filter(|volume| own.contains(&volume.number));
    let volume_bytes: u64 = volumes.map(|volume| volume.bytes).sum();
    let (kinds, spec) = (context.kinds.clone(), record.spec.clone());
    let folder = context.dir.worker(&record.name);
    let measured =
        tokio::task::spawn_blocking(move || kinds.of(&spec).map(|kind| kind.disk_bytes(&folder)));
    let disk_bytes = measured
        .await
        .map_err(|error| error.to_string())
        .flatten()?;
    Ok(Offer {
        machine: record.name.clone(),
        spec: record.spec.clone(),
        program: report.program.map(Fingerprint),
        epoch: record.epoch,
        revision,
        worker,
        memory_pages: to_come(report),
        volume_bytes: volume_bytes.saturating_add(disk_bytes),
        features: needed_features(),
        proofs: proofs.list(),
        post_copy,
        shown_output: report.log.1,
        traceparent: None,
    })
}

/// Bytes of each memory to transfer. Zero for a spanning machine: its home becomes one of its
/// parts, and the others hold the rest.
fn to_come(report: &Report) -> Vec<u64> {
    let mut pages = report.memory_pages.clone();
    if report.parts > 0 {
        pages.fill(0);
        if let Some(first) = pages.first_mut() {
            *first = ROOM_BYTES_MIN >> 16;
        }
    }
    pages
}

/// Whether a machine of this status still needs the frozen copy that its source has.
pub(crate) fn needs_copy(source: &NodeName, status: &Status) -> bool {
    match status {
        Status::Arriving { from } | Status::Filling { from } => from == source,
        _ => false,
    }
}

/// Passes a failpoint; the error is the reason for which the step fails.
pub(super) async fn passed(name: &'static str) -> Result<(), String> {
    failpoint::pass_async(name)
        .await
        .map_err(|injected| injected.to_string())
}
