//! How many entries the tables of a machine may have: each table, and all of them together.
//!
//! Every thread's instance has tables of its own, so what a module may have in tables is a
//! matter of threads, too. A thread is counted with the entries that its instance begins with
//! when it is started, and with what its tables grew by when they grow. Beyond the limit no
//! thread starts (`thread-spawn` fails), and `table.grow` returns -1. What a capture puts into
//! the references table is no guest's and is bounded by what frames may have
//! ([`super::frame::FRAME_BYTES_MAX`]).

use super::program::ProgramError;
use crate::instrument::meta::{REFS_ENTRIES_MAX, TABLE_ENTRIES_MAX};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use wasmparser::{Parser, Payload};
use wasmtime::ResourceLimiter;

/// The most entries of all tables of a machine, over all its threads: 256 MiB, beside its
/// memories' limit. (The directory of functions is a table like others.)
pub const TABLES_ENTRIES_MAX: u64 = 32 << 20;

/// Entries that the tables of one machine have, of those that they may have.
#[derive(Debug)]
pub struct TableBudget {
    limit: u64,
    used: AtomicU64,
}

impl Default for TableBudget {
    fn default() -> Self {
        TableBudget::of(TABLES_ENTRIES_MAX)
    }
}

impl TableBudget {
    /// So many entries, none of which are used.
    pub fn of(limit: u64) -> Self {
        TableBudget {
            limit,
            used: AtomicU64::new(0),
        }
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// What somebody has of a budget; given back when it is dropped.
#[derive(Debug)]
pub(super) struct TableShare {
    budget: Arc<TableBudget>,
    entries: u64,
}

impl TableShare {
    pub(super) fn new(budget: Arc<TableBudget>) -> Self {
        TableShare { budget, entries: 0 }
    }

    /// Takes so many entries more; false where there are not so many.
    pub(super) fn try_take(&mut self, entries: u64) -> bool {
        let taken = self
            .budget
            .used
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(entries)
                    .filter(|used| *used <= self.budget.limit)
            });
        self.entries += if taken.is_ok() { entries } else { 0 };
        taken.is_ok()
    }

    /// Takes so many entries more, also where there are not so many: of a thread that had
    /// them elsewhere.
    pub(super) fn take(&mut self, entries: u64) {
        self.budget.used.fetch_add(entries, Ordering::Relaxed);
        self.entries += entries;
    }

    fn give_back(&mut self) {
        self.budget.used.fetch_sub(self.entries, Ordering::Relaxed);
        self.entries = 0;
    }
}

impl Drop for TableShare {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// For what tables of an instance become larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// It is made: its thread was counted with that.
    Start,
    /// A captured thread's state is put into it.
    Load,
    Code,
}

/// Bounds the tables of one instance.
#[derive(Debug)]
pub(crate) struct TableLimits {
    growth: TableShare,
    cause: Cause,
    is_instrumented: bool,
}

impl TableLimits {
    /// Of an instance that is about to be made.
    pub(super) fn new(budget: Arc<TableBudget>) -> Self {
        TableLimits {
            growth: TableShare::new(budget),
            cause: Cause::Start,
            is_instrumented: true,
        }
    }

    /// Of an instance of a module as its author built it; all of its tables are counted.
    pub(super) fn plain(budget: Arc<TableBudget>) -> Self {
        TableLimits {
            cause: Cause::Code,
            is_instrumented: false,
            ..TableLimits::new(budget)
        }
    }

    /// From now on what tables grow by is counted; `loads` while it is that of a thread that
    /// had it before.
    pub(super) fn count(&mut self, loads: bool) {
        self.cause = if loads { Cause::Load } else { Cause::Code };
    }

    /// The instance's thread goes over into another one.
    pub(super) fn give_back(&mut self) {
        self.growth.give_back();
    }
}

impl ResourceLimiter for TableLimits {
    fn memory_growing(
        &mut self,
        _current: usize,
        _desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // (Memories have limits of their own.)
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if self.is_instrumented && maximum == Some(REFS_ENTRIES_MAX as usize) {
            // The references table: a guest's declares no such maximum once it is lowered.
            return Ok(true);
        }
        let more = desired.saturating_sub(current) as u64;
        Ok(desired as u64 <= TABLE_ENTRIES_MAX
            && match self.cause {
                Cause::Start => true,
                Cause::Load => {
                    self.growth.take(more);
                    true
                }
                Cause::Code => self.growth.try_take(more),
            })
    }
}

/// Entries that an instance of a module begins with, but for the references table of one that
/// was instrumented.
///
/// # Errors
/// [`ProgramError::Tables`] where that is more than a machine may have. (A module that is
/// damaged before its tables has none here, and is refused elsewhere.)
pub(super) fn initial_entries(module: &[u8], is_instrumented: bool) -> Result<u64, ProgramError> {
    let mut all = 0_u64;
    for payload in Parser::new(0).parse_all(module) {
        match payload {
            Ok(Payload::TableSection(section)) => {
                for table in section.into_iter().map_while(Result::ok) {
                    if is_instrumented && table.ty.maximum == Some(REFS_ENTRIES_MAX.into()) {
                        continue;
                    }
                    all = all.saturating_add(table.ty.initial);
                    if table.ty.initial > TABLE_ENTRIES_MAX || all > TABLES_ENTRIES_MAX {
                        return Err(ProgramError::Tables { entries: all });
                    }
                }
                break;
            }
            Ok(Payload::CodeSectionStart { .. }) | Err(_) => break,
            Ok(_) => {}
        }
    }
    Ok(all)
}
