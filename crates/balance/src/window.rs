//! The sliding window of a node's load samples, and the test whether a load difference between two
//! nodes has lasted long enough to act on.

use std::collections::VecDeque;

/// Number of newest samples of which [`NEWEST_SHOWING`] must show a difference.
pub const NEWEST: usize = 5;
/// How many of the newest must show it.
pub const NEWEST_SHOWING: usize = 4;

/// Loads of the last samples.
#[derive(Debug, Clone)]
pub struct Window {
    /// Newest first.
    loads: VecDeque<f64>,
    samples_max: usize,
}

impl Window {
    /// A window of `samples_max` samples.
    pub fn new(samples_max: usize) -> Self {
        Window {
            loads: VecDeque::with_capacity(samples_max),
            samples_max,
        }
    }

    pub fn add(&mut self, load: f64) {
        self.loads.truncate(self.samples_max.saturating_sub(1));
        self.loads.push_front(load);
    }

    /// Adjusts all samples for load that a move added or removed. Without that each move would hide
    /// the node's load for the length of the window.
    pub fn shift(&mut self, by: f64) {
        for load in &mut self.loads {
            *load = (*load + by).max(0.0);
        }
    }

    /// Drops all samples: after a gap the old ones are meaningless.
    pub fn clear(&mut self) {
        self.loads.clear();
    }

    /// Newest first.
    pub fn loads(&self) -> impl Iterator<Item = f64> {
        self.loads.iter().copied()
    }
}

/// The load difference that [`NEWEST_SHOWING`] of the [`NEWEST`] newest samples and the lower
/// quartile of all samples exceed. `None` with fewer than [`NEWEST`] samples of either node.
pub fn steady_difference(here: &[f64], there: &[f64]) -> Option<f64> {
    let mut differences: Vec<f64> = here.iter().zip(there).map(|(a, b)| a - b).collect();
    if differences.len() < NEWEST {
        return None;
    }
    let newest = &mut differences[..NEWEST].to_vec();
    newest.sort_by(f64::total_cmp);
    // All but the smallest are at least this.
    let shown_by_most = newest[NEWEST - NEWEST_SHOWING];
    differences.sort_by(f64::total_cmp);
    let quartile = differences[differences.len() / 4];
    Some(shown_by_most.min(quartile))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_five_may_differ_and_two_may_not() {
        let there = [0.0; 8];
        assert_eq!(steady_difference(&[1.0; 4], &there), None);
        assert_eq!(steady_difference(&[1.0; 8], &there), Some(1.0));
        let one = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(steady_difference(&one, &there), Some(1.0));
        let two = [1.0, 0.0, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(steady_difference(&two, &there), Some(0.1));
        // A burst that has lasted five seconds of twenty is no state yet.
        let mut burst = [0.0; 20];
        burst[..5].fill(1.0);
        assert_eq!(steady_difference(&burst, &[0.0; 20]), Some(0.0));
    }

    #[test]
    fn a_move_does_not_hide_a_node() {
        let mut window = Window::new(6);
        for _ in 0..9 {
            window.add(4.0);
        }
        window.shift(-1.0);
        assert_eq!(window.loads().collect::<Vec<_>>(), [3.0; 6]);
        window.shift(-9.0);
        assert_eq!(window.loads().collect::<Vec<_>>(), [0.0; 6]);
    }
}
