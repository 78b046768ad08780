//! Earlier moves away from this node: what links to other nodes carried.

use keel_cluster::NodeName;
use keel_machine::moves::{Ending, MoveReport};
use keel_machine::spec::Record;
use std::collections::{HashMap, VecDeque};

/// Moves that are remembered for each target.
const REMEMBERED: usize = 16;
/// Earlier moves away from here, by target.
#[derive(Debug, Default)]
pub(super) struct History(HashMap<NodeName, VecDeque<MoveReport>>);

impl History {
    pub(super) fn add(&mut self, report: &MoveReport) {
        if report.ending != Ending::Moved {
            return;
        }
        let of = self.0.entry(report.target.clone()).or_default();
        of.push_back(report.clone());
        if of.len() > REMEMBERED {
            of.pop_front();
        }
    }

    /// All that is known of moves to a target: of this node's memory, or, after it
    /// was started anew, of the machine's record.
    pub(super) fn of(
        &self,
        record: &Record,
        source: &NodeName,
        target: &NodeName,
    ) -> Vec<MoveReport> {
        match self.0.get(target) {
            Some(known) => known.iter().cloned().collect(),
            None => {
                let same =
                    |report: &&MoveReport| report.source == *source && report.target == *target;
                record.reports.iter().filter(same).cloned().collect()
            }
        }
    }
}
