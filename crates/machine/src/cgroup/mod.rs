//! Control groups of machines' workers: each worker has a group of its own where this
//! user may create groups, so that the kernel limits and accounts each machine separately
//! and reports which one ran out of memory.
//!
//! - `layout`: the hierarchies and this process's position in them
//! - `slice`: the folder of a node's groups: creation, cleanup, removal
//! - `group`: one worker's group: limit, counters, removal
//! - `cpu_limit`: limits of CPU time for the threads of a guest
//! - `pressure`: pressure stall information
//! - `budget`: limits of the groups around this process
//! - `priority`: order of OOM kills, and scheduling priorities
//!
//! Version 2, version 1 and the hybrid of both are supported. A group is a folder in each
//! hierarchy of use: the one with the `memory` controller, and the version 2 hierarchy,
//! which accounts CPU time without any controller.
//!
//! ```text
//!   the agent's group/                  (v2: its processes go to keel-agent/ when
//!     keel-agent/                        the kernel requires groups with controllers
//!     keel-HASH OF THE NODE'S FOLDER/    to have no processes)
//!       MACHINE.RANDOM/                  one worker
//! ```
//!
//! The CPU time of a worker is accounted, not limited: a quota would slow down the threads that
//! move a machine as well as the guest's. Those of a kind that cannot hold its guest back by
//! itself (as `keel_wasm`'s governor does) get a group of their own.
//!
//! Machines do not depend on groups: without the right to create them all works, except
//! for the limit, the counters and the reason of an OOM kill.

mod budget;
mod cpu_limit;
mod group;
mod layout;
mod pressure;
mod priority;
mod slice;

pub use budget::Budget;
pub use cpu_limit::lacks_for_cpu_limits;
pub use group::{Group, GroupCounts, GroupUsage, OutOfMemory, memory_limit_bytes};
pub use layout::Layout;
pub use pressure::Pressure;
pub use priority::{
    CompilePriority, YieldPolicy, expose_worker_to_oom, guest_nice, lock_agent_memory,
    protect_agent_from_oom, raise_priority, set_compile_priority, yield_compile_thread,
};
pub use slice::Slice;

/// Formats bytes for users.
fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..0x40_0000 => format!("{} KiB", bytes >> 10),
        0x40_0000..0x1_0000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}
