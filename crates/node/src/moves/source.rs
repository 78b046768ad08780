//! One move, step by step: what each command of the source's state machine does, and what
//! came of it.

use super::directory_proofs::Proofs;
use super::dry_run;
use super::handle::Moves;
use super::offer::{self, Arrival, needs_copy, offer_of, passed};
use super::queue::QueuePlace;
use crate::code::{CODE, CodeState};
use crate::events::Note;
use crate::processes::{COMPILE_PATIENCE, PROMPT, Worker, is_older};
use crate::records::{self, RecordError};
use crate::rules::{ClaimError, Claims};
use crate::spanning::{Placement, Successor, successor};
use keel_api::{MoveLine, Urgency};
use keel_cluster::{Epoch, NodeName};
use keel_machine::failpoint;
use keel_machine::moves::ownership::{Settlement, Transfer, VersionedRecord};
use keel_machine::moves::{
    Ending, MoveReport, Phase, Progress, SourceCommand, SourceEvent, SourceMove, SourceState,
};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{
    Copy, CopyEvent, CopyHome, Frozen, MoveEndpoint, State, kind, pack, unpack,
};
use keel_net::{Fingerprint, RpcError};
use keel_store::StoreError;
use keel_store::TxnOutcome;
use keel_store::clock::unix_ms;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Begins the reason of a commit that lost against another placement.
pub(crate) const RACED: &str = "raced with another change of what a rule holds:";

/// How long the store may take before a move is given up.
const STORE_PATIENCE: Duration = Duration::from_secs(3);
/// Pause between looks at how far compiling is.
const CODE_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Pause between looks at whether the target has written that it has all memory.
const FILLED_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// Pause between attempts to settle what is unknown.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How long the word may be on its way that the target has all memory.
const LAST_WORD_PATIENCE: Duration = Duration::from_secs(1);
/// How long whoever watches a move may take to read how it ended.
const WATCHER_PATIENCE: Duration = Duration::from_secs(1);
/// How long freezing and sending the rest may take.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Driver {
    pub(super) moves: Arc<Moves>,
    pub(super) record: Record,
    pub(super) revision: u64,
    pub(super) target: NodeName,
    pub(super) worker: Worker,
    pub(super) source: SourceMove,
    pub(super) post_copy: bool,
    pub(super) interrupted: watch::Receiver<Option<SourceEvent>>,
    pub(super) lines: mpsc::Sender<MoveLine>,
    pub(super) receiving: Option<MoveEndpoint>,
    pub(super) report: MoveReport,
    pub(super) begun: Instant,
    /// When the target had everything.
    pub(super) prepared: Option<Instant>,
    /// Its place among the moves that copy.
    pub(super) place: Option<QueuePlace>,
    /// The longest downtime for sending what is left.
    pub(super) budget: Duration,
    /// What rules demand of the commit.
    pub(super) claims: Claims,
    /// Whether it had parts when it was offered.
    pub(super) spans: bool,
    /// Where its parts were before its home was to move.
    pub(super) placement: Option<Placement>,
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Driver {
    pub(super) async fn drive(&mut self, urgency: Urgency) {
        let interrupted = match self.compile().await {
            None => self.wait_for_turn(urgency).await,
            interrupted => interrupted,
        };
        let offered = match interrupted {
            None => {
                // Foretold meanwhile: the target has to compile anyway.
                let predicted = dry_run::before_move(
                    self.moves.clone(),
                    self.record.clone(),
                    self.worker.clone(),
                    self.target.clone(),
                    self.post_copy,
                    self.budget,
                );
                let mut interrupted = self.interrupted.clone();
                let offer = async { tokio::join!(self.offer(), predicted) };
                // (A target that accepts too late hears nothing more, and drops it.)
                let offered = tokio::select! {
                    offered = offer => Ok(offered),
                    event = interruption(&mut interrupted) => Err(event),
                };
                match offered {
                    Ok((offered, predicted)) => {
                        self.report.predicted = predicted;
                        offered
                    }
                    Err(event) => event,
                }
            }
            Some(interrupted) => interrupted,
        };
        let commands = self.source.step(offered).into();
        self.carry_on(commands).await;
    }

    pub(super) async fn carry_on(&mut self, mut commands: VecDeque<SourceCommand>) {
        while let Some(command) = commands.pop_front() {
            tracing::debug!(machine = %self.record.name, ?command, "move");
            if let Some(event) = self.carry_out(command).await {
                commands.extend(self.source.step(event));
            }
        }
        self.conclude().await;
    }

    async fn carry_out(&mut self, command: SourceCommand) -> Option<SourceEvent> {
        match command {
            SourceCommand::StartCopy => Some(self.copy().await),
            SourceCommand::AskStore => Some(self.ask_store().await),
            SourceCommand::FreezeAndSend => Some(self.freeze().await),
            SourceCommand::Commit { .. } => Some(self.commit().await),
            SourceCommand::SettleByWrite { .. } => Some(self.settle().await),
            SourceCommand::TellTarget { epoch } => Some(self.tell_target(epoch).await),
            SourceCommand::TakeBack { .. } => Some(self.take_back().await),
            SourceCommand::Thaw { epoch } => {
                self.thaw(epoch).await;
                None
            }
            SourceCommand::AbortTarget { reason } => {
                self.abort_target(&reason).await;
                None
            }
            SourceCommand::Serve => Some(self.serve().await),
            SourceCommand::Forget => {
                if passed("move.forget").await.is_err() {
                    // As if it had come later.
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                let (moves, machine) = (&self.moves, &self.record.name);
                moves
                    .processes
                    .machines
                    .forget_later(&moves.context.dir, machine, &self.worker);
                None
            }
            SourceCommand::End => {
                self.end().await;
                None
            }
        }
    }

    /// Ends the worker of a machine whose end is in the store; what it said stays.
    async fn end(&self) {
        let (moves, machine) = (&self.moves, &self.record.name);
        if moves
            .processes
            .machines
            .get(machine)
            .is_some_and(|now| now.is(&self.worker))
        {
            self.worker.forget().await;
            moves
                .processes
                .machines
                .drop_group(&moves.context.dir, machine)
                .await;
            moves
                .processes
                .machines
                .remove_exactly(machine, &self.worker);
        }
    }

    /// Lets the machine go on here, however often that must be said: a machine
    /// that stays must not stand still.
    async fn thaw(&self, epoch: Epoch) {
        loop {
            // A lost worker is seen to elsewhere; one whose connection was lost
            // has another by now.
            let worker = self.moves.processes.machines.get(&self.record.name);
            let Some(worker) = worker.filter(|now| now.is(&self.worker) && !now.is_lost()) else {
                return;
            };
            let thawed: Result<(), RpcError> = match failpoint::pass_async("move.thaw").await {
                Ok(()) => worker.ask(kind::THAW, &epoch, PROMPT).await,
                Err(injected) => Err(RpcError::unknown(injected)),
            };
            let Err(error) = thawed else { return };
            if matches!(worker.state().await, Ok(State::Ended { .. }))
                || worker.gone_within(Duration::ZERO).await
            {
                return;
            }
            tracing::error!(machine = %self.record.name, %error, "it does not go on yet");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    // ── its code ────────────────────────────────────────────────────────

    /// Waits until source and target have the code with which threads of the program are
    /// resumed; what came first if it is not let go.
    async fn compile(&mut self) -> Option<SourceEvent> {
        let begun = Instant::now();
        let program = match self.worker.report().await.map(|report| report.program) {
            Ok(Some(program)) => Fingerprint(program),
            // The offer says why it cannot be made.
            Ok(None) | Err(_) => return None,
        };
        loop {
            let here = self.moves.code.demand(program, &self.moves.context.name);
            let there = match self.code_there(program).await {
                Ok(there) => there,
                Err(reason) => {
                    let reason = format!("{} does not take it: {reason}", self.target);
                    return Some(SourceEvent::Refused(reason));
                }
            };
            let nodes = [(&self.moves.context.name, &here), (&self.target, &there)];
            for (node, state) in nodes {
                if let CodeState::Failed { reason } = state {
                    let reason = format!("its program cannot be compiled on {node}: {reason}");
                    return Some(SourceEvent::Refused(reason));
                }
            }
            let Some(percent) = least_percent(&[here, there]) else {
                let waited_ms = micros(begun) / 1000;
                tracing::info!(machine = %self.record.name, waited_ms, "its code is ready");
                return None;
            };
            let progress = Progress {
                percent: Some(percent),
                ..Progress::of(Phase::Compile)
            };
            // Whoever watches may have gone.
            let _ = self.lines.try_send(MoveLine::Progress(progress));
            tokio::select! {
                () = tokio::time::sleep(CODE_AGAIN_AFTER) => {}
                event = interruption(&mut self.interrupted) => return Some(event),
            }
        }
    }

    async fn code_there(&self, program: Fingerprint) -> Result<CodeState, String> {
        let payload = pack(&program).map_err(|error| error.to_string())?;
        let answer = self
            .moves
            .context
            .peers
            .call(&self.target, CODE, payload, PROMPT)
            .await;
        match answer {
            // An agent of the version before compiles while it is offered the machine.
            Err(error) if is_older(&error.to_string()) => Ok(CodeState::Ready),
            Err(error) => Err(error.to_string()),
            Ok(answer) => unpack(&answer).map_err(|error: RpcError| error.to_string()),
        }
    }

    // ── its turn ────────────────────────────────────────────────────────

    /// Waits until not too many others copy; what came first if it is not let go.
    async fn wait_for_turn(&mut self, urgency: Urgency) -> Option<SourceEvent> {
        // Its worker says how large it is; one that does not will not move anyway.
        let bytes = self.worker.report().await.map_or(0, |it| it.memory_bytes);
        let queue = &self.moves.queue;
        let place = queue.enter(&self.record.name, bytes, urgency);
        while let Some(ahead) = place.ahead() {
            let waits = Progress {
                round: ahead as u32,
                remaining_bytes: bytes,
                ..Progress::of(Phase::Wait)
            };
            // Whoever watches may have gone.
            let _ = self.lines.try_send(MoveLine::Progress(waits));
            tokio::select! {
                () = place.changed() => {}
                event = interruption(&mut self.interrupted) => return Some(event),
            }
        }
        self.place = Some(place);
        self.begun = Instant::now();
        None
    }

    // ── offer ───────────────────────────────────────────────────────────

    async fn offer(&mut self) -> SourceEvent {
        let proofs = match Proofs::make(&self.record.spec).await {
            Ok(proofs) => proofs,
            Err(reason) => return SourceEvent::Refused(reason),
        };
        let result = match passed("move.offer").await {
            Ok(()) => self.ask_target(&proofs).await,
            Err(reason) => Err(reason),
        };
        proofs.remove().await;
        self.report.offer_micros = micros(self.begun);
        let accepted = match result {
            Ok(receiving) => passed("move.accepted").await.map(|()| receiving),
            Err(reason) => Err(reason),
        };
        match accepted {
            Ok(receiving) => {
                self.receiving = Some(receiving);
                SourceEvent::Accepted
            }
            Err(reason) => {
                SourceEvent::Refused(format!("{} does not take it: {reason}", self.target))
            }
        }
    }

    async fn ask_target(&mut self, proofs: &Proofs) -> Result<MoveEndpoint, String> {
        let text = |error: RpcError| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
            other => other.to_string(),
        };
        let report = self.worker.report().await.map_err(text)?;
        self.spans = report.parts > 0;
        let worker: Fingerprint = self
            .worker
            .ask(kind::IDENTITY, &(), PROMPT)
            .await
            .map_err(text)?;
        let (record, post_copy) = (&self.record, self.post_copy);
        let offer = offer_of(record, self.revision, &report, worker, proofs, post_copy)?;
        let payload = pack(&offer).map_err(text)?;
        let answer = self
            .moves
            .context
            .peers
            .call(&self.target, offer::OFFER, payload, COMPILE_PATIENCE)
            .await
            .map_err(text)?;
        unpack(&answer).map_err(text)
    }

    // ── copying ─────────────────────────────────────────────────────────

    async fn copy(&mut self) -> SourceEvent {
        let Some(target) = self.receiving.clone() else {
            return SourceEvent::PeerLost("the target said nothing".into());
        };
        let (spanning_part, worker) = (self.moves.spanning.clone(), self.worker.clone());
        let (record, node) = (self.record.clone(), self.target.clone());
        let mut successor =
            tokio::spawn(async move { successor(&spanning_part, &record, &worker, &node).await });
        let successor = tokio::select! {
            successor = &mut successor => match successor {
                Ok(Ok(successor)) => successor,
                Ok(Err(error)) => {
                    let hint = format!("`keel unspan {}` brings it together first", self.record.name);
                    return SourceEvent::Cancel(format!("its home does not move: {error} ({hint})"));
                }
                Err(panic) => return SourceEvent::Cancel(panic.to_string()),
            },
            event = interruption(&mut self.interrupted) => {
                // (It comes, or does not: it is let go then.)
                if let Ok(Ok(Some(successor))) = successor.await {
                    self.placement = Some(successor.before);
                }
                return event;
            }
        };
        if successor.is_some() != self.spans || self.spans && self.post_copy {
            self.placement = successor.map(|it| it.before);
            return SourceEvent::Cancel("it got parts, or lost them, meanwhile; try again".into());
        }
        let begun = Instant::now();
        let copy = Copy {
            target,
            post_copy: self.post_copy,
            budget_micros: u64::try_from(self.budget.as_micros()).unwrap_or(u64::MAX),
        };
        let events = match successor {
            None => self.worker.stream(kind::COPY, &copy).await,
            Some(Successor {
                part,
                threads_to,
                before,
            }) => {
                self.placement = Some(before);
                let copy = CopyHome {
                    copy,
                    successor: part,
                    threads_to,
                };
                self.worker.stream(kind::COPY_HOME, &copy).await
            }
        };
        let mut events = match events {
            Ok(events) => events,
            Err(error) => return SourceEvent::PeerLost(error.to_string()),
        };
        loop {
            let item = tokio::select! {
                item = events.recv() => item,
                event = interruption(&mut self.interrupted) => return event,
            };
            let event: Result<CopyEvent, RpcError> = match item {
                Some(item) => item.and_then(|bytes| unpack(&bytes)),
                None => return SourceEvent::PeerLost("copying ended early".into()),
            };
            match event {
                Ok(CopyEvent::Progress(progress)) => {
                    // Whoever watches may have gone.
                    let _ = self.lines.try_send(MoveLine::Progress(progress));
                }
                Ok(CopyEvent::Converged { rounds, slowed }) => {
                    self.report.rounds = rounds;
                    self.report.slowed = slowed;
                    self.report.copy_micros = micros(begun);
                    return SourceEvent::Converged;
                }
                Ok(CopyEvent::Lost { reason }) => return SourceEvent::PeerLost(reason),
                Err(error) => return SourceEvent::PeerLost(error.to_string()),
            }
        }
    }

    /// A round trip to the store, in which it is asked what rules demand of the commit.
    async fn ask_store(&mut self) -> SourceEvent {
        if let Err(reason) = passed("move.store").await {
            return SourceEvent::StoreUnavailable(reason);
        }
        let claims = self.moves.rules.claim(&self.record.name, &self.target);
        match tokio::time::timeout(STORE_PATIENCE, claims).await {
            Ok(Ok(claims)) => {
                self.claims = claims;
                SourceEvent::StoreAnswered
            }
            Ok(Err(error @ (ClaimError::Broken(_) | ClaimError::Draining(_)))) => {
                SourceEvent::Cancel(error.to_string())
            }
            Ok(Err(error)) => SourceEvent::StoreUnavailable(error.to_string()),
            Err(_) => SourceEvent::StoreUnavailable("the store does not answer".into()),
        }
    }

    // ── the change of owner ─────────────────────────────────────────────

    async fn freeze(&mut self) -> SourceEvent {
        let interrupted = self.interrupted.borrow().clone();
        if let Some(event) = interrupted {
            return event;
        }
        if let Err(reason) = passed("move.freeze").await {
            return SourceEvent::FreezeLate(reason);
        }
        match self
            .worker
            .ask::<_, Frozen>(kind::FREEZE, &(), FREEZE_PATIENCE)
            .await
        {
            Ok(frozen) => {
                self.report.freeze_micros = frozen.freeze_micros;
                self.report.last_pages_micros = frozen.last_pages_micros;
                self.report.last_bytes = frozen.last_bytes;
                self.report.state_micros = frozen.state_micros;
                self.report.bytes = frozen.bytes;
                self.prepared = Some(Instant::now());
                // What follows takes no room on the links.
                self.place = None;
                SourceEvent::Prepared
            }
            Err(RpcError::Failed { reason, .. }) if reason.contains("has ended") => {
                SourceEvent::MachineEnded
            }
            Err(RpcError::Failed { reason, .. }) => SourceEvent::FreezeLate(reason),
            Err(error) => SourceEvent::PeerLost(error.to_string()),
        }
    }

    /// What the move began with; the record is never another one, or a write that was
    /// repeated would be judged by what it wrote.
    fn transfer(&self) -> Transfer {
        Transfer {
            machine: self.record.name.clone(),
            source: self.moves.context.name.clone(),
            target: self.target.clone(),
            epoch: self.record.epoch,
            revision: self.revision,
        }
    }

    /// One transaction: the two schedule entries, the owner, the epoch and the
    /// reservation.
    async fn commit(&mut self) -> SourceEvent {
        let begun = Instant::now();
        let txn = match self.transfer().commit(&self.record, unix_ms()) {
            Ok(txn) => txn,
            Err(error) => return SourceEvent::CommitRefused(error),
        };
        let before = txn.compare.len();
        let txn = self.claims.add_to(txn);
        if let Err(reason) = passed("move.commit").await {
            return SourceEvent::CommitRefused(reason);
        }
        let outcome = self.moves.context.store.txn(txn).await;
        self.report.commit_micros = micros(begun);
        if passed("move.committed").await.is_err() {
            return SourceEvent::CommitUnknown;
        }
        match outcome {
            Ok(TxnOutcome::Committed { .. }) => SourceEvent::CommitWon,
            Ok(TxnOutcome::Refused { failed, .. })
                if let Some(rule) = self.claims.raced(failed, before) =>
            {
                SourceEvent::CommitRefused(format!("{RACED} {rule:?}"))
            }
            Ok(TxnOutcome::Refused { failed, .. }) => SourceEvent::CommitRefused(
                match failed {
                    0 | 1 => "the machine was changed by others meanwhile",
                    2 => "the target gave its reservation up",
                    3 => "this node's lease ended",
                    _ => "the target's lease ended",
                }
                .to_owned(),
            ),
            Err(StoreError::Unknown { .. }) => SourceEvent::CommitUnknown,
            Err(error) => SourceEvent::CommitRefused(error.to_string()),
        }
    }

    /// A write of the source's own, that makes a pending commit impossible.
    async fn settle(&mut self) -> SourceEvent {
        if let Err(reason) = passed("move.settle").await {
            return self.later(&reason).await;
        }
        let event = match self.found().await {
            Ok(found) => self.own_write(self.transfer().settle(found.as_ref())).await,
            Err(error) => self.later(&error).await,
        };
        match passed("move.settled").await {
            Ok(()) => event,
            Err(reason) => self.later(&reason).await,
        }
    }

    /// Takes the machine back from a target that does not run it.
    async fn take_back(&mut self) -> SourceEvent {
        if let Err(reason) = passed("move.take-back").await {
            return self.later(&reason).await;
        }
        let event = match self.found().await {
            Ok(found) => {
                let next = self.transfer().take_back(found.as_ref(), unix_ms());
                self.own_write(next).await
            }
            Err(error) => self.later(&error).await,
        };
        match passed("move.taken-back").await {
            Ok(()) => event,
            Err(reason) => self.later(&reason).await,
        }
    }

    /// The machine's record as it is now; `None` if there is none any more.
    async fn found(&self) -> Result<Option<VersionedRecord>, String> {
        match records::get(&*self.moves.context.store, &self.record.name).await {
            Ok(found) => Ok(Some(found)),
            Err(RecordError::NoMachine(_)) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Makes the write that a settlement asks for. One that is refused, or whose answer
    /// is lost, decides nothing: the record is looked at again.
    async fn own_write(&self, next: Result<Settlement, String>) -> SourceEvent {
        match next {
            Ok(Settlement::Write { txn, .. }) => match self.moves.context.store.txn(txn).await {
                Ok(TxnOutcome::Committed { .. }) => SourceEvent::OwnWriteWon,
                Ok(TxnOutcome::Refused { .. }) => SourceEvent::OwnWriteUnknown,
                Err(error) => self.later(&error.to_string()).await,
            },
            Ok(Settlement::Kept) => SourceEvent::OwnWriteWon,
            Ok(Settlement::Won) => SourceEvent::CommitWon,
            Ok(Settlement::Superseded {
                reason,
                output_stays,
            }) => SourceEvent::Superseded {
                reason,
                output_stays,
            },
            Err(error) => self.later(&error).await,
        }
    }

    async fn later(&self, error: &str) -> SourceEvent {
        tracing::warn!(machine = %self.record.name, error, "the owner is not settled yet");
        tokio::time::sleep(RETRY_AFTER).await;
        SourceEvent::OwnWriteUnknown
    }

    // ── handing over ────────────────────────────────────────────────────

    async fn tell_target(&mut self, epoch: Epoch) -> SourceEvent {
        let told = Instant::now();
        let direct: Result<u64, RpcError> = match failpoint::pass_async("move.go").await {
            Ok(()) => self.worker.ask(kind::GO, &epoch, PROMPT).await,
            Err(injected) => Err(RpcError::unknown(injected)),
        };
        let event = match direct {
            Ok(_) => SourceEvent::TargetResumed,
            Err(error) => {
                tracing::warn!(machine = %self.record.name, %error, "asking the target's moves");
                self.ask_arrival(epoch).await
            }
        };
        self.report.resume_micros = micros(told);
        let report = &mut self.report;
        report.downtime_micros = report.freeze_micros
            + report.last_pages_micros
            + report.state_micros
            + self.prepared.map_or(0, micros);
        event
    }

    /// Asks the target's agent until it answers: only it knows.
    async fn ask_arrival(&self, epoch: Epoch) -> SourceEvent {
        loop {
            let payload = match pack(&(self.record.name.clone(), epoch)) {
                Ok(payload) => payload,
                Err(error) => return SourceEvent::PeerLost(error.to_string()),
            };
            let answer = self
                .moves
                .context
                .peers
                .call(&self.target, offer::ARRIVAL, payload, PROMPT)
                .await
                .and_then(|bytes| unpack(&bytes));
            match answer {
                Ok(Arrival::Resumed) => return SourceEvent::TargetResumed,
                Ok(Arrival::Without) => return SourceEvent::TargetNotRunning,
                Err(error) => {
                    tracing::warn!(machine = %self.record.name, %error, "the target does not answer; the frozen copy is kept");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    /// Keeps the frozen copy and lets its worker send pages of it until nobody
    /// needs them: the target has all of them, or the machine ended there.
    async fn serve(&mut self) -> SourceEvent {
        let asked: Result<(), RpcError> = self.worker.ask(kind::SERVE, &(), PROMPT).await;
        if let Err(error) = asked {
            tracing::warn!(machine = %self.record.name, %error, "its memory is not sent");
        }
        loop {
            match self.worker.report().await {
                Ok(report) if report.fill.is_some() => {
                    self.report.fill = report.fill;
                    if let Err(reason) = passed("move.served").await {
                        tracing::warn!(reason, "asking again");
                        continue;
                    }
                    self.await_filled().await;
                    return SourceEvent::Served;
                }
                Ok(report) => {
                    let progress = Progress {
                        round: self.report.rounds.len() as u32,
                        sent_bytes: self.report.bytes,
                        remaining_bytes: report.unsent_bytes,
                        downtime_micros: self.report.downtime_micros,
                        ..Progress::of(Phase::Fill)
                    };
                    // Whoever watches may have gone.
                    let _ = self.lines.try_send(MoveLine::Progress(progress));
                }
                Err(error) => {
                    tracing::warn!(machine = %self.record.name, %error, "its frozen copy does not answer");
                    let worker = self.moves.processes.machines.get(&self.record.name);
                    match worker.filter(|now| now.is(&self.worker) && !now.is_lost()) {
                        // The connection may be another by now.
                        Some(worker) => self.worker = worker,
                        // The target finds out that there is no copy any more.
                        None => return SourceEvent::Served,
                    }
                }
            }
            match records::get(&*self.moves.context.store, &self.record.name).await {
                Ok(found) if needs_copy(&self.moves.context.name, &found.record.status) => {
                    // It went on there; its worker may have died before that was
                    // written.
                    if matches!(found.record.status, Status::Arriving { .. })
                        && self.is_lost_there(found.record.epoch).await
                    {
                        return SourceEvent::Served;
                    }
                }
                Ok(_) | Err(RecordError::NoMachine(_)) => {
                    // The target tells its agent and this worker at once.
                    let deadline = Instant::now() + LAST_WORD_PATIENCE;
                    while self.report.fill.is_none() && Instant::now() < deadline {
                        tokio::time::sleep(RETRY_AFTER / 10).await;
                        let report = self.worker.report().await;
                        self.report.fill = report.ok().and_then(|report| report.fill);
                    }
                    return SourceEvent::Served;
                }
                Err(error) => {
                    tracing::debug!(%error, "not known whether its memory is still needed");
                }
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Waits until the store says that the machine has all of its memory at the target:
    /// what its user asks for next is not to be refused for it. Not for ever: it is the
    /// target's to write.
    async fn await_filled(&self) {
        let deadline = Instant::now() + STORE_PATIENCE;
        while Instant::now() < deadline {
            match records::get(&*self.moves.context.store, &self.record.name).await {
                Ok(found) if needs_copy(&self.moves.context.name, &found.record.status) => {
                    tokio::time::sleep(FILLED_AGAIN_AFTER).await;
                }
                _ => return,
            }
        }
    }

    /// Whether the target's agent says that a machine which went on there does not
    /// run any more.
    async fn is_lost_there(&self, epoch: Epoch) -> bool {
        let Ok(payload) = pack(&(self.record.name.clone(), epoch)) else {
            return false;
        };
        let answer = self
            .moves
            .context
            .peers
            .call(&self.target, offer::ARRIVAL, payload, PROMPT)
            .await
            .and_then(|bytes| unpack::<Arrival>(&bytes));
        matches!(answer, Ok(Arrival::Without))
    }

    async fn abort_target(&self, reason: &str) {
        if passed("move.abort").await.is_err() {
            return;
        }
        let aborted: Result<(), _> = self
            .worker
            .ask(kind::ABORT, &reason.to_owned(), PROMPT)
            .await;
        if let Err(error) = aborted {
            tracing::debug!(%error, "the worker has no move to abort");
        }
        if let Ok(payload) = pack(&self.record.name) {
            // If it does not hear it, its worker sees the connection end.
            let _ = self
                .moves
                .context
                .peers
                .call(&self.target, offer::WITHDRAW, payload, PROMPT)
                .await;
        }
    }

    async fn conclude(&mut self) {
        self.report.total_micros = micros(self.begun);
        self.report.ending = match self.source.state() {
            SourceState::Gone { epoch } => {
                self.report.epoch = *epoch;
                Ending::Moved
            }
            SourceState::Stayed { epoch, reason } => {
                self.report.epoch = *epoch;
                Ending::Stayed {
                    reason: reason.clone(),
                }
            }
            SourceState::Superseded { reason } => Ending::Stayed {
                reason: reason.clone(),
            },
            _ => Ending::Stayed {
                reason: "the machine ended".into(),
            },
        };
        tracing::info!("{}", self.report.line());
        self.moves.history().add(&self.report);
        self.moves.context.events.record(Note::moved(&self.report));
        // (Its worker sent them.)
        self.moves
            .context
            .traffic
            .add_sent(&self.target, self.report.bytes);
        self.moves.announce_end(&self.report);
        if let Err(reason) = passed("move.report").await {
            tracing::warn!(reason, "the move's report is not kept");
            return;
        }
        let report = self.report.clone();
        let add = |record: &mut Record| {
            let is_new = !record.reports.contains(&report);
            if is_new {
                record.add_report(report.clone());
            }
            is_new
        };
        let (store, machine) = (&*self.moves.context.store, &self.record.name);
        if let Err(error) = records::update(store, machine, add, |txn, _| txn).await {
            tracing::warn!(%machine, %error, "the move's report is not kept");
        }
        // Whoever watched may have gone, or read no more: others wait for the move's end.
        let report = MoveLine::Report(Box::new(self.report.clone()));
        let told = self.lines.send_timeout(report, WATCHER_PATIENCE).await;
        if let Err(error) = told {
            tracing::debug!(%error, "nobody reads the move's report");
        }
    }
}

/// How far the one is that is behind, in percent; `None` once all are ready.
fn least_percent(states: &[CodeState]) -> Option<u8> {
    let percent = |state: &CodeState| match state {
        CodeState::Ready => None,
        CodeState::Compiling { percent } => Some(*percent),
        CodeState::Waiting | CodeState::Failed { .. } => Some(0),
    };
    states.iter().filter_map(percent).min()
}

async fn interruption(interrupted: &mut watch::Receiver<Option<SourceEvent>>) -> SourceEvent {
    let event = match interrupted.wait_for(Option::is_some).await {
        Ok(event) => event.clone(),
        // The handle is gone: nobody can interrupt.
        Err(_) => None,
    };
    match event {
        Some(event) => event,
        None => std::future::pending().await,
    }
}
