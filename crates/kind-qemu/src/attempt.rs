//! An attempt to move a machine, or to make a checkpoint of it, that fails: what it began in QEMU is
//! undone, and the guest runs on. Attempts of one machine follow each other, and each undoes what
//! earlier ones left ([`Vm::begin_attempt`]).

use crate::block_job::{BACKUP, COPY};
use crate::vm::Vm;
use keel_machine::worker::MoveError;
use std::sync::Arc;
use std::time::Duration;

/// Pause before something is tried again that QEMU did not do.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Ends what an attempt began, and lets the guest run on if nobody else does (`is_frozen`: whoever
/// settles a commit).
///
/// # Errors
/// If a later attempt has begun, or QEMU does not end it; it may yet.
pub(crate) fn undo(vm: &Vm, attempt: u64, is_frozen: bool) -> Result<(), MoveError> {
    vm.during(attempt, || {
        // Perhaps one of an attempt before, which could not end it any more.
        vm.cancel_migration()?;
        // The guest need not wait for the end of a job.
        let resumed = match is_frozen {
            true => Ok(()),
            // QEMU has stopped it itself if nothing was left.
            false => vm.resume(),
        };
        let ended = COPY.cancel(vm).and_then(|()| BACKUP.cancel(vm));
        Ok(resumed.and(ended)?)
    })
}

/// Repeats until done what could not be done at once, of an attempt from which nobody hears any
/// more: its guest may be stopped. The next attempt takes that over.
pub(crate) fn undo_later(vm: Arc<Vm>, attempt: u64, is_frozen: bool) {
    let thread = std::thread::Builder::new().name("undo".into());
    let repeats = move || {
        while vm.is_last_attempt(attempt)
            && vm.end_within(AGAIN_AFTER).is_none()
            && let Err(error) = undo(&vm, attempt, is_frozen)
        {
            tracing::warn!(%error, "a move or checkpoint that was given up is not undone yet");
        }
    };
    if let Err(error) = thread.spawn(repeats) {
        tracing::error!(%error, "a move or checkpoint that was given up is not undone");
    }
}
