//! Target loads promised by specs, which may count instead of measurements.

use keel_balance::load::{Capacity, Factors};
use keel_balance::policy::Basis;
use keel_machine::spec::{BalanceBy, Balancing};

/// The highest promised disk traffic, in bytes a second.
pub(crate) const IO_TARGET_MAX: u64 = 1 << 40;

/// The load of a machine that counts: the promised one, if the policy says so. Memory that it
/// occupies beyond its promise counts as measured.
pub(super) fn promised(
    balancing: &Balancing,
    measured: Factors,
    capacity: &Capacity,
    basis: Basis,
) -> Factors {
    let by_target = match balancing.by {
        BalanceBy::Policy => basis == Basis::Target,
        BalanceBy::Target => true,
        BalanceBy::Actual | BalanceBy::Off => false,
    };
    if !by_target {
        return measured;
    }
    let mut counted = measured;
    if let Some(millis) = balancing.cpu_target_millis {
        counted.cpu_cores = f64::from(millis) / 1e3 / capacity.speed;
        counted.cpu_bound_cores = 0.0;
    }
    if let Some(bytes) = balancing.memory_target_bytes {
        counted.memory_bytes = measured.memory_bytes.max(bytes);
    }
    if let Some(rate) = balancing.io_target_bytes_per_s {
        counted.io_bytes_per_s = rate.min(IO_TARGET_MAX) as f64;
    }
    counted
}
