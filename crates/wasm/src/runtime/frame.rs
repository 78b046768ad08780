//! A captured thread as plain data: its frames, the pending operation, and the state of its
//! instance.
//!
//! # Format
//! `"KTHR"`, version (`u32`, [`meta::VERSION`]), hash of the instrumented
//! module (32 bytes), then [`ThreadState`] in postcard. Inside, a frame is a
//! point number, which the module's metadata turns into function, place and
//! slot types, and the slots' bytes, little-endian, in the metadata's order.
//! References to functions are indices, plus one; zero is null.

use crate::instrument::meta::{self, Meta, SlotType};
use serde::{Deserialize, Serialize};

/// First bytes of an encoded thread.
pub const MAGIC: [u8; 4] = *b"KTHR";

/// Maximum number of frames of a thread: a native frame is at least 16 bytes, so a thread that was
/// never captured has fewer on its stack. (A capture empties that stack, which therefore does not
/// limit the depth of a captured thread.)
pub const FRAMES_MAX: usize = super::program::STACK_BYTES / 16;
/// Maximum bytes of a thread's frames, including [`FRAME_OVERHEAD_BYTES`] for each: eight times its
/// native stack. A native frame holds each distinct value, so only frames full of copies and
/// constants, which native code does not store, need more.
pub const FRAME_BYTES_MAX: usize = (meta::SAVE_END - meta::SAVE) as usize;
/// Bytes per frame in addition to its slots; more than its header in the save area, which therefore
/// has room for all frames of a thread.
pub const FRAME_OVERHEAD_BYTES: usize = 48;

/// Whether frames are within the limits; otherwise the call stack is exhausted.
pub(crate) fn fits(frames: &[Frame]) -> bool {
    let bytes = |frame: &Frame| frame.payload.len() + FRAME_OVERHEAD_BYTES;
    frames.len() <= FRAMES_MAX && frames.iter().map(bytes).sum::<usize>() <= FRAME_BYTES_MAX
}

/// One activation of a function, saved at a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Number of the point among all points of the module.
    pub point: u32,
    /// The saved slots, as [`meta::Point::saved`] lists them.
    pub payload: Vec<u8>,
}

/// A WebAssembly value, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// `i32`
    I32(u32),
    /// `i64`
    I64(u64),
    /// `f32`
    F32(u32),
    /// `f64`
    F64(u64),
    /// `v128`
    V128(u128),
    /// `funcref`: function index plus one, or zero for null.
    FuncRef(u32),
}

impl Value {
    pub fn ty(self) -> SlotType {
        match self {
            Value::I32(_) => SlotType::I32,
            Value::I64(_) => SlotType::I64,
            Value::F32(_) => SlotType::F32,
            Value::F64(_) => SlotType::F64,
            Value::V128(_) => SlotType::V128,
            Value::FuncRef(_) => SlotType::FuncRef,
        }
    }

    /// Reads a value of a type from the start of `bytes`, which must be long enough.
    pub(crate) fn read(ty: SlotType, bytes: &[u8]) -> Value {
        let mut wide = [0; 16];
        let count = ty.bytes() as usize;
        wide[..count].copy_from_slice(&bytes[..count]);
        let bits = u128::from_le_bytes(wide);
        match ty {
            SlotType::I32 => Value::I32(bits as u32),
            SlotType::I64 => Value::I64(bits as u64),
            SlotType::F32 => Value::F32(bits as u32),
            SlotType::F64 => Value::F64(bits as u64),
            SlotType::V128 => Value::V128(bits),
            SlotType::FuncRef => Value::FuncRef(bits as u32),
        }
    }

    /// The bits, zero-extended.
    pub fn bits(self) -> u128 {
        match self {
            Value::I32(bits) | Value::F32(bits) | Value::FuncRef(bits) => bits.into(),
            Value::I64(bits) | Value::F64(bits) => bits.into(),
            Value::V128(bits) => bits,
        }
    }

    /// A value of a type from its low bits.
    pub fn from_bits(ty: SlotType, bits: u128) -> Value {
        Value::read(ty, &bits.to_le_bytes())
    }
}

/// Progress of an interrupted host call, needed to continue elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub enum Progress {
    /// Not started, or without state.
    #[default]
    Fresh,
    Wasi(keel_wasi::CallState),
    /// `memory.atomic.wait`: queued; this much of its time-out is left.
    Waiting {
        /// Nanoseconds; `None` for no limit.
        remaining_ns: Option<u64>,
    },
}

/// Pending operation of the innermost frame.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub enum Pending {
    /// None: it is at a poll.
    #[default]
    Nothing,
    Results(Vec<Value>),
    /// A host call without effect so far, to be repeated.
    Call {
        import: u32,
        args: Vec<u64>,
        progress: Progress,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ThreadState {
    /// Frames, outermost first.
    pub frames: Vec<Frame>,
    /// Pending operation of the last frame.
    pub pending: Pending,
    /// Which of the thread's entry functions is running: 0 for the first.
    pub stage: u32,
    /// Mutable globals in the metadata's order.
    pub globals: Vec<Value>,
    /// Contents of the mutable tables, in the metadata's order.
    pub tables: Vec<Vec<u32>>,
}

/// Why bytes are not a thread of this module.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Not an encoded thread at all.
    #[error("not a captured thread (it does not begin with \"KTHR\")")]
    Magic,
    #[error("captured with frame format {found}, this is format {expected}")]
    Version { found: u32, expected: u32 },
    /// Of another module.
    #[error("captured from module {found}, this is module {expected}")]
    Module { found: String, expected: String },
    /// Truncated or inconsistent.
    #[error("the captured thread is damaged: {0}")]
    Damaged(String),
}

fn damaged(what: impl Into<String>) -> FrameError {
    FrameError::Damaged(what.into())
}

impl ThreadState {
    pub fn encode(&self, module: &[u8; 32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.frames.len() * 64);
        bytes.extend(MAGIC);
        bytes.extend(meta::VERSION.to_le_bytes());
        bytes.extend(module);
        // Writing to memory does not fail.
        postcard::to_extend(self, bytes).unwrap_or_default()
    }

    /// Decodes the documented format, and checks that every frame fits the module.
    ///
    /// # Errors
    /// [`FrameError`], naming what does not fit.
    pub fn decode(bytes: &[u8], module: &[u8; 32], meta: &Meta) -> Result<Self, FrameError> {
        let Some((header, body)) = bytes.split_at_checked(40) else {
            return Err(if bytes.starts_with(&MAGIC) {
                damaged("it ends inside its header")
            } else {
                FrameError::Magic
            });
        };
        if header[..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        let version = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if version != meta::VERSION {
            return Err(FrameError::Version {
                found: version,
                expected: meta::VERSION,
            });
        }
        if header[8..] != module[..] {
            return Err(FrameError::Module {
                found: hex(&header[8..]),
                expected: hex(module),
            });
        }
        let (state, rest): (ThreadState, _) =
            postcard::take_from_bytes(body).map_err(|error| damaged(error.to_string()))?;
        if !rest.is_empty() {
            return Err(damaged("it has trailing bytes"));
        }
        state.check(meta)?;
        Ok(state)
    }

    /// Whether every part fits the module.
    ///
    /// # Errors
    /// [`FrameError::Damaged`].
    pub fn check(&self, meta: &Meta) -> Result<(), FrameError> {
        if !fits(&self.frames) {
            return Err(damaged(format!(
                "its {} frames are more than a thread may have",
                self.frames.len()
            )));
        }
        let directory = meta.directory.as_slice();
        let reference = |value: u32| value == 0 || directory.binary_search(&(value - 1)).is_ok();
        for frame in &self.frames {
            let (_, function, point) = meta
                .point(frame.point)
                .ok_or_else(|| damaged(format!("no point {}", frame.point)))?;
            let mut rest = frame.payload.as_slice();
            for slot in &point.saved {
                let ty = function.slots[*slot as usize];
                let (bytes, after) = rest
                    .split_at_checked(ty.bytes() as usize)
                    .ok_or_else(|| damaged("a frame is too short"))?;
                if let Value::FuncRef(index) = Value::read(ty, bytes)
                    && !reference(index)
                {
                    return Err(damaged(format!("reference to function {index}")));
                }
                rest = after;
            }
            if !rest.is_empty() {
                return Err(damaged("a frame is too long"));
            }
        }
        let types = |values: &[Value]| values.iter().map(|value| value.ty()).collect::<Vec<_>>();
        let globals: Vec<SlotType> = meta.globals.iter().map(|global| global.ty).collect();
        if types(&self.globals) != globals {
            return Err(damaged("its globals are not the module's"));
        }
        if self.tables.len() != meta.tables.len()
            || !self.tables.iter().flatten().all(|entry| reference(*entry))
        {
            return Err(damaged("its tables are not the module's"));
        }
        let values = match &self.pending {
            Pending::Results(values) => values.as_slice(),
            _ => &[],
        };
        for value in self.globals.iter().chain(values) {
            if let Value::FuncRef(index) = value
                && !reference(*index)
            {
                return Err(damaged(format!("reference to function {index}")));
            }
        }
        self.check_pending(meta)
    }

    /// Checks that the innermost frame can take the pending operation.
    fn check_pending(&self, meta: &Meta) -> Result<(), FrameError> {
        let given: Vec<SlotType> = match &self.pending {
            Pending::Nothing => Vec::new(),
            Pending::Results(values) => values.iter().map(|value| value.ty()).collect(),
            Pending::Call { import, args, .. } => {
                let import = meta
                    .imports
                    .get(*import as usize)
                    .ok_or_else(|| damaged("it waits for a function that is not imported"))?;
                if args.len() != import.params.len() {
                    return Err(damaged("a pending call has the wrong arguments"));
                }
                import.results.clone()
            }
        };
        let mut given = given;
        for frame in self.frames.iter().rev() {
            let Some((_, function, point)) = meta.point(frame.point) else {
                return Err(damaged("no such point"));
            };
            let wanted: Vec<SlotType> = point
                .results
                .iter()
                .map(|slot| function.slots[*slot as usize])
                .collect();
            if wanted != given {
                return Err(damaged("a frame expects other results than it gets"));
            }
            given.clone_from(&function.results);
        }
        Ok(())
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
