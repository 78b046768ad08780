//! CPU traces as CloudSim keeps those of PlanetLab (Park and Pai, CoMon, 2006;
//! Beloglazov and Buyya 2012): a folder with one file for each machine; in it one
//! line for each five minutes, with the percentage of its CPU that the machine uses.
//! The published days have 288 lines.

use super::Trace;
use crate::bad_input::{self, BadInput};
use std::path::{Path, PathBuf};

/// Seconds from one line to the next.
const EVERY_S: f64 = 300.0;

/// Reads a folder: demand of each machine as a share of its CPU, 0 to 1, in order of file names.
///
/// # Errors
/// The file, line and reason of an error; an empty folder.
pub fn read(folder: &Path) -> Result<Vec<Trace>, BadInput> {
    let bad = |error: std::io::Error| BadInput::file(folder, error);
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(bad)? {
        let entry = entry.map_err(bad)?;
        if entry.file_type().map_err(bad)?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(BadInput::file(
            folder,
            "there are no files; each machine's trace is one, of a percentage on each line",
        ));
    }
    files.iter().map(|file| read_trace(file)).collect()
}

fn read_trace(file: &Path) -> Result<Trace, BadInput> {
    let text = bad_input::read(file)?;
    let mut samples = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let percent: f32 = line
            .trim()
            .parse()
            .ok()
            .filter(|percent| (0.0..=100.0).contains(percent))
            .ok_or_else(|| {
                let reason = format!("{line:?} is not a percentage from 0 to 100");
                BadInput::line(file, number + 1, reason)
            })?;
        samples.push(percent / 100.0);
    }
    if samples.is_empty() {
        return Err(BadInput::file(file, "it is empty"));
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    Ok(Trace {
        name: name.into_owned(),
        samples: samples.into(),
        every_s: EVERY_S,
    })
}
