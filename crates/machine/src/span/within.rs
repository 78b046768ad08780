//! All parts of a machine in one process, connected as they are over a network: for
//! programs in the foreground, and to try what spans.

use super::meet::{MeetError, Meeting};
use super::peer::Ends;
use super::threads::{Home, MemberPart, SpanningError, Spread};
use keel_cluster::{Epoch, MachineName};
use keel_wasm::coherence::{PARTS_MAX, PartId, PartSet};
use keel_wasm::runtime::Machine;
use std::collections::BTreeMap;
use std::time::Duration;

/// Why there are no parts.
#[derive(Debug, thiserror::Error)]
pub enum WithinError {
    /// Too few or too many.
    #[error("a machine has 1 to {PARTS_MAX} parts, not {0}")]
    Count(usize),
    /// They do not meet.
    #[error(transparent)]
    Meet(#[from] MeetError),
    /// A part.
    #[error(transparent)]
    Spanning(#[from] SpanningError),
}

/// How long parts of this process may take to meet.
const PATIENCE: Duration = Duration::from_secs(10);

/// A machine and its members in this process.
#[derive(Debug)]
pub struct Within {
    /// Dropped first: the others end when it says so.
    home: Home,
    members: Vec<MemberPart>,
}

impl Within {
    /// Lets a running machine span `count` parts, itself one of them.
    ///
    /// # Errors
    /// [`WithinError`]; it goes on alone then.
    pub fn begin(
        machine: &Machine,
        count: usize,
        limit_bytes: u64,
        how: Spread,
    ) -> Result<Self, WithinError> {
        if !(1..=PARTS_MAX).contains(&count) {
            return Err(WithinError::Count(count));
        }
        let mut ends = connect(count)?.into_iter();
        let home = ends.next().unwrap_or_default();
        let program = machine.program();
        // What lets threads go on there is compiled while it runs.
        program
            .prepare_resume()
            .map_err(|error| SpanningError::Machine(error.into()))?;
        let mut members = Vec::new();
        for (number, ends) in (1..).zip(ends) {
            let me = part(number)?;
            let member = MemberPart::begin(program.clone(), limit_bytes, None, me, ends)?;
            members.push(member);
        }
        let home = Home::begin(machine, home, how)?;
        Ok(Within { home, members })
    }

    /// The home.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The others.
    pub fn members(&self) -> &[MemberPart] {
        &self.members
    }

    /// Ends the last member as if its node had died.
    pub fn lose_last(&mut self) {
        if let Some(member) = self.members.pop() {
            member.die();
        }
    }

    /// As [`Home::alone`].
    ///
    /// # Errors
    /// As there.
    pub fn alone(self, patience: Duration) -> Result<Duration, (Box<Self>, WithinError)> {
        let Within { home, members } = self;
        match home.alone(patience) {
            Ok(stood) => Ok(stood),
            Err((home, error)) => {
                let home = *home;
                Err((Box::new(Within { home, members }), error.into()))
            }
        }
    }
}

fn part(number: usize) -> Result<PartId, WithinError> {
    PartId::new(number).ok_or(WithinError::Count(number))
}

/// The connections of each part to all others.
fn connect(count: usize) -> Result<Vec<BTreeMap<PartId, Ends>>, WithinError> {
    let mut all = PartSet::default();
    for number in 0..count {
        all = all.with(part(number)?);
    }
    let (mut meetings, mut places) = (Vec::new(), BTreeMap::new());
    for me in all.iter() {
        let (meeting, place) = Meeting::open(me, all.without(me), "127.0.0.1")?;
        meetings.push(meeting);
        places.insert(me, place);
    }
    let machine: MachineName = "within".parse().map_err(|_| WithinError::Count(count))?;
    std::thread::scope(|scope| {
        let (machine, places) = (&machine, &places);
        let meeting: Vec<_> = meetings
            .into_iter()
            .map(|it| scope.spawn(move || it.meet(machine, Epoch::default(), places, PATIENCE)))
            .collect();
        meeting
            .into_iter()
            .map(|met| {
                let met = met.join();
                Ok(met.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
            })
            .collect()
    })
}
