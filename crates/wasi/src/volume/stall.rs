//! Guests that wait because the host's disk is full or a volume's backend is unavailable, for
//! display to users.

use crate::abi::{Result, interrupted};
use crate::lock::locked;
use crate::wait::{Interrupt, wait};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

/// Retry interval of a wait for disk space.
pub const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Current waits for disk space by path, or for other reasons in a sentence. A path stays until
/// something is written there, also over interruptions.
#[derive(Default)]
pub struct Stalls {
    full: Mutex<BTreeMap<String, String>>,
    changed: Option<Box<dyn Fn(Option<String>) + Send + Sync>>,
}

impl std::fmt::Debug for Stalls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Stalls").field(&self.full).finish()
    }
}

impl Stalls {
    /// Calls `changed` when the first wait starts, with its path or reason, and when no wait is
    /// left.
    pub fn new(changed: impl Fn(Option<String>) + Send + Sync + 'static) -> Self {
        Self {
            full: Mutex::default(),
            changed: Some(Box::new(changed)),
        }
    }

    /// Path or reason of a wait; `None` if nothing waits.
    pub fn full(&self) -> Option<String> {
        locked(&self.full).values().next().cloned()
    }

    /// Waits for one retry interval after a failed write at `path`, or until `interrupt` is
    /// requested.
    ///
    /// # Errors
    /// The call is interrupted, to be repeated.
    pub(crate) fn wait(&self, path: &str, interrupt: &dyn Interrupt) -> Result<()> {
        if self.wait_briefly(path, interrupt) {
            Ok(())
        } else {
            Err(interrupted())
        }
    }

    /// Waits for one retry interval after a failed write at `path`. False if `interrupt` was
    /// requested: the write must be repeated later.
    pub fn wait_briefly(&self, path: &str, interrupt: &dyn Interrupt) -> bool {
        self.begin(path, path);
        self.pause(interrupt)
    }

    /// As [`Self::wait`], for another reason. The wait counts until something is written at `path`.
    pub(crate) fn wait_with_reason(
        &self,
        path: &str,
        reason: &str,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        self.begin(path, reason);
        if self.pause(interrupt) {
            Ok(())
        } else {
            Err(interrupted())
        }
    }

    /// Starts a wait that lasts until [`Self::written`]: for space at `path`, or for the reason.
    pub fn begin(&self, path: &str, reason: &str) {
        let news = {
            let mut full = locked(&self.full);
            let before = full.values().next().cloned();
            full.insert(path.to_owned(), reason.to_owned());
            let now = full.values().next().cloned();
            now.filter(|now| before.as_ref() != Some(now))
        };
        if let Some(reason) = news {
            tracing::warn!(reason, "the machine waits for disk space or for a backend");
            self.tell(Some(reason));
        }
    }

    fn pause(&self, interrupt: &dyn Interrupt) -> bool {
        if interrupt.requested() {
            return false;
        }
        let timeout = u64::try_from(RETRY_AFTER.as_nanos()).unwrap_or(u64::MAX);
        match wait(&[], Some(timeout), interrupt.wakeup()) {
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "waiting for room");
                std::thread::sleep(RETRY_AFTER);
            }
        }
        !interrupt.requested()
    }

    /// Ends the wait at `path`.
    pub fn written(&self, path: &str) {
        let last = {
            let mut full = locked(&self.full);
            // The common case.
            if full.is_empty() {
                return;
            }
            full.remove(path).is_some() && full.is_empty()
        };
        if last {
            tracing::info!(path, "the wait is over");
            self.tell(None);
        }
    }

    fn tell(&self, full: Option<String>) {
        if let Some(changed) = &self.changed {
            changed(full);
        }
    }
}

/// Whether an error means that the disk is full.
pub fn is_disk_full(error: &std::io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOSPC | Errno::DQUOT)
    )
}
