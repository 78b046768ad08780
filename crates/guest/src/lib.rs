//! Evenkeel's guest agent: a program in a whole system that carries out what its host asks for. It
//! speaks the protocol of the QEMU guest agent (docs/interop/qemu-ga-ref.rst of QEMU), of which it has
//! the commands that Evenkeel uses; so nodes ask either of them, and do not know which one answers.
//!
//! ```text
//!   node                          guest
//!   worker ── virtio serial ──▶ port ─▶ requests ─▶ commands ─▶ processes, system, clock, power
//! ```
//!
//! It is one file without libraries, on a disk that a system is given (`keel run
//! --install-guest-agent true`): [`install`] makes it a service of the system. What a host may ask for
//! is everything: it has the system's memory and disks.

#![forbid(unsafe_code)]

mod clock;
mod commands;
mod failure;
pub mod install;
pub mod port;
mod power;
mod processes;
mod programs;
mod requests;
mod system;

pub use commands::{Agent, is_request};
pub use requests::Requests;
