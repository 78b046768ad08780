//! Fuzz targets: every decoder that the network, a file or a guest module reaches, as a function of
//! bytes. None of them may panic, or take memory that the bytes do not justify.
//!
//! - `cargo xtask fuzz TARGET --minutes N` runs one under libFuzzer, with coverage feedback, from its
//!   seeds and its folder in `corpus`, and keeps in that folder what is to be tried for ever.
//! - `tests/corpus.rs` tries the seeds, the corpus, and damaged copies of both, in each test-suite.
//! - `cargo run -p keel-fuzz -- TARGET FILE…` tries single inputs.
//!
//! Where a checksum or a header precedes a body, the target takes the body and makes them, so that
//! damage gets past them.

mod formats;
mod messages;
mod modules;
mod types;

/// One decoder, or several alike.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its folder in `corpus`.
    pub name: &'static str,
    /// Tries bytes; whether they were accepted.
    pub run: fn(&[u8]) -> bool,
    /// Bytes to begin with; each of them is accepted.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All targets.
pub const TARGETS: &[Target] = &[
    formats::BACKUP,
    formats::KEY,
    formats::MANIFEST,
    formats::OUTPUT,
    formats::RECORDS,
    formats::SEGMENT,
    formats::TOKENS,
    messages::API,
    messages::FRAME,
    messages::GOSSIP,
    messages::GOSSIP_DATAGRAM,
    messages::MOVE,
    messages::PARTS,
    messages::RPC,
    modules::MODULE,
    modules::METADATA,
    modules::NETWORK,
    modules::THREAD,
    types::CLUSTER_TYPES,
    types::GUEST_AGENT,
    types::NODE_TYPES,
    types::PART_CONNECTION,
    types::QEMU,
    types::RPC_FRAMES,
    types::STORE_TYPES,
    types::USER_FILES,
];

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// The first byte, which chooses among `count` types, and the rest.
fn choice(data: &[u8], count: u8) -> Option<(u8, &[u8])> {
    let (first, rest) = data.split_first()?;
    Some((first % count, rest))
}
