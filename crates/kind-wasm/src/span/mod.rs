//! One part of a machine that spans: its pages, its threads, and its connections to the
//! other parts.
//!
//! `keel_wasm::coherence` decides which part may hold which page; this module carries
//! that out. It does not use the async runtime: one thread serves page faults and reads
//! the connections of all other parts, and one thread per part writes what its socket
//! could not take at once.
//!
//! - `messages`: what parts tell each other about pages, besides the coherence protocol
//! - `wire`: the encoding of all messages between parts
//! - `peer`: the connections to another part
//! - `mesh`: connection set-up among all parts
//! - `pages`: the part's pages
//! - `eviction`: which pages a part evicts when it exceeds its limit
//! - `idle_pages`: detection of memory that is not accessed
//! - `false_sharing`: pages that threads repeatedly wait for, and whether parts share
//!   bytes or only the page
//! - `prefetch`: pages requested before a thread accesses them
//! - `home_and_member`: a machine that spans, at its home and at its members
//! - `membership`: adding and removing parts
//! - `home_migration`: moving the home to another part
//! - `in_process`: all parts of a machine in one process
//! - `adaptive_polling`: whether to poll again or to sleep
//!
//! `docs/spanning.md` explains parts and their protocols.

mod adaptive_polling;
mod eviction;
mod false_sharing;
mod home_and_member;
mod home_migration;
mod idle_pages;
mod in_process;
mod membership;
mod mesh;
mod messages;
mod page_digests;
mod pages;
mod peer;
mod prefetch;
mod wire;

pub use false_sharing::{HotPage, Sharing};
pub use home_and_member::{Home, MemberPart, PartLimits, SpanConfig, SpanningError};
pub use home_migration::{HomeMigration, HomeState, ThreadLocation};
pub use idle_pages::IdleRange;
pub use in_process::{InProcess, InProcessError};
pub use keel_wasm::coherence::{PARTS_MAX, PartId, PartSet};
pub use keel_wasm::runtime::parts::SpawnPolicy;
pub use keel_wasm::runtime::{CoreTime, CpuUsage};
pub use mesh::{MeshError, MeshListener, PartAddress};
pub use messages::{CutMessage, CutPages, CutPiece, PartMemory, UnchangedPages};
pub(crate) use page_digests::{agrees, split_unchanged};
pub use pages::{
    BeginError, Cut, Heat, Latency, Listener, Notifier, Object, PART_BYTES_MIN, Pages, PartConfig,
    SpanError,
};
pub use peer::{Hello, PeerConnections, PeerError};

/// Reads the bytes of a connection between parts, a greeting and what follows, for fuzzing; whether
/// anything of it is a message.
#[doc(hidden)]
pub fn is_connection(bytes: &[u8]) -> bool {
    let mut messages = Vec::new();
    let mut reader = wire::FrameReader::default();
    if matches!(reader.feed_hello(bytes), Ok(Some(_))) {
        return reader.feed(&[], &mut messages).is_ok();
    }
    let mut reader = wire::FrameReader::default();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let fed = reader.feed(first, &mut messages);
    fed.and_then(|()| reader.feed(second, &mut messages))
        .is_ok()
        && !messages.is_empty()
}
