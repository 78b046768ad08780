//! Decoders of what others than this worker wrote, for fuzzing.

use crate::balloon;
use crate::checkpoint::{is_memory_stream, is_system_state};
use crate::guest_agent;
use crate::migration_status::Info;
use crate::qmp::is_conversation;
use crate::spec::QemuSpec;
use serde::Deserialize;

/// Whether bytes are lines that QEMU may send, or what a system may tell of its memory. QEMU's answers
/// are decoded as the status of a migration.
pub fn is_from_qemu(bytes: &[u8]) -> bool {
    balloon::is_told(bytes)
        || is_conversation(bytes, |answer| {
            // Not every answer is one.
            if let Ok(info) = Info::deserialize(answer) {
                let _ = info.check();
            }
        })
}

/// Whether bytes are an answer that an agent in a guest may give.
pub fn is_from_guest_agent(bytes: &[u8]) -> bool {
    guest_agent::is_answer(bytes)
}

/// Whether bytes are this kind's part of a spec, with values that a machine may have.
pub fn is_spec(bytes: &[u8]) -> bool {
    let spec = serde_json::from_slice::<QemuSpec>(bytes);
    spec.is_ok_and(|spec| spec.check().is_ok())
}

/// Whether bytes are what a checkpoint may have of a system: the state of its devices, or QEMU's copy
/// of its memory.
pub fn is_from_checkpoint(bytes: &[u8]) -> bool {
    is_system_state(bytes) || is_memory_stream(bytes)
}
