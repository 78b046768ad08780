//! Runs the nemesis for some minutes; see `keel_testkit::nemesis`. Started by
//! `cargo xtask nemesis`.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::Parser;
use keel_testkit::nemesis::{Nemesis, WITHOUT};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Injects faults at random while machines move.
#[derive(Parser)]
struct Args {
    /// The `keel` binary, built with failpoints.
    #[arg(long)]
    keel: PathBuf,
    /// The guest.
    #[arg(long)]
    witness: PathBuf,
    /// Minutes in all.
    #[arg(long)]
    minutes: u64,
    /// Minutes that earlier runs have completed.
    #[arg(long, default_value_t = 0.0)]
    done: f64,
    /// Seed of the random choices.
    #[arg(long)]
    seed: u64,
    /// Faults that are left out, because what they need is missing here.
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(WITHOUT))]
    without: Vec<String>,
    /// File that records the elapsed minutes after each round.
    #[arg(long)]
    note: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    match runtime
        .context("no runtime")
        .and_then(|it| it.block_on(run(&args)))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nemesis, seed {}: {error:#}", args.seed);
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("keel-nemesis-").tempdir()?;
    let begun = Instant::now();
    let end = Duration::from_secs(args.minutes * 60).saturating_sub(minutes(args.done));
    let without = args.without.clone();
    let mut nemesis =
        Nemesis::start(&args.keel, &args.witness, folder.path(), without, args.seed).await?;
    while begun.elapsed() < end {
        match nemesis.round().await {
            Ok(what) => println!("{:>6.1} s  {what}", begun.elapsed().as_secs_f64()),
            Err(error) => {
                // The nodes' logs are kept for diagnosis.
                nemesis.keep_disks();
                let kept = folder.keep();
                println!("{}", nemesis.tally);
                return Err(error.context(format!("all of it is kept in {}", kept.display())));
            }
        }
        let done = args.done + begun.elapsed().as_secs_f64() / 60.0;
        std::fs::write(&args.note, format!("{done:.3} {}\n", args.seed))?;
    }
    println!("{}", nemesis.tally);
    nemesis.wait_rotated().await
}

fn minutes(minutes: f64) -> Duration {
    Duration::try_from_secs_f64(minutes * 60.0).unwrap_or_default()
}
