//! One part of a machine that spans: its pages, its threads, and its connections to the
//! others.
//!
//! `keel_wasm::coherence` decides who may have which page; here it is done. Nothing of
//! it runs on the async runtime: a thread serves faults and hears the other parts, and
//! one for each of these writes to it what cannot be written at once.
//!
//! - `wire`: what is said, byte by byte
//! - `peer`: the connections to another part
//! - `mesh`: how parts find each other
//! - `pages`: the part's pages
//! - `eviction`: which pages leave a part that has too many
//! - `idle_pages`: which memory nobody uses
//! - `false_sharing`: which pages threads wait for again and again, and what parts share of them
//! - `prefetch`: which pages are asked for before they are touched
//! - `threads`: a machine that spans, at its home and at its members
//! - `membership`: parts that come and go
//! - `home_migration`: the home moves
//! - `in_process`: all parts of a machine in one process
//! - `adaptive_polling`: whether to look again rather than to sleep

mod adaptive_polling;
mod eviction;
mod false_sharing;
mod home_migration;
mod idle_pages;
mod in_process;
mod membership;
mod mesh;
mod page_digests;
mod pages;
mod peer;
mod prefetch;
mod threads;
mod wire;

pub use false_sharing::{HotPage, Sharing};
pub use home_migration::{HomeMigration, HomeState, ThreadLocation};
pub use idle_pages::IdleRange;
pub use in_process::{InProcess, InProcessError};
pub use keel_wasm::coherence::{PARTS_MAX, PartId, PartSet};
pub use keel_wasm::runtime::parts::Spawning;
pub use keel_wasm::runtime::{CoreTime, Took};
pub use mesh::{MeshError, MeshListener, PartAddress};
pub(crate) use page_digests::{PageDigests, split_unchanged};
pub use pages::{
    BeginError, Cut, CutMessage, CutPages, CutPiece, Heat, Latency, Listener, Notifier, Object,
    PART_BYTES_MIN, Pages, PartConfig, PartMemory, SpanError, UnchangedPages,
};
pub use peer::{Hello, PeerConnections, PeerError};
pub use threads::{Home, MemberPart, PartLimits, SpanConfig, SpanningError};
