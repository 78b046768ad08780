//! Checks the output of the guest `witness`: its lines are `N EPOCH`, in a file that outlives the
//! machine and that every node sees.

use anyhow::{Result, bail, ensure};

/// The result of checking a witness's file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Number of complete lines.
    pub lines: u64,
    /// Number of the last one.
    pub last: u64,
    /// Epochs that wrote.
    pub epochs: u64,
    /// Number of times that it continued from an earlier line, under a later epoch: restarts from
    /// a checkpoint or from the beginning.
    pub rewinds: u64,
    /// Lines that were written more than once because of that.
    pub repeated: u64,
}

/// Reads the lines of a witness.
///
/// Numbers increase by one, and epochs never decrease: two concurrent copies would write a number
/// twice, or decrease. An earlier number may only follow under a later epoch than any before. The
/// first line after a rewind may still have an older epoch, since the machine may have been
/// captured between reading the epoch and writing it: the line after it tells. As long as a file
/// ends with such a line, that line does not count yet, like one of which only a part is written.
///
/// # Errors
/// The first impossible line.
pub fn examine(text: &str) -> Result<Evidence> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut lines = Vec::new();
    for (at, line) in whole.lines().enumerate() {
        let mut words = line.split(' ');
        let numbers = (words.next(), words.next(), words.next());
        let (Some(number), Some(epoch), None) = numbers else {
            bail!("line {at} is {line:?}");
        };
        let read = |word: &str| word.parse::<u64>();
        let (Ok(number), Ok(epoch)) = (read(number), read(epoch)) else {
            bail!("line {at} is {line:?}");
        };
        lines.push((number, epoch));
    }
    let mut told = Evidence::default();
    let mut newest = 0;
    let mut before: Option<u64> = None;
    for (at, (number, epoch)) in lines.iter().copied().enumerate() {
        let follows = before.map_or(0, |before| before + 1);
        let near = || {
            let from = at.saturating_sub(3);
            let until = (at + 3).min(lines.len());
            format!("line {at}, around it {:?}", &lines[from..until])
        };
        ensure!(number <= follows, "lines are missing: {}", near());
        let rewinds = number < follows;
        let is_too_old = if rewinds {
            epoch <= newest
        } else {
            epoch < newest
        };
        if is_too_old && (rewinds || told.rewinds > 0) {
            let Some(next) = lines.get(at + 1) else {
                break;
            };
            let is_first_after_rewind = next.0 == number + 1 && next.1 > newest;
            ensure!(
                is_first_after_rewind,
                "a line is written twice, or under an older epoch: {}",
                near()
            );
        } else {
            ensure!(!is_too_old, "an older epoch writes again: {}", near());
        }
        if rewinds {
            told.rewinds += 1;
            told.repeated += follows - number;
        }
        told.lines += 1;
        if epoch > newest {
            told.epochs += 1;
            newest = epoch;
        }
        before = Some(number);
    }
    told.last = before.unwrap_or(0);
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[(u64, u64)]) -> Result<Evidence> {
        let lines: Vec<String> = lines
            .iter()
            .map(|(number, epoch)| format!("{number} {epoch}\n"))
            .collect();
        examine(&lines.concat())
    }

    #[test]
    fn moves_and_restarts_are_told_apart() {
        let moved = told(&[(0, 1), (1, 1), (2, 2), (3, 4)]).unwrap();
        assert_eq!((moved.rewinds, moved.epochs, moved.last), (0, 3, 3));
        let restarted = told(&[(0, 1), (1, 1), (2, 1), (1, 2), (2, 2)]).unwrap();
        assert_eq!((restarted.rewinds, restarted.repeated), (1, 2));
        let stale = told(&[(0, 1), (1, 2), (2, 2), (1, 1), (2, 3), (3, 3)]).unwrap();
        assert_eq!(stale.rewinds, 1);
        let not_yet_known = told(&[(0, 1), (1, 2), (2, 2), (1, 2)]).unwrap();
        assert_eq!((not_yet_known.lines, not_yet_known.rewinds), (3, 0));
        let then = told(&[(0, 1), (1, 2), (2, 2), (1, 2), (2, 3)]).unwrap();
        assert_eq!((then.lines, then.rewinds), (5, 1));
        assert_eq!(examine("0 1\n1 1\n2").unwrap().lines, 2);
    }

    #[test]
    fn what_two_copies_would_write_is_found() {
        for lines in [
            // Twice under one epoch, alternating, gaps, return to an old epoch.
            &[(0, 1), (1, 1), (1, 1), (2, 1)][..],
            &[(0, 1), (1, 2), (1, 1), (2, 2)],
            &[(0, 1), (1, 2), (2, 2), (1, 2), (3, 3)],
            &[(0, 1), (1, 2), (0, 3), (1, 2), (2, 3)],
            &[(0, 1), (1, 2), (0, 1), (1, 2)],
            &[(0, 1), (1, 1), (3, 1)],
            &[(0, 1), (1, 2), (2, 1), (3, 2)],
            &[(1, 1)],
        ] {
            assert!(told(lines).is_err(), "{lines:?}");
        }
        assert!(examine("0 1\nx 1\n").is_err());
        assert!(examine("0 1 2\n").is_err());
    }
}
