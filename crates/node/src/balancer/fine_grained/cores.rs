//! Cores that a thread had.

/// Weight of the newest sample in a thread's cores.
pub(super) const NEWEST_WEIGHT: f64 = 0.4;
/// What a thread had of a processor, in cores of its node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Cores {
    /// What it ran, and what it waited for its turn.
    pub(super) wanted: f64,
    /// What it ran.
    pub(super) ran: f64,
}

impl Cores {
    /// Smoothed, where it was that much before.
    pub(super) fn after(self, earlier: &Cores) -> Cores {
        let smoothed =
            |now: f64, earlier: f64| now * NEWEST_WEIGHT + earlier * (1.0 - NEWEST_WEIGHT);
        Cores {
            wanted: smoothed(self.wanted, earlier.wanted),
            ran: smoothed(self.ran, earlier.ran),
        }
    }
}
