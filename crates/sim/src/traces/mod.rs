//! Readers of clusters and loads that others recorded.
//!
//! - [`ganeti`]: `hbal -t` and `-U`
//! - [`planetlab`]: CPU traces in CloudSim's folder format
//! - [`csv`]: columns of numbers

pub mod csv;
pub mod ganeti;
pub mod planetlab;

use std::sync::Arc;

/// Recorded demand of one machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    pub name: String,
    /// In the reader's unit.
    pub samples: Arc<[f32]>,
    /// Interval of the samples, in seconds.
    pub every_s: f64,
}
