//! `keel`: the one binary of Evenkeel.
//!
//! - `wasm`: `keel wasm`, one program in the foreground, without a cluster
//! - `size`: sizes as people write them

mod size;
mod wasm;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// A self-balancing cluster of virtual machines.
#[derive(Parser)]
#[command(name = "keel", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one WebAssembly program in the foreground, without a cluster.
    Wasm(wasm::Args),
    /// Prints a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("KEEL_LOG")
                .unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let result = match cli.command {
        Command::Wasm(args) => wasm::run(args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "keel", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keel: {error:#}");
            ExitCode::from(1)
        }
    }
}
