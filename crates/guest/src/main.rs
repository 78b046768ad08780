//! `keel-guest`: [`keel_guest`] as a program.

#![forbid(unsafe_code)]

#[cfg(not(target_feature = "crt-static"))]
compile_error!("this program runs in systems of any kind: build it with `cargo xtask guest-agent`");

use anyhow::Result;
use clap::{Parser, Subcommand};
use keel_guest::{Agent, install, port};
use std::path::PathBuf;
use std::process::ExitCode;

/// The guest agent of Evenkeel: carries out in this system what its host asks for.
#[derive(Parser)]
#[command(name = "keel-guest", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers the host until the system ends.
    Run {
        /// The port, a character device (default: the one that is named org.qemu.guest_agent.0).
        #[arg(long)]
        port: Option<PathBuf>,
    },
    /// Copies this program into the system, and makes it a service that begins with it.
    Install,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keel-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Run { port } => port::serve(port.as_deref(), &mut Agent::default()),
        Command::Install => install::install(),
    }
}
