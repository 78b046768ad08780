//! All parts of a machine in one process, connected as over a network: for programs in
//! the foreground and for tests.

use super::home_and_member::{Home, MemberPart, SpanConfig, SpanningError};
use super::home_migration::{HomeMigration, HomeState};
use super::mesh::{MeshError, MeshListener};
use super::peer::PeerConnections;
use keel_cluster::{Epoch, MachineName};
use keel_wasm::coherence::{PARTS_MAX, PartId, PartSet};
use keel_wasm::memory::GuestMemory;
use keel_wasm::runtime::{Image, Machine, MachineError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Why a machine cannot span in this process.
#[derive(Debug, thiserror::Error)]
pub enum InProcessError {
    /// Too few or too many parts.
    #[error("a machine has 1 to {PARTS_MAX} parts, not {0}")]
    Count(usize),
    #[error(transparent)]
    Meet(#[from] MeshError),
    #[error(transparent)]
    Spanning(#[from] SpanningError),
}

/// Time limit for connecting the parts.
const PATIENCE: Duration = Duration::from_secs(10);

/// A machine and its members in this process.
#[derive(Debug)]
pub struct InProcess {
    /// Dropped first: members end when the home tells them.
    home: Arc<Home>,
    members: BTreeMap<PartId, MemberPart>,
    limit_bytes: u64,
}

impl InProcess {
    /// Makes a running machine span `count` parts, including itself.
    ///
    /// # Errors
    /// [`InProcessError`]; the machine then goes on in one part.
    pub fn begin(
        machine: &Machine,
        count: usize,
        limit_bytes: u64,
        how: SpanConfig,
    ) -> Result<Self, InProcessError> {
        if !(1..=PARTS_MAX).contains(&count) {
            return Err(InProcessError::Count(count));
        }
        let mut all = PartSet::default();
        for number in 0..count {
            all = all.with(part(number)?);
        }
        let mut ends = connect(all, |_, _| true)?;
        let home = ends.remove(&PartId::HOME).unwrap_or_default();
        let program = machine.program();
        // Code for resuming threads is compiled while the machine runs.
        program
            .prepare_resume()
            .map_err(|error| SpanningError::Machine(error.into()))?;
        let mut members = BTreeMap::new();
        for (me, ends) in ends {
            let member = MemberPart::begin(program.clone(), limit_bytes, None, me, ends)?;
            members.insert(me, member);
        }
        let home = Home::begin(machine, home, how)?;
        Ok(InProcess {
            home: Arc::new(home),
            members,
            limit_bytes,
        })
    }

    /// The home.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The members.
    pub fn members(&self) -> &BTreeMap<PartId, MemberPart> {
        &self.members
    }

    /// Adds a part while the machine runs; returns it and the downtime.
    ///
    /// # Errors
    /// [`InProcessError`]; the parts are then as before.
    pub fn join(&mut self) -> Result<(PartId, Duration), InProcessError> {
        let (new, member, mut home) = self.meet_new()?;
        let mut downtime = Duration::ZERO;
        if let Some(ends) = home.remove(&new) {
            downtime = self.home.join(new, ends, PATIENCE)?;
        }
        self.members.insert(new, member);
        Ok((new, downtime))
    }

    /// Lets a part join and ends it when all but the home know it.
    ///
    /// # Errors
    /// [`InProcessError`].
    pub fn kill_joining_member(&mut self) -> Result<(), InProcessError> {
        let (_, member, _) = self.meet_new()?;
        member.die();
        Ok(())
    }

    /// A new part that all but the home know, with the home's connections to it.
    fn meet_new(
        &self,
    ) -> Result<(PartId, MemberPart, BTreeMap<PartId, PeerConnections>), InProcessError> {
        let others = self.home.members().with(PartId::HOME);
        let mut free = (1..=PARTS_MAX).map_while(PartId::new);
        let new = free.find(|part| !others.contains(*part));
        let new = new.ok_or(InProcessError::Count(PARTS_MAX + 1))?;
        let mut ends = connect(others.with(new), |one, other| one == new || other == new)?;
        let mut own = |part: PartId| ends.remove(&part).unwrap_or_default();
        let program = self.home.machine().program();
        let begun = own(new);
        let member = MemberPart::begin(program.clone(), self.limit_bytes, None, new, begun)?;
        for (part, member) in &self.members {
            for (_, ends) in own(*part) {
                member
                    .pages()
                    .join(new, ends)
                    .map_err(SpanningError::from)?;
            }
        }
        let home = own(PartId::HOME);
        Ok((new, member, home))
    }

    /// As [`Home::remove_part`]; the part has ended then.
    ///
    /// # Errors
    /// As there.
    pub fn remove_part(
        &mut self,
        part: PartId,
        threads_to: PartId,
        patience: Duration,
    ) -> Result<Duration, InProcessError> {
        let downtime = self.home.remove_part(part, threads_to, patience)?;
        if let Some(member) = self.members.remove(&part) {
            member.wait();
        }
        Ok(downtime)
    }

    /// Moves the home: a new part joins, takes all that the home holds, and becomes the
    /// home of a machine restored from the image on its memories. The machine runs when
    /// this returns.
    ///
    /// # Errors
    /// [`InProcessError`]; the machine then runs where it was, with one more part, or was
    /// ended.
    pub fn move_home(
        &mut self,
        make: impl FnOnce(Image, Arc<[Arc<GuestMemory>]>) -> Machine,
        goes: bool,
    ) -> Result<Machine, InProcessError> {
        let (new, _) = self.join()?;
        let others = self.home.members().without(new);
        let threads_to = others.iter().next();
        let threads_to = threads_to.ok_or(InProcessError::Count(1))?;
        let old = self.home.clone();
        let mut leaving =
            HomeMigration::begin(old.clone(), new, threads_to, PATIENCE, &mut |_| true)
                .map_err(InProcessError::from)?;
        let before = old.machine().clone();
        let left = before
            .freeze(PATIENCE)
            .map_err(SpanningError::from)
            .and_then(|()| leaving.leave(PATIENCE));
        let successor = self.members.remove(&new);
        let (home_state, successor) = match (left, successor, goes) {
            (Ok(home_state), Some(successor), true) => (home_state, successor),
            (left, successor, _) => {
                self.members.extend(successor.map(|member| (new, member)));
                leaving.cancel().map_err(SpanningError::from)?;
                before.thaw().map_err(SpanningError::from)?;
                left?;
                return Ok(before);
            }
        };
        let again = postcard::to_stdvec(&home_state).map(|bytes| postcard::from_bytes(&bytes));
        let home_state: HomeState = again.ok().and_then(Result::ok).unwrap_or(home_state);
        let program = before.program();
        let image = before.image().and_then(|image| image.encode());
        let image = image.map_err(SpanningError::from)?;
        let image = Image::decode(&image, program).map_err(|error| {
            let why = super::SpanError::Inconsistent(error.to_string());
            SpanningError::from(why)
        })?;
        let machine = make(image, successor.memories().clone());
        self.home = Arc::new(successor.become_home(&machine, &home_state, PATIENCE)?);
        // The former home is usually in another process.
        before.stop();
        drop((leaving, old));
        match machine.thaw() {
            Ok(()) | Err(MachineError::Ended) => Ok(machine),
            Err(error) => Err(SpanningError::from(error).into()),
        }
    }

    /// Ends the last member, as if its node had died.
    pub fn kill_last_member(&mut self) {
        if let Some((_, member)) = self.members.pop_last() {
            member.die();
        }
    }

    /// As [`Home::unspan`].
    ///
    /// # Errors
    /// As there.
    pub fn unspan(self, patience: Duration) -> Result<Duration, (Box<Self>, InProcessError)> {
        match self.home.unspan(patience) {
            Ok(downtime) => Ok(downtime),
            Err(error) => Err((Box::new(self), error.into())),
        }
    }
}

fn part(number: usize) -> Result<PartId, InProcessError> {
    PartId::new(number).ok_or(InProcessError::Count(number))
}

/// Connects all parts with each other.
pub(super) fn connect(
    parts: PartSet,
    meet: impl Fn(PartId, PartId) -> bool,
) -> Result<BTreeMap<PartId, BTreeMap<PartId, PeerConnections>>, InProcessError> {
    let (mut meetings, mut places) = (Vec::new(), BTreeMap::new());
    for me in parts.iter() {
        let others = parts.without(me).iter().filter(|other| meet(me, *other));
        let (meeting, place) = MeshListener::open(me, others.collect(), "127.0.0.1")?;
        meetings.push((me, meeting));
        places.insert(me, place);
    }
    let count = meetings.len();
    let machine: MachineName = "within".parse().map_err(|_| InProcessError::Count(count))?;
    std::thread::scope(|scope| {
        let (machine, places) = (&machine, &places);
        let meeting: Vec<_> = meetings
            .into_iter()
            .map(|(me, it)| {
                scope.spawn(move || {
                    let ends = it.meet(machine, Epoch::default(), places, PATIENCE)?;
                    Ok((me, ends))
                })
            })
            .collect();
        meeting
            .into_iter()
            .map(|met| {
                met.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}
