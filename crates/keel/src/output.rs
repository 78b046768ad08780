//! Tables for users, JSON for programs.

use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Exit code of a program that was ended by SIGPIPE.
const UNREAD: i32 = 128 + 13;

/// As `print!`, which panics if the reader has gone (`keel ps | head`): the program then ends
/// silently.
macro_rules! out {
    ($($text:tt)*) => { $crate::output::write(format_args!($($text)*)) };
}

/// As [`out`], a line.
macro_rules! outln {
    () => { $crate::output::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($text)*))) };
}

/// Prints; ends the program if that fails.
pub(crate) fn write(text: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    // A terminal, or a pipe, gets each line at once.
    if let Err(error) = out.write_fmt(text) {
        if error.kind() != ErrorKind::BrokenPipe {
            eprintln!("keel: cannot write the output: {error}");
        }
        std::process::exit(match error.kind() {
            ErrorKind::BrokenPipe => UNREAD,
            _ => 1,
        });
    }
}

/// Output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A table or a sentence.
    Text,
    /// JSON.
    Json,
    /// Names only, one on a line.
    Name,
}

/// Prints a list in the requested format.
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

/// Prints one object in the requested format.
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

/// The fields of an object as names and values for users, in alphabetical order; empty ones are
/// `none`.
pub(crate) fn fields(object: &serde_json::Value) -> impl Iterator<Item = (String, String)> {
    let fields = object.as_object().into_iter().flatten();
    fields.map(|(name, value)| (name.replace('_', " "), field_value(value)))
}

fn field_value(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Array(values) if values.is_empty() => "none".to_owned(),
        serde_json::Value::Array(values) => {
            let values: Vec<String> = values.iter().map(field_value).collect();
            values.join(" ")
        }
        serde_json::Value::Null => "none".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Bytes with a unit.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// The time since then, with a unit.
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
