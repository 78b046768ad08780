//! Remote execution of WASI calls: packed at the node of the guest's thread, executed at the node
//! with the machine's descriptors.
//!
//! ```text
//!   pack: arguments, guest memory ─▶ Packed ──▶ Wasi::call_packed ──▶ output
//!                                    Targets ◀──────────────────────────┘
//!                                       └─▶ guest memory
//! ```
//!
//! A packed call accesses no guest memory at its destination, so no page moves for it. Its pointers
//! refer to a buffer of its own: first the input, then single results, then the one output range of
//! which the call reports the used length.
//!
//! Only calls with identical semantics are packed: for an invalid pointer or too much data,
//! [`pack`] returns nothing, and the call runs with the guest's memory, which produces the usual
//! error. (Padding bytes of a structure become zero.)

use crate::function::Function;
use crate::guest::{BUFFERS_MAX, TRANSFER_BYTES_MAX};
use crate::outcome::{CallState, Outcome};
use crate::snapshot_0::{FILESTAT_BYTES, SUBSCRIPTION_BYTES};
use crate::state::Wasi;
use crate::wait::Interrupt;
use serde::{Deserialize, Serialize};
use wiggle::{GuestMemory, GuestPtr};

/// Maximum bytes of a packed call: one transfer plus its descriptors.
const BYTES_MAX: usize = TRANSFER_BYTES_MAX + (64 << 10);
/// Alignment of every value: that of the largest value of preview 1.
const ALIGN: usize = 8;
/// Bytes of an `iovec` or `ciovec`.
const IOVEC_BYTES: usize = 8;

/// Meaning of pointer parameters; numbers are indices of parameters.
#[derive(Debug, Clone, Copy)]
enum ParamRole {
    /// Input values of a fixed size.
    In(Values),
    /// An array of `ciovec`, with the buffers.
    Gather { at: usize, count: usize },
    /// An array of `iovec`, with the buffers, of which `used` bytes are filled.
    Scatter {
        at: usize,
        count: usize,
        used: usize,
    },
    /// A result of a fixed size.
    Out {
        at: usize,
        bytes: usize,
        align: usize,
    },
    /// Output values; `used` is the result with their number, or all are filled.
    Room { values: Values, used: Option<usize> },
}

#[derive(Debug, Clone, Copy)]
struct Values {
    at: usize,
    count: usize,
    bytes: usize,
    align: usize,
}

const fn bytes(at: usize, count: usize) -> Values {
    Values {
        at,
        count,
        bytes: 1,
        align: 1,
    }
}

const fn out(at: usize, bytes: usize) -> ParamRole {
    let align = if bytes < ALIGN { bytes } else { ALIGN };
    ParamRole::Out { at, bytes, align }
}

/// For a read: the number of its buffers follows their address.
const fn scatter(at: usize, used: usize) -> ParamRole {
    let count = at + 1;
    ParamRole::Scatter { at, count, used }
}

const fn room(values: Values, used: Option<usize>) -> ParamRole {
    ParamRole::Room { values, used }
}

const fn path(at: usize) -> ParamRole {
    ParamRole::In(bytes(at, at + 1))
}

/// For `poll_oneoff`: subscriptions of this size, and room for events.
const fn poll(subscription_bytes: usize) -> [ParamRole; 3] {
    let subscriptions = Values {
        at: 0,
        count: 2,
        bytes: subscription_bytes,
        align: 8,
    };
    let events = Values {
        at: 1,
        bytes: 32,
        ..subscriptions
    };
    [
        ParamRole::In(subscriptions),
        room(events, Some(3)),
        out(3, 4),
    ]
}

/// Meaning of a function's parameters; `None` for functions that are not packed: those without
/// pointers, and those whose output size is not known beforehand.
fn roles(function: Function) -> Option<&'static [ParamRole]> {
    use Function as F;
    Some(match function {
        F::ClockResGet => const { &[out(1, 8)] },
        F::ClockTimeGet => const { &[out(2, 8)] },
        F::FdFdstatGet => const { &[out(1, 24)] },
        F::FdFilestatGet => const { &[out(1, 64)] },
        F::FdSeek | F::FdSeek0 => const { &[out(3, 8)] },
        F::FdFilestatGet0 => const { &[out(1, FILESTAT_BYTES)] },
        F::FdTell => const { &[out(1, 8)] },
        F::FdRead => const { &[scatter(1, 3), out(3, 4)] },
        F::FdPread => const { &[scatter(1, 4), out(4, 4)] },
        F::FdWrite => const { &[ParamRole::Gather { at: 1, count: 2 }, out(3, 4)] },
        F::FdPwrite => const { &[ParamRole::Gather { at: 1, count: 2 }, out(4, 4)] },
        F::FdReaddir => const { &[room(bytes(1, 2), Some(4)), out(4, 4)] },
        F::PathCreateDirectory | F::PathRemoveDirectory | F::PathUnlinkFile => const { &[path(1)] },
        F::PathFilestatGet => const { &[path(2), out(4, 64)] },
        F::PathFilestatGet0 => const { &[path(2), out(4, FILESTAT_BYTES)] },
        F::PathFilestatSetTimes => const { &[path(2)] },
        F::PathLink => const { &[path(2), path(5)] },
        F::PathOpen => const { &[path(2), out(8, 4)] },
        F::PathReadlink => const { &[path(1), room(bytes(3, 4), Some(5)), out(5, 4)] },
        F::PathRename => const { &[path(1), path(4)] },
        F::PathSymlink => const { &[path(0), path(3)] },
        F::PollOneoff => const { &poll(48) },
        F::PollOneoff0 => const { &poll(SUBSCRIPTION_BYTES) },
        F::RandomGet => const { &[room(bytes(0, 1), None)] },
        F::SockAccept => const { &[out(2, 4)] },
        F::SockRecv => const { &[scatter(1, 4), out(4, 4), out(5, 2)] },
        F::SockSend => const { &[ParamRole::Gather { at: 1, count: 2 }, out(4, 4)] },
        _ => return None,
    })
}

/// A call with its input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedCall {
    /// Arguments of the core signature; pointers are offsets in the buffer.
    args: Vec<u64>,
    /// Input: the start of the buffer.
    #[serde(with = "serde_bytes")]
    input: Vec<u8>,
    /// Bytes of the buffer behind the input, all zero.
    output_bytes: u32,
}

/// Destinations of a packed call's output in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputTargets {
    /// Single results: address and length.
    results: Vec<(u32, u32)>,
    /// Pieces of the output range, in the order in which they are filled.
    ranges: Vec<(u32, u32)>,
}

/// Layout of the output in a call's buffer.
struct Layout {
    /// Single results: offset, length.
    results: Vec<(usize, usize)>,
    /// Offset and length of the output range.
    range: Option<(usize, usize)>,
    /// The result with the used number of values, and the size of one.
    used: Option<((usize, usize), usize)>,
}

fn number(args: &[u64], at: usize) -> u32 {
    // (The low 32 bits.)
    args.get(at).copied().unwrap_or(0) as u32
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// The bytes at an address, if it is aligned and the range is in memory.
fn read(memory: &GuestMemory<'_>, address: u32, bytes: usize, align: usize) -> Option<Vec<u8>> {
    let bytes = u32::try_from(bytes).ok()?;
    is_there(memory, address, bytes, align)?;
    memory
        .to_vec(GuestPtr::<u8>::new(address).as_array(bytes))
        .ok()
}

fn is_there(memory: &GuestMemory<'_>, address: u32, bytes: u32, align: usize) -> Option<()> {
    let is_aligned = (address as usize).is_multiple_of(align);
    let range = GuestPtr::<u8>::new(address).as_array(bytes);
    (is_aligned && memory.as_slice(range).is_ok()).then_some(())
}

/// The buffers of an array of `iovec`: address and length.
fn buffers(
    memory: &GuestMemory<'_>,
    args: &[u64],
    at: usize,
    count: usize,
) -> Option<Vec<(u32, u32)>> {
    let count = number(args, count) as usize;
    if count > BUFFERS_MAX {
        return None;
    }
    let array = read(memory, number(args, at), count * IOVEC_BYTES, 4)?;
    let words = array.chunks_exact(IOVEC_BYTES).map(|iovec| {
        let (address, length) = iovec.split_at(4);
        (word(address), word(length))
    });
    Some(words.collect())
}

fn word(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u32::from_le_bytes(word)
}

/// Packs a call with its input, and returns the destinations of its output; `None` for a call that
/// must run with the guest's memory.
pub fn pack(
    function: Function,
    args: &[u64],
    memory: &GuestMemory<'_>,
) -> Option<(PackedCall, OutputTargets)> {
    let roles = roles(function)?;
    if args.len() != function.params().len() {
        return None;
    }
    let mut packed = PackedCall {
        args: args.to_vec(),
        input: Vec::new(),
        output_bytes: 0,
    };
    // Input values, each aligned.
    let mut put = |bytes: &[u8]| {
        let at = packed.input.len();
        packed.input.extend_from_slice(bytes);
        packed.input.resize(padded(packed.input.len()), 0);
        (packed.input.len() <= BYTES_MAX).then_some(at)
    };
    let mut targets = OutputTargets {
        results: Vec::new(),
        ranges: Vec::new(),
    };
    // Offset of the array of a read's buffers.
    let mut array = None;
    for role in roles {
        match *role {
            ParamRole::In(values) => {
                let bytes = (number(args, values.count) as usize).checked_mul(values.bytes)?;
                if bytes > BYTES_MAX {
                    return None;
                }
                let bytes = read(memory, number(args, values.at), bytes, values.align)?;
                packed.args[values.at] = put(&bytes)? as u64;
            }
            ParamRole::Gather { at, count } => {
                let buffers = buffers(memory, args, at, count)?;
                let all: u64 = buffers.iter().map(|(_, length)| u64::from(*length)).sum();
                if all > TRANSFER_BYTES_MAX as u64 {
                    return None;
                }
                let mut iovecs = Vec::new();
                for (address, length) in buffers {
                    let bytes = read(memory, address, length as usize, 1)?;
                    let place = put(&bytes)? as u32;
                    iovecs.extend_from_slice(&place.to_le_bytes());
                    iovecs.extend_from_slice(&length.to_le_bytes());
                }
                packed.args[at] = put(&iovecs)? as u64;
            }
            ParamRole::Scatter { at, count, .. } => {
                let buffers = buffers(memory, args, at, count)?;
                for (address, length) in &buffers {
                    is_there(memory, *address, *length, 1)?;
                }
                let iovecs = vec![0; buffers.len() * IOVEC_BYTES];
                let place = put(&iovecs)?;
                packed.args[at] = place as u64;
                array = Some(place);
                targets.ranges = buffers;
            }
            ParamRole::Out { at, bytes, align } => {
                let address = number(args, at);
                is_there(memory, address, bytes as u32, align)?;
                targets.results.push((address, bytes as u32));
            }
            ParamRole::Room { values, .. } => {
                let bytes = (number(args, values.count) as usize).checked_mul(values.bytes)?;
                let (address, bytes) = (number(args, values.at), u32::try_from(bytes).ok()?);
                is_there(memory, address, bytes, values.align)?;
                targets.ranges = vec![(address, bytes)];
            }
        }
    }
    // Output: single results first.
    let mut at = packed.input.len();
    for role in roles {
        if let ParamRole::Out { at: arg, bytes, .. } = *role {
            packed.args[arg] = at as u64;
            at += padded(bytes);
        }
    }
    let room: u64 = targets
        .ranges
        .iter()
        .map(|(_, length)| u64::from(*length))
        .sum();
    if room > TRANSFER_BYTES_MAX as u64 {
        return None;
    }
    for role in roles {
        match *role {
            ParamRole::Room { values, .. } => packed.args[values.at] = at as u64,
            ParamRole::Scatter { .. } => {
                let mut place = array?;
                let mut start = at as u32;
                for (_, length) in &targets.ranges {
                    let iovec = packed.input.get_mut(place..place + IOVEC_BYTES)?;
                    iovec[..4].copy_from_slice(&start.to_le_bytes());
                    iovec[4..].copy_from_slice(&length.to_le_bytes());
                    start += length;
                    place += IOVEC_BYTES;
                }
            }
            _ => {}
        }
    }
    at += room as usize;
    packed.output_bytes = u32::try_from(at - packed.input.len()).ok()?;
    (at <= 2 * BYTES_MAX).then_some((packed, targets))
}

impl PackedCall {
    /// The layout of its output; `None` if the call is invalid.
    fn layout(&self, function: Function) -> Option<Layout> {
        let roles = roles(function)?;
        let end = self.input.len().checked_add(self.output_bytes as usize)?;
        if self.args.len() != function.params().len() || end > 2 * BYTES_MAX {
            return None;
        }
        let place = |at: usize, bytes: usize| {
            let start = number(&self.args, at) as usize;
            let is_inside = start >= self.input.len() && start.checked_add(bytes)? <= end;
            is_inside.then_some((start, bytes))
        };
        let mut layout = Layout {
            results: Vec::new(),
            range: None,
            used: None,
        };
        let mut rest = self.input.len();
        for role in roles {
            if let ParamRole::Out { at, bytes, .. } = *role {
                layout.results.push(place(at, bytes)?);
                rest += padded(bytes);
            }
        }
        for role in roles {
            let (used, each) = match *role {
                ParamRole::Scatter { used, .. } => (Some(used), 1),
                ParamRole::Room { values, used } => (used, values.bytes),
                _ => continue,
            };
            layout.range = Some((rest, end.checked_sub(rest)?));
            layout.used = match used {
                Some(used) => Some((place(used, 4)?, each)),
                None => None,
            };
        }
        Some(layout)
    }
}

impl Wasi {
    /// As [`Wasi::call`], for a packed call; also returns its output for [`OutputTargets::fill`],
    /// empty without output.
    pub fn call_packed(
        &self,
        function: Function,
        packed: &PackedCall,
        state: &mut CallState,
        tid: u32,
        interrupt: &dyn Interrupt,
    ) -> (Outcome, Vec<u8>) {
        let Some(layout) = packed.layout(function) else {
            let what = format!("invalid packed call of {}", function.name());
            return (Outcome::Trap(what), Vec::new());
        };
        // Aligned like guest memory.
        let size = packed.input.len() + packed.output_bytes as usize;
        let mut room = vec![0; size + ALIGN];
        let start = room.as_ptr().align_offset(ALIGN).min(ALIGN);
        let buffer = &mut room[start..start + size];
        buffer[..packed.input.len()].copy_from_slice(&packed.input);
        let mut memory = GuestMemory::Unshared(buffer);
        let outcome = self.call(function, &packed.args, &mut memory, state, tid, interrupt);
        let buffer = &room[start..start + size];
        let mut output = Vec::new();
        if outcome == Outcome::Done(0) {
            for (at, bytes) in layout.results {
                output.extend_from_slice(&buffer[at..at + bytes]);
            }
            if let Some((at, room)) = layout.range {
                let used = layout.used.map(|((at, bytes), each)| {
                    (word(&buffer[at..at + bytes]) as usize).saturating_mul(each)
                });
                output.extend_from_slice(&buffer[at..at + used.unwrap_or(room).min(room)]);
            }
        }
        (outcome, output)
    }
}

impl OutputTargets {
    /// Copies a call's output to guest memory.
    ///
    /// # Errors
    /// The reason for a trap of the guest's thread: the output does not belong to this call.
    pub fn fill(&self, output: &[u8], memory: &mut GuestMemory<'_>) -> Result<(), String> {
        if output.is_empty() {
            return Ok(());
        }
        let results: usize = self
            .results
            .iter()
            .map(|(_, length)| *length as usize)
            .sum();
        let (results, mut range) = output
            .split_at_checked(results)
            .ok_or("a call's output is too short")?;
        let mut put = |address: u32, bytes: &[u8]| {
            let length = u32::try_from(bytes.len()).map_err(|error| error.to_string())?;
            let target = GuestPtr::<u8>::new(address).as_array(length);
            memory
                .copy_from_slice(bytes, target)
                .map_err(|error| error.to_string())
        };
        // (In this order, as calls fill buffers before they store the count.)
        for (address, length) in &self.ranges {
            let (now, later) = range.split_at(range.len().min(*length as usize));
            put(*address, now)?;
            range = later;
        }
        if !range.is_empty() {
            return Err("a call's output is too long".into());
        }
        // (The last one first, as calls store them: two may overlap.)
        let mut rest = results;
        for (address, length) in self.results.iter().rev() {
            let at = rest.len().saturating_sub(*length as usize);
            let (earlier, now) = rest.split_at(at);
            put(*address, now)?;
            rest = earlier;
        }
        Ok(())
    }
}
