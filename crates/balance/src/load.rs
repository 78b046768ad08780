//! Load: the raw counters of machines and nodes, their combination into one number, and the
//! validation that keeps the balancer from acting on an impossible number of a peer.
//!
//! *Load is demand, not usage.* Twelve CPU-bound programs on one core use one core; their demand is
//! twelve. So CPU demand is the time on a core plus the time waiting for one. Time throttled by a
//! machine's own limit does not count.

use crate::Name;
use serde::{Deserialize, Serialize};

/// Highest CPU demand that is accepted as valid, in cores.
pub const CORES_MAX: f64 = 65_536.0;
/// Highest rate that is accepted as valid, in bytes or operations per second.
pub const RATE_MAX: f64 = 1e13;
/// Largest memory that is accepted as valid, in bytes: 1 PiB.
pub const MEMORY_MAX: u64 = 1 << 50;
/// Range of a node's speed factor.
pub const SPEED_RANGE: (f64, f64) = (0.25, 4.0);
/// Highest load that is accepted as valid.
pub const LOAD_MAX: f64 = 1e6;

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = NodeCapacity)]
pub struct Capacity {
    /// Cores available to machines; a cgroup quota is taken into account.
    pub cores: f64,
    /// Speed of one core relative to the cluster's reference core, 0.25 to 4.
    pub speed: f64,
    /// Memory for machines, in bytes.
    pub memory_bytes: u64,
    /// Disk bandwidth, in bytes per second.
    pub io_bytes_per_s: f64,
}

impl Capacity {
    /// Cores times speed: the capacity in cores of the reference speed, by which nodes are
    /// weighted.
    pub fn power(&self) -> f64 {
        self.cores * self.speed
    }
}

/// Load factors of a machine: raw counters from which each node computes the load that the machine
/// would put on it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = LoadFactors)]
pub struct Factors {
    /// CPU demand on the current node: cores used and waited for, excluding the time throttled by
    /// the machine's own limit, and at most that limit.
    pub cpu_cores: f64,
    /// Part of `cpu_cores` that belongs to CPU-bound threads. They take a whole core on any node;
    /// other threads take less of a faster core.
    pub cpu_bound_cores: f64,
    /// Resident memory, in bytes.
    pub memory_bytes: u64,
    /// Bytes of memory dirtied per second: a pre-copy move must copy them again.
    pub dirty_bytes_per_s: f64,
    /// Bytes read from and written to disks per second.
    pub io_bytes_per_s: f64,
    /// Bytes sent and received over the network per second.
    pub network_bytes_per_s: f64,
    /// Share of time stalled on memory or disks (PSI `some`), 0 to 1.
    pub stalled: f64,
}

/// Weights that combine the resources into one load.
///
/// Memory and disks are constraints first (a machine that does not fit is not accepted), and
/// weights second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = LoadWeights)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Weight of CPU demand as a share of the node's cores.
    pub cpu: f64,
    /// Weight of resident memory as a share of the node's memory.
    pub memory: f64,
    /// Weight of disk traffic as a share of the node's disk bandwidth.
    pub io: f64,
    /// Weight of the time stalled on memory or disks. (Waiting for CPU is part of the demand.)
    pub pressure: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Weights {
            cpu: 1.0,
            memory: 0.1,
            io: 0.2,
            pressure: 0.5,
        }
    }
}

/// A reported number outside its valid range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = InvalidNumber)]
pub struct ValidationError {
    pub field: String,
    pub found: String,
}

impl std::fmt::Display for ValidationError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} was {}", self.field, self.found)
    }
}

/// Clamps a number to its range, and records the original if it was outside.
fn clamp(field: &str, value: &mut f64, least: f64, most: f64, errors: &mut Vec<ValidationError>) {
    if (least..=most).contains(value) {
        return;
    }
    errors.push(ValidationError {
        field: field.to_owned(),
        found: value.to_string(),
    });
    *value = if value.is_nan() {
        least
    } else {
        value.clamp(least, most)
    };
}

impl Capacity {
    /// Clamps every number to its range; returns the numbers that were outside.
    pub fn sanitise(&mut self) -> Vec<ValidationError> {
        let mut errors = Vec::new();
        clamp("cores", &mut self.cores, 0.01, CORES_MAX, &mut errors);
        let (slowest, fastest) = SPEED_RANGE;
        clamp("speed", &mut self.speed, slowest, fastest, &mut errors);
        clamp(
            "io_bytes_per_s",
            &mut self.io_bytes_per_s,
            1.0,
            RATE_MAX,
            &mut errors,
        );
        if self.memory_bytes > MEMORY_MAX {
            errors.push(ValidationError {
                field: "memory_bytes".into(),
                found: self.memory_bytes.to_string(),
            });
            self.memory_bytes = MEMORY_MAX;
        }
        errors
    }
}

impl Factors {
    /// Clamps every number to its range; returns the numbers that were outside.
    pub fn sanitise(&mut self) -> Vec<ValidationError> {
        let mut errors = Vec::new();
        let fields: [(&str, &mut f64, f64); 6] = [
            ("cpu_cores", &mut self.cpu_cores, CORES_MAX),
            ("cpu_bound_cores", &mut self.cpu_bound_cores, CORES_MAX),
            ("dirty_bytes_per_s", &mut self.dirty_bytes_per_s, RATE_MAX),
            ("io_bytes_per_s", &mut self.io_bytes_per_s, RATE_MAX),
            (
                "network_bytes_per_s",
                &mut self.network_bytes_per_s,
                RATE_MAX,
            ),
            ("stalled", &mut self.stalled, 1.0),
        ];
        for (name, value, most) in fields {
            clamp(name, value, 0.0, most, &mut errors);
        }
        self.cpu_bound_cores = self.cpu_bound_cores.min(self.cpu_cores);
        if self.memory_bytes > MEMORY_MAX {
            errors.push(ValidationError {
                field: "memory_bytes".into(),
                found: self.memory_bytes.to_string(),
            });
            self.memory_bytes = MEMORY_MAX;
        }
        errors
    }

    /// The same machine's factors on another node: work that is not CPU-bound takes less time on a
    /// faster core, and the stall time of one node says nothing about another.
    #[must_use]
    pub fn on(&self, here: &Capacity, there: &Capacity) -> Factors {
        let elastic = (self.cpu_cores - self.cpu_bound_cores).max(0.0);
        Factors {
            cpu_cores: self.cpu_bound_cores + elastic * here.speed / there.speed,
            stalled: 0.0,
            ..*self
        }
    }

    /// Load on a node, as a share of the node's capacity.
    pub fn weigh(&self, node: &Capacity, weights: &Weights) -> f64 {
        let share = |amount: f64, of: f64| if of > 0.0 { amount / of } else { 0.0 };
        weights.cpu * share(self.cpu_cores, node.cores)
            + weights.memory * share(self.memory_bytes as f64, node.memory_bytes as f64)
            + weights.io * share(self.io_bytes_per_s, node.io_bytes_per_s)
            + weights.pressure * self.stalled
    }
}

/// Sample of one machine, taken by its node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MachineSample {
    #[schema(value_type = String)]
    pub name: Name,
    /// The measured factors, or those of the spec where [`crate::policy::Basis`] says so.
    pub factors: Factors,
    /// Milliseconds for which the load has been about constant.
    pub lasted_ms: u64,
    /// Shown to users; no decision depends on it.
    #[serde(default)]
    pub usage: Usage,
}

/// Resource usage of a machine beyond its load factors. `None` where the kernel does not account
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MachineUsage)]
pub struct Usage {
    /// Part of the CPU demand that waited for a core, in cores.
    pub cpu_waited_cores: f64,
    /// Working set: memory touched in about the last minute, in bytes.
    pub working_set_bytes: Option<u64>,
    /// Refaults per second: pages read again after eviction.
    pub refaults_per_s: Option<f64>,
    /// Disk reads and writes per second.
    pub io_operations_per_s: Option<f64>,
}

/// Sample of a node, taken by the node itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NodeSample {
    pub capacity: Capacity,
    /// Usage of processes other than machines.
    pub base: Factors,
    pub machines: Vec<MachineSample>,
    /// Share of time in which a runnable task waited for a core although its own limit allowed it
    /// to run (PSI `some` of CPU), 0 to 1.
    pub cpu_pressure: f64,
    /// The same for memory and disks, the greater of the two.
    pub stall_pressure: f64,
}

impl NodeSample {
    /// Clamps every number to its range; returns the numbers that were outside.
    pub fn sanitise(&mut self) -> Vec<ValidationError> {
        let mut errors = self.capacity.sanitise();
        errors.extend(self.base.sanitise());
        let pressures = [
            ("cpu_pressure", &mut self.cpu_pressure),
            ("stall_pressure", &mut self.stall_pressure),
        ];
        for (name, value) in pressures {
            clamp(name, value, 0.0, 1.0, &mut errors);
        }
        for machine in &mut self.machines {
            errors.extend(machine.factors.sanitise());
        }
        errors
    }

    /// The node's load: the sum over its machines and `base`.
    pub fn load(&self, weights: &Weights) -> f64 {
        let machines = self.machines.iter();
        let machines: f64 = machines
            .map(|machine| machine.factors.weigh(&self.capacity, weights))
            .sum();
        self.base.weigh(&self.capacity, weights) + machines
    }

    /// Free memory, in bytes.
    pub fn memory_free_bytes(&self) -> u64 {
        let used = self.machines.iter().map(|it| it.factors.memory_bytes);
        let used = used.fold(self.base.memory_bytes, u64::saturating_add);
        self.capacity.memory_bytes.saturating_sub(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(cores: f64, speed: f64) -> Capacity {
        Capacity {
            cores,
            speed,
            memory_bytes: 1 << 30,
            io_bytes_per_s: 1e8,
        }
    }

    #[test]
    fn work_takes_less_on_a_faster_node_and_burning_does_not() {
        let (slow, fast) = (node(1.0, 1.0), node(1.0, 2.0));
        let steady = Factors {
            cpu_cores: 0.5,
            ..Factors::default()
        };
        assert_eq!(steady.on(&slow, &fast).cpu_cores, 0.25);
        let burner = Factors {
            cpu_cores: 1.0,
            cpu_bound_cores: 1.0,
            ..Factors::default()
        };
        assert_eq!(burner.on(&slow, &fast).cpu_cores, 1.0);
        let there_and_back = steady.on(&slow, &fast).on(&fast, &slow);
        assert_eq!(there_and_back, steady);
    }

    #[test]
    fn demand_may_be_more_than_there_is() {
        let sample = NodeSample {
            capacity: node(1.0, 1.0),
            base: Factors::default(),
            machines: (0..12)
                .map(|number| MachineSample {
                    name: format!("m{number}").into(),
                    factors: Factors {
                        cpu_cores: 1.0,
                        ..Factors::default()
                    },
                    lasted_ms: 0,
                    usage: Usage::default(),
                })
                .collect(),
            cpu_pressure: 0.9,
            stall_pressure: 0.0,
        };
        assert_eq!(sample.load(&Weights::default()), 12.0);
    }

    #[test]
    fn absurd_numbers_are_marked_and_not_followed() {
        let errors = [
            f64::NAN,
            -1.0,
            f64::INFINITY,
            f64::NEG_INFINITY,
            -0.0,
            1e300,
        ];
        for value in errors {
            let mut sample = NodeSample {
                capacity: Capacity {
                    cores: value,
                    speed: value,
                    memory_bytes: u64::MAX,
                    io_bytes_per_s: value,
                },
                base: Factors {
                    cpu_cores: value,
                    cpu_bound_cores: value,
                    memory_bytes: u64::MAX,
                    dirty_bytes_per_s: value,
                    io_bytes_per_s: value,
                    network_bytes_per_s: value,
                    stalled: value,
                },
                machines: Vec::new(),
                cpu_pressure: value,
                stall_pressure: value,
            };
            assert!(!sample.sanitise().is_empty(), "{value}");
            let load = sample.load(&Weights::default());
            assert!(load.is_finite() && load >= 0.0, "{value}: {load}");
            assert!(sample.sanitise().is_empty(), "{value}: once is enough");
        }
    }
}
