//! Earlier moves away from this node: the throughput of links to other nodes.

use keel_cluster::NodeName;
use keel_machine::moves::prediction::link_rate;
use keel_machine::moves::{Ending, MoveReport};
use keel_machine::spec::Record;
use std::collections::{HashMap, VecDeque};

/// Moves kept for each target.
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

    /// Rate of a copy to a target by the last moves there, in bytes per second, if it is known.
    pub(super) fn rate_to(&self, target: &NodeName) -> Option<f64> {
        link_rate(self.0.get(target)?)
    }

    /// All known moves to a target: from this node's memory, or, after a restart of the agent,
    /// from the machine's record.
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
