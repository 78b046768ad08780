//! The process that compiles one program into the node's cache, and the contents of the cache.

use super::compilations::{Code, Job};
use crate::context::Context;
use crate::images::Images;
use crate::processes::{own_image, spawn};
use keel_net::Fingerprint;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::watch;

/// How long fetching a module may take.
const FETCH_PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of what a process said that are part of an error.
const SAID_MAX: usize = 4096;

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
    let mut command = tokio::process::Command::new(own_image());
    command
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
        .kill_on_drop(true);
    let mut child = spawn(command)
        .await
        .map_err(|error| format!("the compiling process cannot be started: {error}"))?;
    let mut stdin = child.stdin.take();
    // Read all the time: a process that says much would wait for a reader, with the program's lock.
    let said = child
        .stderr
        .take()
        .map(|stderr| tokio::spawn(last_said(stderr)));
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
    let status = child
        .wait()
        .await
        .map_err(|error| format!("the compiling process: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let said = match said {
        Some(said) => said.await.unwrap_or_default(),
        None => String::new(),
    };
    Err(format!(
        "the compiling process ended with {status}: {}",
        said.trim()
    ))
}

/// The last lines that a process writes until it ends, up to [`SAID_MAX`] bytes.
async fn last_said(mut stderr: impl AsyncRead + Unpin) -> String {
    let mut said = Vec::new();
    // Once it cannot be read, nothing more is said.
    while let Ok(1..) = stderr.read_buf(&mut said).await {
        let over = said.len().saturating_sub(SAID_MAX);
        said.drain(..over);
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn much_that_is_said_is_read_to_its_end() {
        let (mut process, stderr) = tokio::io::duplex(64);
        let said = tokio::spawn(last_said(stderr));
        process.write_all(&vec![b'x'; 9 * SAID_MAX]).await.unwrap();
        process.write_all(b"\nno memory").await.unwrap();
        drop(process);
        let said = said.await.unwrap();
        assert!(said.ends_with("x\nno memory"), "{said}");
        assert_eq!(said.len(), SAID_MAX);
    }
}
