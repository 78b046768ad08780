//! Tells whether a node rests, by a few small files for all of its machines together: its last
//! measurement stands then, and not even one file of each machine is read. A node at rest has many.

use crate::host::{HostMemory, HostProcessors};
use keel_machine::cgroup::Pressure;
use std::time::{Duration, Instant};

/// Machines that use no more rest, in cores for each of them. What they use while a measurement stands
/// counts in the second after it: of 30 s a hundredth of a core for each.
const MACHINE_CORES_MAX: f64 = 0.0005;
/// What the host's processes use by more or less is no change, in cores.
const HOST_CORES_MAX: f64 = 0.05;
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
    pub(super) cores_of_host: f64,
    pub(super) memory: HostMemory,
    /// Of machines here, whether they run here or not. Sorted.
    pub(super) processes: Vec<u32>,
}

impl Look {
    /// Cores that machines and all processes of the host used since an earlier look; `None` if it is not
    /// known.
    fn cores_since(&self, before: &Look) -> Option<(f64, f64)> {
        let seconds = self.at.duration_since(before.at).as_secs_f64();
        let micros = self.machines_micros?.checked_sub(before.machines_micros?)?;
        let busy = self.host.shares_since(&before.host).busy * self.cores_of_host;
        (seconds > 0.0).then(|| (micros as f64 / 1e6 / seconds, busy))
    }

    /// Whether machines are other ones, or may have waited for memory or a disk.
    fn differs(&self, before: &Look) -> bool {
        self.processes != before.processes || !self.pressure.has_same_stalls(&before.pressure)
    }
}

/// The last looks.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// The last one.
    last: Option<Look>,
    /// That of the last measurement, with the cores that the host used then; `None` if machines did not
    /// rest.
    measured: Option<(Look, f64)>,
}

impl Rest {
    /// Takes another look. Whether the last measurement stands.
    pub(super) fn stands(&mut self, look: Look) -> bool {
        let cores = self.last.as_ref().and_then(|last| look.cores_since(last));
        let most = MACHINE_CORES_MAX * look.processes.len() as f64;
        let rests = cores.is_some_and(|(machines, _)| machines <= most);
        let host_cores = cores.map_or(0.0, |(_, host)| host);
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
            let last = self.last.as_ref();
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
        assert!(is_measured(|it| it.machines_micros = Some(1_000 + 1_001)));
        assert!(is_measured(|it| it.machines_micros = None));
        assert!(is_measured(|it| it.pressure.io_micros = Some(1)));
        assert!(is_measured(|it| it.pressure.memory_micros = Some(1)));
        assert!(is_measured(|it| it.host.busy += 6));
        assert!(is_measured(|it| it.memory.available_bytes -= 6 << 20));
        assert!(is_measured(|it| it.memory.available_bytes += 6 << 20));
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
