//! Errors in input files: file, line, reason, and the probably intended name.

use std::path::{Path, PathBuf};

/// Similarity from which a known name is suggested, 0 to 1.
const SIMILARITY_MIN: f64 = 0.7;

/// An invalid file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}: {reason}", path.display(), line.map(|it| format!(", line {it}")).unwrap_or_default())]
pub struct BadInput {
    pub path: PathBuf,
    /// From 1; `None` for the whole file.
    pub line: Option<usize>,
    pub reason: String,
}

impl BadInput {
    pub fn file(path: &Path, reason: impl ToString) -> Self {
        BadInput {
            path: path.to_owned(),
            line: None,
            reason: reason.to_string(),
        }
    }

    /// An error in one line, from 1.
    pub fn line(path: &Path, line: usize, reason: impl ToString) -> Self {
        BadInput {
            line: Some(line),
            ..BadInput::file(path, reason)
        }
    }
}

/// Reads a text file.
///
/// # Errors
/// If it cannot be read, or is not text.
pub fn read(path: &Path) -> Result<String, BadInput> {
    std::fs::read_to_string(path).map_err(|error| BadInput::file(path, error))
}

/// The line of a byte offset, from 1.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()
        .iter()
        .take(at)
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

/// A suggestion, as the end of a sentence.
pub(crate) fn hint<'a>(given: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let nearest = known
        .clone()
        .map(|known| (strsim::jaro_winkler(known, given), known))
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .filter(|(like, _)| *like >= SIMILARITY_MIN);
    match nearest {
        Some((_, known)) => format!("did you mean {known:?}?"),
        None => {
            let known: Vec<&str> = known.take(40).collect();
            format!("known are {}", known.join(", "))
        }
    }
}

/// A TOML error with its line; for unknown keys with the most similar known key.
pub(crate) fn from_toml(path: &Path, text: &str, error: &toml::de::Error) -> BadInput {
    let reason = sentence(error.message());
    match error.span() {
        Some(span) => BadInput::line(path, line_of(text, span.start), reason),
        None => BadInput::file(path, reason),
    }
}

/// Rewrites serde's message about an unknown key or variant.
pub(crate) fn sentence(said: &str) -> String {
    for (what, begins) in [("key", "unknown field `"), ("kind", "unknown variant `")] {
        let Some(rest) = said.strip_prefix(begins) else {
            continue;
        };
        let mut quoted = rest.split('`').step_by(2);
        let given = quoted.next().unwrap_or_default();
        let known: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
        return format!(
            "there is no {what} {given:?} here; {}",
            hint(given, known.iter().copied())
        );
    }
    said.to_owned()
}
