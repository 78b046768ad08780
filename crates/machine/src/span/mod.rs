//! One part of a machine that spans: its pages, its threads, and its connections to the
//! others.
//!
//! `keel_wasm::coherence` decides who may have which page; here it is done. Nothing of
//! it runs on the async runtime: a thread serves faults and hears the other parts, and
//! one for each of these writes to it what cannot be written at once.
//!
//! - `wire`: what is said, byte by byte
//! - `peer`: the connections to another part
//! - `meet`: how parts find each other
//! - `pages`: the part's pages
//! - `keep`: which pages leave a part that has too many
//! - `idle`: which memory nobody uses
//! - `sharing`: which pages threads wait for again and again, and what parts share of them
//! - `ahead`: which pages are asked for before they are touched
//! - `threads`: a machine that spans, at its home and at its members
//! - `change`: parts that come and go
//! - `succession`: the home moves
//! - `within`: all parts of a machine in one process
//! - `spin`: whether to look again rather than to sleep

mod ahead;
mod change;
mod idle;
mod keep;
mod known;
mod meet;
mod pages;
mod peer;
mod sharing;
mod spin;
mod succession;
mod threads;
mod wire;
mod within;

pub use idle::IdleRange;
pub use keel_wasm::coherence::{PARTS_MAX, PartId, PartSet};
pub use keel_wasm::runtime::parts::SpawnPolicy;
pub use keel_wasm::runtime::{CoreTime, CpuUsage};
pub(crate) use known::{Known, sort as sort_by_known};
pub use meet::{MeetError, Meeting, Place};
pub use pages::{
    BeginError, Cut, CutPages, CutPiece, CutSame, CutWord, Heat, Latency, Listener, Object,
    PART_BYTES_MIN, Pages, PartMemory, Setup, SpanError, Teller,
};
pub use peer::{Ends, Hello, PeerError};
pub use sharing::{HotPage, Sharing};
pub use succession::{LeavingHome, Legacy, Whereabouts};
pub use threads::{Home, Keeps, MemberPart, SpanningError, Spread};
pub use within::{Within, WithinError};
