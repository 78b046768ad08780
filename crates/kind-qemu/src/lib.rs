//! Machines of kind `qemu`: whole Linux systems, each in a QEMU process beside its worker.
//!
//! ```text
//!   worker process                              qemu-system-x86_64
//!  ┌─────────────────────────────────┐         ┌──────────────────┐
//!  │ worker ──▶ vm ──▶ qmp ──────────┼── QMP ─▶│ guest            │
//!  │   log ◀── console ◀─────────────┼─────────│ serial console   │
//!  │ guest_agent ◀───────────────────┼─ port ─▶│ its agent        │
//!  │ session, migration ◀────────────┼─────────│ its state        │
//!  └──────────────┬──────────────────┘         └──────────────────┘
//!          TLS to the worker at the target
//! ```
//!
//! - `kind`: what an agent asks of this kind; `spec`: its part of a spec
//! - `worker`: the process around one machine; `session`: its moves, at the source; `checkpoint`: its
//!   checkpoints; `attempt`: what a failed one of either leaves
//! - `guest`: the parts of a machine that runs here
//! - `vm`: a machine's QEMU and its guest; `process`: its process; `arguments`: its command line;
//!   `qmp`: its protocol
//! - `migration`: QEMU's migration stream over the link between two workers; `migration_status`: how
//!   far it is; `copy_mode`: whether memory is copied in rounds
//! - `root_disk`: the disk that belongs to the machine alone; `disk_copy`: its way to the target of a
//!   move; `block_job`: QEMU's jobs that copy it; `relay`: bytes of a socket over a link
//! - `post_copy`: memory that follows a guest; `channel`: bytes between the QEMUs of a move
//! - `network`: tap devices on bridges of the node
//! - `console`: the serial console, which is the machine's output
//! - `display`: its screen, keyboard and pointer, for viewers
//! - `balloon`: memory that the guest gives back
//! - `guest_agent`: commands to the agent in the guest; `guest_system`: what it tells; `guest_clock`: the
//!   time of a restored guest
//! - `full_disk`: a guest whose disk has no room waits for it
//! - `decoders`: decoders of what comes from outside, for fuzzing
//! - `processor`: the features of a machine's processor; `host_offers`: what this host can give
//!   to systems; `bare_qemu`: questions to the host's QEMU; `accelerator`: whether the host's processor executes guests, or QEMU translates them
//!
//! The worker supervises QEMU: the kernel ends QEMU with it. So who may run a machine is decided
//! for workers alone, as for every kind.

#![deny(unsafe_code)]

mod accelerator;
mod arguments;
mod attempt;
mod balloon;
mod bare_qemu;
mod block_job;
mod channel;
mod checkpoint;
mod console;
mod copy_mode;
mod decoders;
mod disk_copy;
mod display;
mod full_disk;
mod guest;
mod guest_agent;
mod guest_clock;
mod guest_system;
mod host_offers;
mod kind;
mod migration;
mod migration_status;
mod network;
mod post_copy;
mod process;
mod processor;
mod qmp;
mod relay;
mod root_disk;
mod session;
mod spec;
mod vm;
mod worker;

pub use decoders::{is_from_checkpoint, is_from_guest_agent, is_from_qemu, is_spec};
pub use kind::QemuKind;
pub use processor::{Accelerator, CpuModel, Processor};
pub use root_disk::{ImageHeader, SIGNATURE_BYTES};
pub use spec::{
    CPUS_MAX, Disk, DiskFormat, Interface, Kernel, QemuSpec, ROOT_BYTES_MAX, RootDisk,
    SECTOR_BYTES, SHUTDOWN_S,
};
