//! Measured history of a node, or a machine.

use crate::Silence;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Default number of points of an answer.
pub const HISTORY_DEFAULT: u32 = 24;
/// The most points of an answer.
pub const HISTORY_MAX: u32 = 10_000;

/// Measurements of one interval; means, unless stated otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HistoryPoint {
    /// Start, in milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// Length, in milliseconds.
    pub lasts_ms: u64,
    /// Number of samples: fewer than fit into the interval if the agent was not running.
    pub samples: u32,
    /// Load, by the weights of the policy of that time.
    pub load: f64,
    /// The highest load of a sample.
    pub load_max: f64,
    /// CPU demand, in cores.
    pub cpu_cores: f64,
    /// Occupied memory, in bytes.
    pub memory_bytes: u64,
    /// Memory referenced in about a minute, in bytes; of machines only.
    pub working_set_bytes: Option<u64>,
    /// Disk traffic in bytes a second.
    pub io_bytes_per_s: f64,
    /// Of a node, the share of time in which a task waited for a core (PSI `some`); of a machine,
    /// the cores that it waited for.
    pub cpu_pressure: f64,
    /// Share of time stalled for memory and disks.
    pub stalled: f64,
    /// The highest number of machines of the node; 1 of a machine.
    pub machines: u32,
}

impl HistoryPoint {
    /// One empty sample.
    pub const ONE: HistoryPoint = HistoryPoint {
        at_unix_ms: 0,
        lasts_ms: 0,
        samples: 1,
        load: 0.0,
        load_max: 0.0,
        cpu_cores: 0.0,
        memory_bytes: 0,
        working_set_bytes: None,
        io_bytes_per_s: 0.0,
        cpu_pressure: 0.0,
        stalled: 0.0,
        machines: 0,
    };

    /// Merges the samples of another point, and extends the interval to cover both.
    pub fn add(&mut self, other: &HistoryPoint) {
        let (mine, others) = (f64::from(self.samples), f64::from(other.samples));
        let all = (mine + others).max(1.0);
        let mean = |one: f64, other: f64| (one * mine + other * others) / all;
        let mean_bytes = |one: u64, other: u64| mean(one as f64, other as f64) as u64;
        self.load = mean(self.load, other.load);
        self.load_max = self.load_max.max(other.load_max);
        self.cpu_cores = mean(self.cpu_cores, other.cpu_cores);
        self.memory_bytes = mean_bytes(self.memory_bytes, other.memory_bytes);
        self.working_set_bytes = match (self.working_set_bytes, other.working_set_bytes) {
            (Some(one), Some(other)) => Some(mean_bytes(one, other)),
            (one, other) => one.or(other),
        };
        self.io_bytes_per_s = mean(self.io_bytes_per_s, other.io_bytes_per_s);
        self.cpu_pressure = mean(self.cpu_pressure, other.cpu_pressure);
        self.stalled = mean(self.stalled, other.stalled);
        self.machines = self.machines.max(other.machines);
        self.samples = self.samples.saturating_add(other.samples);
        let end = |it: &HistoryPoint| it.at_unix_ms.saturating_add(it.lasts_ms);
        let ends = end(self).max(end(other));
        self.at_unix_ms = self.at_unix_ms.min(other.at_unix_ms);
        self.lasts_ms = ends - self.at_unix_ms;
    }
}

/// Reduces the points to at most this number of equal length, oldest first; those that
/// begin together are merged.
pub fn history_in_points(mut points: Vec<HistoryPoint>, points_max: u32) -> Vec<HistoryPoint> {
    points.sort_by_key(|point| point.at_unix_ms);
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return points;
    };
    let finest_ms = points
        .iter()
        .map(|it| it.lasts_ms)
        .max()
        .unwrap_or(1)
        .max(1);
    let spans = (last.at_unix_ms - first.at_unix_ms) / finest_ms + 1;
    let step_ms = finest_ms * spans.div_ceil(u64::from(points_max.max(1)));
    let begins_ms = first.at_unix_ms;
    let mut merged: Vec<(u64, HistoryPoint)> = Vec::new();
    for point in points {
        let number = (point.at_unix_ms - begins_ms) / step_ms;
        match merged.last_mut() {
            Some((of, before)) if *of == number => before.add(&point),
            _ => merged.push((number, point)),
        }
    }
    merged.into_iter().map(|(_, point)| point).collect()
}

/// The measured history of a node, or a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HistoryInfo {
    /// Oldest first; gaps have no points.
    pub points: Vec<HistoryPoint>,
    /// Nodes that did not answer, whose points of a machine are missing.
    pub silent: Vec<Silence>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(at_unix_ms: u64, load: f64) -> HistoryPoint {
        HistoryPoint {
            at_unix_ms,
            lasts_ms: 10,
            load,
            load_max: load,
            ..HistoryPoint::ONE
        }
    }

    #[test]
    fn fewer_points_say_the_same_less_finely() {
        let points: Vec<_> = (0..10).map(|it| point(it * 10, it as f64)).collect();
        assert_eq!(history_in_points(points.clone(), 10), points);
        let five = history_in_points(points.clone(), 5);
        assert_eq!(five.len(), 5);
        assert_eq!((five[4].load, five[4].load_max), (8.5, 9.0));
        assert_eq!((five[4].at_unix_ms, five[4].lasts_ms), (80, 20));
        let one = history_in_points(points, 1);
        assert_eq!((one.len(), one[0].samples, one[0].load), (1, 10, 4.5));
        assert_eq!(history_in_points(Vec::new(), 1), []);
        // A gap is kept; points of two nodes for one interval are merged.
        let gap = history_in_points(vec![point(90, 1.0), point(0, 1.0), point(0, 3.0)], 100);
        assert_eq!((gap.len(), gap[0].load, gap[1].at_unix_ms), (2, 2.0, 90));
    }
}
