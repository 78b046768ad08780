//! Dirty rates of machines: what a move must copy again. A measurement tracks writes for a short
//! time, so it is made seldom, for one machine at a time, and never during a move.

use keel_cluster::MachineName;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Pause between two machines.
pub(super) const EVERY: Duration = Duration::from_secs(5);
/// Pause between two measurements of one machine.
const AGAIN_AFTER: Duration = Duration::from_secs(300);
/// Delay of the first measurement of a new machine, which is busy with its start.
const FIRST_AFTER: Duration = Duration::from_secs(10);

/// Measurements of a machine that runs here.
#[derive(Debug)]
struct DirtyRate {
    bytes_per_s: f64,
    due: Instant,
}

/// Dirty rates of the machines of this node.
#[derive(Debug, Clone, Default)]
pub(super) struct DirtyRates(Arc<Mutex<HashMap<MachineName, DirtyRate>>>);

impl DirtyRates {
    fn table(&self) -> MutexGuard<'_, HashMap<MachineName, DirtyRate>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes a second that a machine writes; 0 while that is unknown.
    pub(super) fn of(&self, machine: &MachineName) -> f64 {
        self.table().get(machine).map_or(0.0, |it| it.bytes_per_s)
    }

    /// The machine to measure now: of those that are due the one that waits longest.
    pub(super) fn next(&self, here: &[MachineName], now: Instant) -> Option<MachineName> {
        let mut table = self.table();
        table.retain(|machine, _| here.contains(machine));
        for machine in here {
            table.entry(machine.clone()).or_insert(DirtyRate {
                bytes_per_s: 0.0,
                due: now + FIRST_AFTER,
            });
        }
        let due = table.iter().filter(|(_, it)| it.due <= now);
        let (machine, _) = due.min_by_key(|(_, it)| it.due)?;
        Some(machine.clone())
    }

    /// Records a measurement; a failed one leaves the earlier value.
    pub(super) fn record(&self, machine: &MachineName, bytes_per_s: Option<f64>, now: Instant) {
        if let Some(rate) = self.table().get_mut(machine) {
            rate.bytes_per_s = bytes_per_s.unwrap_or(rate.bytes_per_s);
            // A machine that could not be measured may still be arriving.
            rate.due = now + bytes_per_s.map_or(FIRST_AFTER, |_| AGAIN_AFTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_looked_at_in_turn_and_not_too_often() {
        let name = |text: &str| text.parse::<MachineName>().unwrap();
        let writes = DirtyRates::default();
        let here = [name("a"), name("b")];
        let mut now = Instant::now();
        assert_eq!(writes.next(&here, now), None, "they just came");
        now += FIRST_AFTER;
        let first = writes.next(&here, now).unwrap();
        writes.record(&first, Some(7.0), now);
        now += EVERY;
        let second = writes.next(&here, now).unwrap();
        assert_ne!(first, second);
        writes.record(&second, None, now);
        assert_eq!((writes.of(&first), writes.of(&second)), (7.0, 0.0));
        assert_eq!(writes.next(&here, now), None);
        now += FIRST_AFTER;
        assert_eq!(writes.next(&here, now), Some(second.clone()), "once more");
        writes.record(&second, Some(3.0), now);
        assert_eq!(writes.next(&here, now), None);
        now += AGAIN_AFTER;
        writes.record(&second, Some(3.0), now);
        assert_eq!(writes.next(&here, now), Some(first.clone()));
        // A failed measurement keeps the earlier value.
        writes.record(&first, None, now);
        assert_eq!(writes.of(&first), 7.0);
        // One that left is forgotten.
        assert_eq!(writes.next(&[second], now + EVERY), None);
        assert_eq!(writes.of(&first), 0.0);
    }
}
