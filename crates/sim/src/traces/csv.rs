//! Loads in a table. The first line names the columns: `at_s`, then a machine each.
//! Every other line has an instant in seconds, evenly spaced from 0, and each
//! machine's demand then, in cores of the reference speed:
//!
//! ```text
//! at_s,web,db
//! 0,0.5,1.0
//! 60,0.7,1.1
//! ```

use super::Trace;
use crate::bad_input::{self, BadInput};
use keel_balance::load::CORES_MAX;
use std::path::Path;

/// Reads a file: demand of each machine in cores, in column order.
///
/// # Errors
/// The line and reason of an error.
pub fn read(path: &Path) -> Result<Vec<Trace>, BadInput> {
    parse(path, &bad_input::read(path)?)
}

fn parse(path: &Path, text: &str) -> Result<Vec<Trace>, BadInput> {
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(number, it)| (number + 1, it));
    let bad = |line: usize, reason: String| BadInput::line(path, line, reason);
    let Some((_, head)) = lines.next() else {
        return Err(BadInput::file(path, "it is empty"));
    };
    let mut names = head.split(',').map(str::trim);
    if names.next() != Some("at_s") {
        let reason = "the first column must be \"at_s\", seconds; the others are machines";
        return Err(bad(1, reason.into()));
    }
    let names: Vec<&str> = names.collect();
    if names.is_empty() || names.contains(&"") {
        return Err(bad(
            1,
            "every column after at_s needs a machine's name".into(),
        ));
    }
    let mut instants: Vec<f64> = Vec::new();
    let mut columns: Vec<Vec<f32>> = vec![Vec::new(); names.len()];
    for (line, row) in lines.filter(|(_, row)| !row.trim().is_empty()) {
        let fields: Vec<&str> = row.split(',').map(str::trim).collect();
        if fields.len() != names.len() + 1 {
            let (found, asked) = (fields.len(), names.len() + 1);
            return Err(bad(line, format!("{found} columns instead of {asked}")));
        }
        let at_s = number(fields[0], f64::MAX)
            .ok_or_else(|| bad(line, format!("{:?} is not a number of seconds", fields[0])))?;
        let even = match instants.as_slice() {
            [] => at_s == 0.0,
            [_] => at_s > 0.0,
            [first, second, ..] => {
                let due = (second - first) * instants.len() as f64;
                (at_s - due).abs() <= 1e-6 * due.max(1.0)
            }
        };
        if !even {
            let reason = format!("at_s is {at_s}; lines must be evenly spaced in time, from 0");
            return Err(bad(line, reason));
        }
        instants.push(at_s);
        for ((field, name), column) in fields[1..].iter().zip(&names).zip(&mut columns) {
            let cores = number(field, CORES_MAX).ok_or_else(|| {
                let reason = format!("{field:?} of {name:?} is not a number of cores");
                bad(line, reason)
            })?;
            column.push(cores as f32);
        }
    }
    let every_s = match instants.as_slice() {
        [] => return Err(BadInput::file(path, "it has no lines but the first")),
        [_] => 1.0,
        [_, second, ..] => *second,
    };
    let traces = names.iter().zip(columns).map(|(name, column)| Trace {
        name: (*name).to_owned(),
        samples: column.into(),
        every_s,
    });
    Ok(traces.collect())
}

fn number(text: &str, most: f64) -> Option<f64> {
    let number: f64 = text.parse().ok()?;
    (0.0..=most).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::parse;
    use std::path::Path;

    fn error(text: &str) -> String {
        parse(Path::new("l.csv"), text).unwrap_err().to_string()
    }

    #[test]
    fn columns_are_machines() {
        let text = "at_s, web,db\n0,0.5,1\n60,0.75,2\n120,0,3\n\n";
        let traces = parse(Path::new("l.csv"), text).unwrap();
        assert_eq!(traces[0].name, "web");
        assert_eq!(traces[1].samples[..], [1.0, 2.0, 3.0]);
        assert_eq!(traces[0].every_s, 60.0);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, says) in [
            ("", "l.csv: it is empty"),
            (
                "web,db\n",
                "l.csv, line 1: the first column must be \"at_s\"",
            ),
            ("at_s,\n", "l.csv, line 1: every column"),
            ("at_s,a\n", "l.csv: it has no lines"),
            ("at_s,a\n0,1\n60\n", "l.csv, line 3: 1 columns instead of 2"),
            ("at_s,a\n0,x\n", "l.csv, line 2: \"x\" of \"a\" is not"),
            ("at_s,a\n0,-1\n", "l.csv, line 2: \"-1\" of \"a\" is not"),
            ("at_s,a\n0,NaN\n", "l.csv, line 2: \"NaN\" of \"a\" is not"),
            ("at_s,a\n5,1\n", "l.csv, line 2: at_s is 5; lines must be"),
            ("at_s,a\n0,1\n9,1\n10,1\n", "l.csv, line 4: at_s is 10"),
            (
                "at_s,a\nsoon,1\n",
                "l.csv, line 2: \"soon\" is not a number of s",
            ),
        ] {
            assert!(error(text).starts_with(says), "{text:?}: {}", error(text));
        }
    }
}
