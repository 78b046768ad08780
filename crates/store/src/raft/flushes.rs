//! How far a voter's log is on its disk, and what follows from that for what a leader sends.
//!
//! A leader's disk works while those of its followers do (Raft thesis, section 10.2.1):
//!
//! - `openraft` sends an entry as soon as it is told that the entry is written. Where nothing can be
//!   committed without another voter, log.rs tells it at once ([`Flush::tell_early`]), and network.rs
//!   keeps back what the others answer until the entry is on this disk ([`Flushes::reached`]). So
//!   nothing is committed before the leader's own disk has it.
//! - A leader whose disk does not answer sends nothing ([`Flushes::prompt`]): the others elect one
//!   that can write.
//! - A leader that is restarted may have lost entries that others got from it. It does not lead on
//!   in its old term, in which it would give their numbers to different ones (`as_follower` in
//!   log.rs).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::storage::LogFlushed;
use tokio::sync::watch;
use tokio::time::Instant;

use super::types::Types;

/// A disk that takes longer than that for a write makes a leader silent. Others elect one 0.4 to
/// 0.7 s later, before any node's lease ends; a disk that is only busy delays no renewal of a lease.
const DISK_PATIENCE: Duration = Duration::from_millis(300);

/// What is on disk, and what is to come there. Clones share it.
#[derive(Clone)]
pub(super) struct Flushes(Arc<watch::Sender<Flushed>>);

struct Flushed {
    /// Entries before this index are on disk.
    end: u64,
    /// How many writes are not on disk yet.
    under_way: usize,
    /// Since when the disk works on the first of them.
    first_since: Instant,
    /// Why nothing more comes to the disk.
    failed: Option<String>,
}

/// Index of the entry after `last`.
fn after(last: Option<u64>) -> u64 {
    last.map_or(0, |last| last + 1)
}

impl Flushes {
    /// Of a log with entries to `last`.
    pub(super) fn new(last: Option<u64>) -> Self {
        Self(Arc::new(watch::Sender::new(Flushed {
            end: after(last),
            under_way: 0,
            first_since: Instant::now(),
            failed: None,
        })))
    }

    /// A write of entries to `last` begins; writes end in the order in which they begin.
    /// `callback` tells `openraft` of the end.
    pub(super) fn begin(&self, last: Option<u64>, callback: Option<LogFlushed<Types>>) -> Flush {
        self.0.send_modify(|flushed| {
            if flushed.under_way == 0 {
                flushed.first_since = Instant::now();
            }
            flushed.under_way += 1;
        });
        Flush {
            end: after(last),
            flushes: self.clone(),
            callback,
        }
    }

    /// Entries from `index` on were removed from the disk.
    pub(super) fn truncated(&self, index: u64) {
        self.0
            .send_modify(|flushed| flushed.end = flushed.end.min(index));
    }

    /// Entries to `last` are in the snapshot.
    pub(super) fn purged(&self, last: u64) {
        self.0
            .send_modify(|flushed| flushed.end = flushed.end.max(last + 1));
    }

    /// Why nothing more comes to the disk, if a write failed.
    pub(super) fn failed(&self) -> Option<String> {
        self.0.borrow().failed.clone()
    }

    /// Waits while the disk works on one write for longer than [`DISK_PATIENCE`].
    ///
    /// # Errors
    /// If a write failed.
    pub(super) async fn prompt(&self) -> io::Result<()> {
        self.wait(|flushed| !flushed.is_late()).await
    }

    /// Waits until entries to `last` are on disk.
    ///
    /// # Errors
    /// If they do not come there.
    pub(super) async fn reached(&self, last: Option<u64>) -> io::Result<()> {
        self.wait(|flushed| flushed.end >= after(last)).await
    }

    async fn wait(&self, mut done: impl FnMut(&Flushed) -> bool) -> io::Result<()> {
        let mut flushed = self.0.subscribe();
        let waited = flushed.wait_for(|it| it.failed.is_some() || done(it)).await;
        match &waited.map_err(io::Error::other)?.failed {
            Some(reason) => Err(io::Error::other(reason.clone())),
            None => Ok(()),
        }
    }
}

impl Flushed {
    fn is_late(&self) -> bool {
        self.under_way > 0 && self.first_since.elapsed() > DISK_PATIENCE
    }
}

/// A write under way.
pub(super) struct Flush {
    end: u64,
    flushes: Flushes,
    /// Tells `openraft`, unless that was told.
    callback: Option<LogFlushed<Types>>,
}

impl Flush {
    /// Tells `openraft` that the entries are written, before they are. Once a write has failed it
    /// is told the truth, and stops.
    pub(super) fn tell_early(&mut self) {
        if self.flushes.0.borrow().failed.is_none()
            && let Some(callback) = self.callback.take()
        {
            callback.log_io_completed(Ok(()));
        }
    }

    /// The write is on disk, or failed.
    pub(super) fn finish(self, result: Result<(), String>) {
        self.flushes.0.send_modify(|flushed| {
            flushed.under_way = flushed.under_way.saturating_sub(1);
            flushed.first_since = Instant::now();
            match &result {
                Ok(()) => flushed.end = flushed.end.max(self.end),
                Err(reason) => flushed.failed = Some(reason.clone()),
            }
        });
        if let Some(callback) = self.callback {
            callback.log_io_completed(result.map_err(io::Error::other));
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn is_reached(flushes: &Flushes, last: u64) -> bool {
        matches!(flushes.reached(Some(last)).now_or_never(), Some(Ok(())))
    }

    fn is_prompt(flushes: &Flushes) -> bool {
        matches!(flushes.prompt().now_or_never(), Some(Ok(())))
    }

    #[tokio::test]
    async fn answers_wait_for_the_disk() {
        let flushes = Flushes::new(Some(4));
        assert!(is_reached(&flushes, 4) && !is_reached(&flushes, 5));
        let first = flushes.begin(Some(5), None);
        let second = flushes.begin(Some(7), None);
        assert!(!is_reached(&flushes, 5));
        first.finish(Ok(()));
        assert!(is_reached(&flushes, 5) && !is_reached(&flushes, 6));
        let waits = tokio::spawn({
            let flushes = flushes.clone();
            async move { flushes.reached(Some(7)).await }
        });
        tokio::task::yield_now().await;
        second.finish(Ok(()));
        assert!(waits.await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn removed_entries_are_not_on_disk() {
        let flushes = Flushes::new(Some(9));
        flushes.truncated(6);
        assert!(is_reached(&flushes, 5) && !is_reached(&flushes, 6));
        flushes.begin(Some(6), None).finish(Ok(()));
        assert!(is_reached(&flushes, 6) && !is_reached(&flushes, 7));
        flushes.purged(20);
        assert!(is_reached(&flushes, 20) && !is_reached(&flushes, 21));
        assert!(!is_reached(&Flushes::new(None), 0));
    }

    #[tokio::test]
    async fn nothing_is_reached_after_a_failure() {
        let flushes = Flushes::new(None);
        let failing = flushes.begin(Some(0), None);
        let waits = flushes.reached(Some(0));
        failing.finish(Err("it is full".into()));
        assert_eq!(waits.await.unwrap_err().to_string(), "it is full");
        let error = flushes.prompt().await.unwrap_err();
        assert_eq!(error.to_string(), "it is full");
        assert_eq!(flushes.failed().as_deref(), Some("it is full"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_disk_is_noticed() {
        let flushes = Flushes::new(None);
        let moment = Duration::from_millis(1);
        tokio::time::advance(DISK_PATIENCE * 2).await;
        let first = flushes.begin(Some(0), None);
        tokio::time::advance(DISK_PATIENCE).await;
        let second = flushes.begin(Some(1), None);
        assert!(is_prompt(&flushes));
        tokio::time::advance(moment).await;
        assert!(!is_prompt(&flushes));
        first.finish(Ok(()));
        assert!(is_prompt(&flushes));
        tokio::time::advance(DISK_PATIENCE + moment).await;
        assert!(!is_prompt(&flushes));
        second.finish(Ok(()));
        assert!(is_prompt(&flushes));
    }

    /// Otherwise a disk that is just slow would make a busy leader silent for two writes at a time.
    #[tokio::test(start_paused = true)]
    async fn a_write_that_waits_for_another_is_not_slow() {
        let flushes = Flushes::new(None);
        let mut waiting = flushes.begin(Some(0), None);
        for index in 1..20 {
            let next = flushes.begin(Some(index), None);
            tokio::time::advance(DISK_PATIENCE * 9 / 10).await;
            assert!(is_prompt(&flushes));
            std::mem::replace(&mut waiting, next).finish(Ok(()));
            assert!(is_prompt(&flushes));
        }
    }
}
