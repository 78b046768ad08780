//! Limits on table entries of a machine: per table, and in total.
//!
//! Every thread's instance has its own tables, so their total depends on the number of threads. The
//! initial entries of an instance count when its thread starts, growth counts when it happens.
//! Beyond the limit no thread starts (`thread-spawn` fails), and `table.grow` returns -1. Entries
//! that a capture adds to the references table do not count: the limits of frames bound them
//! ([`super::frame::FRAME_BYTES_MAX`]).

use super::program::ProgramError;
use crate::instrument::meta::{REFS_ENTRIES_MAX, TABLE_ENTRIES_MAX};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use wasmparser::{Parser, Payload};
use wasmtime::ResourceLimiter;

/// Maximum table entries of a machine, over all its threads: 256 MiB, beside the limit of its
/// memories. (The function directory is a table like others.)
pub const TABLES_ENTRIES_MAX: u64 = 32 << 20;

/// Table entries of one machine in use and available.
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
    /// A budget of `limit` entries.
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

/// A share of a budget; returned when dropped.
#[derive(Debug)]
pub(super) struct TableShare {
    budget: Arc<TableBudget>,
    entries: u64,
}

impl TableShare {
    pub(super) fn new(budget: Arc<TableBudget>) -> Self {
        TableShare { budget, entries: 0 }
    }

    /// Takes more entries; false if not available.
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

    /// Takes more entries even beyond the limit: for a thread that had them at another part.
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

/// Why tables of an instance grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// Instantiation: counted with its thread.
    Start,
    /// Restoring a captured thread.
    Load,
    Code,
}

/// Limits the tables of one instance.
#[derive(Debug)]
pub(crate) struct TableLimits {
    growth: TableShare,
    cause: Cause,
    is_instrumented: bool,
}

impl TableLimits {
    /// For a new instance.
    pub(super) fn new(budget: Arc<TableBudget>) -> Self {
        TableLimits {
            growth: TableShare::new(budget),
            cause: Cause::Start,
            is_instrumented: true,
        }
    }

    /// For an instance of an original module; all of its tables count.
    pub(super) fn plain(budget: Arc<TableBudget>) -> Self {
        TableLimits {
            cause: Cause::Code,
            is_instrumented: false,
            ..TableLimits::new(budget)
        }
    }

    /// Starts counting growth; `loads` while a thread's state is restored that counted before.
    pub(super) fn count(&mut self, loads: bool) {
        self.cause = if loads { Cause::Load } else { Cause::Code };
    }

    /// The instance's thread switches to another instance.
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
        // (Memories are limited elsewhere.)
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if self.is_instrumented && maximum == Some(REFS_ENTRIES_MAX as usize) {
            // The references table: lowering ensures that no guest table declares this maximum.
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

/// Initial table entries of an instance, without the references table of an instrumented module.
///
/// # Errors
/// [`ProgramError::Tables`] beyond the limit of a machine. (A module that is malformed before its
/// tables counts as without tables, and is refused elsewhere.)
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
