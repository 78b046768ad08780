//! The code in which captured threads are resumed: the clones and loop versions of functions, compiled when
//! they are needed.
//!
//! A function whose clone and loop versions are small is compiled as one module. A large one, such as the
//! loop of an interpreter, has several *parts*: its clone, and each of its loop versions. And where a
//! part is not compiled yet, a thread need not wait for it:
//!
//! ```text
//!   frame at a point ──▶ part compiled? ──yes──▶ part
//!                            │ no
//!                            ▼
//!                        *entry module*: what this frame executes before it leaves for a loop
//!                            │ at the loop header, again
//!                            ▼
//!                        part of that loop, or entry module
//! ```
//!
//! An entry module is compiled in milliseconds, where the clone of an interpreter takes a quarter of a
//! second. It is not used where it is nearly as large as its part: the innermost loop of an interpreter
//! is all of it. A part is compiled in the background once one of its entries is used, so threads soon
//! stay in the part.

use super::lock::locked;
use super::program::{Program, ProgramError, lower_priority};
use crate::instrument::EntryModule;
use crate::instrument::meta::Meta;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use wasmtime::Module;

/// Size of a function's clone and loop versions, in bytes of WebAssembly, from which each is a part of
/// its own.
const LARGE_FUNCTION_BYTES: usize = 64 << 10;

/// The same from which its parts are compiled before a thread is captured: together about a quarter of a
/// second on one core.
const HUGE_FUNCTION_BYTES: usize = 256 << 10;

/// Size of a part from which a thread does not wait for it if it need not.
const LARGE_PART_BYTES: usize = 16 << 10;

/// An entry module is of use if it is smaller than its part by this factor.
const ENTRY_FACTOR: usize = 4;

/// Entry modules of a function, after which its parts are compiled instead: frames are resumed in it often.
const ENTRIES_MAX: usize = 16;

/// Which module the code of a frame is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CodeKey {
    /// Of a function, by its position in the metadata, a part.
    Part(usize, usize),
    /// The entry module of a point among all points of the module.
    Entry(u32),
}

/// Compiled once; an error is the same each time.
type Compiled<T> = OnceLock<Result<T, String>>;

/// The code of one function.
pub(super) struct FunctionCode {
    parts: Box<[Part]>,
    /// Position in the parts of each loop that has one, by the point at its header.
    loops: BTreeMap<u32, usize>,
    /// Entry modules by point, with the points at which they leave; `None` for those of no use.
    entries: Mutex<BTreeMap<u32, Arc<Compiled<Option<Entry>>>>>,
}

struct Part {
    /// Function index of the clone or the loop version; `None` for all in one.
    index: Option<u32>,
    bytes: usize,
    module: Compiled<Module>,
    /// A thread compiles it in the background, or has done so.
    is_begun: AtomicBool,
}

#[derive(Clone)]
struct Entry {
    module: Module,
    /// Points at which it leaves.
    next: BTreeSet<u32>,
}

impl FunctionCode {
    fn is_large(&self) -> bool {
        self.parts.first().is_some_and(|part| part.index.is_some())
    }

    /// The part that has a point.
    fn part_of(&self, point: u32) -> usize {
        self.loops.get(&point).copied().unwrap_or(0)
    }

    fn large_parts(&self) -> impl Iterator<Item = usize> {
        let parts = self.parts.iter().enumerate();
        parts.filter_map(|(at, part)| (part.bytes >= LARGE_PART_BYTES).then_some(at))
    }

    /// Bytes of machine code.
    pub(super) fn code_bytes(&self) -> usize {
        let parts = self.parts.iter().filter_map(|part| part.module.get());
        let parts = parts.filter_map(|module| module.as_ref().ok());
        let parts: usize = parts.map(|module| module.text().len()).sum();
        let entries = locked(&self.entries);
        let entries = entries.values().filter_map(|entry| entry.get());
        let entries = entries.filter_map(|entry| entry.as_ref().ok()?.as_ref());
        let entries = entries.map(|entry| entry.module.text().len());
        parts + entries.sum::<usize>()
    }
}

impl Program {
    /// Compiles the code for resuming threads that takes so long that no captured thread should wait for it.
    /// Best called well before a freeze, on a thread that may block: freezing calls it, and waits.
    ///
    /// # Errors
    /// [`ProgramError::Clone`], the same each time: threads cannot be resumed, so the program must
    /// not be captured.
    pub fn prepare_resume(&self) -> Result<(), ProgramError> {
        let layout = self.layout()?;
        let functions = self.meta().functions.iter().enumerate();
        let mut huge = functions.filter(|(_, it)| layout.clone_bytes(it) >= HUGE_FUNCTION_BYTES);
        huge.try_for_each(|(position, _)| {
            let code = self.function_code(position)?;
            self.compile_parts(position, code.large_parts())
        })
    }

    /// What a node has to compile so that threads can be resumed whose frames are at these points, for
    /// [`Self::prepare_stacks`]: the positions of their functions in the metadata; and for the points of
    /// large functions the number of all functions plus that of the point.
    ///
    /// # Errors
    /// [`ProgramError::Instrument`].
    pub fn stack_code(&self, points: &BTreeSet<u32>) -> Result<BTreeSet<u32>, ProgramError> {
        let functions = self.meta().functions.len() as u32;
        let mut numbers = BTreeSet::new();
        for point in points {
            let Some((position, ..)) = self.meta().point(*point) else {
                continue;
            };
            numbers.insert(position as u32);
            if self.function_code(position)?.is_large() {
                numbers.extend(functions.checked_add(*point));
            }
        }
        Ok(numbers)
    }

    /// Compiles what [`Self::stack_code`] says, before threads are resumed. Other numbers are ignored. Of a
    /// large function without points, as an older node names it, all large parts are compiled.
    ///
    /// # Errors
    /// [`ProgramError::Clone`].
    pub fn prepare_stacks(&self, numbers: &BTreeSet<u32>) -> Result<(), ProgramError> {
        let functions = self.meta().functions.len() as u32;
        let points = numbers.range(functions..).map(|number| number - functions);
        let points: BTreeSet<u32> = points.collect();
        let precise: BTreeSet<usize> = points
            .iter()
            .filter_map(|it| position(self.meta(), *it))
            .collect();
        for number in numbers.range(..functions) {
            let position = *number as usize;
            let code = self.function_code(position)?;
            match code.is_large() {
                false => self.compile_parts(position, 0..1)?,
                true if precise.contains(&position) => {}
                true => self.compile_parts(position, code.large_parts())?,
            }
        }
        points
            .iter()
            .try_for_each(|point| self.prepare_point(*point))
    }

    /// Compiles what a frame at a point needs at once: its part; or an entry module, and what is needed at
    /// the loops for which that leaves.
    ///
    /// # Errors
    /// [`ProgramError::Clone`].
    pub(super) fn prepare_point(&self, point: u32) -> Result<(), ProgramError> {
        let (mut known, mut left) = (BTreeSet::new(), vec![point]);
        while let Some(point) = left.pop() {
            let Some((position, function, _)) = self.meta().point(point) else {
                continue;
            };
            let code = self.function_code(position)?;
            let Some(entry) = self.entry(position, code, point)? else {
                let part = code.part_of(point - function.first_point);
                self.compile_parts(position, part..part + 1)?;
                continue;
            };
            let next = entry.next.into_iter().filter(|next| {
                let within = next.checked_sub(function.first_point);
                within.is_some_and(|within| code.loops.contains_key(&within))
            });
            left.extend(next.filter(|next| known.insert(*next)));
        }
        Ok(())
    }

    /// The code in which a frame at a point is resumed; compiles it if it is missing, or waits for
    /// the thread that compiles it. So it must not be called by a thread of rayon's pool: the compiler
    /// distributes its work there, and a thread that waits for that work may be given one that waits for
    /// the same code.
    ///
    /// # Errors
    /// [`ProgramError::Clone`], the same each time.
    pub(super) fn resume_code(
        self: &Arc<Self>,
        point: u32,
    ) -> Result<(CodeKey, Module), ProgramError> {
        let Some((position, function, _)) = self.meta().point(point) else {
            return Err(self.no_code(0, "a frame names no point".into()));
        };
        let code = self.function_code(position)?;
        let part = code.part_of(point - function.first_point);
        Ok(match self.entry(position, code, point)? {
            Some(entry) => {
                self.complete(position, part);
                (CodeKey::Entry(point), entry.module)
            }
            None => (
                CodeKey::Part(position, part),
                self.part(position, part)?.clone(),
            ),
        })
    }

    /// Lets a part be compiled, as threads come to its entries: behind an entry they leave for each loop.
    fn complete(self: &Arc<Self>, position: usize, part: usize) {
        let Ok(code) = self.function_code(position) else {
            return;
        };
        if self.only_entries() || code.parts[part].is_begun.swap(true, Ordering::Relaxed) {
            return;
        }
        let program = self.clone();
        let compile = move || {
            lower_priority(&program);
            if let Err(error) = program.part(position, part) {
                tracing::warn!(%error, "threads are slow at first each time they are resumed");
            }
        };
        let thread = std::thread::Builder::new().name("compile".into());
        if let Err(error) = thread.spawn(compile) {
            tracing::warn!(%error, "threads are slow at first each time they are resumed");
        }
    }

    /// The entry module of a point; `None` if its part is to be used.
    fn entry(
        &self,
        position: usize,
        code: &FunctionCode,
        point: u32,
    ) -> Result<Option<Entry>, ProgramError> {
        let function = &self.meta().functions[position];
        let within = point - function.first_point;
        let part = &code.parts[code.part_of(within)];
        let only_entries = self.only_entries();
        let Some(index) = part.index else {
            return Ok(None);
        };
        if part.module.get().is_some() || (part.bytes < LARGE_PART_BYTES && !only_entries) {
            return Ok(None);
        }
        let compiled = {
            let mut entries = locked(&code.entries);
            if entries.len() >= ENTRIES_MAX && !only_entries && !entries.contains_key(&point) {
                return Ok(None);
            }
            entries.entry(point).or_default().clone()
        };
        let entry = compiled.get_or_init(|| {
            let layout = self.layout().map_err(|error| error.to_string())?;
            let entry = layout.entry_module(self.bytes(), self.meta(), function, (within, index));
            let entry = entry.map_err(|error| error.to_string())?;
            let is_of_use =
                |entry: &EntryModule| only_entries || entry.bytes * ENTRY_FACTOR <= part.bytes;
            let Some(entry) = entry.filter(is_of_use) else {
                return Ok(None);
            };
            // (Not stored: it is compiled about as soon as it would be read.)
            let module = Module::new(self.wasmtime(), &entry.module);
            Ok(Some(Entry {
                module: module.map_err(|error| format!("{error:#}"))?,
                next: entry.next,
            }))
        });
        entry
            .clone()
            .map_err(|reason| self.no_code(position, reason))
    }

    /// Compiles parts of a function that are missing.
    fn compile_parts(
        &self,
        position: usize,
        parts: impl IntoIterator<Item = usize>,
    ) -> Result<(), ProgramError> {
        let mut parts = parts.into_iter();
        parts.try_for_each(|part| self.part(position, part).map(drop))
    }

    /// A part of a function, compiled if it is missing.
    fn part(&self, position: usize, part: usize) -> Result<&Module, ProgramError> {
        let function = &self.meta().functions[position];
        let code = self.function_code(position)?;
        let part = &code.parts[part];
        let compiled = part.module.get_or_init(|| {
            let name = match part.index {
                None => format!("{position}"),
                Some(index) => format!("{position}-{}", index - function.clone),
            };
            let extract = || {
                let layout = self.layout()?;
                Ok(match part.index {
                    None => layout.resume_module(self.bytes(), self.meta(), function)?,
                    Some(index) => {
                        layout.resume_part(self.bytes(), self.meta(), function, index)?
                    }
                })
            };
            self.compile_resume(&name, extract)
                .map_err(|error| error.to_string())
        });
        compiled
            .as_ref()
            .map_err(|reason| self.no_code(position, reason.clone()))
    }

    fn function_code(&self, position: usize) -> Result<&FunctionCode, ProgramError> {
        let known = self.resume_codes().get(position);
        let known = known.ok_or_else(|| self.no_code(0, "there is no such function".into()))?;
        if let Some(code) = known.get() {
            return Ok(code);
        }
        let code = self.new_function_code(position)?;
        Ok(known.get_or_init(|| code))
    }

    fn new_function_code(&self, position: usize) -> Result<FunctionCode, ProgramError> {
        let function = &self.meta().functions[position];
        let layout = self.layout()?;
        let bytes = layout.clone_bytes(function);
        let part = |index: Option<u32>, bytes| Part {
            index,
            bytes,
            module: OnceLock::new(),
            is_begun: AtomicBool::new(false),
        };
        let (mut parts, mut loops) = (Vec::new(), BTreeMap::new());
        if bytes < LARGE_FUNCTION_BYTES && !self.only_entries() {
            parts.push(part(None, bytes));
        } else {
            let index = function.clone;
            parts.push(part(Some(index), layout.body_bytes(index)));
            for (point, index) in layout.loop_versions(self.bytes(), function)? {
                loops.insert(point, parts.len());
                parts.push(part(Some(index), layout.body_bytes(index)));
            }
        }
        Ok(FunctionCode {
            parts: parts.into(),
            loops,
            entries: Mutex::default(),
        })
    }

    fn no_code(&self, position: usize, reason: String) -> ProgramError {
        let function = self.meta().functions.get(position);
        ProgramError::Clone {
            function: function.map_or_else(String::new, |it| self.meta().function_name(it.index)),
            reason,
        }
    }
}

fn position(meta: &Meta, point: u32) -> Option<usize> {
    meta.point(point).map(|(position, ..)| position)
}
