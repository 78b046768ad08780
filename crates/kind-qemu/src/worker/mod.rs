//! The worker process of a machine of this kind.
//!
//! - `qemu_worker`: supervises the machine's QEMU, and answers the agent
//! - `checkpoints`: makes checkpoints of the machine, and begins from one

mod checkpoints;
mod qemu_worker;

pub(crate) use qemu_worker::run;
