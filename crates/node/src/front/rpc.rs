//! Requests of other nodes, over `keel-net`'s rpc: each is decoded and passed to one handle, and
//! its answer is encoded. Two requests with one number would be an unreachable arm.

use super::handles::Handles;
use crate::balancer::{self, BALANCE};
use crate::checkpoints::{
    COPIED_LOG, CreateCheckpoint, DISCARD, Discard, FETCH_CHECKPOINT, FetchCheckpoint, OBJECT,
    OBJECTS, Object,
};
use crate::cluster_events::{EVENTS, Question, answer_peer};
use crate::compilation::{CODE, PROGRAM, program_here};
use crate::error::CommandError;
use crate::events::Note;
use crate::images::{COPY, FETCH};
use crate::logs::{LOG, LogOffset, WHOLE_LOG};
use crate::machines::{
    self, ProcessQuery, RemoveMachine, ReportQuery, SEEN_BY, SEES, Sees, SetMachine, StartProcess,
    StopMachine, SystemQuery, TypeIn, VIEW, VIEWER_INPUT,
};
use crate::moves::{
    self, ARRIVAL, CancelMove, DryRunCommand, HELD, MOVE, MoveOrder, OFFER, Offer, TRIAL, WITHDRAW,
    WOULD_ACCEPT,
};
use crate::records::MachineCommand;
use crate::spanning::{
    self, ADD_PART, ARRIVED_PART, ARRIVING_JOIN, ARRIVING_PART, CONNECT_NEW_PART, FREE_MEMORY,
    MoveObjectCommand, MoveThreadCommand, ObjectsQuery, PART, PART_JOIN, PartsQuery, SpanCommand,
    UnspanCommand,
};
use crate::volumes::FileCommand;
use crate::voters::Voters;
use futures::FutureExt;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_kind_wasm::control::{AddPart, ConnectNewPart};
use keel_machine::kind::KindName;
use keel_machine::spec::Spec;
use keel_machine::worker::control::{ReadLog, pack, unpack};
use keel_net::{BoxFuture, Bytes, Fingerprint, Handler, PeerId, Peers, Reply, RpcError};
use serde::Serialize;
use std::sync::{Arc, OnceLock};
use tokio::sync::mpsc;

/// Answers other nodes.
pub(crate) struct Service {
    handles: Arc<Handles>,
}

/// The first to get a request. What voters ask each other, and what nodes ask the store, is
/// answered from the start; all else once the agent has found the workers that run.
pub(crate) struct Entry {
    voters: Arc<Voters>,
    peers: Arc<Peers>,
    service: OnceLock<Service>,
}

impl Entry {
    pub(crate) fn new(voters: Arc<Voters>, peers: Arc<Peers>) -> Self {
        Entry {
            voters,
            peers,
            service: OnceLock::new(),
        }
    }

    /// Lets all requests in.
    pub(crate) fn open(&self, service: Service) {
        // Only the agent calls this, once.
        let _ = self.service.set(service);
    }
}

impl Handler for Entry {
    fn permits(&self, peer: &PeerId, kind: u16) -> bool {
        match Voters::handles(kind) {
            true => self.voters.permits(peer, kind),
            false => matches!(peer, PeerId::Node(_)),
        }
    }

    fn call(
        &self,
        peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        if let PeerId::Node(source) = &peer {
            self.peers.heard_from(source);
        }
        if Voters::handles(kind) {
            return self.voters.call(peer, kind, payload);
        }
        async move {
            let service = self.service.get();
            let service = service.ok_or_else(|| RpcError::refused("this agent is starting"))?;
            match peer {
                PeerId::Node(source) => service.answer(source, kind, payload).await,
                other => Err(RpcError::refused(format!("{other} is no node"))),
            }
        }
        .boxed()
    }
}

/// The answer of a handle, or its error in a sentence.
fn reply<T: Serialize>(
    answer: Result<T, impl std::fmt::Display + Send + Sync + 'static>,
) -> Result<Reply, RpcError> {
    Ok(pack(&answer.map_err(RpcError::failed)?)?.into())
}

/// Carries out by `here` a command that a user gave to another node.
async fn command<C, F>(payload: &Bytes, here: impl FnOnce(C) -> F) -> Result<Reply, RpcError>
where
    C: MachineCommand,
    F: Future<Output = Result<C::Answer, CommandError>>,
{
    Ok(pack(&here(unpack(payload)?).await)?.into())
}

impl Service {
    pub(crate) fn new(handles: Arc<Handles>) -> Self {
        Service { handles }
    }

    async fn answer(&self, source: NodeName, kind: u16, payload: Bytes) -> Result<Reply, RpcError> {
        let at = &self.handles;
        let payload = &payload;
        match kind {
            StopMachine::KIND => command(payload, |it| at.machines.stop_here(it)).await,
            RemoveMachine::KIND => command(payload, |it| at.machines.remove_here(it)).await,
            SetMachine::KIND => command(payload, |it| at.machines.set_here(it)).await,
            StartProcess::KIND => command(payload, |it| at.machines.start_process_here(it)).await,
            ProcessQuery::KIND => command(payload, |it| at.machines.process_here(it)).await,
            SystemQuery::KIND => command(payload, |it| at.machines.system_here(it)).await,
            TypeIn::KIND => command(payload, |it| at.machines.type_in_here(it)).await,
            ReportQuery::KIND => command(payload, |it| at.machines.report_here(it)).await,
            CancelMove::KIND => command(payload, |it| at.moves.cancel_here(it)).await,
            DryRunCommand::KIND => command(payload, |it| at.moves.dry_run_here(it)).await,
            CreateCheckpoint::KIND => {
                let here = async |it: CreateCheckpoint| {
                    at.checkpoints.create_here(&it.machine, it.request).await
                };
                command(payload, here).await
            }
            FileCommand::KIND => command(payload, |it| at.files.act_here(it)).await,
            LogOffset::KIND => command(payload, |it| at.logs.offset_here(it)).await,
            SpanCommand::KIND => command(payload, |it| at.spanning.span_here(it)).await,
            UnspanCommand::KIND => command(payload, |it| at.spanning.unspan_here(it)).await,
            PartsQuery::KIND => command(payload, |it| at.spanning.parts_here(it)).await,
            ObjectsQuery::KIND => command(payload, |it| at.spanning.objects_here(it)).await,
            MoveObjectCommand::KIND => {
                command(payload, |it| at.spanning.move_object_here(it)).await
            }
            MoveThreadCommand::KIND => {
                command(payload, |it| at.spanning.move_thread_here(it)).await
            }
            OFFER => {
                let request: Offer = unpack(payload)?;
                let (machine, epoch) = (request.machine.clone(), request.epoch);
                let answer = moves::accept(&at.moves, source.clone(), request).await;
                let refused = answer.as_ref().err();
                let offered = Note::offered(&machine, epoch, &source, refused);
                at.context.events.record(offered);
                reply(answer)
            }
            FETCH => {
                let (is_program, hash): (bool, String) = unpack(payload)?;
                at.images.send(is_program, &hash).await
            }
            COPY => at.images.copy_here(&unpack::<String>(payload)?).await,
            ARRIVAL => {
                let (machine, epoch): (MachineName, Epoch) = unpack(payload)?;
                reply(moves::arrival(&at.moves, &machine, epoch).await)
            }
            CODE => {
                let (kind, program): (KindName, Fingerprint) = unpack(payload)?;
                Ok(pack(&at.code.demand(&kind, program, &source))?.into())
            }
            PROGRAM => {
                let machine: MachineName = unpack(payload)?;
                Ok(pack(&program_here(&at.processes, &machine).await)?.into())
            }
            HELD => {
                let machine: MachineName = unpack(payload)?;
                Ok(pack(&moves::holds_copy(&at.moves, &machine).await)?.into())
            }
            WITHDRAW => {
                let machine: MachineName = unpack(payload)?;
                moves::settle(&at.moves, &machine).await;
                Ok(pack(&())?.into())
            }
            MOVE => {
                let order: MoveOrder = unpack(payload)?;
                let mut lines = moves::begin(&at.moves, &order.machine, &order)
                    .await
                    .map_err(RpcError::failed)?;
                let (send, stream) = mpsc::channel(64);
                tokio::spawn(async move {
                    while let Some(line) = lines.recv().await {
                        let Ok(bytes) = pack(&line) else { return };
                        if send.send(bytes).await.is_err() {
                            return;
                        }
                    }
                });
                Ok(Reply::Stream(stream))
            }
            LOG | WHOLE_LOG => {
                let (machine, from, follow): (MachineName, u64, bool) = unpack(payload)?;
                let read = ReadLog {
                    from,
                    follow,
                    whole: kind == WHOLE_LOG,
                };
                let stream = at.logs.here(&machine, read).await;
                Ok(Reply::Stream(stream.map_err(RpcError::failed)?))
            }
            VIEW => {
                let (machine, viewer): (MachineName, u64) = unpack(payload)?;
                let view = at.machines.view_for(&machine, viewer).await;
                view.map_err(|error| match error {
                    CommandError::Unavailable(reason) => RpcError::refused(reason),
                    error => RpcError::failed(error),
                })
            }
            VIEWER_INPUT => {
                let (machine, viewer, bytes): (MachineName, u64, Vec<u8>) = unpack(payload)?;
                at.machines
                    .viewer_input_here(&machine, viewer, bytes)
                    .await?;
                Ok(pack(&())?.into())
            }
            TRIAL => Ok(pack(&())?.into()),
            WOULD_ACCEPT => {
                let request: Offer = unpack(payload)?;
                reply(moves::would_accept(&at.moves, &source, &request).await)
            }
            BALANCE => reply(at.balancer.answer(&source, unpack(payload)?).await),
            balancer::LOAD
            | balancer::LEDGER
            | balancer::LEDGER_TRANSFER
            | balancer::HISTORY
            | balancer::WHY_NOT
            | balancer::CONFIRM
            | balancer::DRAIN => {
                let payload = payload.clone();
                let answer = balancer::answer(&at.balancer, kind, payload).await;
                Ok(Bytes::from(answer.map_err(RpcError::failed)?).into())
            }
            PART => reply(spanning::ready(&at.spanning, &source, unpack(payload)?).await),
            PART_JOIN => reply(spanning::join(&at.spanning, unpack(payload)?).await),
            CONNECT_NEW_PART => {
                let request: ConnectNewPart = unpack(payload)?;
                reply(spanning::meet_new(&at.spanning, &request).await)
            }
            ADD_PART => {
                let request: AddPart = unpack(payload)?;
                reply(spanning::join_new(&at.spanning, &request).await)
            }
            ARRIVING_PART => {
                reply(spanning::ready_arriving(&at.spanning, &source, unpack(payload)?).await)
            }
            ARRIVING_JOIN => reply(spanning::join_arriving(&at.spanning, unpack(payload)?).await),
            ARRIVED_PART => {
                let machine: MachineName = unpack(payload)?;
                reply(spanning::arrived_part(&at.spanning, &machine).await)
            }
            FETCH_CHECKPOINT => {
                let request: FetchCheckpoint = unpack(payload)?;
                reply(at.checkpoints.fetch_here(&source, request).await)
            }
            COPIED_LOG => {
                let (machine, folder, from): (MachineName, String, u64) = unpack(payload)?;
                let copy = at.checkpoints.send_copy(&machine, &folder, from).await;
                Ok(Reply::Stream(copy.map_err(RpcError::failed)?))
            }
            OBJECT => {
                let (machine, object): (MachineName, Object) = unpack(payload)?;
                at.checkpoints.send_object(&machine, &object).await
            }
            OBJECTS => {
                let machine: MachineName = unpack(payload)?;
                reply(at.checkpoints.objects_here(machine).await)
            }
            DISCARD => {
                let request: Discard = unpack(payload)?;
                reply(at.checkpoints.discard_here(&source, request).await)
            }
            SEES => {
                let request: Sees = unpack(payload)?;
                let seen = machines::sees(&at.machines, request).await;
                reply(seen.map_err(RpcError::failed))
            }
            SEEN_BY => {
                let spec: Spec = unpack(payload)?;
                let nodes = machines::seen_by(&at.machines, &spec).await;
                reply(nodes.map_err(RpcError::failed))
            }
            FREE_MEMORY => {
                let (machine, features): (MachineName, Vec<String>) = unpack(payload)?;
                reply(spanning::free_memory_here(&at.spanning, &machine, &features).await)
            }
            EVENTS => {
                let question: Question = unpack(payload)?;
                Ok(Reply::Stream(answer_peer(&at.context.events, question)))
            }
            other => Err(RpcError::refused(format!(
                "this node knows no request of kind {other:#06x}; is it older?"
            ))),
        }
    }
}
