//! What other nodes ask of this one, over `keel-net`'s rpc: offers, modules,
//! arrivals, and what users want done with machines that run here.

use crate::agent::Agent;
use crate::events::{self, Note, Question};
use crate::offer::{self, Offer};
use crate::operate::{self, Operation};
use crate::output;
use crate::state_dir::{is_hash, write_whole};
use crate::workers::PROMPT;
use crate::{changing, spanning};
use futures::FutureExt;
use keel_cluster::service::ClusterService;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::worker::control::{AddPart, ConnectNewPart, pack, unpack};
use keel_net::{BoxFuture, Bytes, Fingerprint, Handler, PeerId, Reply, RpcError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Kinds of requests between agents.
pub(crate) mod kind {
    /// `Offer` → `Receiving`.
    pub(crate) const OFFER: u16 = 0x0301;
    /// `(is program, hash)` → stream of the file's pieces.
    pub(crate) const FETCH: u16 = 0x0302;
    /// `(machine, epoch)` → `Arrival`.
    pub(crate) const ARRIVAL: u16 = 0x0303;
    /// `machine` → `()`: the source gives an offer up.
    pub(crate) const WITHDRAW: u16 = 0x0304;
    /// `Operation` → its answer.
    pub(crate) const OPERATE: u16 = 0x0305;
    /// `MoveOrder` → stream of `MoveLine`.
    pub(crate) const MOVE: u16 = 0x0306;
    /// `(machine, from, follow)` → stream of `LogChunk`.
    pub(crate) const LOG: u16 = 0x0307;
    /// `machine` → `bool`: whether a source still has the frozen copy.
    pub(crate) const HELD: u16 = 0x0308;
    /// `events::Question` → stream of `EventLine` as JSON.
    pub(crate) const EVENTS: u16 = 0x0309;
    /// Any bytes → `()`: how fast they come.
    pub(crate) const TRIAL: u16 = 0x030a;
    /// `Offer` → `()`: whether it would be taken; nothing is reserved.
    pub(crate) const WOULD_TAKE: u16 = 0x030b;
    /// `keel_balance::round::Question` → `Answer`.
    pub(crate) const BALANCE: u16 = 0x030c;
    /// `balancer::Wanted`, which is not looked at → `NodeLoad` as JSON.
    pub(crate) const LOAD: u16 = 0x030d;
    /// `balancer::Wanted` → list of `Line` as JSON.
    pub(crate) const LEDGER: u16 = 0x030e;
    /// `(machine, node)` → `WhyNot` as JSON.
    pub(crate) const WHY_NOT: u16 = 0x030f;
    /// `machine` → `()` as JSON: a proposed move is to be made.
    pub(crate) const CONFIRM: u16 = 0x0310;
    /// nothing → `DrainInfo` as JSON.
    pub(crate) const DRAIN: u16 = 0x0311;
    /// `balancer::Span` → list of `HistoryPoint` as JSON.
    pub(crate) const HISTORY: u16 = 0x0312;
    /// List of `Line` as JSON, of a machine that came → `()` as JSON.
    pub(crate) const LEDGER_ALONG: u16 = 0x0313;
    /// `spanning::PartOffer` → `spanning::ReadyMember`.
    pub(crate) const PART: u16 = 0x0314;
    /// `spanning::PartJoin` → `()`.
    pub(crate) const PART_JOIN: u16 = 0x0315;
    /// `(machine, CPU features that a part of it needs)` → `u64`: bytes of memory that are
    /// free for it.
    pub(crate) const ROOM: u16 = 0x0316;
    /// [`keel_machine::worker::control::ConnectNewPart`] → [`keel_machine::span::PartAddress`].
    pub(crate) const CONNECT_NEW_PART: u16 = 0x0317;
    /// [`keel_machine::worker::control::AddPart`] → `u64`.
    pub(crate) const ADD_PART: u16 = 0x0318;
    /// [`crate::spanning::PartOffer`] → [`crate::spanning::ReadyMember`]: as [`PART`], of the
    /// worker to which the machine moves.
    pub(crate) const ARRIVING_PART: u16 = 0x0319;
    /// [`crate::spanning::PartJoin`] → `()`: as [`PART_JOIN`], of that worker.
    pub(crate) const ARRIVING_JOIN: u16 = 0x031a;
    /// [`MachineName`] → `Option<PartId>`: the part of it that the worker is here to which it
    /// was to move.
    pub(crate) const ARRIVED_PART: u16 = 0x031b;
    /// `program` → [`crate::code::CodeState`]: a machine is to move here, and its module is
    /// at who asks.
    pub(crate) const CODE: u16 = 0x031c;
    /// `machine` → `Option<Fingerprint>`: the program of a machine that runs here.
    pub(crate) const PROGRAM: u16 = 0x031d;
}

/// Bytes of a module in one piece.
const PIECE_BYTES: usize = 1 << 20;

pub(crate) struct Service {
    agent: Arc<Agent>,
    cluster: Option<ClusterService>,
}

impl Service {
    pub(crate) fn new(agent: Arc<Agent>, cluster: Option<ClusterService>) -> Self {
        Service { agent, cluster }
    }

    async fn answer(&self, source: NodeName, kind: u16, payload: Bytes) -> Result<Reply, RpcError> {
        let agent = &self.agent;
        match kind {
            kind::OFFER => {
                let request: Offer = unpack(&payload)?;
                let (machine, epoch) = (request.machine.clone(), request.epoch);
                let answer = offer::accept(agent, source.clone(), request).await;
                let refused = answer.as_ref().err();
                let offered = Note::offered(&machine, epoch, &source, refused);
                agent.events.record(offered);
                Ok(pack(&answer.map_err(RpcError::failed)?)?.into())
            }
            kind::FETCH => {
                let (is_program, hash): (bool, String) = unpack(&payload)?;
                if !is_hash(&hash) {
                    return Err(RpcError::refused("that is no hash of a module"));
                }
                let path = if is_program {
                    agent.dir.program(&hash)
                } else {
                    agent.dir.module(&hash)
                };
                send_file(path).await
            }
            kind::ARRIVAL => {
                let (machine, epoch): (MachineName, Epoch) = unpack(&payload)?;
                let arrival = offer::arrival(agent, &machine, epoch)
                    .await
                    .map_err(RpcError::failed)?;
                Ok(pack(&arrival)?.into())
            }
            kind::CODE => {
                let program: Fingerprint = unpack(&payload)?;
                Ok(pack(&agent.code.demand(program, &source))?.into())
            }
            kind::PROGRAM => {
                let machine: MachineName = unpack(&payload)?;
                Ok(pack(&crate::code::program_here(agent, &machine).await)?.into())
            }
            kind::HELD => {
                let machine: MachineName = unpack(&payload)?;
                let held = match agent.workers.get(&machine).filter(|it| !it.is_lost()) {
                    Some(worker) => match worker.report().await {
                        // (Else it is another life of that name.)
                        Ok(report) => report.moving_away,
                        // It may have the copy as long as its process is there.
                        Err(_) => !worker.gone_within(Duration::ZERO).await,
                    },
                    None => false,
                };
                Ok(pack(&held)?.into())
            }
            kind::WITHDRAW => {
                let machine: MachineName = unpack(&payload)?;
                offer::settle(agent, &machine).await;
                Ok(pack(&())?.into())
            }
            kind::OPERATE => {
                let operation: Operation = unpack(&payload)?;
                let answer = operate::here(agent, operation).await;
                Ok(pack(&answer)?.into())
            }
            kind::MOVE => {
                let order: crate::moving::MoveOrder = unpack(&payload)?;
                let mut lines = crate::moving::begin(agent, &order.machine, &order)
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
            kind::LOG => {
                let (machine, from, follow): (MachineName, u64, bool) = unpack(&payload)?;
                let stream = output::here(agent, &machine, from, follow)
                    .await
                    .map_err(RpcError::failed)?;
                Ok(Reply::Stream(stream))
            }
            kind::TRIAL => Ok(pack(&())?.into()),
            kind::WOULD_TAKE => {
                let request: Offer = unpack(&payload)?;
                let would = offer::would_take(agent, &request).await;
                Ok(pack(&would.map_err(RpcError::failed)?)?.into())
            }
            kind::BALANCE => {
                let question = unpack(&payload)?;
                let answer = agent.balancer.answer(&source, question).await;
                Ok(pack(&answer.map_err(RpcError::failed)?)?.into())
            }
            kind::LOAD
            | kind::LEDGER
            | kind::LEDGER_ALONG
            | kind::HISTORY
            | kind::WHY_NOT
            | kind::CONFIRM
            | kind::DRAIN => {
                let answer = crate::balancer::answer(agent, kind, payload).await;
                Ok(Bytes::from(answer.map_err(RpcError::failed)?).into())
            }
            kind::PART => {
                let offer = unpack(&payload)?;
                let ready = spanning::ready(agent, &source, offer).await;
                Ok(pack(&ready.map_err(RpcError::failed)?)?.into())
            }
            kind::PART_JOIN => {
                let request = unpack(&payload)?;
                let joined = spanning::join(agent, request).await;
                Ok(pack(&joined.map_err(RpcError::failed)?)?.into())
            }
            kind::CONNECT_NEW_PART => {
                let request: ConnectNewPart = unpack(&payload)?;
                let place = changing::meet_new(agent, &request).await;
                Ok(pack(&place.map_err(RpcError::failed)?)?.into())
            }
            kind::ADD_PART => {
                let request: AddPart = unpack(&payload)?;
                let joined = changing::join_new(agent, &request).await;
                Ok(pack(&joined.map_err(RpcError::failed)?)?.into())
            }
            kind::ARRIVING_PART => {
                let offer = unpack(&payload)?;
                let ready = spanning::ready_arriving(agent, &source, offer).await;
                Ok(pack(&ready.map_err(RpcError::failed)?)?.into())
            }
            kind::ARRIVING_JOIN => {
                let request = unpack(&payload)?;
                let joined = spanning::join_arriving(agent, request).await;
                Ok(pack(&joined.map_err(RpcError::failed)?)?.into())
            }
            kind::ARRIVED_PART => {
                let machine: MachineName = unpack(&payload)?;
                let part = spanning::arrived_part(agent, &machine).await;
                Ok(pack(&part.map_err(RpcError::failed)?)?.into())
            }
            kind::ROOM => {
                let (machine, features): (MachineName, Vec<String>) = unpack(&payload)?;
                spanning::has_features(&features).map_err(RpcError::failed)?;
                let room = offer::room_bytes(agent, &machine).await;
                Ok(pack(&room.map_err(RpcError::failed)?)?.into())
            }
            kind::EVENTS => {
                let question: Question = unpack(&payload)?;
                let lines = events::answer_peer(&agent.events, question);
                Ok(Reply::Stream(lines))
            }
            other => Err(RpcError::refused(format!(
                "this node knows no request of kind {other:#06x}; is it older?"
            ))),
        }
    }
}

impl Handler for Service {
    fn permits(&self, peer: &PeerId, kind: u16) -> bool {
        match &self.cluster {
            Some(cluster) if ClusterService::handles(kind) => cluster.permits(peer, kind),
            _ => matches!(peer, PeerId::Node(_)),
        }
    }

    fn call(
        &self,
        peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        if let Some(cluster) = &self.cluster
            && ClusterService::handles(kind)
        {
            return cluster.call(peer, kind, payload);
        }
        async move {
            match peer {
                PeerId::Node(source) => self.answer(source, kind, payload).await,
                other => Err(RpcError::refused(format!("{other} is no node"))),
            }
        }
        .boxed()
    }
}

async fn send_file(path: PathBuf) -> Result<Reply, RpcError> {
    let opened = tokio::task::spawn_blocking(move || std::fs::File::open(path));
    let mut file = opened
        .await
        .map_err(RpcError::unknown)?
        .map_err(|_| RpcError::refused("this node does not have that module"))?;
    let (send, stream) = mpsc::channel(4);
    std::thread::Builder::new()
        .name("send-file".into())
        .spawn(move || {
            use std::io::Read;
            loop {
                let mut piece = Vec::with_capacity(PIECE_BYTES);
                let read = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece);
                match read {
                    Ok(0) => return,
                    Ok(_) => {
                        if send.blocking_send(piece.into()).is_err() {
                            return;
                        }
                    }
                    // The receiver checks the hash of the whole.
                    Err(error) => {
                        tracing::warn!(%error, "a module cannot be sent");
                        return;
                    }
                }
            }
        })
        .map_err(RpcError::failed)?;
    Ok(Reply::Stream(stream))
}

/// Gets a file from a node and keeps it, if it is what its hash says.
async fn fetch(
    agent: &Agent,
    node: &NodeName,
    is_program: bool,
    hash: &str,
    path: &Path,
) -> Result<(), String> {
    let question = pack(&(is_program, hash.to_owned())).map_err(|error| error.to_string())?;
    let mut stream = agent
        .peers
        .stream(node, kind::FETCH, question)
        .await
        .map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.recv().await {
        bytes.extend_from_slice(&piece.map_err(|error| error.to_string())?);
        if bytes.len() > 2 * keel_machine::MODULE_BYTES_MAX {
            return Err("the module is too large".into());
        }
    }
    let (hash, path) = (hash.to_owned(), path.to_owned());
    tokio::task::spawn_blocking(move || {
        if blake3::hash(&bytes).to_hex().as_str() != hash {
            return Err("the module is not what its hash says".to_owned());
        }
        write_whole(&path, &bytes).map_err(|error| format!("{}: {error}", path.display()))
    })
    .await
    .map_err(|error| error.to_string())?
}

/// Whether there is such a file; where that cannot be said it is fetched.
async fn is_there(path: &Path) -> bool {
    tokio::fs::try_exists(path).await.unwrap_or_default()
}

/// The file of an instrumented module, fetched from a move's source if need be.
pub(crate) async fn find_program(
    agent: &Agent,
    source: &NodeName,
    hash: &Fingerprint,
) -> Result<PathBuf, String> {
    let hash = hash.to_string();
    let path = agent.dir.program(&hash);
    if !is_there(&path).await {
        fetch(agent, source, true, &hash, &path)
            .await
            .map_err(|error| format!("its module cannot be fetched: {error}"))?;
    }
    Ok(path)
}

/// The file of a module as its author built it, fetched from whichever node has
/// it if need be.
pub(crate) async fn find_module(agent: &Agent, hash: &str) -> Result<PathBuf, String> {
    if !is_hash(hash) {
        return Err(format!("{hash:?} is no hash of a module"));
    }
    let path = agent.dir.module(hash);
    if is_there(&path).await {
        return Ok(path);
    }
    for node in agent.members.all().keys() {
        if *node == agent.name {
            continue;
        }
        match tokio::time::timeout(6 * PROMPT, fetch(agent, node, false, hash, &path)).await {
            Ok(Ok(())) => return Ok(path),
            Ok(Err(error)) => tracing::debug!(%node, error, "no module from there"),
            Err(_) => tracing::warn!(%node, "a module takes too long"),
        }
    }
    Err(format!(
        "no node that answers has module {hash}; run it again with its file"
    ))
}
