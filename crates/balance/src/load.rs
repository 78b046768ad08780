//! What a load is: raw counters of machines and nodes, how they become one
//! number, and what keeps an absurd number of a peer from being followed.
//!
//! *Load is demand, not use.* Twelve programs that burn on one core use one core;
//! their demand is twelve. So CPU counts as time on a core plus time waiting for
//! one. What a machine's own limit holds back is no demand.

use crate::Name;
use serde::{Deserialize, Serialize};

/// Highest demand for CPU that is believed, in cores.
pub const CORES_MAX: f64 = 65_536.0;
/// Highest rate that is believed, in bytes or operations a second.
pub const RATE_MAX: f64 = 1e13;
/// Most memory that is believed, in bytes: 1 PiB.
pub const MEMORY_MAX: u64 = 1 << 50;
/// Least and greatest speed factor of a node.
pub const SPEED_RANGE: (f64, f64) = (0.25, 4.0);
/// Highest load that is believed.
pub const LOAD_MAX: f64 = 1e6;

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Cores that its machines may use; a cgroup's quota counts.
    pub cores: f64,
    /// How fast one of its cores is beside the cluster's reference core, 0.25 to 4.
    pub speed: f64,
    /// Memory for machines, in bytes.
    pub memory_bytes: u64,
    /// What its disks carry, in bytes a second.
    pub io_bytes_per_s: f64,
}

impl Capacity {
    /// Cores of the reference speed: the node's weight beside others.
    pub fn power(&self) -> f64 {
        self.cores * self.speed
    }
}

/// Load factors of a machine: counters, from which any node computes what the load
/// would be on *it*.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Factors {
    /// Demand for CPU where it is now: cores used and waited for, without what its
    /// own limit held back, and not more than that limit.
    pub cpu_cores: f64,
    /// Of these, cores of threads that never rest. They take a whole core on any
    /// node; the others less on a faster one.
    pub cpu_bound_cores: f64,
    /// Memory that it occupies, in bytes.
    pub memory_bytes: u64,
    /// Bytes that it writes to memory, a second: what a move must copy again.
    pub dirty_bytes_per_s: f64,
    /// Bytes read from and written to disks, a second.
    pub io_bytes_per_s: f64,
    /// Bytes to and from the network, a second.
    pub network_bytes_per_s: f64,
    /// Share of time in which it stood still for memory or disks (PSI `some`), 0 to 1.
    pub stalled: f64,
}

/// How resources become one number.
///
/// Memory and disks are constraints first (what does not fit is not taken), and
/// weights second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Of CPU demand as a share of the node's cores.
    pub cpu: f64,
    /// Of memory occupied as a share of the node's.
    pub memory: f64,
    /// Of disk traffic as a share of what the node's disks carry.
    pub io: f64,
    /// Of time stood still for memory or disks. (Waiting for CPU is in the demand.)
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

/// Why a number was not believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidationError {
    pub field: String,
    pub found: String,
}

impl std::fmt::Display for ValidationError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} was {}", self.field, self.found)
    }
}

/// Brings a number into its range, and notes that it was outside.
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
    /// Brings every number into its range; what was outside.
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
    /// Brings every number into its range; what was outside.
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

    /// The same machine's factors on another node: work that is not bound by the
    /// core takes less time on a faster one, and what stood still may not there.
    #[must_use]
    pub fn on(&self, here: &Capacity, there: &Capacity) -> Factors {
        let elastic = (self.cpu_cores - self.cpu_bound_cores).max(0.0);
        Factors {
            cpu_cores: self.cpu_bound_cores + elastic * here.speed / there.speed,
            stalled: 0.0,
            ..*self
        }
    }

    /// What it weighs on a node, as a share of the node's capacity.
    pub fn weigh(&self, node: &Capacity, weights: &Weights) -> f64 {
        let share = |amount: f64, of: f64| if of > 0.0 { amount / of } else { 0.0 };
        weights.cpu * share(self.cpu_cores, node.cores)
            + weights.memory * share(self.memory_bytes as f64, node.memory_bytes as f64)
            + weights.io * share(self.io_bytes_per_s, node.io_bytes_per_s)
            + weights.pressure * self.stalled
    }
}

/// A machine as its node sees it now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineSample {
    pub name: Name,
    /// What was measured, or what its spec promises where the policy says so.
    pub factors: Factors,
    /// Milliseconds for which its load has been about what it is now.
    pub lasted_ms: u64,
    /// What is told to people beside it; nothing is decided by it.
    #[serde(default)]
    pub usage: Usage,
}

/// What a machine uses beside its load factors. What the kernel does not count here is
/// missing.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Of its CPU demand, cores that it waited for.
    pub cpu_waited_cores: f64,
    /// Memory that it touched since about a minute, in bytes: what must be near.
    pub working_set_bytes: Option<u64>,
    /// Pages a second that it needed again after they had been taken from it.
    pub refaults_per_s: Option<f64>,
    /// Reads from and writes to disks, a second.
    pub io_operations_per_s: Option<f64>,
}

/// A node as it sees itself now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeSample {
    pub capacity: Capacity,
    /// What is used by others than machines.
    pub base: Factors,
    pub machines: Vec<MachineSample>,
    /// Share of time in which something waited for a core though its own limit
    /// allowed it (PSI `some` of CPU), 0 to 1.
    pub cpu_pressure: f64,
    /// The same for memory and disks, the greater one.
    pub stall_pressure: f64,
}

impl NodeSample {
    /// Brings every number into its range; what was outside.
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

    /// Its load: what all that is on it weighs.
    pub fn load(&self, weights: &Weights) -> f64 {
        let machines = self.machines.iter();
        let machines: f64 = machines
            .map(|machine| machine.factors.weigh(&self.capacity, weights))
            .sum();
        self.base.weigh(&self.capacity, weights) + machines
    }

    /// Memory that is not occupied, in bytes.
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
