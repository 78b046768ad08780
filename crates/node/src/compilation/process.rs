//! The process that compiles one program into the node's cache, and the contents of the cache.

use super::compilations::{Code, Job};
use crate::context::Context;
use crate::images::Images;
use crate::processes::own_image;
use keel_net::Fingerprint;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::watch;

/// How long fetching a module may take.
const FETCH_PATIENCE: Duration = Duration::from_secs(300);

/// Programs in the cache of an earlier agent. Whether the code fits this host and engine is
/// checked when it is loaded.
pub(super) async fn compiled_before(context: &Context) -> Vec<Fingerprint> {
    let (folder, kinds) = (context.dir.cache(), context.kinds.clone());
    let listed = tokio::task::spawn_blocking(move || {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            kinds.program_of_code(&name)?.parse().ok()
        });
        names.collect()
    });
    // Then no program is ready: each is compiled, and found in the cache.
    listed.await.unwrap_or_default()
}

/// Compiles a program; returns when its code is in the cache. `wanted` is whether a move waits for
/// it.
pub(super) async fn compile(
    context: &Context,
    images: &Images,
    code: &Code,
    job: &Job,
    mut wanted: watch::Receiver<bool>,
) -> Result<(), String> {
    let found = images.find_program(&job.holder, &job.program);
    let path = tokio::time::timeout(FETCH_PATIENCE, found)
        .await
        .map_err(|_| format!("{} does not send its module", job.holder))??;
    let mut child = tokio::process::Command::new(own_image())
        .arg("compile")
        .arg("--kind")
        .arg(job.kind.as_str())
        .arg("--cache")
        .arg(context.dir.cache())
        .arg("--program")
        .arg(&path)
        .args(wanted.borrow_and_update().then_some("--wanted"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("the compiling process cannot be started: {error}"))?;
    let mut stdin = child.stdin.take();
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        loop {
            let line = tokio::select! {
                line = lines.next_line() => line,
                Ok(()) = wanted.changed() => {
                    // It may have ended.
                    if let Some(stdin) = &mut stdin {
                        let _ = stdin.write_all(b"wanted\n").await;
                    }
                    continue;
                }
            };
            let Ok(Some(line)) = line else { break };
            if let Ok(percent) = line.parse::<u8>()
                && let Some(current) = code.inner().current.get_mut(&job.program)
            {
                current.percent = percent.min(100);
            }
        }
    }
    let ended = child
        .wait_with_output()
        .await
        .map_err(|error| format!("the compiling process: {error}"))?;
    match ended.status.success() {
        true => Ok(()),
        false => Err(format!(
            "the compiling process ended with {}: {}",
            ended.status,
            String::from_utf8_lossy(&ended.stderr).trim()
        )),
    }
}
