//! What a machine's spec promises, which may count instead of what is measured.

use keel_balance::load::{Capacity, Factors};
use keel_balance::policy::Basis;
use keel_machine::spec::{BalanceBy, Balancing};

/// Most disk traffic that a machine may promise, in bytes a second.
pub(crate) const IO_TARGET_MAX: u64 = 1 << 40;

/// A machine's load as it counts: what it promises, where that is wanted. Memory that
/// it occupies beyond its promise is occupied all the same.
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
