//! `keel exec`: a command in a machine, as its guest agent carries it out.

use crate::cluster::Reach;
use crate::output::Format;
use anyhow::{Context, Result, bail, ensure};
use data_encoding::BASE64;
use keel_api::{ExecuteEnd, ExecuteLine, ExecuteRequest};
use std::io::{Read, Write};
use std::process::ExitCode;

/// The most that is read of the standard input, in bytes: the API passes on no more.
const INPUT_BYTES_MAX: u64 = 1 << 20;
/// Added to the number of a signal, as shells do.
const SIGNAL_EXIT: i32 = 128;
/// The exit code if the command was not started, or how it ended is not known, as that of `ssh`.
pub(crate) const UNKNOWN_EXIT: u8 = 255;

#[derive(clap::Args)]
#[command(override_usage = "keel exec [OPTIONS] <MACHINE> -- <COMMAND> [ARGS]...")]
pub(crate) struct Args {
    /// Passes standard input on to the command: all of it, at most 1 MiB.
    #[arg(short, long)]
    input: bool,
    /// Sets a variable of its environment, which then has no others.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The machine.
    machine: String,
    /// A program, by its path in the machine or by a name that is searched for there, and its
    /// arguments.
    #[arg(last = true, required = true, num_args = 1.., value_names = ["COMMAND", "ARGS"])]
    command: Vec<String>,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let client = reach.client()?;
    let (command, arguments) = args.command.split_first().context("no command")?;
    let request = ExecuteRequest {
        command: command.clone(),
        arguments: arguments.to_vec(),
        environment: args.env.clone(),
        input: match args.input {
            true => BASE64.encode(&input()?),
            false => String::new(),
        },
    };
    let path = keel_api::path(["machines", &args.machine, "execute"]);
    let mut lines = client.post_stream(&path, &request).await?;
    while let Some(line) = lines.line::<ExecuteLine>().await? {
        match line {
            ExecuteLine::Running => {}
            ExecuteLine::Ended(end) => return show(reach.format(), &end),
            ExecuteLine::Error(error) => bail!("machine {:?}: {error}", args.machine),
        }
    }
    bail!("the node that was asked no longer answers; the command goes on without it")
}

fn input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    std::io::stdin()
        .take(INPUT_BYTES_MAX + 1)
        .read_to_end(&mut input)
        .context("cannot read the standard input")?;
    ensure!(
        input.len() as u64 <= INPUT_BYTES_MAX,
        "the standard input is longer than 1 MiB, the most that a command in a machine is given"
    );
    Ok(input)
}

/// Prints what the command has printed, where it did; returns its exit code.
fn show(format: Format, end: &ExecuteEnd) -> Result<ExitCode> {
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(end)?);
    } else {
        let decode = |text: &str| BASE64.decode(text.as_bytes());
        std::io::stdout().write_all(&decode(&end.output)?)?;
        std::io::stderr().write_all(&decode(&end.error_output)?)?;
        if end.is_cut {
            eprintln!("keel: the command printed more than is shown here");
        }
    }
    Ok(ExitCode::from(exit_code(end)))
}

fn exit_code(end: &ExecuteEnd) -> u8 {
    let signal = end.signal.map(|signal| signal.saturating_add(SIGNAL_EXIT));
    let code = end.exit_code.or(signal).unwrap_or_default();
    u8::try_from(code).unwrap_or(UNKNOWN_EXIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_exit_code_is_that_of_the_command() {
        let end = |exit_code, signal| ExecuteEnd {
            exit_code,
            signal,
            output: String::new(),
            error_output: String::new(),
            is_cut: false,
        };
        assert_eq!(exit_code(&end(Some(0), None)), 0);
        assert_eq!(exit_code(&end(Some(7), None)), 7);
        assert_eq!(exit_code(&end(None, Some(9))), 137);
        // Of a guest that is no Unix.
        assert_eq!(exit_code(&end(Some(-1), None)), UNKNOWN_EXIT);
    }
}
