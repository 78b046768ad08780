//! Target of a move: checks, fetches and compiles the module, reserves room,
//! starts a worker that receives, and settles what a lost source left behind.

use crate::agent::{Agent, cpu_features, memory_available_bytes};
use crate::record::{self, Reservation};
use crate::service::kind as node_kind;
use crate::workers::{COMPILE_PATIENCE, Leftovers, PROMPT, Worker};
use keel_cluster::keys::{self, Key};
use keel_cluster::store::{Compare, Txn, TxnOutcome};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::moves::ownership::{self, ArrivalVerdict};
use keel_machine::spec::{Spec, VolumeKind};
use keel_machine::worker::control::{MoveEndpoint, Receive, State, kind, pack};
use keel_machine::worker::volumes;
use keel_net::{Fingerprint, RpcError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Memory that a node keeps for itself.
const SPARE_BYTES: u64 = 256 << 20;
/// Pause between attempts to settle.
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// What a source asks of a target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) machine: MachineName,
    #[serde(with = "keel_machine::past::spec_for_others")]
    pub(crate) spec: Spec,
    pub(crate) program: Fingerprint,
    pub(crate) epoch: Epoch,
    /// Revision of the machine's record: the reservation holds only for it.
    pub(crate) revision: u64,
    /// Certificate of the source's worker.
    pub(crate) worker: Fingerprint,
    /// Size of each memory in 64 KiB pages.
    pub(crate) memory_pages: Vec<u64>,
    /// Bytes that its own volumes take.
    pub(crate) volume_bytes: u64,
    /// CPU features that the source's compiled code may use are of no matter;
    /// those that the cluster's baseline names must be here.
    pub(crate) features: Vec<String>,
    /// A file that the source just made in each writable volume, and what is in
    /// it: proof that this node sees the same directory.
    pub(crate) proofs: Vec<Option<(String, String)>>,
    /// Whether memory comes after the machine.
    pub(crate) post_copy: bool,
}

/// Answers an offer. Whatever was begun is undone when it fails.
pub(crate) async fn accept(
    agent: &Arc<Agent>,
    source: NodeName,
    offer: Offer,
) -> Result<MoveEndpoint, String> {
    let machine = offer.machine.clone();
    check(agent, &offer).await?;
    passed("offer.checked").await?;
    if !agent.busy().insert(machine.clone()) {
        return Err(format!("machine {machine:?} is arriving here already"));
    }
    let result = take_in(agent, source, offer).await;
    if result.is_err() {
        drop_reservation(agent, &machine).await;
    }
    agent.busy().remove(&machine);
    result
}

/// Whether an offer would be taken, as far as that shows without beginning.
pub(crate) async fn would_take(agent: &Agent, offer: &Offer) -> Result<(), String> {
    check(agent, offer).await?;
    check_room(agent, &offer.machine, &offer.memory_pages).await
}

async fn check(agent: &Agent, offer: &Offer) -> Result<(), String> {
    if offer.post_copy
        && let Some(missing) = keel_machine::missing_for_post_copy()
    {
        return Err(format!(
            "memory cannot come after a machine here: {missing}"
        ));
    }
    let here = cpu_features();
    let missing: Vec<&str> = offer
        .features
        .iter()
        .filter(|feature| !here.contains(feature))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return Err(format!("this node's CPU lacks {}", missing.join(", ")));
    }
    let (spec_volumes, proofs) = (offer.spec.volumes.clone(), offer.proofs.clone());
    let (workers, volume_bytes) = (agent.dir.workers(), offer.volume_bytes);
    tokio::task::spawn_blocking(move || {
        if volume_bytes > 0 {
            let free = volumes::free_bytes(&workers)
                .map_err(|error| format!("{}: {error}", workers.display()))?;
            if volume_bytes > free {
                return Err(volumes::no_room(volume_bytes, free, &workers));
            }
        }
        for (volume, proof) in spec_volumes.iter().zip(&proofs) {
            let VolumeKind::Host { path } = &volume.kind else {
                continue;
            };
            let folder = std::path::Path::new(path);
            if !folder.is_dir() {
                return Err(format!("volume {path} is no directory here"));
            }
            let Some((name, content)) = proof else {
                continue;
            };
            // A name without slashes: nothing outside the volume is looked at.
            let seen = (!name.contains('/'))
                .then(|| std::fs::read_to_string(folder.join(name)).ok())
                .flatten();
            if seen.as_ref() != Some(content) {
                return Err(format!(
                    "volume {path} is another directory here: every node must see the same one (NFS or the like)"
                ));
            }
        }
        Ok(())
    })
    .await
    .map_err(|error| error.to_string())?
}

async fn take_in(
    agent: &Arc<Agent>,
    source: NodeName,
    offer: Offer,
) -> Result<MoveEndpoint, String> {
    let machine = &offer.machine;
    if let Some(worker) = agent.workers.get(machine) {
        match worker.state().await {
            Ok(State::Ended { .. } | State::Dropped { .. } | State::Empty) | Err(_) => {
                agent.workers.forget(&agent.dir, machine).await;
            }
            Ok(_) if crate::spanning::part_of(&worker).await?.is_some() => {
                return Err(format!(
                    "a part of machine {machine:?} is still here that an earlier move made; try again"
                ));
            }
            Ok(_) => return Err(format!("machine {machine:?} has a worker here already")),
        }
    }
    let program = crate::service::find_program(agent, &source, &offer.program).await?;
    passed("offer.fetched").await?;
    {
        // One at a time: two that fit alone may not fit together.
        let _reserving = agent.reserving.lock().await;
        check_room(agent, machine, &offer.memory_pages).await?;
        reserve(agent, &source, &offer).await?;
    }
    passed("offer.reserved").await?;
    let worker = match agent
        .workers
        .start(&agent.dir, machine, Leftovers::Remove)
        .await
    {
        Ok(worker) => worker,
        Err(error) => {
            agent.workers.forget(&agent.dir, machine).await;
            return Err(error);
        }
    };
    if let Err(reason) = passed("offer.started").await {
        agent.workers.forget(&agent.dir, machine).await;
        return Err(reason);
    }
    let request = Receive {
        machine: machine.clone(),
        spec: offer.spec.clone(),
        program,
        offered: offer.epoch,
        source: offer.worker,
        address: agent.settings.listen.ip().to_string(),
        memory_pages: offer.memory_pages.clone(),
        post_copy: offer.post_copy,
        volume_bytes: offer.volume_bytes,
    };
    match worker.ask(kind::RECEIVE, &request, COMPILE_PATIENCE).await {
        Ok(receiving) => {
            crate::reconcile::watch_worker(agent, machine);
            if let Err(reason) = passed("offer.accepted").await {
                agent.workers.forget(&agent.dir, machine).await;
                return Err(reason);
            }
            Ok(receiving)
        }
        Err(error) => {
            agent.workers.forget(&agent.dir, machine).await;
            Err(match error {
                RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
                other => other.to_string(),
            })
        }
    }
}

/// Whether memories of a machine (in 64 KiB pages) fit beside what other arriving
/// machines were promised.
pub(crate) async fn check_room(
    agent: &Agent,
    machine: &MachineName,
    memory_pages: &[u64],
) -> Result<(), String> {
    let (available, promised) = available(agent, machine).await?;
    room(memory_pages, available, promised)
}

/// Bytes of memory that are free here for a machine.
pub(crate) async fn room_bytes(agent: &Agent, machine: &MachineName) -> Result<u64, String> {
    let (available, promised) = available(agent, machine).await?;
    Ok(available.saturating_sub(promised))
}

/// Bytes that are free here, and of them those that other arriving machines were promised.
async fn available(agent: &Agent, machine: &MachineName) -> Result<(u64, u64), String> {
    let listing = agent
        .store
        .list(&keys::reservations_of(&agent.name))
        .await
        .map_err(|error| format!("what is reserved here is not known: {error}"))?;
    let own = Key::Reservation(agent.name.clone(), machine.clone()).to_string();
    let promised: u64 = listing
        .entries
        .iter()
        .filter(|entry| entry.key != own)
        .filter_map(|entry| keel_cluster::wire::decode("a reservation", &entry.value).ok())
        .map(|reservation: Reservation| reservation.bytes)
        .fold(0, u64::saturating_add);
    Ok((free_bytes(), promised))
}

/// Bytes that are free here, whoever was promised them.
pub(crate) fn free_bytes() -> u64 {
    memory_available_bytes().saturating_sub(SPARE_BYTES)
}

/// Whether memories (in 64 KiB pages) fit. What has arrived of a promised machine
/// counts twice for a while: too little is taken rather than too much.
fn room(memory_pages: &[u64], available: u64, promised: u64) -> Result<(), String> {
    let wanted = memory_pages.iter().fold(0u64, |sum, pages| {
        sum.saturating_add(pages.saturating_mul(1 << 16))
    });
    let free = available.saturating_sub(promised);
    if wanted <= free {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(format!(
        "it needs {:.1} GiB of memory; {:.1} GiB are free here, of which {:.1} GiB are promised to others that arrive",
        gib(wanted),
        gib(available),
        gib(promised)
    ))
}

/// Reserves room in the store: the commit demands that the reservation is
/// there, so whoever deletes it makes the commit impossible.
async fn reserve(agent: &Arc<Agent>, source: &NodeName, offer: &Offer) -> Result<(), String> {
    let lease =
        (*agent.lease.borrow()).ok_or("this node has no lease in the store just now; try again")?;
    let reservation = Reservation {
        source: source.clone(),
        bytes: offer.memory_pages.iter().sum::<u64>() << 16,
    };
    let value = keel_cluster::wire::encode("a reservation", &reservation)
        .map_err(|error| error.to_string())?;
    let key = Key::Reservation(agent.name.clone(), offer.machine.clone());
    let txn = Txn::new()
        .when_modified_at(Key::Machine(offer.machine.clone()), offer.revision)
        .put_leased(key, value, lease);
    match agent.store.txn(txn).await {
        Ok(TxnOutcome::Committed { .. }) => Ok(()),
        Ok(TxnOutcome::Refused { .. }) => {
            Err("the machine changed meanwhile; try again".to_owned())
        }
        Err(error) => Err(format!("room cannot be reserved: {error}")),
    }
}

pub(crate) async fn drop_reservation(agent: &Arc<Agent>, machine: &MachineName) {
    let key = Key::Reservation(agent.name.clone(), machine.clone());
    if let Err(error) = agent.store.txn(Txn::new().delete(key)).await {
        // It ends with this node's lease at the latest.
        tracing::warn!(%machine, %error, "a reservation stays for a while");
    }
}

/// Withdraws what an earlier agent of this node offered and can no longer go on
/// with, so that the targets need not wait for it.
pub(crate) async fn withdraw_old(agent: Arc<Agent>) {
    let listing = match agent.store.list(keys::RESERVATIONS).await {
        Ok(listing) => listing,
        Err(error) => {
            tracing::warn!(%error, "old offers end by themselves");
            return;
        }
    };
    for entry in &listing.entries {
        let Ok(Key::Reservation(target, machine)) = entry.key.parse() else {
            continue;
        };
        let made_here = keel_cluster::wire::decode("a reservation", &entry.value)
            .is_ok_and(|reservation: Reservation| reservation.source == agent.name);
        if !made_here || agent.moves().contains_key(&machine) {
            continue;
        }
        tracing::info!(%machine, %target, "withdrawing the offer of an earlier agent");
        if let Ok(payload) = pack(&machine) {
            let told = agent
                .peers
                .call(&target, node_kind::WITHDRAW, payload, PROMPT)
                .await;
            if let Err(error) = told {
                tracing::info!(%machine, %target, %error, "it ends by itself there");
            }
        }
    }
}

/// Settles an arrival whose source is lost: takes the reservation away, which
/// makes a commit that is still on its way impossible. Where it is gone
/// already, the commit had won, and the machine is this node's.
pub(crate) async fn settle(agent: &Arc<Agent>, machine: &MachineName) {
    loop {
        match settle_once(agent, machine).await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(%machine, error, "an arrival is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

async fn settle_once(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), String> {
    let Some(worker) = agent.workers.get(machine) else {
        return Ok(());
    };
    let state = worker.state().await.map_err(|error| error.to_string())?;
    // Only what arrives is settled: it may be the source that asks to withdraw,
    // while this node gives the machine to it.
    if matches!(
        state,
        State::Running { .. } | State::Filling { .. } | State::Ended { .. }
    ) {
        return Ok(());
    }
    passed("arrival.settle").await?;
    let key = Key::Reservation(agent.name.clone(), machine.clone()).to_string();
    let txn = Txn::new()
        .when(Compare::Exists { key: key.clone() })
        .delete(key);
    let taken = agent
        .store
        .txn(txn)
        .await
        .map_err(|error| error.to_string())?
        .is_committed();
    passed("arrival.settled").await?;
    if !taken && goes_on(agent, machine, &worker, &state).await? {
        return Ok(());
    }
    drop_copy(agent, machine, &worker).await
}

/// Drops a copy that arrived here and will never go on.
async fn drop_copy(
    agent: &Arc<Agent>,
    machine: &MachineName,
    worker: &Worker,
) -> Result<(), String> {
    if crate::spanning::part_of(worker).await?.is_some() {
        // The machine needs what it has; it ends when the home parts with it.
        let reason = "the machine stays where it was".to_owned();
        let told: Result<(), RpcError> = worker.ask(kind::ABORT, &reason, PROMPT).await;
        return told.map_err(|error| error.to_string());
    }
    agent
        .workers
        .forget_exactly(&agent.dir, machine, Some(worker))
        .await;
    Ok(())
}

/// Lets an arrival whose reservation is gone go on, if the record says that the commit
/// of its move has won. False if that will never be.
async fn goes_on(
    agent: &Arc<Agent>,
    machine: &MachineName,
    worker: &Worker,
    state: &State,
) -> Result<bool, String> {
    let record = match record::get(&*agent.store, machine).await {
        Ok(found) => Some(found.record),
        Err(record::RecordError::NoMachine(_)) => None,
        Err(error) => return Err(error.to_string()),
    };
    match state {
        State::Prepared { offered, .. } => {
            let ArrivalVerdict::Goes(epoch) =
                ownership::arrival(&agent.name, *offered, record.as_ref())
            else {
                return Ok(false);
            };
            let gone: Result<u64, RpcError> = worker.ask(kind::GO, &epoch, PROMPT).await;
            gone.map(|_| true).map_err(|error| error.to_string())
        }
        // It is being made ready, and says so; then it is asked for again.
        State::Receiving { offered } => {
            let verdict = ownership::arrival(&agent.name, *offered, record.as_ref());
            Ok(matches!(verdict, ArrivalVerdict::Goes(_)))
        }
        // No copy of a move: a machine of that name is being started here.
        State::Empty | State::Held { .. } => {
            Ok(record.is_some_and(|it| it.owner == agent.name && !it.status.ended()))
        }
        _ => Ok(false),
    }
}

/// Passes a failpoint; why the step fails.
async fn passed(name: &'static str) -> Result<(), String> {
    failpoint::pass_async(name)
        .await
        .map_err(|injected| injected.to_string())
}

/// What became of a machine that was handed over to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Arrival {
    /// It runs here, or ran and ended.
    Resumed,
    /// It does not, and never will.
    Without,
}

/// Answers a source that does not know whether its machine runs here: makes it
/// go on, or makes sure that it never will.
pub(crate) async fn arrival(
    agent: &Arc<Agent>,
    machine: &MachineName,
    epoch: Epoch,
) -> Result<Arrival, String> {
    passed("arrival.asked").await?;
    let Some(worker) = agent.workers.get(machine) else {
        return Ok(Arrival::Without);
    };
    match worker.state().await.map_err(|error| error.to_string())? {
        State::Running { .. } | State::Filling { .. } | State::Ended { .. } => Ok(Arrival::Resumed),
        // (Whoever asks believes that its commit has won: the store knows.)
        State::Prepared { offered, .. } => {
            let found = match record::get(&*agent.store, machine).await {
                Ok(found) => Some(found.record),
                Err(record::RecordError::NoMachine(_)) => None,
                Err(error) => return Err(error.to_string()),
            };
            match ownership::arrival(&agent.name, offered, found.as_ref()) {
                ArrivalVerdict::Goes(won) if won == epoch => {
                    let gone: Result<u64, RpcError> = worker.ask(kind::GO, &won, PROMPT).await;
                    gone.map(|_| Arrival::Resumed)
                        .map_err(|error| error.to_string())
                }
                ArrivalVerdict::Never => {
                    drop_copy(agent, machine, &worker).await?;
                    Ok(Arrival::Without)
                }
                ArrivalVerdict::Goes(_) | ArrivalVerdict::Open => Err(format!(
                    "machine {machine:?} was not given to {} under epoch {epoch}",
                    agent.name
                )),
            }
        }
        // (A part of a machine that stays: whoever has its home parts with it.)
        State::Receiving { .. } if crate::spanning::part_of(&worker).await?.is_some() => {
            Ok(Arrival::Without)
        }
        State::Empty | State::Receiving { .. } | State::Dropped { .. } | State::Held { .. } => {
            agent
                .workers
                .forget_exactly(&agent.dir, machine, Some(&worker))
                .await;
            Ok(Arrival::Without)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::room;

    #[test]
    fn what_is_promised_is_not_free() {
        let gib = 1u64 << 30;
        // 16,384 pages of 64 KiB are 1 GiB.
        assert_eq!(room(&[16_384], gib, 0), Ok(()));
        assert_eq!(room(&[8192, 8192], 3 * gib, 2 * gib), Ok(()));
        let error = room(&[16_384], 2 * gib, 2 * gib).unwrap_err();
        assert!(error.contains("2.0 GiB are promised"), "{error}");
        assert!(room(&[16_384], gib, 2 * gib).is_err());
        assert!(room(&[u64::MAX, 1], gib, 0).is_err());
    }
}
