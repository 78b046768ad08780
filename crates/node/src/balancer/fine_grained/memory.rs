//! What is remembered of a machine between two samples.

use super::cores::Cores;
use keel_balance::Name;
use keel_balance::fine_grained::Action;
use keel_cluster::Epoch;
use keel_machine::span::{CpuUsage, PartId};
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// Looks in a row at which that must be so.
pub(super) const HOT_LOOKS: u32 = 4;
/// What is remembered of a machine.
#[derive(Default)]
pub(super) struct Known {
    pub(super) worker: u64,
    pub(super) epoch: Epoch,
    pub(super) took: HashMap<u32, (PartId, CpuUsage)>,
    /// Waits for pages so far, in microseconds, and when that was seen.
    pub(super) waited: Option<(u64, Instant)>,
    pub(super) held: HashMap<u32, Instant>,
    /// From which nodes to which threads went, and until when none goes back.
    pub(super) recent: Vec<((Name, Name), Instant)>,
    /// Cores of each thread, smoothed.
    pub(super) cores: HashMap<u32, Cores>,
    /// Share of its time that each thread stands at pages, by the part that gives them,
    /// smoothed.
    pub(super) stands: HashMap<u32, BTreeMap<PartId, f64>>,
    /// For so many looks in a row most pages of a thread came from a part.
    pub(super) hot: HashMap<u32, (PartId, u32)>,
    /// Threads that went to where their pages came from, or had to go from where they
    /// wanted to be, and until when they are not drawn anywhere: what they use where they
    /// are is not seen, and may be more.
    pub(super) followed: HashMap<u32, Instant>,
    /// Bytes that each part had given away because they were too much.
    pub(super) given: BTreeMap<PartId, u64>,
    /// When it is looked again where the objects are that threads like.
    pub(super) likes_at: Option<Instant>,
    /// Nothing is done until then.
    pub(super) rests_until: Option<Instant>,
    /// It lost by its parts, so often in a row.
    pub(super) losing: u32,
    /// It is not spread again until then.
    pub(super) gathered_until: Option<Instant>,
    /// What was only suggested last.
    pub(super) suggested: Option<Action>,
    /// Parts of which it was told that they do not answer, and for how many milliseconds
    /// they have not.
    pub(super) silent: BTreeMap<PartId, u64>,
}
