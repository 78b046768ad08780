//! The clock of a system that goes on from a checkpoint: it would go on from the time of the checkpoint.
//! The guest's agent sets it to the time of this host.

use crate::guest::Guest;
use crate::guest_agent::{AgentError, GuestAgent};
use keel_machine::worker::control::Execute;
use keel_machine::worker::write_notice;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often an agent is asked that does not answer, or answers so late that the time is not right.
const ATTEMPTS: usize = 3;
/// Pause after a failure, in which others may ask it.
const PAUSE: Duration = Duration::from_secs(2);
/// By how much a clock may be behind because its agent took so long.
const LATE: Duration = Duration::from_millis(500);
/// How long `date` may take.
const DATE_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked for.
const DATE_POLL: Duration = Duration::from_millis(50);

/// Has the clock of a guest set that runs again. If that is not possible, its output says so.
///
/// # Errors
/// If no thread can be started.
pub(crate) fn set_after_restore(guest: Guest) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("clock".into());
    let set = move || {
        let set = match guest.vm.agent() {
            Some(agent) => set(agent, || guest.vm.has_ended()).map_err(|error| error.to_string()),
            None => Err("it has no port for a guest agent".into()),
        };
        if let Err(reason) = set
            && !guest.vm.has_ended()
        {
            let notice = format!("its clock goes on from the time of the checkpoint: {reason}");
            write_notice(&guest.log, &notice);
        }
    };
    thread.spawn(set).map(drop)
}

fn set(agent: &GuestAgent, has_ended: impl Fn() -> bool) -> Result<(), AgentError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let asked = Instant::now();
        let set = match agent.set_time(now()) {
            // An agent needs the program `hwclock` for it.
            Err(AgentError::Refused { .. }) => set_by_date(agent, now()),
            set => set,
        };
        let is_final = attempts >= ATTEMPTS || has_ended();
        match set {
            Ok(()) if asked.elapsed() < LATE || is_final => return Ok(()),
            Ok(()) => {}
            Err(error @ AgentError::Refused { .. }) => return Err(error),
            Err(error) if is_final => return Err(error),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Sets it with the program `date`, to whole seconds.
fn set_by_date(agent: &GuestAgent, now: Duration) -> Result<(), AgentError> {
    // Half a second is lost on average.
    let seconds = (now + Duration::from_millis(500)).as_secs();
    let command = "date";
    let number = agent.start_process(&Execute {
        command: command.into(),
        arguments: vec!["-u".into(), "-s".into(), format!("@{seconds}")],
        environment: Vec::new(),
        input: Vec::new(),
    })?;
    let deadline = Instant::now() + DATE_PATIENCE;
    loop {
        match agent.process_end(number)? {
            Some(end) if end.exit_code == Some(0) => return Ok(()),
            Some(end) => {
                let said = String::from_utf8_lossy(&end.error_output);
                let reason = said.trim().chars().take(200).collect();
                return Err(AgentError::Refused { command, reason });
            }
            None if Instant::now() < deadline => std::thread::sleep(DATE_POLL),
            None => {
                let reason = "it does not end".into();
                return Err(AgentError::Lost { command, reason });
            }
        }
    }
}

/// Since 1970-01-01 UTC.
fn now() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}
