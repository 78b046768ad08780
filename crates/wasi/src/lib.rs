//! WASI preview 1 for machines that are captured and moved while they run.
//!
//! All 46 functions, with the errno results of wasmtime 48 on Linux. The state differs: a
//! descriptor is not just a number of the host's kernel but plain data ([`Snapshot`]) from which it
//! can be reopened elsewhere; blocking calls can be interrupted before their effect and repeated
//! ([`Outcome::Interrupted`]); clocks and random streams continue after a move.
//!
//! | file | what it holds |
//! |---|---|
//! | `abi.rs` | types and trait generated from the witx; errno and trap |
//! | `function.rs` | the functions' names and signatures, dispatch |
//! | `call.rs` | the trait: checks arguments, hands on to the files below |
//! | `guest.rs` | copying between guest memory and bounce buffers |
//! | `outcome.rs` | result of a call; state of an interrupted one |
//! | `config.rs` | initial configuration of a machine |
//! | `state.rs` | the state, and its start |
//! | `root.rs` | preopened directories |
//! | `descriptor.rs` | descriptor table, rights |
//! | `file.rs` | `fd_*` on files and streams |
//! | `directory.rs` | `fd_readdir` |
//! | `listing.rs` | a directory's entries at one moment |
//! | `path.rs` | `path_*` |
//! | `unlinked_open.rs` | files removed while open; locating open files |
//! | `volume/` | file systems that move with their machine |
//! | `stream.rs` | standard input, output, error |
//! | `network/` | listeners and connections, whose bytes move with their machine |
//! | `socket.rs` | `sock_*` |
//! | `remote_call.rs` | calls executed at another node |
//! | `poll.rs` | `poll_oneoff` |
//! | `wait.rs` | interruptible waiting |
//! | `clock.rs`, `random.rs` | clocks and random streams that continue after a move |
//! | `snapshot.rs`, `restore.rs` | capturing and restoring the state |
//! | `lock.rs` | locks a mutex |
//! | `error.rs` | errors outside of guest calls |

#![forbid(unsafe_code)]

mod abi;
mod call;
mod clock;
mod config;
mod descriptor;
mod directory;
mod error;
mod file;
mod function;
mod guest;
mod host_access;
mod listing;
mod lock;
pub mod network;
mod outcome;
mod path;
mod poll;
mod random;
mod remote_call;
mod restore;
mod root;
mod snapshot;
mod snapshot_0;
mod socket;
mod state;
mod stream;
mod unlinked_open;
pub mod volume;
mod wait;

pub use abi::types::Errno;
pub use clock::{CausalClock, HostClock, SystemClock};
pub use config::{Config, Limits, Preopen, Source};
pub use error::Error;
pub use function::{Function, ParamType};
pub use host_access::{FileStat, Files};
pub use outcome::{CallState, Outcome};
pub use remote_call::{OutputTargets, PackedCall, pack};
pub use restore::Resources;
pub use snapshot::{
    ConnectionRecord, DescriptorKind, DescriptorRecord, DirectoryRecord, EntryRecord, FileRecord,
    HostPlace, ListenerRecord, Place, PreopenRecord, SNAPSHOT_VERSION, Snapshot, StdinRecord,
};
pub use state::Wasi;
pub use stream::{DiscardSink, FdSink, Input, MemorySink, Sink, SinkResult};
pub use wait::Interrupt;
pub use wiggle::GuestMemory;
