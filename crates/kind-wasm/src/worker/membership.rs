//! Changes of the set of parts, at the worker of a part: adding and removing parts while
//! the machine runs. The owner's agent (`keel_node`'s `spanning`) determines the order.

use super::spanning::{FREEZE_PATIENCE, HOME_PATIENCE, MEET_PATIENCE, SpanState, failed};
use super::wasm_worker::WasmWorker;
use crate::control::{AddPart, ConnectNewPart, RemovePart};
use crate::span::{MeshListener, PartAddress, PartId, PartSet};
use keel_cluster::{Epoch, MachineName};
use keel_machine::failpoint;
use keel_net::RpcError;
use std::time::Duration;

impl SpanState {
    /// Whether a part of a machine is at this worker.
    fn is(&self, own: Option<&MachineName>, machine: &MachineName, part: PartId) -> bool {
        match part {
            PartId::HOME => own == Some(machine) && self.home.is_some(),
            _ => {
                let member = self.member.as_ref();
                // A part that is about to end does not count; another one may have its
                // number.
                member.is_some_and(|(of, me, member)| {
                    of == machine && *me == part && !member.pages().is_over()
                })
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl WasmWorker {
    /// Prepares to connect this part with a new one.
    pub(super) fn connect_new_part(&self, meet: &ConnectNewPart) -> Result<PartAddress, RpcError> {
        let mut inner = self.inner();
        if !inner.parts.is(inner.name.as_ref(), &meet.machine, meet.me) {
            return Err(RpcError::refused("that part is not at this worker"));
        }
        let others = PartSet::default().with(meet.new);
        let (meeting, place) =
            MeshListener::open(meet.me, others, &meet.address).map_err(failed)?;
        inner.parts.meeting = Some(meeting);
        Ok(place)
    }

    /// Connects this part with the new one, which joins the machine. Returns the downtime
    /// in microseconds.
    pub(super) fn add_part(&self, new: AddPart) -> Result<u64, RpcError> {
        let (home, member, meeting, epoch) = {
            let mut inner = self.inner();
            if !inner.parts.is(inner.name.as_ref(), &new.machine, new.me) {
                return Err(RpcError::refused("that part is not at this worker"));
            }
            let meeting = inner.parts.meeting.take();
            let meeting =
                meeting.ok_or_else(|| failed("no connection to a new part was prepared"))?;
            let member = inner.parts.member.as_ref();
            let member = member.map(|(_, _, member)| member.clone());
            (inner.parts.home.clone(), member, meeting, inner.moves.epoch)
        };
        let meet = |epoch: Epoch| -> Result<_, RpcError> {
            let places = &new.join.places;
            let ends = meeting.meet(&new.machine, epoch, places, MEET_PATIENCE);
            let ends = ends.map_err(failed)?.remove(&new.new);
            ends.ok_or_else(|| failed("a connection to another part was prepared"))
        };
        if let Some(member) = member {
            let ends = meet(new.join.epoch)?;
            member.pages().join(new.new, ends).map_err(failed)?;
            return Ok(0);
        }
        let Some(home) = home else {
            return Err(failed("the machine is on one node (`keel span`)"));
        };
        // Excludes moves and checkpoints meanwhile, in the order in which a checkpoint locks both.
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self.process.freezing();
        self.check_not_moving()?;
        if epoch != new.join.epoch {
            return Err(failed("the machine changed meanwhile; try again"));
        }
        let ends = meet(epoch)?;
        let joined = home.join(new.new, ends, FREEZE_PATIENCE);
        if joined.is_ok() {
            self.inner().parts.nodes.insert(new.new, new.node);
        }
        self.end_if_ended()?;
        joined.map(micros).map_err(failed)
    }

    /// Removes a member. Returns the downtime of the machine in microseconds.
    pub(super) fn remove_part(&self, with: RemovePart) -> Result<u64, RpcError> {
        // In the order in which a checkpoint locks both.
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self.process.freezing();
        self.check_not_moving()?;
        let home = self.inner().parts.home.clone();
        let home = home.ok_or_else(|| failed("the machine is on one node (`keel span`)"))?;
        let parted = home.remove_part(with.part, with.threads_to, HOME_PATIENCE);
        if parted.is_ok() {
            self.inner().parts.nodes.remove(&with.part);
            failpoint::pass("parts.gone").map_err(failed)?;
        }
        self.end_if_ended()?;
        parted.map(micros).map_err(failed)
    }

    /// Fails while the home is moving.
    pub(super) fn check_not_moving(&self) -> Result<(), RpcError> {
        match self.inner().moves.is_moving_away() {
            true => Err(failed("the machine is moving; try again")),
            false => Ok(()),
        }
    }

    fn end_if_ended(&self) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        match machine {
            Some(machine) => self.end_orphaned_members(&machine),
            None => Ok(()),
        }
    }
}
