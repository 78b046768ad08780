//! Waits until a machine runs.

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use keel_api::{Client, ClientError, MachineInfo};
use std::time::Duration;

/// Pauses before the machine's state is queried again.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(2);
const ASK_AGAIN_MAX: Duration = Duration::from_millis(100);
/// The most consecutive queries without an answer: its node may be restarting.
const SILENCES_MAX: u32 = 100;

/// Waits until a scheduled machine runs, or has run. Shows the progress on a terminal if `shows`
/// is set.
///
/// # Errors
/// Why it does not run, and the remedy.
pub(crate) async fn started(
    client: &Client,
    scheduled: MachineInfo,
    shows: bool,
) -> Result<MachineInfo> {
    let path = keel_api::path(["machines", &scheduled.name]);
    let bar = shows.then(ProgressBar::new_spinner);
    if let Some(bar) = &bar {
        bar.enable_steady_tick(Duration::from_millis(100));
    }
    let mut pause = ASK_AGAIN_MIN;
    let mut machine = scheduled;
    let mut silences = 0;
    loop {
        if let Some(bar) = &bar {
            let line = machine.status_line();
            bar.set_message(format!("{} on {}: {line}", machine.name, machine.node));
        }
        if !machine.is_starting() {
            if let Some(bar) = &bar {
                bar.finish_and_clear();
            }
            return ran(machine);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(ASK_AGAIN_MAX);
        match client.get(&path).await {
            Ok(now) => (machine, silences) = (now, 0),
            // It ran, ended and was removed, as its spec asks.
            Err(ClientError::Problem { status: 404, .. }) if machine.remove_at_end => {
                return Ok(machine);
            }
            Err(error @ ClientError::Problem { status: ..500, .. }) => return Err(error.into()),
            Err(error) if silences == SILENCES_MAX => return Err(error.into()),
            Err(_) => silences += 1,
        }
    }
}

fn ran(machine: MachineInfo) -> Result<MachineInfo> {
    let has_run = machine.started_unix_ms > 0;
    match machine.status.as_str() {
        "stopped" if !has_run => bail!("machine {} was stopped before it ran", machine.name),
        "failed" => {}
        "restarting" if !has_run => {}
        _ => return Ok(machine),
    }
    bail!(
        "machine {} could not be started: {}{}",
        machine.name,
        machine.message.as_deref().unwrap_or("no reason is known"),
        match machine.is_live() {
            true => "; it will be retried".to_owned(),
            false => format!(" (`keel rm {}` frees its name)", machine.name),
        }
    )
}
