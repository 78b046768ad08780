//! State of a machine that is kept between two samples.

use super::cores::Cores;
use keel_balance::Name;
use keel_balance::fine_grained::Action;
use keel_cluster::Epoch;
use keel_kind_wasm::span::{CpuUsage, PartId};
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// Consecutive samples for which a condition on pages must hold.
pub(super) const HOT_LOOKS: u32 = 4;
/// State of a machine that is kept between two samples.
#[derive(Default)]
pub(super) struct TrackedMachine {
    pub(super) worker: u64,
    pub(super) epoch: Epoch,
    pub(super) took: HashMap<u32, (PartId, CpuUsage)>,
    /// Total wait for pages, in microseconds, and when it was read.
    pub(super) waited: Option<(u64, Instant)>,
    pub(super) held: HashMap<u32, Instant>,
    /// Pairs of nodes between which threads moved, and until when none moves back.
    pub(super) recent: Vec<((Name, Name), Instant)>,
    /// Cores of each thread, smoothed.
    pub(super) cores: HashMap<u32, Cores>,
    /// Share of its time that each thread waits for pages, by the part that sends them, smoothed.
    pub(super) page_waits: HashMap<u32, BTreeMap<PartId, f64>>,
    /// The part that sent most pages of a thread, and for how many consecutive samples.
    pub(super) hot: HashMap<u32, (PartId, u32)>,
    /// Threads that followed their pages, or were moved away from a preferred place, and until
    /// when they ignore preferences: the use of local pages is not observed, and may outweigh
    /// them.
    pub(super) followed: HashMap<u32, Instant>,
    /// Bytes that each part had evicted for its limit.
    pub(super) given: BTreeMap<PartId, u64>,
    /// When the objects that threads prefer are located again.
    pub(super) likes_at: Option<Instant>,
    /// No decision before this time.
    pub(super) rests_until: Option<Instant>,
    /// Consecutive samples with a loss by its parts.
    pub(super) losing: u32,
    /// Not spread again before this time.
    pub(super) gathered_until: Option<Instant>,
    /// The last decision that was only suggested.
    pub(super) suggested: Option<Action>,
    /// Parts that were reported as not answering, and for how many milliseconds they have not
    /// answered.
    pub(super) silent: BTreeMap<PartId, u64>,
}
