//! Source of a move: carries out each command of the source's state machine and returns the
//! resulting event.

use super::directory_proofs::Proofs;
use super::dry_run;
use super::handle::Moves;
use super::offer::{self, Arrival, needs_copy, offer_of, passed};
use super::queue::QueuePlace;
use super::trace;
use crate::compilation::{CODE, CodeState};
use crate::events::Note;
use crate::processes::{COMPILE_PATIENCE, PROMPT, WorkerHandle, is_older};
use crate::records::{self, RecordError};
use crate::rules::{ClaimError, Claims};
use crate::spanning::{Placement, Successor, successor};
use crate::traces::Span;
use keel_api::{MoveLine, Urgency};
use keel_cluster::{Epoch, NodeName};
use keel_kind_wasm::control::{CopyHome, kind::COPY_HOME};
use keel_machine::failpoint;
use keel_machine::kind::KindName;
use keel_machine::moves::{
    Ending, MoveReport, Phase, Progress, SourceCommand, SourceEvent, SourceMove, SourceState,
};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{Copy, CopyEvent, MoveEndpoint, State, kind, pack, unpack};
use keel_net::{Bytes, Fingerprint, RpcError};
use keel_store::Revision;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// How long the store may take before a move is aborted.
const STORE_PATIENCE: Duration = Duration::from_secs(3);
/// How long the target's agent may be away before a machine is offered to it: it may be restarted.
const RESTART_PATIENCE: Duration = Duration::from_secs(3);
/// Pause between attempts to reach it.
const REACH_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Pause between checks of the progress of compiling.
const CODE_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// Pause between checks whether the target has recorded that it has all memory.
const FILLED_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// Pause between attempts to settle what is unknown.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How long the target's notification that it has all memory may take.
const LAST_WORD_PATIENCE: Duration = Duration::from_secs(1);
/// How long the clients of a move may take to read its result.
const WATCHER_PATIENCE: Duration = Duration::from_secs(1);

pub(super) struct Driver {
    pub(super) moves: Arc<Moves>,
    pub(super) record: Record,
    /// The machine's epoch at the target.
    pub(super) committed: Epoch,
    pub(super) revision: u64,
    pub(super) target: NodeName,
    pub(super) worker: WorkerHandle,
    pub(super) source: SourceMove,
    pub(super) post_copy: bool,
    pub(super) interrupted: watch::Receiver<Option<SourceEvent>>,
    pub(super) lines: mpsc::Sender<MoveLine>,
    pub(super) receiving: Option<MoveEndpoint>,
    pub(super) report: MoveReport,
    pub(super) begun: Instant,
    /// When the target had all pages.
    pub(super) prepared: Option<Instant>,
    /// Its place in the move queue.
    pub(super) place: Option<QueuePlace>,
    /// The longest downtime for sending the residual dirty pages.
    pub(super) budget: Duration,
    /// Conditions that rules add to the commit.
    pub(super) claims: Claims,
    /// Whether the machine had parts when it was offered.
    pub(super) spans: bool,
    /// Where its parts were before its home moved.
    pub(super) placement: Option<Placement>,
    pub(super) trace: Span,
}

pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Driver {
    pub(super) async fn drive(&mut self, urgency: Urgency) {
        let step = self.trace.child("compile");
        let mut interrupted = self.compile().await;
        drop(step);
        if interrupted.is_none() {
            let _step = self.trace.child("wait");
            interrupted = self.wait_for_turn(urgency).await;
        }
        let offered = match interrupted {
            None => {
                // Predicted in the meantime: the target has to compile anyway.
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
                // A target that accepts too late gets no further message, and drops the machine.
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
        self.run_commands(commands).await;
    }

    pub(super) async fn run_commands(&mut self, mut commands: VecDeque<SourceCommand>) {
        while let Some(command) = commands.pop_front() {
            tracing::debug!(machine = %self.record.name, ?command, "move");
            let step = self.trace.child(trace::step_name(&command));
            if let Some(event) = self.carry_out(command).await {
                trace::mark(&step, &event);
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
            SourceCommand::SettleByWrite => Some(self.settle().await),
            SourceCommand::TellTarget { epoch } => Some(self.tell_target(epoch).await),
            SourceCommand::TakeBack => Some(self.take_back().await),
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
                    // Handled as if it had arrived later.
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

    /// Ends the worker of a machine whose end is recorded; its output stays.
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

    /// Resumes the machine here, and retries until it succeeds: a machine that stays must not
    /// remain frozen.
    async fn thaw(&self, epoch: Epoch) {
        loop {
            // The watch handles a lost worker; a worker with a lost connection has been replaced
            // in the table by now.
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
            tracing::error!(machine = %self.record.name, %error, "cannot resume the machine yet");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    // ── code ────────────────────────────────────────────────────────────

    /// Waits until the target has the compiled code of the program. Returns the event that
    /// interrupts the wait, if any. Meanwhile this node compiles what its worker needs to freeze the
    /// machine.
    async fn compile(&mut self) -> Option<SourceEvent> {
        let begun = Instant::now();
        let kind = self.moves.context.kinds.of(&self.record.spec);
        if kind.is_ok_and(|kind| !kind.abilities().compiles) {
            return None;
        }
        let program = match self.worker.report().await.map(|report| report.program) {
            Ok(Some(program)) => Fingerprint(program),
            // Nothing is to be compiled, or the offer fails with the reason.
            Ok(None) | Err(_) => return None,
        };
        let code = &self.moves.code;
        let kind = self.record.spec.kind.clone();
        code.prepare(&kind, program, &self.moves.context.name);
        loop {
            let percent = match self.code_there(&kind, program).await {
                Ok(CodeState::Ready) => {
                    let waited_ms = micros(begun) / 1000;
                    tracing::info!(machine = %self.record.name, waited_ms, "its code is ready");
                    return None;
                }
                Ok(CodeState::Compiling { percent }) => percent,
                Ok(CodeState::Waiting) => 0,
                Ok(CodeState::Failed { reason }) => {
                    let node = &self.target;
                    let reason = format!("its program cannot be compiled on {node}: {reason}");
                    return Some(SourceEvent::Refused(reason));
                }
                Err(reason) => {
                    let reason = format!("{} refuses it: {reason}", self.target);
                    return Some(SourceEvent::Refused(reason));
                }
            };
            let progress = Progress {
                percent: Some(percent),
                ..Progress::of(Phase::Compile)
            };
            // The client may have disconnected.
            let _ = self.lines.try_send(MoveLine::Progress(progress));
            tokio::select! {
                () = tokio::time::sleep(CODE_AGAIN_AFTER) => {}
                event = interruption(&mut self.interrupted) => return Some(event),
            }
        }
    }

    async fn code_there(&self, kind: &KindName, program: Fingerprint) -> Result<CodeState, String> {
        let payload = pack(&(kind, program)).map_err(|error| error.to_string())?;
        match self.ask_agent((CODE, true), payload, PROMPT).await {
            // An agent of the previous version compiles while it handles the offer.
            Err(error) if is_older(&error.to_string()) => Ok(CodeState::Ready),
            Err(error) => Err(error.to_string()),
            Ok(answer) => unpack(&answer).map_err(|error: RpcError| error.to_string()),
        }
    }

    /// Asks the target's agent, and repeats for [`RESTART_PATIENCE`] what may be repeated: what was
    /// certainly not sent, and a mere question also if its answer was lost.
    async fn ask_agent(
        &self,
        (kind, is_question): (u16, bool),
        payload: Bytes,
        patience: Duration,
    ) -> Result<Bytes, RpcError> {
        let begun = Instant::now();
        loop {
            let peers = &self.moves.context.peers;
            let asked = peers.call(&self.target, kind, payload.clone(), patience);
            let answer = asked.await;
            let may_repeat = match &answer {
                Err(RpcError::NotSent { .. }) => true,
                Err(RpcError::Unknown { .. }) => is_question,
                Err(_) | Ok(_) => false,
            };
            if !may_repeat || begun.elapsed() > RESTART_PATIENCE {
                return answer;
            }
            tokio::time::sleep(REACH_AGAIN_AFTER).await;
        }
    }

    // ── queue ───────────────────────────────────────────────────────────

    /// Waits for a free place among the moves that copy. Returns the event that interrupts the
    /// wait, if any.
    async fn wait_for_turn(&mut self, urgency: Urgency) -> Option<SourceEvent> {
        // Its worker reports its size; if it does not answer, the move fails anyway.
        let bytes = self.worker.report().await.map_or(0, |it| it.memory_bytes);
        let queue = &self.moves.queue;
        let place = queue.enter(&self.record.name, bytes, urgency);
        while let Some(ahead) = place.ahead() {
            let waits = Progress {
                round: ahead as u32,
                remaining_bytes: bytes,
                ..Progress::of(Phase::Wait)
            };
            // The client may have disconnected.
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
        let step = self.trace.child("offer");
        let result = match passed("move.offer").await {
            Ok(()) => self.ask_target(&proofs, &step).await,
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
                step.fail(reason.as_str());
                SourceEvent::Refused(format!("{} refuses it: {reason}", self.target))
            }
        }
    }

    async fn ask_target(&mut self, proofs: &Proofs, step: &Span) -> Result<MoveEndpoint, String> {
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
        let context = &self.moves.context;
        let offer = offer_of(
            context,
            record,
            self.revision,
            &report,
            worker,
            proofs,
            post_copy,
        );
        let mut offer = offer.await?;
        offer.traceparent = step.traceparent();
        let payload = pack(&offer).map_err(text)?;
        let answer = self
            .ask_agent((offer::OFFER, false), payload, COMPILE_PATIENCE)
            .await
            .map_err(text)?;
        unpack(&answer).map_err(text)
    }

    // ── copying ─────────────────────────────────────────────────────────

    async fn copy(&mut self) -> SourceEvent {
        let Some(target) = self.receiving.clone() else {
            return SourceEvent::PeerLost("the target did not answer".into());
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
                // A successor that is made is recorded, so that it can be released.
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
                self.worker.stream(COPY_HOME, &copy).await
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
                    // The client may have disconnected.
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

    /// A round trip to the store, which also reads the conditions that rules add to the commit.
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

    // ── handing over ────────────────────────────────────────────────────

    async fn tell_target(&mut self, epoch: Epoch) -> SourceEvent {
        let told = Instant::now();
        let event = self.resume_there(epoch).await;
        self.report.resume_micros = micros(told);
        let report = &mut self.report;
        report.downtime_micros = report.freeze_micros
            + report.last_pages_micros
            + report.state_micros
            + self.prepared.map_or(0, micros);
        event
    }

    /// Tells the target directly, then asks its agent until that answers, because only the target
    /// knows. Meanwhile the machine is taken back if the target's node is known to have failed: a
    /// call to such a node may hang for longer than others wait with a failover.
    async fn resume_there(&self, epoch: Epoch) -> SourceEvent {
        let direct = async {
            match failpoint::pass_async("move.go").await {
                Ok(()) => self.worker.ask::<_, u64>(kind::GO, &epoch, PROMPT).await,
                Err(injected) => Err(RpcError::unknown(injected)),
            }
        };
        let mut in_doubt = None;
        match self.unless_failed(&mut in_doubt, direct).await {
            Err(event) => return event,
            Ok(Ok(_)) => return self.resumed_there(in_doubt).await,
            Ok(Err(error)) => {
                tracing::warn!(machine = %self.record.name, %error, "asking the target's agent");
            }
        }
        let payload = match pack(&(self.record.name.clone(), epoch)) {
            Ok(payload) => payload,
            Err(error) => return SourceEvent::PeerLost(error.to_string()),
        };
        loop {
            let peers = &self.moves.context.peers;
            let asked = peers.call(&self.target, offer::ARRIVAL, payload.clone(), PROMPT);
            let answer = match self.unless_failed(&mut in_doubt, asked).await {
                Err(event) => return event,
                Ok(answer) => answer.and_then(|bytes| unpack(&bytes)),
            };
            match answer {
                Ok(Arrival::Resumed) => return self.resumed_there(in_doubt).await,
                Ok(Arrival::Without) => return SourceEvent::TargetNotRunning,
                Err(error) => {
                    tracing::warn!(machine = %self.record.name, %error, "the target does not answer; the frozen copy is kept");
                    if let Some(event) = self.take_back_from_failed(&mut in_doubt).await {
                        return event;
                    }
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    /// The outcome of `call`, or as `Err` what became of a machine whose target's node failed
    /// meanwhile.
    async fn unless_failed<T>(
        &self,
        in_doubt: &mut Option<Revision>,
        call: impl Future<Output = T>,
    ) -> Result<T, SourceEvent> {
        let mut call = std::pin::pin!(call);
        loop {
            tokio::select! {
                outcome = &mut call => return Ok(outcome),
                () = tokio::time::sleep(RETRY_AFTER) => {}
            }
            // Not in the race above: a write that is begun is waited for.
            if let Some(event) = self.take_back_from_failed(in_doubt).await {
                return Err(event);
            }
        }
    }

    /// The target says that the machine resumed there. A write of this node's own that took it
    /// back may still be applied; that is settled first.
    async fn resumed_there(&self, in_doubt: Option<Revision>) -> SourceEvent {
        let Some(revision) = in_doubt else {
            return SourceEvent::TargetResumed;
        };
        loop {
            if let Some(event) = self.settled_after(revision).await {
                return event;
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Keeps the frozen copy and lets its worker send pages of it until the target has all of
    /// them, or the machine has ended there.
    async fn serve(&mut self) -> SourceEvent {
        let asked: Result<(), RpcError> = self.worker.ask(kind::SERVE, &(), PROMPT).await;
        if let Err(error) = asked {
            tracing::warn!(machine = %self.record.name, %error, "cannot send the rest of its memory");
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
                    // The client may have disconnected.
                    let _ = self.lines.try_send(MoveLine::Progress(progress));
                }
                Err(error) => {
                    tracing::warn!(machine = %self.record.name, %error, "the worker of the frozen copy does not answer");
                    let worker = self.moves.processes.machines.get(&self.record.name);
                    match worker.filter(|now| now.is(&self.worker) && !now.is_lost()) {
                        // The connection may have been replaced.
                        Some(worker) => self.worker = worker,
                        // The target detects that the copy is gone.
                        None => return SourceEvent::Served,
                    }
                }
            }
            match records::get(&*self.moves.context.store, &self.record.name).await {
                Ok(found) if needs_copy(&self.moves.context.name, &found.record.status) => {
                    // It resumed there; its worker may have died before that was recorded.
                    if matches!(found.record.status, Status::Arriving { .. })
                        && self.is_lost_there(found.record.epoch).await
                    {
                        return SourceEvent::Served;
                    }
                }
                Ok(_) | Err(RecordError::NoMachine(_)) => {
                    // The target notifies its agent and this worker at the same time.
                    let deadline = Instant::now() + LAST_WORD_PATIENCE;
                    while self.report.fill.is_none() && Instant::now() < deadline {
                        tokio::time::sleep(RETRY_AFTER / 10).await;
                        let report = self.worker.report().await;
                        self.report.fill = report.ok().and_then(|report| report.fill);
                    }
                    return SourceEvent::Served;
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot read whether the target still needs the memory");
                }
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Waits until the store records that the machine has all of its memory at the target, so that
    /// the user's next command is not refused. The wait is bounded, because the target makes that
    /// write.
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

    /// Whether the target's agent reports that a machine which resumed there does not run any
    /// more.
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
            // If the target misses the message, its worker detects the end of the connection.
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
        trace::describe(&self.trace, &self.report);
        // It ends here: what follows is not the move.
        self.trace = Span::default();
        self.moves.history().add(&self.report);
        if self.report.ending == Ending::Moved {
            let report = &self.report;
            let metrics = &self.moves.context.metrics;
            metrics.moved(report.downtime_micros, report.total_micros);
        }
        self.moves.context.events.record(Note::moved(&self.report));
        // Its worker sent them.
        self.moves
            .context
            .traffic
            .add_sent(&self.target, self.report.bytes);
        self.moves.announce_end(&self.report);
        if let Err(reason) = passed("move.report").await {
            tracing::warn!(reason, "cannot store the move report");
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
            tracing::warn!(%machine, %error, "cannot store the move report");
        }
        // The clients may have disconnected or stopped reading; others wait for the end of the
        // move.
        let report = MoveLine::Report(Box::new(self.report.clone()));
        let told = self.lines.send_timeout(report, WATCHER_PATIENCE).await;
        if let Err(error) = told {
            tracing::debug!(%error, "no client reads the move report");
        }
    }
}

/// Progress of the slowest one in percent; `None` once all are ready.
async fn interruption(interrupted: &mut watch::Receiver<Option<SourceEvent>>) -> SourceEvent {
    let event = match interrupted.wait_for(Option::is_some).await {
        Ok(event) => event.clone(),
        // The handle is dropped, so that no event can interrupt.
        Err(_) => None,
    };
    match event {
        Some(event) => event,
        None => std::future::pending().await,
    }
}
