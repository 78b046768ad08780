//! Databases of a node that only explain, so that no operation depends on them: a damaged one is
//! renamed, and the node starts with a new one.

use redb::Database;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Why a database cannot be used.
enum OpenError {
    /// Its file is none of redb, or not what was written.
    Damaged(String),
    /// It may be good: another process has it, or the disk does not answer.
    Unusable(redb::Error),
}

impl From<redb::Error> for OpenError {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::DatabaseAlreadyOpen => Self::Unusable(error),
            // What redb says of a file that has not its beginning, or ends early.
            redb::Error::Io(cause)
                if matches!(
                    cause.kind(),
                    ErrorKind::InvalidData | ErrorKind::UnexpectedEof
                ) =>
            {
                Self::Damaged(cause.to_string())
            }
            redb::Error::Io(_) => Self::Unusable(error),
            other => Self::Damaged(other.to_string()),
        }
    }
}

/// Opens or creates the database in a file and reads it with `load`; `what` is its name for users.
///
/// # Errors
/// If the file cannot be used, in a sentence.
pub(super) fn open<T>(
    path: &Path,
    what: &str,
    load: impl Fn(&Database) -> Result<T, redb::Error>,
) -> Result<(Database, T), String> {
    let shown = path.display();
    match try_open(path, &load) {
        Ok(opened) => return Ok(opened),
        Err(OpenError::Unusable(error)) => {
            return Err(format!("{what} in {shown} cannot be opened: {error}"));
        }
        Err(OpenError::Damaged(error)) => {
            tracing::error!(
                file = %shown, error,
                "{what} is damaged: its file is renamed to *.damaged, and a new one is created"
            );
        }
    }
    std::fs::rename(path, path.with_extension("damaged"))
        .map_err(|error| format!("{what} in {shown} is damaged, and not renamed: {error}"))?;
    try_open(path, &load).map_err(|error| {
        let error = match error {
            OpenError::Unusable(error) => error.to_string(),
            OpenError::Damaged(error) => error,
        };
        format!("{what} cannot be created in {shown}: {error}")
    })
}

fn try_open<T>(
    path: &Path,
    load: &impl Fn(&Database) -> Result<T, redb::Error>,
) -> Result<(Database, T), OpenError> {
    let attempt = || -> Result<_, redb::Error> {
        let database = Database::create(path)?;
        let loaded = load(&database)?;
        Ok((database, loaded))
    };
    // Some damage is found by assertions of redb only.
    match catch_unwind(AssertUnwindSafe(attempt)) {
        Ok(opened) => Ok(opened?),
        Err(_) => Err(OpenError::Damaged("its pages contradict each other".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use redb::{ReadableDatabase, ReadableTable, TableDefinition};

    const NUMBERS: TableDefinition<u64, u64> = TableDefinition::new("numbers");

    fn count(database: &Database) -> Result<u64, redb::Error> {
        let txn = database.begin_write()?;
        let mut table = txn.open_table(NUMBERS)?;
        let next = table.last()?.map_or(0, |(at, _)| at.value() + 1);
        table.insert(next, next)?;
        drop(table);
        txn.commit()?;
        Ok(next)
    }

    fn try_count(path: &Path) -> Result<u64, String> {
        open(path, "the numbers", count).map(|(_, next)| next)
    }

    #[test]
    fn a_damaged_file_is_renamed_whatever_the_damage() {
        let zero_all = |bytes: &mut Vec<u8>| bytes.fill(0);
        let other_file = |bytes: &mut Vec<u8>| *bytes = b"of another program".to_vec();
        let cut = |bytes: &mut Vec<u8>| bytes.truncate(5000);
        let pages_gone = |bytes: &mut Vec<u8>| bytes[4096..].fill(0);
        let no_versions = |bytes: &mut Vec<u8>| bytes[9..320].fill(0xff);
        let damages: [fn(&mut Vec<u8>); 5] = [zero_all, other_file, cut, pages_gone, no_versions];
        for (at, damage) in damages.into_iter().enumerate() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("numbers.redb");
            assert_eq!(try_count(&path), Ok(0));
            assert_eq!(try_count(&path), Ok(1), "it is kept");
            let mut bytes = std::fs::read(&path).unwrap();
            damage(&mut bytes);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(try_count(&path), Ok(0), "damage {at}");
            let aside = std::fs::read(folder.path().join("numbers.damaged")).unwrap();
            assert!(!aside.is_empty(), "damage {at}");
            assert_eq!(try_count(&path), Ok(1), "damage {at}");
        }
    }

    #[test]
    fn a_file_that_may_be_good_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.redb");
        let (database, _) = open(&path, "the numbers", count).unwrap();
        let error = try_count(&path).unwrap_err();
        assert!(error.contains("already open"), "{error}");
        let txn = database.begin_read().unwrap();
        assert_eq!(txn.open_table(NUMBERS).unwrap().iter().unwrap().count(), 1);
        drop((txn, database));
        assert_eq!(try_count(&path), Ok(1));
        assert!(try_count(folder.path()).is_err(), "a folder");
        assert!(folder.path().is_dir());
    }
}
