//! Handles SIGINT and SIGTERM: ends child processes first, because machines outlive the process
//! that started them.

use anyhow::{Result, bail};
use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Time limit for an orderly end, after which the process exits.
const PATIENCE: Duration = Duration::from_secs(20);

static INTERRUPTED: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::channel(false).0);

/// Installs the signal handlers.
///
/// # Errors
/// If no thread can be started, or the handlers cannot be installed.
pub(crate) fn listen() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::Builder::new()
        .name("told".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            });
            INTERRUPTED.send_replace(true);
            // Further signals are ignored, since `timeout` sends several.
            std::thread::sleep(PATIENCE);
            std::process::exit(130);
        })?;
    Ok(())
}

/// For work without cancellation: an error after the first signal.
///
/// # Errors
/// That a signal was received.
pub(crate) fn check() -> Result<()> {
    if *INTERRUPTED.borrow() {
        bail!("interrupted by a signal");
    }
    Ok(())
}

/// Runs a future, and drops it at the first signal.
///
/// # Errors
/// The error of the future, or that a signal was received.
pub(crate) async fn until<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut told = INTERRUPTED.subscribe();
    tokio::select! {
        done = work => done,
        // Its sender lives as long as the process.
        _ = told.wait_for(|told| *told) => bail!("interrupted by a signal"),
    }
}
