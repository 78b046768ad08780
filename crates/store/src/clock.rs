//! The clock for leases: CLOCK_BOOTTIME, which continues while the host is suspended and is never
//! set.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where a voter reads the time for leases.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum Clock {
    /// [`boottime`].
    #[default]
    Boottime,
    /// Of a simulated host: the time of the runtime since `begun`, at another rate.
    #[cfg(test)]
    Simulated {
        begun: tokio::time::Instant,
        rate: f64,
    },
}

impl Clock {
    pub(crate) fn now(self) -> Duration {
        match self {
            Clock::Boottime => boottime(),
            #[cfg(test)]
            Clock::Simulated { begun, rate } => {
                // Not zero: so long ago nobody had looked at any deadline.
                Duration::from_secs(60) + begun.elapsed().mul_f64(rate)
            }
        }
    }
}

/// Time since the host booted, suspended time included.
pub fn boottime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Neither field of a time since boot is negative.
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// Identifies this boot of this host, and so what [`boottime`] counts from; empty if unknown.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Wall-clock time in milliseconds since 1970. Only for the expiry of tokens
/// and for showing to people.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX))
}
