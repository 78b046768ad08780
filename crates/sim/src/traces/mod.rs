//! Readers of clusters and loads that others recorded.
//!
//! - [`ganeti`]: `hbal -t` and `-U`
//! - [`planetlab`]: CPU traces in CloudSim's folder format
//! - [`csv`]: columns of numbers

pub mod csv;
pub mod ganeti;
pub mod planetlab;

use std::sync::Arc;

/// One machine's demand as it was recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    pub name: String,
    /// Demand, in the reader's unit.
    pub samples: Arc<[f32]>,
    /// Seconds from one sample to the next.
    pub every_s: f64,
}
