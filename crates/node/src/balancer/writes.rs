//! How much machines write: what a move must copy again. To find it their memory is
//! watched for a moment, so it is done seldom, one machine after the other, and never
//! while something moves.

use crate::agent::Agent;
use keel_cluster::MachineName;
use keel_machine::moves::prediction::Activity;
use keel_machine::worker::control::kind;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two machines that are looked at.
const EVERY: Duration = Duration::from_secs(5);
/// Until the same one is looked at again.
const AGAIN_AFTER: Duration = Duration::from_secs(300);
/// Until a machine that came is looked at: it has enough to do.
const FIRST_AFTER: Duration = Duration::from_secs(10);
/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is known of a machine that runs here.
#[derive(Debug)]
struct Looked {
    bytes_per_s: f64,
    due: Instant,
}

/// What machines of this node write.
#[derive(Debug, Clone, Default)]
pub(super) struct Writes(Arc<Mutex<HashMap<MachineName, Looked>>>);

impl Writes {
    fn table(&self) -> MutexGuard<'_, HashMap<MachineName, Looked>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes a second that a machine writes; 0 while that is not known.
    pub(super) fn of(&self, machine: &MachineName) -> f64 {
        self.table().get(machine).map_or(0.0, |it| it.bytes_per_s)
    }

    /// The machine to look at now: of those that are due the one that waits longest.
    fn next(&self, here: &[MachineName], now: Instant) -> Option<MachineName> {
        let mut table = self.table();
        table.retain(|machine, _| here.contains(machine));
        for machine in here {
            table.entry(machine.clone()).or_insert(Looked {
                bytes_per_s: 0.0,
                due: now + FIRST_AFTER,
            });
        }
        let due = table.iter().filter(|(_, it)| it.due <= now);
        let (machine, _) = due.min_by_key(|(_, it)| it.due)?;
        Some(machine.clone())
    }

    /// Takes what was seen; where nothing could be seen, what was known stays.
    fn looked(&self, machine: &MachineName, bytes_per_s: Option<f64>, now: Instant) {
        if let Some(looked) = self.table().get_mut(machine) {
            looked.bytes_per_s = bytes_per_s.unwrap_or(looked.bytes_per_s);
            // One that could not be looked at may be arriving still.
            looked.due = now + bytes_per_s.map_or(FIRST_AFTER, |_| AGAIN_AFTER);
        }
    }
}

/// Looks at this node's machines for ever.
pub(super) async fn follow(agent: Arc<Agent>) {
    let writes = agent.balancer.writes.clone();
    loop {
        tokio::time::sleep(EVERY).await;
        if !agent.moves().is_empty() {
            continue;
        }
        let here = agent.workers.processes().into_iter();
        let here: Vec<MachineName> = here.map(|(machine, _)| machine).collect();
        let Some(machine) = writes.next(&here, Instant::now()) else {
            continue;
        };
        let Some(worker) = agent.workers.get(&machine) else {
            continue;
        };
        let looked: Result<Activity, _> = worker.ask(kind::ACTIVITY, &(), PATIENCE).await;
        let looked = looked.inspect_err(|error| {
            tracing::debug!(%machine, %error, "what it writes was not looked at");
        });
        let bytes_per_s = looked.ok().map(|it| it.bytes_per_s() as f64);
        writes.looked(&machine, bytes_per_s, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_looked_at_in_turn_and_not_too_often() {
        let name = |text: &str| text.parse::<MachineName>().unwrap();
        let writes = Writes::default();
        let here = [name("a"), name("b")];
        let mut now = Instant::now();
        assert_eq!(writes.next(&here, now), None, "they just came");
        now += FIRST_AFTER;
        let first = writes.next(&here, now).unwrap();
        writes.looked(&first, Some(7.0), now);
        now += EVERY;
        let second = writes.next(&here, now).unwrap();
        assert_ne!(first, second);
        writes.looked(&second, None, now);
        assert_eq!((writes.of(&first), writes.of(&second)), (7.0, 0.0));
        assert_eq!(writes.next(&here, now), None);
        now += FIRST_AFTER;
        assert_eq!(writes.next(&here, now), Some(second.clone()), "once more");
        writes.looked(&second, Some(3.0), now);
        assert_eq!(writes.next(&here, now), None);
        now += AGAIN_AFTER;
        writes.looked(&second, Some(3.0), now);
        assert_eq!(writes.next(&here, now), Some(first.clone()));
        // What could not be seen again is what it was.
        writes.looked(&first, None, now);
        assert_eq!(writes.of(&first), 7.0);
        // One that left is forgotten.
        assert_eq!(writes.next(&[second], now + EVERY), None);
        assert_eq!(writes.of(&first), 0.0);
    }
}
