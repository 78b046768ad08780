//! Tables for people, JSON for programs.

use serde::Serialize;
use std::io::{ErrorKind, Write};

/// What a program's code is that the kernel ended since nobody read what it wrote.
const UNREAD: i32 = 128 + 13;

/// As `print!`, which panics where nobody reads any more (`keel ps | head`): the program
/// ends then, without a word.
macro_rules! out {
    ($($text:tt)*) => { $crate::output::write(format_args!($($text)*)) };
}

/// As [`out`], a line.
macro_rules! outln {
    () => { $crate::output::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($text)*))) };
}

/// Prints; ends the program where that cannot be.
pub(crate) fn write(text: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    // (A terminal, or a pipe, sees each line at once.)
    if let Err(error) = out.write_fmt(text) {
        if error.kind() != ErrorKind::BrokenPipe {
            eprintln!("keel: what is to be said cannot be written: {error}");
        }
        std::process::exit(match error.kind() {
            ErrorKind::BrokenPipe => UNREAD,
            _ => 1,
        });
    }
}

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A table or a sentence.
    Text,
    /// JSON.
    Json,
    /// Names only, one on a line.
    Name,
}

/// Prints a list in the format that was asked for.
pub(crate) fn list<T: Serialize>(
    format: Format,
    items: &[T],
    head: &[&str],
    name: impl Fn(&T) -> String,
    row: impl Fn(&T) -> Vec<String>,
) -> anyhow::Result<()> {
    match format {
        Format::Json => outln!("{}", serde_json::to_string_pretty(items)?),
        Format::Name => {
            for item in items {
                outln!("{}", name(item));
            }
        }
        Format::Text => outln!("{}", table(head, items.iter().map(row))),
    }
    Ok(())
}

/// Prints one thing in the format that was asked for.
pub(crate) fn one<T: Serialize>(
    format: Format,
    item: &T,
    name: &str,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    match format {
        Format::Json => outln!("{}", serde_json::to_string_pretty(item)?),
        Format::Name => outln!("{name}"),
        Format::Text => outln!("{}", text(item)),
    }
    Ok(())
}

/// A plain table.
pub(crate) fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_header(head.iter().map(|word| word.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    table.trim_fmt()
}

/// Bytes as people read them.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// How long ago, in a word.
pub(crate) fn ago(unix_ms: u64) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_millis() as u64);
    let seconds = now.saturating_sub(unix_ms) / 1000;
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
