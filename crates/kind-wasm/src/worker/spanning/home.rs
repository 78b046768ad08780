//! The home's side: makes the machine span and reduces it to one part, reads its memory from a
//! checkpoint, reports its parts and threads, and moves threads. Adding and removing single parts
//! is left to `worker::membership`, moving the home to `worker::source`.

use super::super::wasm_worker::WasmWorker;
use super::{FREEZE_PATIENCE, HOME_PATIENCE, MEET_PATIENCE, OBJECT_PATIENCE, failed, lost, open};
use crate::checkpoint::SpanningRestore;
use crate::control::{ConnectParts, MoveThread, PartsReport, Span, ThreadReport};
use crate::span::{Home, PartAddress, PartLimits, SpanConfig, SpanError};
use keel_machine::checkpoint::RepositoryError;
use keel_machine::failpoint;
use keel_machine::worker::control::State;
use keel_net::RpcError;
use keel_wasm::coherence::PartId;
use keel_wasm::runtime::Machine;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a part may take to answer before it is reported as silent, and the polling
/// interval.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Why the memory of a restored machine was not read.
#[derive(Debug, thiserror::Error)]
enum SpanningRestoreError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("it was ended while its memory was read")]
    Ended,
}

impl WasmWorker {
    /// Prepares the home to connect to members.
    pub(in crate::worker) fn prepare_home(
        &self,
        meet: &ConnectParts,
    ) -> Result<PartAddress, RpcError> {
        // The code that threads need to resume elsewhere is compiled before anything
        // waits for it.
        let machine = self.inner().machine.clone();
        if let Some(machine) = machine {
            machine.program().prepare_resume().map_err(failed)?;
        }
        let mut inner = self.inner();
        let state = self.process.state.borrow().clone();
        if !matches!(state, State::Running { .. } | State::Held { .. }) {
            return Err(failed("no machine runs here"));
        }
        if inner.moves.is_moving_away() {
            return Err(failed("the machine is moving; try again"));
        }
        if inner.post_copy_target.is_some() || inner.lazy_restore.is_some() {
            return Err(failed("a part of its memory is still to come; try again"));
        }
        if let Some(refusal) = inner.parts.refusal() {
            return Err(failed(refusal));
        }
        if inner
            .spec
            .as_ref()
            .is_some_and(|spec| spec.cpu_limit_millis.is_some())
        {
            return Err(failed(
                "it has a limit of its CPU time, which applies on one node only (`keel set M --cpu none` removes it)",
            ));
        }
        let (meeting, place) = open(PartId::HOME, meet).map_err(failed)?;
        inner.parts.meeting = Some(meeting);
        Ok(place)
    }

    /// Makes the machine span. Returns the downtime in microseconds.
    pub(in crate::worker) fn span(&self, span: Span) -> Result<u64, RpcError> {
        // Excludes moves and checkpoints meanwhile, in the order in which a checkpoint locks both.
        // One in progress is given up: the other parts are waiting.
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self.process.freezing();
        let (meeting, machine, name, epoch, part_bytes, stands) = {
            let mut inner = self.inner();
            if inner.moves.is_moving_away() {
                return Err(failed("the machine is moving; try again"));
            }
            let meeting = inner.parts.meeting.take();
            match (meeting, &inner.machine, &inner.name) {
                (Some(meeting), Some(machine), Some(name)) => {
                    let spec = inner.spec.as_ref();
                    let part_bytes = spec.and_then(|it| it.balancing.part_memory_bytes);
                    let (machine, name) = (machine.clone(), name.clone());
                    let stands = matches!(*self.process.state.borrow(), State::Held { .. });
                    (
                        meeting,
                        machine,
                        name,
                        inner.moves.epoch,
                        part_bytes,
                        stands,
                    )
                }
                _ => return Err(failed("no connections were prepared")),
            }
        };
        if epoch != span.join.epoch {
            return Err(failed("the machine changed meanwhile; try again"));
        }
        let ends = meeting
            .meet(&name, epoch, &span.join.places, MEET_PATIENCE)
            .map_err(failed)?;
        let how = SpanConfig {
            spawning: span.spawning,
            patience: FREEZE_PATIENCE,
            limits: PartLimits {
                part_bytes,
                room_bytes: span.room_bytes,
            },
            stays_stopped: stands,
        };
        let home = Home::begin(&machine, ends, how).map_err(failed)?;
        let stood = home.downtime();
        {
            let mut inner = self.inner();
            inner.parts.nodes = span.nodes;
            inner.parts.home = Some(Arc::new(home));
        }
        self.end_orphaned_members(&machine)?;
        Ok(u64::try_from(stood.as_micros()).unwrap_or(u64::MAX))
    }

    /// Reads the memory of a held machine, now that it has parts, if it comes from a
    /// checkpoint; returns the bytes read. The machine runs afterwards.
    pub(in crate::worker) fn restore_to_parts(&self) -> Result<u64, RpcError> {
        if !matches!(*self.process.state.borrow(), State::Held { .. }) {
            return Err(failed("it is not held"));
        }
        let (spanning_restore, machine) = {
            let mut inner = self.inner();
            (inner.spanning_restore.take(), inner.machine.clone())
        };
        let machine = machine.ok_or_else(|| failed("no machine is held here"))?;
        let bytes = match spanning_restore {
            Some(spanning_restore) => self.read_memory(&machine, spanning_restore)?,
            None => 0,
        };
        failpoint::pass("spanning-start.brought").map_err(failed)?;
        self.first_thaw(&machine).map_err(failed)?;
        self.process.lease().machine_changed(self);
        self.process.state.send_if_modified(|state| match *state {
            State::Held { epoch } => {
                *state = State::Running { epoch };
                true
            }
            // It ended because a part was lost.
            _ => false,
        });
        Ok(bytes)
    }

    fn read_memory(
        &self,
        machine: &Machine,
        spanning_restore: SpanningRestore,
    ) -> Result<u64, RpcError> {
        let pages = self.pages()?;
        let nodes = self.inner().parts.nodes.clone();
        let write = |memory: usize, offset, bytes: &[u8]| -> Result<(), SpanningRestoreError> {
            // It may have been stopped.
            if machine.wait(Some(Duration::ZERO)).is_some() && pages.failure().is_none() {
                return Err(SpanningRestoreError::Ended);
            }
            pages.await_room()?;
            // A program has few memories.
            Ok(pages.write(memory as u32, offset, bytes, OBJECT_PATIENCE)?)
        };
        let brought = spanning_restore.read_pages(&write);
        let bytes = spanning_restore.bytes();
        spanning_restore.release();
        brought.map_err(|error| match &error {
            SpanningRestoreError::Span(SpanError::Lost { part, .. }) => {
                failed(lost(&nodes, *part, &error))
            }
            _ => failed(error),
        })?;
        Ok(bytes)
    }

    /// Reduces the machine to one part. Returns the downtime in microseconds. A
    /// checkpoint in progress is given up, as for a move.
    pub(in crate::worker) fn unspan(&self) -> Result<u64, RpcError> {
        // In the order in which a checkpoint locks both.
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self.process.freezing();
        // The machine would run without its memory.
        if matches!(*self.process.state.borrow(), State::Held { .. }) {
            return Err(failed("its memory is still to come; try again"));
        }
        self.check_not_moving()?;
        let (home, machine) = {
            let inner = self.inner();
            (inner.parts.home.clone(), inner.machine.clone())
        };
        let (Some(home), Some(machine)) = (home, machine) else {
            return Err(failed("the machine is on one node already"));
        };
        match home.unspan(HOME_PATIENCE) {
            Ok(stood) => {
                let ended = {
                    let parts = &mut self.inner().parts;
                    parts.nodes.clear();
                    parts.home.take()
                };
                drop(ended);
                Ok(u64::try_from(stood.as_micros()).unwrap_or(u64::MAX))
            }
            Err(error) => {
                self.end_orphaned_members(&machine)?;
                Err(self.failed_naming_silent(error))
            }
        }
    }

    /// As [`failed`], and names the parts that do not answer: they are the probable
    /// cause.
    pub(super) fn failed_naming_silent(&self, error: impl std::fmt::Display) -> RpcError {
        let (machine, nodes) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.parts.nodes.clone())
        };
        let Some(machine) = machine else {
            return failed(error);
        };
        machine.request_cpu_times();
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut silent = machine.unresponsive_members();
        while !silent.is_empty() && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
            silent = machine.unresponsive_members();
        }
        let silent = silent.keys().filter_map(|part| nodes.get(part));
        let silent: Vec<String> = silent.map(|node| format!("the part on {node}")).collect();
        match silent.is_empty() {
            true => failed(error),
            false => failed(format!(
                "{} does not answer, its process is stopped or its node is overloaded: {error}",
                silent.join(" and ")
            )),
        }
    }

    /// Ends the members of a machine that ended while it was made to span: its end found
    /// no members to end.
    pub(in crate::worker) fn end_orphaned_members(
        &self,
        machine: &Machine,
    ) -> Result<(), RpcError> {
        if machine.wait(Some(Duration::ZERO)).is_none() {
            return Ok(());
        }
        let mut parts = std::mem::take(&mut self.inner().parts);
        let why = parts.end();
        Err(failed(
            why.unwrap_or_else(|| "the machine has ended".into()),
        ))
    }

    /// Reports parts and threads of the machine.
    pub(in crate::worker) fn parts(&self) -> Result<PartsReport, RpcError> {
        let (machine, nodes, home) = {
            let inner = self.inner();
            let parts = &inner.parts;
            (
                inner.machine.clone(),
                parts.nodes.clone(),
                parts.home.clone(),
            )
        };
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        let threads = machine.thread_infos().into_iter();
        let liked = machine.preferences();
        // For the next report.
        machine.request_cpu_times();
        Ok(PartsReport {
            nodes,
            threads: threads
                .map(|thread| ThreadReport {
                    tid: thread.tid,
                    part: thread.part,
                    moves_to: thread.moves_to,
                    waits: thread.waits,
                    took: thread.cpu_usage,
                    likes: liked.get(&thread.tid).cloned(),
                })
                .collect(),
            memory: match &home {
                Some(home) => home.pages().memory_of_parts(),
                None => BTreeMap::new(),
            },
            silent_ms: {
                let silent = machine.unresponsive_members().into_iter();
                // Less than a day and a millisecond.
                silent
                    .map(|(part, since)| (part, since.as_millis() as u64))
                    .collect()
            },
            waits: match &home {
                Some(home) => home.pages().latency().buckets.to_vec(),
                None => Vec::new(),
            },
        })
    }

    /// Sets the idle cores of each part: new threads begin where most are idle.
    pub(in crate::worker) fn room(&self, room: BTreeMap<PartId, f64>) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        machine.set_free_cores(room);
        Ok(())
    }

    /// Starts to move a thread to another part; does not wait.
    pub(in crate::worker) fn move_thread(&self, thread: MoveThread) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        machine.move_thread(thread.tid, thread.to).map_err(failed)
    }
}
