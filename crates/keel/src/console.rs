//! `keel console`: the serial console of a machine, in this terminal or from a file.
//!
//! What is typed is one request, which the nodes pass on wherever the machine is; what the machine
//! prints is followed as `keel logs` does.

use crate::cluster::Reach;
use crate::machines;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::future::select_all;
use keel_api::{LogOffset, Nothing};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io::Read;
use std::pin::pin;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Leaves the console (Ctrl-]), as in `telnet` and `virsh console`.
const ESCAPE: u8 = 0x1d;
/// How long an answer to what was typed may take once its user leaves or the output has ended.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes that are read at once.
const PIECE_BYTES: usize = 4096;
/// Pieces that a user at a terminal can paste before the key that leaves waits for them, 16 MiB.
const PASTED_PIECES_MAX: usize = 4096;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The machine, of a kind with a console.
    machine: String,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let (client, machine) = (reach.client()?, &args.machine);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let path = keel_api::path(["machines", machine, "logs", "offset"]);
    let from: LogOffset = client.get(&format!("{path}?since={now}")).await?;
    let mut signals = Signals::new()?;
    let terminal = RawTerminal::enter().context("the terminal cannot be set up")?;
    let (escape, pieces_max) = match terminal {
        Some(_) => (Some(ESCAPE), PASTED_PIECES_MAX),
        None => (None, 1),
    };
    if escape.is_some() {
        eprint!("The console of {machine}; Ctrl-] leaves it.\r\n");
    }
    let (send, pieces) = mpsc::channel(pieces_max);
    let (tell, input_end) = oneshot::channel();
    // It may wait for input for ever, and ends with this process.
    std::thread::Builder::new()
        .name("keyboard".into())
        .spawn(move || {
            // Told before the request can end, so that an unreadable input is no success.
            let _ = tell.send(read_keys(&mut std::io::stdin(), escape, &send));
            drop(send);
        })?;
    let path = keel_api::path(["machines", machine, "input"]);
    let mut typed = pin!(client.post_pieces::<Nothing>(&path, pieces));
    let mut followed = pin!(machines::follow(&client, machine, from.offset, true));
    let input = async {
        match input_end.await {
            Ok(InputEnd::File) | Err(_) => std::future::pending().await,
            Ok(end) => end,
        }
    };
    tokio::select! {
        biased;
        code = signals.next() => return Ok(code),
        end = input => {
            let answer = timeout(ANSWER_PATIENCE, &mut typed).await;
            if let InputEnd::Failed(error) = end {
                return Err(error).context("the standard input cannot be read");
            }
            match answer {
                Ok(typed) => typed.map(drop)?,
                Err(_) => bail!("machine {machine:?} has not taken all that was typed"),
            }
        }
        typed = &mut typed => {
            typed?;
        }
        followed = &mut followed => {
            followed?;
            // Of a machine that had ended before, or has no console, this says more.
            if let Ok(typed) = timeout(ANSWER_PATIENCE, typed).await {
                typed?;
            }
            bail!("machine {machine:?} has ended (`keel describe {machine}` says how)");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The signals that end a program at a terminal, awaited so that the terminal is as before.
struct Signals([(SignalKind, Signal); 4]);

impl Signals {
    fn new() -> std::io::Result<Self> {
        let of = |kind| Ok::<_, std::io::Error>((kind, signal(kind)?));
        Ok(Signals([
            of(SignalKind::hangup())?,
            of(SignalKind::interrupt())?,
            of(SignalKind::quit())?,
            of(SignalKind::terminate())?,
        ]))
    }

    /// Waits for one; returns the exit code that shells give to it.
    async fn next(&mut self) -> ExitCode {
        let came = self.0.iter_mut().map(|(kind, signal)| {
            Box::pin(async move {
                signal.recv().await;
                kind.as_raw_value()
            })
        });
        let (number, ..) = select_all(came).await;
        ExitCode::from(u8::try_from(128 + number).unwrap_or(u8::MAX))
    }
}

/// Why there is no more input.
enum InputEnd {
    /// It ended, and all of it is typed.
    File,
    /// The user left.
    Left,
    Failed(std::io::Error),
}

/// Passes on what is typed, up to the end or the key that leaves the console.
fn read_keys(keys: &mut impl Read, escape: Option<u8>, pieces: &mpsc::Sender<Bytes>) -> InputEnd {
    let mut buffer = [0; PIECE_BYTES];
    loop {
        let read = match keys.read(&mut buffer) {
            Ok(0) => return InputEnd::File,
            Ok(count) => &buffer[..count],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return InputEnd::Failed(error),
        };
        let leaves = read.iter().position(|byte| Some(*byte) == escape);
        let piece = Bytes::copy_from_slice(&read[..leaves.unwrap_or(read.len())]);
        // Nobody takes it once the request has ended, whose answer says why.
        if !piece.is_empty() && pieces.blocking_send(piece).is_err() {
            return InputEnd::File;
        }
        if leaves.is_some() {
            return InputEnd::Left;
        }
    }
}

/// A terminal that passes on each key as it is; dropped, it is as before.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` if the standard input is no terminal.
    fn enter() -> rustix::io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return Ok(None);
        }
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(RawTerminal { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If it is gone, there is nothing to restore.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8], escape: Option<u8>) -> Vec<u8> {
        let (send, mut pieces) = mpsc::channel(8);
        let end = read_keys(&mut &*keys, escape, &send);
        assert_eq!(
            matches!(end, InputEnd::Left),
            keys.contains(&ESCAPE) && escape.is_some()
        );
        drop(send);
        let pieces = std::iter::from_fn(|| pieces.blocking_recv());
        pieces.flat_map(Vec::from).collect()
    }

    #[test]
    fn keys_are_passed_on_up_to_the_escape() {
        assert_eq!(typed(b"ls\r\x03\x1dno more", Some(ESCAPE)), b"ls\r\x03");
        assert_eq!(typed(b"\x1d", Some(ESCAPE)), b"");
        // A file may have any byte.
        assert_eq!(typed(b"a\x1db", None), b"a\x1db");
    }
}
