//! Control groups of machines' workers: each worker is in a group of its own
//! where this user may make groups, so that the kernel bounds and counts each
//! machine by itself, and says which one ran out of memory.
//!
//! - `layout`: which hierarchies there are, and where this process is in them
//! - `slice`: the folder of a node's groups: made, swept, removed
//! - `group`: one worker's group: limit, counters, end
//! - `pressure`: for how long something of a group stood still
//! - `budget`: what the groups around this process let it use
//! - `priority`: whom the kernel ends first when the host has no memory left, and who
//!   goes first where processors are scarce
//!
//! Version 2, version 1 and the hybrid of both are supported. A group is a
//! folder in each hierarchy that is of use: where the `memory` controller is,
//! and the version 2 hierarchy, which counts CPU time without any controller.
//!
//! ```text
//!   the agent's group/                  (v2: its processes go to keel-agent/ when
//!     keel-agent/                        the kernel wants groups with controllers
//!     keel-HASH OF THE NODE'S FOLDER/    to be without processes)
//!       MACHINE.RANDOM/                  one worker
//! ```
//!
//! CPU time is counted, not bounded: a quota would slow the threads that move a
//! machine as well as the guest's, which `keel_wasm`'s governor holds alone.
//!
//! What a group is decides nothing about machines: without rights all works as
//! it does with them, less the bound, the counters and the name of the end.

mod budget;
mod group;
mod layout;
mod pressure;
mod priority;
mod slice;

pub use budget::Budget;
pub use group::{Group, GroupCounts, GroupUsage, OutOfMemory, memory_limit_bytes};
pub use layout::Layout;
pub use pressure::Pressure;
pub use priority::{
    CompilePriority, YieldPolicy, expose_worker_to_oom, guest_nice, protect_agent_from_oom,
    raise_priority, set_compile_priority, yield_compile_thread,
};
pub use slice::Slice;

/// Bytes for people.
fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..0x40_0000 => format!("{} KiB", bytes >> 10),
        0x40_0000..0x1_0000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}
