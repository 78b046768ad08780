//! The end of the system, as its host asks for it.

use crate::failure::Failure;
use crate::programs::PATH;
use std::io;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The mode in which power is off afterwards.
pub(crate) const POWER_DOWN: &str = "powerdown";

/// By mode: the programs that do it, of which the first that there is is called: small systems have only
/// the latter. (To `shutdown` of System V, `-P` and `-H` only say how what `-h` asks for ends.)
const PROGRAMS: [(&str, [&[&str]; 2]); 3] = [
    (POWER_DOWN, [&["shutdown", "-h", "-P", "+0"], &["poweroff"]]),
    ("halt", [&["shutdown", "-h", "-H", "+0"], &["halt"]]),
    ("reboot", [&["shutdown", "-r", "+0"], &["reboot"]]),
];

/// How long it is watched whether a program fails.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked.
const POLL: Duration = Duration::from_millis(20);

/// Ends the system.
///
/// # Errors
/// If there is no such mode, or no program does it.
pub(crate) fn end(mode: &str) -> Result<(), Failure> {
    let mut modes = PROGRAMS.iter();
    let programs = modes.find(|(known, _)| *known == mode);
    let Some((_, programs)) = programs else {
        let reason = format!("{mode:?} is none of powerdown, halt and reboot");
        return Err(Failure::new(reason));
    };
    let mut missing = Vec::new();
    for words in programs {
        let (program, arguments) = words.split_first().ok_or("no program")?;
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", PATH);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        match command.stderr(Stdio::null()).spawn() {
            Ok(mut child) => {
                let deadline = Instant::now() + PATIENCE;
                while Instant::now() < deadline {
                    match child.try_wait()? {
                        Some(status) if status.success() => return Ok(()),
                        Some(status) => {
                            return Err(Failure::new(format!("{program} fails: {status}")));
                        }
                        None => sleep(POLL),
                    }
                }
                // The system ends, slowly.
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(*program),
            Err(error) => return Err(Failure::new(format!("{program}: {error}"))),
        }
    }
    let missing = missing.join(" nor ");
    Err(Failure::new(format!("the system has neither {missing}")))
}
