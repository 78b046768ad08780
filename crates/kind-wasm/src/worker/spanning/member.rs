//! The member's side: prepares an empty worker as a part, joins the others, ends with its machine,
//! and becomes the home if the machine moves to it. It only has pages and threads; they are left
//! to [`crate::span`].

use super::super::wasm_worker::WasmWorker;
use super::{HOME_PATIENCE, MEET_PATIENCE, PendingMember, failed, open};
use crate::control::{HomeHandover, Join, PrepareMember};
use crate::span::{MemberPart, PartAddress, SpanningError};
use keel_machine::failpoint;
use keel_machine::moves::TargetEvent;
use keel_machine::worker::control::State;
use keel_machine::worker::step_target;
use keel_net::RpcError;
use keel_wasm::runtime::Machine;
use std::sync::Arc;
use std::time::Duration;

/// How long a member waits for the addresses of the others, which may have to compile
/// first.
const JOIN_PATIENCE: Duration = Duration::from_secs(1900);
/// Delay before a member's process exits, so that its last messages are sent.
const END_AFTER: Duration = Duration::from_millis(20);

impl WasmWorker {
    /// Prepares an empty worker as a member: compiles the program and listens for the
    /// other parts.
    pub(in crate::worker) fn prepare_member(
        self: &Arc<Self>,
        ready: &PrepareMember,
    ) -> Result<PartAddress, RpcError> {
        // Or the machine moves to this worker.
        let arrives = {
            let inner = self.inner();
            let is_free = inner.machine.is_none() && inner.parts.member.is_none();
            is_free && inner.name.as_ref() == Some(&ready.machine)
        };
        match &*self.process.state.borrow() {
            State::Empty => {}
            State::Receiving { .. } if arrives => {}
            _ => return Err(RpcError::refused("this worker has a machine already")),
        }
        let bytes = std::fs::read(&ready.program)
            .map_err(|error| failed(format!("{}: {error}", ready.program.display())))?;
        let program = self.engine.load_instrumented(bytes).map_err(failed)?;
        self.limit_memory(program.meta().memories.len(), &ready.spec);
        let (meeting, place) = open(ready.me, &ready.meet).map_err(failed)?;
        let mut inner = self.inner();
        inner.parts.meeting = Some(meeting);
        inner.parts.ready = Some(PendingMember {
            machine: ready.machine.clone(),
            program,
            memory_bytes: ready.spec.memory_bytes,
            room_bytes: ready.room_bytes,
            me: ready.me,
        });
        drop(inner);
        if arrives {
            return Ok(place);
        }
        // The requester may be gone, and no other process knows of this part.
        let worker = self.clone();
        std::thread::Builder::new()
            .name("unwanted".into())
            .spawn(move || {
                std::thread::sleep(JOIN_PATIENCE);
                if worker.inner().parts.ready.is_some() {
                    tracing::warn!("this part was not told to join");
                    std::process::exit(1);
                }
            })
            .map_err(failed)?;
        Ok(place)
    }

    /// Connects the member to the others and starts it. Its process ends with it.
    pub(in crate::worker) fn join(self: &Arc<Self>, join: &Join) -> Result<(), RpcError> {
        let (meeting, ready) = {
            let mut inner = self.inner();
            match (inner.parts.meeting.take(), inner.parts.ready.take()) {
                (Some(meeting), Some(ready)) => (meeting, ready),
                _ => return Err(RpcError::refused("this worker is not prepared as a part")),
            }
        };
        let begun = meeting
            .meet(&ready.machine, join.epoch, &join.places, MEET_PATIENCE)
            .map_err(failed)
            .and_then(|ends| {
                let (limit, room) = (ready.memory_bytes, ready.room_bytes);
                MemberPart::begin(ready.program, limit, room, ready.me, ends)
                    .map_err(|error: SpanningError| failed(error))
            });
        let member = Arc::new(begun?);
        let (machine, me) = (ready.machine, ready.me);
        self.inner().parts.member = Some((machine, me, member.clone()));
        let worker = self.clone();
        std::thread::Builder::new()
            .name("end".into())
            .spawn(move || {
                member.wait();
                if member.has_become_home() {
                    return;
                }
                if *worker.process.state.borrow() == State::Empty {
                    std::thread::sleep(END_AFTER);
                    std::process::exit(0);
                }
                worker.end_removed_part();
            })
            .map(drop)
            .map_err(failed)
    }

    /// The machine that was to move here has removed its part at this worker.
    fn end_removed_part(self: &Arc<Self>) {
        let dropped_for = {
            let mut inner = self.inner();
            inner.parts.member = None;
            inner.dropped_for.take()
        };
        match dropped_for {
            Some(reason) => drop(self.process.state.send_replace(State::Dropped { reason })),
            None => {
                let reason = "the machine's part here was removed".to_owned();
                step_target(self, TargetEvent::Abort(reason));
            }
        }
    }

    /// Makes this part the home: the commit was applied. If this fails, the machine has
    /// lost a part and ended.
    pub(in crate::worker) fn become_home(
        &self,
        machine: Option<Machine>,
        part: &MemberPart,
        handover: HomeHandover,
    ) {
        let Some(machine) = machine else { return };
        let home_state = &handover.home_state;
        let succeeded = failpoint::pass("home.succeeds")
            .map_err(|injected| injected.to_string())
            .and_then(|()| {
                // This cannot be undone, so slow parts are waited for.
                let home = part.become_home(&machine, home_state, HOME_PATIENCE);
                home.map_err(|error| error.to_string())
            });
        let mut inner = self.inner();
        match succeeded {
            Ok(home) => {
                inner.parts.home = Some(Arc::new(home));
                inner.parts.nodes = handover.nodes;
                inner.parts.member = None;
            }
            Err(reason) => {
                tracing::error!(reason, "the home of a machine did not arrive");
                inner.ended_for = Some(format!("it was lost when its home moved: {reason}"));
                drop(inner);
                part.end();
                machine.stop();
            }
        }
    }
}
