//! Expectations of a run, and their evaluation.

use crate::report::{CheckResult, Report};
use serde::Deserialize;

/// Expectations; each is optional.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// No move is admissible, in flight or made from this second on.
    pub levelled_by_s: Option<u64>,
    pub moves_max: Option<u64>,
    pub moves_min: Option<u64>,
    /// No move ends after this second.
    pub no_move_after_s: Option<u64>,
    /// Maximum unevenness at the end: the standard deviation of the loads, weighted with power.
    pub unevenness_max: Option<f64>,
    /// Maximum load of a node at the end.
    pub load_max: Option<f64>,
    /// Maximum number of pressed nodes at the end.
    pub pressed_max: Option<u64>,
    /// Minimum number of nodes without machines at the end.
    pub free_min: Option<u64>,
    /// Maximum number of returns within the cool-down.
    pub returns_max: Option<u64>,
    pub failed_max: Option<u64>,
    /// Maximum number of machines that do not run at the end because their node failed.
    pub stranded_max: Option<u64>,
    pub alerts_max: Option<u64>,
    pub alerts_min: Option<u64>,
    /// Maximum number of machines whose placement violates a rule at the end.
    pub broken_max: Option<u64>,
    /// Minimum number of repairs.
    pub repairs_min: Option<u64>,
    pub repairs_max: Option<u64>,
    /// Maximum share of active time in which nodes are overloaded.
    pub overload_max: Option<f64>,
    /// Most energy, in kWh.
    pub energy_kwh_max: Option<f64>,
    /// Nodes that no move involves.
    pub untouched: Vec<String>,
}

impl Expect {
    pub fn check(&self, report: &Report) -> Vec<CheckResult> {
        let mut checked = Vec::new();
        let mut add = |key: &str, expected: String, found: String, met: bool| {
            checked.push(CheckResult {
                expectation: key.to_owned(),
                expected,
                found,
                met,
            });
        };
        if let Some(by_s) = self.levelled_by_s {
            let found = match &report.levelled_at_s {
                Ok(at_s) => format!("from {at_s} s on"),
                Err(why) => why.clone(),
            };
            let met = report.levelled_at_s.as_ref().is_ok_and(|it| *it <= by_s);
            add("levelled_by_s", format!("by {by_s} s"), found, met);
        }
        if let Some(after_s) = self.no_move_after_s {
            let last = report.moves.last();
            let found = last.map_or("no move at all".to_owned(), |last| {
                format!("{} moved at {} s", last.machine, last.at_s)
            });
            let met = last.is_none_or(|last| last.at_s <= after_s as f64);
            add(
                "no_move_after_s",
                format!("none after {after_s} s"),
                found,
                met,
            );
        }
        let count = |it: usize| it as u64;
        let most = [
            ("moves_max", self.moves_max, count(report.moves.len())),
            ("pressed_max", self.pressed_max, count(report.end.pressed)),
            ("returns_max", self.returns_max, report.returns),
            ("failed_max", self.failed_max, report.failed),
            ("stranded_max", self.stranded_max, count(report.stranded)),
            ("alerts_max", self.alerts_max, report.alerts),
            ("broken_max", self.broken_max, count(report.broken.len())),
            ("repairs_max", self.repairs_max, report.repairs),
        ];
        for (key, expected, found) in most {
            if let Some(most) = expected {
                add(
                    key,
                    format!("at most {most}"),
                    found.to_string(),
                    found <= most,
                );
            }
        }
        let least = [
            ("moves_min", self.moves_min, count(report.moves.len())),
            ("free_min", self.free_min, count(report.end.free)),
            ("alerts_min", self.alerts_min, report.alerts),
            ("repairs_min", self.repairs_min, report.repairs),
        ];
        for (key, expected, found) in least {
            if let Some(least) = expected {
                add(
                    key,
                    format!("at least {least}"),
                    found.to_string(),
                    found >= least,
                );
            }
        }
        let numbers = [
            ("unevenness_max", self.unevenness_max, report.end.unevenness),
            ("load_max", self.load_max, report.end.load_max),
            ("overload_max", self.overload_max, report.overload_share),
            (
                "energy_kwh_max",
                self.energy_kwh_max,
                report.energy_kwh.unwrap_or(f64::NAN),
            ),
        ];
        for (key, expected, found) in numbers {
            if let Some(most) = expected {
                add(
                    key,
                    format!("at most {most}"),
                    format!("{found:.4}"),
                    found <= most,
                );
            }
        }
        for node in &self.untouched {
            let touching = report
                .moves
                .iter()
                .find(|it| it.source == *node || it.target == *node);
            let found = touching.map_or("nothing moved".to_owned(), |it| {
                format!(
                    "{} moved from {} to {} at {} s",
                    it.machine, it.source, it.target, it.at_s
                )
            });
            add(
                "untouched",
                format!("nothing to or from {node}"),
                found,
                touching.is_none(),
            );
        }
        checked
    }
}
