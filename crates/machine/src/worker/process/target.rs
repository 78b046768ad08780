//! Receiving a machine from another worker; the store decides when this worker owns it.

use super::super::cluster_volumes::ClusterVolumes;
use super::super::control::{MoveEndpoint, Receive, State};
use super::super::post_copy::{PostCopyStatus, PostCopyTarget};
use super::super::target::{self, TargetError};
use super::super::volumes::TargetVolumes;
use super::{Worker, publish_resumed};
use crate::failpoint;
use crate::link::{Link, LinkError, Message};
use crate::log::Log;
use crate::moves::{TargetCommand, TargetEvent, TargetMove, TargetState};
use keel_cluster::Epoch;
use keel_net::{PinnedIdentity, RpcError};
use keel_wasi::Wasi;
use std::sync::Arc;
use tokio::runtime::Handle;

impl Worker {
    pub(super) fn receive(
        self: &Arc<Self>,
        request: Receive,
        runtime: &Handle,
    ) -> Result<MoveEndpoint, RpcError> {
        if *self.state.borrow() != State::Empty {
            return Err(RpcError::refused("this worker has a machine already"));
        }
        self.limit_memory(request.memory_pages.len(), &request.spec);
        ClusterVolumes::probe(&request.spec, runtime).map_err(RpcError::failed)?;
        let volumes = TargetVolumes::new(&request.spec, &self.folder, request.volume_bytes)
            .map_err(RpcError::failed)?;
        let bytes = std::fs::read(&request.program)
            .map_err(|error| RpcError::failed(format!("{}: {error}", request.program.display())))?;
        let program = self
            .engine
            .load_instrumented(bytes)
            .map_err(RpcError::failed)?;
        let identity = PinnedIdentity::generate().map_err(RpcError::failed)?;
        let listener = std::net::TcpListener::bind((request.address.as_str(), 0))
            .map_err(|error| RpcError::failed(format!("{}: {error}", request.address)))?;
        let address = listener.local_addr().map_err(RpcError::failed)?;
        let receiving = MoveEndpoint {
            address: address.to_string(),
            fingerprint: identity.fingerprint,
        };
        let offered = request.offered;
        {
            let mut inner = self.inner();
            inner.name = Some(request.machine.clone());
            inner.spec = Some(request.spec.clone());
            inner.target = Some(TargetMove::new(offered));
        }
        failpoint::pass("in.listening").map_err(RpcError::failed)?;
        self.state.send_replace(State::Receiving { offered });
        let worker = self.clone();
        let runtime = runtime.clone();
        std::thread::Builder::new()
            .name("move-in".into())
            .spawn(move || {
                let restore = |snapshot, log: Arc<Log>, local| {
                    let cluster_volumes =
                        worker.open_cluster_volumes(&request.spec, &log, &runtime)?;
                    let cluster_volumes = cluster_volumes.with_local(local);
                    let resources = worker.resources(&request.spec, &log, &cluster_volumes)?;
                    let wasi = Wasi::restore(snapshot, resources)?;
                    cluster_volumes.attach(&wasi);
                    worker.inner().cluster_volumes = cluster_volumes;
                    Ok(wasi)
                };
                let telling = worker.clone();
                let fill = move |post_copy_target: &PostCopyTarget, listener, tls, hello| {
                    let worker = telling.clone();
                    post_copy_target
                        .begin(listener, tls, hello, move |it| worker.publish_post_copy(it))
                };
                let part = || worker.inner().parts.arriving();
                let arrived = target::receive(
                    &listener,
                    &identity,
                    &request,
                    program,
                    &worker.folder,
                    volumes,
                    &target::TargetEnvironment {
                        restore: &restore,
                        fill: &fill,
                        part: &part,
                    },
                );
                worker.arrived(arrived, offered);
            })
            .map_err(RpcError::failed)?;
        Ok(receiving)
    }

    fn arrived(
        self: &Arc<Self>,
        arrived: Result<target::ReceivedMachine, TargetError>,
        offered: Epoch,
    ) {
        let mut arrived = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                self.step_target(TargetEvent::Failed(error.to_string()));
                return;
            }
        };
        let mut push = None;
        if let Some((post_copy_target, links)) = arrived.post_copy_target.take() {
            push = Some(links);
            self.inner().post_copy_target = Some(post_copy_target);
        }
        {
            let mut inner = self.inner();
            inner.machine = Some(arrived.machine.clone());
            inner.log = Some(arrived.log.clone());
            inner.handover = arrived.handover.take();
        }
        self.step_target(TargetEvent::StateArrived);
        let commands = self.step_target(TargetEvent::InstancesMade);
        if !commands.contains(&TargetCommand::SendPrepared) {
            return;
        }
        {
            // It may have been dropped meanwhile.
            let inner = self.inner();
            let target = inner.target.as_ref();
            if target.is_none_or(|target| target.state() != TargetState::Prepared) {
                return;
            }
            self.state.send_replace(State::Prepared {
                offered,
                source_lost: false,
            });
        }
        let said = arrived.send_prepared();
        let passed = failpoint::pass("in.prepared");
        if let Some(error) = said
            .err()
            .map(|it| it.to_string())
            .or(passed.err().map(|it| it.to_string()))
        {
            self.source_lost(error, offered);
            return;
        }
        self.read_source(&mut arrived.link, offered);
        // The remaining memory arrives by the same connection.
        let runs = matches!(*self.state.borrow(), State::Filling { .. });
        if let Some(push) = push.filter(|_| runs)
            && push.send(arrived.link).is_err()
        {
            tracing::warn!("no receiver for the remaining memory");
        }
    }

    /// Publishes the progress of post-copy.
    fn publish_post_copy(&self, filling: PostCopyStatus) {
        self.state.send_if_modified(|state| {
            let State::Filling { epoch, source_lost } = state else {
                return false;
            };
            let epoch = *epoch;
            let was_lost = *source_lost;
            let now = match filling {
                PostCopyStatus::Done => State::Running { epoch },
                PostCopyStatus::Receiving | PostCopyStatus::SourceLost => State::Filling {
                    epoch,
                    source_lost: filling == PostCopyStatus::SourceLost,
                },
            };
            let changes = filling == PostCopyStatus::Done
                || was_lost != (filling == PostCopyStatus::SourceLost);
            *state = now;
            changes
        });
        if filling == PostCopyStatus::Done {
            // Its threads have ended or are about to.
            self.inner().post_copy_target = None;
        }
    }

    /// Reads messages of the source until it disconnects.
    fn read_source(self: &Arc<Self>, link: &mut Link, offered: Epoch) {
        let post_copy_target = self.inner().post_copy_target.clone();
        let mut naming = post_copy_target.as_ref();
        loop {
            let event = match link.receive() {
                Ok(message) if message.names_pages() && naming.is_some() => {
                    match naming.map(|post_copy_target| {
                        target::handle_page_names(message, post_copy_target)
                    }) {
                        Some(Ok(true)) => naming = None,
                        Some(Err(error)) => {
                            return self.source_lost(error.to_string(), offered);
                        }
                        Some(Ok(false)) | None => {}
                    }
                    continue;
                }
                Ok(Message::Go(epoch)) => match failpoint::pass("in.go") {
                    Ok(()) => TargetEvent::Go(epoch),
                    Err(error) => return self.source_lost(error.to_string(), offered),
                },
                Ok(_) => TargetEvent::Abort("the source sent a message out of turn".into()),
                Err(LinkError::Aborted(reason)) => TargetEvent::Abort(reason),
                Err(error) => return self.source_lost(error.to_string(), offered),
            };
            let last =
                !matches!(event, TargetEvent::Go(_)) || self.inner().post_copy_target.is_some();
            // The source measures downtime until this message arrives.
            self.step_target_and(event, &mut |epoch| {
                if let Err(error) = failpoint::pass("in.gone")
                    .map_err(|error| LinkError::Aborted(error.to_string()))
                    .and_then(|()| target::send_resumed(link, epoch))
                {
                    // The source asks again through the agents.
                    tracing::info!(%error, "cannot tell the source that the machine runs");
                }
            });
            if last {
                return;
            }
        }
    }

    fn source_lost(self: &Arc<Self>, reason: String, offered: Epoch) {
        if let Some(post_copy_target) = &self.inner().post_copy_target {
            post_copy_target.names_lost();
        }
        let commands = self.step_target(TargetEvent::SourceLost(reason));
        if commands.contains(&TargetCommand::AskAgent) {
            self.state.send_replace(State::Prepared {
                offered,
                source_lost: true,
            });
        }
    }

    /// Steps the target's state machine and carries out its commands, except messages to
    /// the source.
    pub(in super::super) fn step_target(
        self: &Arc<Self>,
        event: TargetEvent,
    ) -> Vec<TargetCommand> {
        self.step_target_and(event, &mut |_| {})
    }

    /// As [`Self::step_target`]; tells the source at once when the machine runs.
    fn step_target_and(
        self: &Arc<Self>,
        event: TargetEvent,
        say_resumed: &mut dyn FnMut(Epoch),
    ) -> Vec<TargetCommand> {
        // A repeated request to resume is answered after the first one is carried out.
        let _stepping = self
            .stepping
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let mut inner = self.inner();
        let Some(target) = &mut inner.target else {
            return Vec::new();
        };
        let commands = target.step(event);
        let state = target.state();
        let mut thawed = None;
        if let Some(TargetCommand::Thaw(epoch)) = commands.first()
            && let Some((part, handover)) = inner.handover.take()
        {
            let machine = inner.machine.clone();
            inner.epoch = *epoch;
            drop(inner);
            self.become_home(machine, &part, handover);
            inner = self.inner();
        }
        for command in &commands {
            match command {
                TargetCommand::Thaw(epoch) => {
                    inner.epoch = *epoch;
                    inner.cluster_volumes.claim_under(*epoch);
                    if let Some(post_copy_target) = &inner.post_copy_target {
                        post_copy_target.seal();
                    }
                    thawed = inner.machine.clone();
                    if let Some(machine) = &thawed {
                        machine.set_epoch(epoch.token());
                        // The machine is ready; its guest cannot have ended.
                        if let Err(error) = machine.thaw() {
                            tracing::error!(%error, "cannot resume a machine that arrived");
                        }
                    }
                }
                TargetCommand::SendResumed(epoch) => say_resumed(*epoch),
                TargetCommand::Drop(reason) => {
                    if let Some(machine) = inner.machine.take() {
                        machine.stop();
                    }
                    inner.handover = None;
                    match inner.parts.is_member() {
                        // Needed while a part of the machine is at this worker.
                        true => {
                            inner.dropped_for = Some(reason.clone());
                            self.state.send_if_modified(|state| match *state {
                                State::Prepared { offered, .. } => {
                                    *state = State::Receiving { offered };
                                    true
                                }
                                _ => false,
                            });
                        }
                        false => drop(self.state.send_replace(State::Dropped {
                            reason: reason.clone(),
                        })),
                    }
                }
                TargetCommand::Prepare | TargetCommand::SendPrepared | TargetCommand::AskAgent => {}
            }
        }
        if let Some(machine) = thawed {
            if let Some(post_copy_target) = &inner.post_copy_target {
                post_copy_target.start_running();
            }
            if let Err(error) = self.watch_end(machine) {
                tracing::error!(%error, "cannot watch for its end");
            }
        }
        if let TargetState::Running { epoch } = state
            && commands
                .iter()
                .any(|command| matches!(command, TargetCommand::Thaw(_)))
        {
            let state = match inner.post_copy_target.is_some() {
                true => State::Filling {
                    epoch,
                    source_lost: false,
                },
                false => State::Running { epoch },
            };
            publish_resumed(&self.state, inner.log.as_deref(), state);
        }
        commands
    }
}
