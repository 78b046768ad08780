//! The clock of the system.

use crate::failure::Failure;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The answer to `guest-get-time`: nanoseconds since 1970-01-01 UTC.
///
/// # Errors
/// If the clock is before that.
pub(crate) fn time() -> Result<Value, Failure> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(json!(i64::try_from(time.as_nanos())?))
}

/// Sets the clock, in nanoseconds since 1970-01-01 UTC, and has the hardware clock follow, if there is
/// the program for it.
///
/// # Errors
/// If it is before 1970, or the agent has no right to.
pub(crate) fn set(nanoseconds: i64) -> Result<(), Failure> {
    let time = Duration::from_nanos(u64::try_from(nanoseconds)?);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(time))?;
    // It waits for a whole second: the host does not.
    let mut hardware = Command::new("hwclock");
    hardware.arg("--systohc").stdin(Stdio::null());
    let hardware = hardware.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    if let Ok(mut hardware) = hardware {
        let thread = std::thread::Builder::new().name("hwclock".into());
        // Without a thread it stays a process that has ended until the agent does.
        let _ = thread.spawn(move || hardware.wait());
    }
    Ok(())
}
