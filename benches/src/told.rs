//! Being told to end (SIGINT, SIGTERM): what was started is ended first. Machines
//! outlive whoever started them, so nobody else would.

use anyhow::{Result, bail};
use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// What does not end by itself until then is cut off.
const PATIENCE: Duration = Duration::from_secs(20);

static TOLD: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::channel(false).0);

/// Listens from now on.
///
/// # Errors
/// Where the host gives no thread or no signals.
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
            TOLD.send_replace(true);
            // (Told several times it is all the same: `timeout` does so.)
            std::thread::sleep(PATIENCE);
            std::process::exit(130);
        })?;
    Ok(())
}

/// For work that nothing interrupts: an error once it was told.
///
/// # Errors
/// That it was told.
pub(crate) fn check() -> Result<()> {
    if *TOLD.borrow() {
        bail!("told to end");
    }
    Ok(())
}

/// Does work, and drops it when it is told to end.
///
/// # Errors
/// The work's, and that it was told.
pub(crate) async fn until<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut told = TOLD.subscribe();
    tokio::select! {
        done = work => done,
        // (Its sender lives as long as the process.)
        _ = told.wait_for(|told| *told) => bail!("told to end"),
    }
}
