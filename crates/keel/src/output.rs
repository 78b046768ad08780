//! Tables for people, JSON for programs.

use serde::Serialize;

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
        Format::Json => println!("{}", serde_json::to_string_pretty(items)?),
        Format::Name => {
            for item in items {
                println!("{}", name(item));
            }
        }
        Format::Text => println!("{}", table(head, items.iter().map(row))),
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
        Format::Json => println!("{}", serde_json::to_string_pretty(item)?),
        Format::Name => println!("{name}"),
        Format::Text => println!("{}", text(item)),
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
