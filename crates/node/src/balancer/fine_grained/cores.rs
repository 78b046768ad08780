//! CPU time of a thread, in cores.

/// Weight of the newest sample in a thread's cores.
pub(super) const NEWEST_WEIGHT: f64 = 0.4;
/// The demand of a thread, in cores of its node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Cores {
    /// Run time plus run-queue wait.
    pub(super) wanted: f64,
    /// Run time.
    pub(super) ran: f64,
}

impl Cores {
    /// Exponentially smoothed with the earlier value.
    pub(super) fn after(self, earlier: &Cores) -> Cores {
        let smoothed =
            |now: f64, earlier: f64| now * NEWEST_WEIGHT + earlier * (1.0 - NEWEST_WEIGHT);
        Cores {
            wanted: smoothed(self.wanted, earlier.wanted),
            ran: smoothed(self.ran, earlier.ran),
        }
    }
}
