//! Post-copy: the machine runs at the target before all of its memory has arrived.
//!
//! ```text
//!   source                                            target
//!     │ REMOTE (pages that it keeps), image ────────────▶│
//!     │  commit in the store                            │
//!     │ REMOTE (pages written last), ROUND_END, GO ────▶│ runs; an access to such a page waits
//!     │ pages, in order ───────────────────────────────▶│ installed and mapped  (first connection)
//!     │◀──────────────────────────────────────── PULL ──│ a page that a thread waits for
//!     │ that page and the next ────────────────────────▶│                       (second connection)
//!     │ ALL_SENT ──────────────────────────────────────▶│
//!     │◀────────────────────────────────────── FILLED ──│ all pages have arrived
//! ```
//!
//! A page becomes visible to the guest only once its newest content is in place. The
//! target's file holds what earlier rounds copied, but the guest's mapping is empty at
//! first, so every first access is a minor or missing fault, and only this module
//! resolves those. The first copy of a page to arrive is installed; later copies are
//! older than what the guest may have written, and are dropped.
//!
//! Pages written last are named while the store commits. If the names do not arrive and
//! the move was committed, every page counts as named.
//!
//! When a connection is lost, threads that need a page wait and the others run on; the
//! source reconnects and is told which pages are still wanted. If the source is lost for
//! good, the agents decide: the machine cannot go on.
//!
//! - `page_set`: a set of pages, and its encoding as messages
//! - `target`: resolves faults, installs pages that arrive and requests those that threads wait for
//! - `source`: sends the pages that the target lacks

mod page_set;
mod source;
mod target;

pub(super) use page_set::PageSet;
pub(super) use source::serve;
pub(super) use target::PostCopyTarget;

use keel_machine::link::LinkError;
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard};

/// The nice value of background work relative to the guest's.
const BACKGROUND_NICE: i32 = 10;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

fn passed(name: &'static str) -> Result<(), LinkError> {
    keel_machine::failpoint::pass(name).map_err(|injected| LinkError::Aborted(injected.to_string()))
}

/// Lowers the thread's priority below that of guests.
fn lower_priority() {
    // On Linux this affects the thread.
    let guests = keel_machine::cgroup::guest_nice().map_or_else(
        || rustix::process::nice(BACKGROUND_NICE).map(drop),
        |guests| rustix::process::setpriority_process(None, guests + BACKGROUND_NICE),
    );
    if let Err(error) = guests {
        tracing::debug!(%error, "cannot lower the priority of the background transfer");
    }
}

fn shut(socket: Option<TcpStream>) {
    if let Some(socket) = socket {
        // The socket may be closed already.
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
}
