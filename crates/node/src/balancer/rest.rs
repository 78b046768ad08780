//! Tells whether a node rests, by a few small files for all of its machines together: its last
//! measurement stands then, and not even one file of each machine is read. A node at rest has many.

use crate::host::{HostMemory, HostProcessors};
use keel_machine::cgroup::{Budget, Pressure};
use std::time::{Duration, Instant};

/// Machines that use no more rest, in cores for each of them.
const MACHINE_CORES_MAX: f64 = 0.001;
/// What the host's processes use by more or less is no change, in cores.
const HOST_CORES_MAX: f64 = 0.05;
/// What the node sends and receives by more is no rest, in bytes a second.
const NETWORK_BYTES_PER_S_MAX: f64 = 1e6;
/// What the free memory differs by without a change, as a part of all memory.
const MEMORY_PART: u64 = 200;
/// The longest time for which a measurement stands.
const STANDS_MAX: Duration = Duration::from_secs(30);

/// What a look at the node sees.
#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) at: Instant,
    /// Processor time of all machines; `None` where it is not accounted.
    pub(super) machines_micros: Option<u64>,
    pub(super) pressure: Pressure,
    pub(super) host: HostProcessors,
    /// To and from other nodes.
    pub(super) network_bytes: u64,
    /// What this node may use.
    pub(super) budget: Budget,
    pub(super) cores_of_host: f64,
    pub(super) memory: HostMemory,
    /// Of machines here, whether they run here or not. Sorted.
    pub(super) processes: Vec<u32>,
}

impl Look {
    /// Whether machines, and links to other nodes, have rested since an earlier look; `false` if it is
    /// not known.
    fn has_rested_since(&self, before: &Look) -> bool {
        let seconds = self.at.duration_since(before.at).as_secs_f64();
        let micros = self.machines_micros.zip(before.machines_micros);
        let micros = micros.and_then(|(now, before)| now.checked_sub(before));
        let machines_s = MACHINE_CORES_MAX * self.processes.len() as f64 * seconds;
        let network = self.network_bytes.saturating_sub(before.network_bytes);
        micros.is_some_and(|micros| micros as f64 / 1e6 <= machines_s)
            && network as f64 <= NETWORK_BYTES_PER_S_MAX * seconds
    }

    /// Cores of the host that were busy since an earlier look.
    fn host_cores_since(&self, before: &Look) -> f64 {
        self.host.shares_since(&before.host).busy * self.cores_of_host
    }

    /// Whether machines are other ones or may have waited for memory or a disk, or what the node may use
    /// is another.
    fn differs(&self, before: &Look) -> bool {
        self.processes != before.processes
            || self.budget != before.budget
            || !self.pressure.has_same_stalls(&before.pressure)
    }
}

/// The last looks.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// The last one.
    last: Option<Look>,
    /// That of the last measurement, with the cores that the host used then; `None` if the node did
    /// not rest.
    measured: Option<(Look, f64)>,
}

impl Rest {
    /// Takes another look. Whether the last measurement stands.
    pub(super) fn stands(&mut self, look: Look) -> bool {
        let last = self.last.as_ref();
        let rests = last.is_some_and(|last| look.has_rested_since(last));
        let host_cores = last.map_or(0.0, |last| look.host_cores_since(last));
        let stands = self.measured.as_ref().is_some_and(|(measured, cores)| {
            let available = measured.memory.available_bytes;
            let freed_or_used = look.memory.available_bytes.abs_diff(available);
            rests
                && !look.differs(measured)
                && (host_cores - cores).abs() < HOST_CORES_MAX
                && freed_or_used <= measured.memory.bytes / MEMORY_PART
                && look.at.duration_since(measured.at) < STANDS_MAX
        });
        if !stands {
            // What a machine uses is known from its second measurement on.
            let is_whole = last.is_some_and(|last| last.processes == look.processes);
            self.measured = (rests && is_whole).then(|| (look.clone(), host_cores));
        }
        self.last = Some(look);
        stands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(begun: Instant, second: u64) -> Look {
        Look {
            at: begun + Duration::from_secs(second),
            machines_micros: Some(500 * second),
            pressure: Pressure {
                cpu_micros: Some(0),
                memory_micros: Some(0),
                io_micros: Some(0),
            },
            host: HostProcessors {
                busy: 10 * second,
                stolen: 0,
                all: 200 * second,
            },
            network_bytes: 1_000 * second,
            budget: Budget::default(),
            cores_of_host: 2.0,
            memory: HostMemory {
                bytes: 1 << 30,
                available_bytes: 1 << 29,
            },
            processes: vec![7, 8],
        }
    }

    /// The looks of four seconds, the last one changed: whether that is measured.
    fn is_measured(change: impl Fn(&mut Look)) -> bool {
        let (begun, mut rest) = (Instant::now(), Rest::default());
        // Two looks tell what is used in between, and the next whether it is the same still.
        assert!(!rest.stands(look(begun, 0)));
        assert!(!rest.stands(look(begun, 1)));
        assert!(rest.stands(look(begun, 2)));
        let mut last = look(begun, 3);
        change(&mut last);
        !rest.stands(last)
    }

    #[test]
    fn a_measurement_stands_while_nothing_changes() {
        assert!(!is_measured(|_| ()));
        assert!(!is_measured(|it| it.memory.available_bytes -= 4 << 20));
        assert!(!is_measured(|it| it.host.busy += 4));
        let (begun, mut rest) = (Instant::now(), Rest::default());
        let stands = (0..100).map(|second| rest.stands(look(begun, second)));
        assert_eq!(
            stands.filter(|stands| !stands).count(),
            1 + 100usize.div_ceil(30)
        );
    }

    #[test]
    fn any_change_is_measured() {
        assert!(is_measured(|it| it.machines_micros = Some(1_000 + 2_001)));
        assert!(is_measured(|it| it.machines_micros = None));
        assert!(is_measured(|it| it.pressure.io_micros = Some(1)));
        assert!(is_measured(|it| it.pressure.memory_micros = Some(1)));
        assert!(is_measured(|it| it.host.busy += 6));
        assert!(is_measured(|it| it.memory.available_bytes -= 6 << 20));
        assert!(is_measured(|it| it.memory.available_bytes += 6 << 20));
        assert!(is_measured(|it| it.network_bytes += 1_000_000));
        assert!(is_measured(|it| it.budget.cores = Some(0.5)));
        assert!(is_measured(|it| it.processes = vec![7]));
        assert!(is_measured(|it| it.processes = vec![7, 9]));
    }

    /// A machine that uses little each second is at rest; one that begins to use more is seen at once, and
    /// measured each time until it rests again.
    #[test]
    fn machines_that_run_are_measured_each_time() {
        let (begun, mut rest) = (Instant::now(), Rest::default());
        let mut at = |second, micros| {
            let mut look = look(begun, second);
            look.machines_micros = Some(micros);
            rest.stands(look)
        };
        let stands = [0, 1, 2, 50, 90, 130, 131, 132, 133];
        let stands = stands.iter().enumerate();
        let stands: Vec<bool> = stands
            .map(|(second, ms)| at(second as u64, ms * 1_000))
            .collect();
        let expected = [false, false, true, false, false, false, false, true, true];
        assert_eq!(stands, expected);
    }

    /// It is not in the first measurement after it came.
    #[test]
    fn a_machine_that_comes_is_measured_twice() {
        let (begun, mut rest) = (Instant::now(), Rest::default());
        let stands = (0..6).map(|second| {
            let mut look = look(begun, second);
            if second < 3 {
                look.processes = vec![7];
            }
            rest.stands(look)
        });
        let stands: Vec<bool> = stands.collect();
        assert_eq!(stands, [false, false, true, false, false, true]);
    }
}
