//! A worker as a part of a machine whose set of parts changes while it runs: one comes, or
//! goes. Who is asked in which order the owner's agent knows (`keel_node`'s `spanning`).

use super::control::{JoinNew, MeetNew, PartWith};
use super::process::Worker;
use super::spanning::{FREEZE_PATIENCE, HOME_PATIENCE, MEET_PATIENCE, Parts, failed};
use crate::failpoint;
use crate::span::{MeshListener, PartAddress, PartId, PartSet};
use keel_cluster::{Epoch, MachineName};
use keel_net::RpcError;
use std::time::Duration;

impl Parts {
    /// Whether a part of a machine is here.
    fn is(&self, own: Option<&MachineName>, machine: &MachineName, part: PartId) -> bool {
        match part {
            PartId::HOME => own == Some(machine) && self.home.is_some(),
            _ => {
                let member = self.member.as_ref();
                // (One that is about to end is none; another one may have its number.)
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

impl Worker {
    /// A part that is here is to meet one more.
    pub(super) fn meet_new(&self, meet: &MeetNew) -> Result<PartAddress, RpcError> {
        let mut inner = self.inner();
        if !inner.parts.is(inner.name.as_ref(), &meet.machine, meet.me) {
            return Err(RpcError::refused("that part is not here"));
        }
        let others = PartSet::default().with(meet.new);
        let (meeting, place) =
            MeshListener::open(meet.me, others, &meet.address).map_err(failed)?;
        inner.parts.meeting = Some(meeting);
        Ok(place)
    }

    /// It meets it, and both are parts of one machine. Microseconds that that stood still.
    pub(super) fn join_new(&self, new: JoinNew) -> Result<u64, RpcError> {
        let (home, member, meeting, epoch) = {
            let mut inner = self.inner();
            if !inner.parts.is(inner.name.as_ref(), &new.machine, new.me) {
                return Err(RpcError::refused("that part is not here"));
            }
            let meeting = inner.parts.meeting.take();
            let meeting = meeting.ok_or_else(|| failed("it is not to meet anybody"))?;
            let member = inner.parts.member.as_ref();
            let member = member.map(|(_, _, member)| member.clone());
            (inner.parts.home.clone(), member, meeting, inner.epoch)
        };
        let meet = |epoch: Epoch| -> Result<_, RpcError> {
            let places = &new.join.places;
            let ends = meeting.meet(&new.machine, epoch, places, MEET_PATIENCE);
            let ends = ends.map_err(failed)?.remove(&new.new);
            ends.ok_or_else(|| failed("it meets somebody else"))
        };
        if let Some(member) = member {
            let ends = meet(new.join.epoch)?;
            member.pages().join(new.new, ends).map_err(failed)?;
            return Ok(0);
        }
        let Some(home) = home else {
            return Err(failed("the machine is on one node (`keel span`)"));
        };
        // Neither a move nor a checkpoint begins meanwhile, and none is being made.
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let Ok(_tracking) = self.tracking.try_lock() else {
            return Err(failed("a checkpoint of it is being made; try again"));
        };
        self.stays()?;
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

    /// A member is none any more. Microseconds that the machine stood still.
    pub(super) fn part_with(&self, with: PartWith) -> Result<u64, RpcError> {
        // (In the order in which a checkpoint takes both.)
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        self.stays()?;
        let home = self.inner().parts.home.clone();
        let home = home.ok_or_else(|| failed("the machine is on one node (`keel span`)"))?;
        let parted = home.part_with(with.part, with.threads_to, HOME_PATIENCE);
        if parted.is_ok() {
            self.inner().parts.nodes.remove(&with.part);
            failpoint::pass("parts.gone").map_err(failed)?;
        }
        self.end_if_ended()?;
        parted.map(micros).map_err(failed)
    }

    /// Its home does not move just now.
    pub(super) fn stays(&self) -> Result<(), RpcError> {
        match self.inner().giving_away {
            true => Err(failed("the machine is moving; try again")),
            false => Ok(()),
        }
    }

    fn end_if_ended(&self) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        match machine {
            Some(machine) => self.end_parts_of_ended(&machine),
            None => Ok(()),
        }
    }
}
