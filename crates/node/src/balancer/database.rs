//! Databases of a node that only explain, so that no operation depends on them: a damaged one is
//! renamed, and the node starts with a new one.

use redb::{Database, DatabaseError, StorageError};
use std::path::Path;

/// Opens or creates the database in a file; `what` is its name for users.
///
/// # Errors
/// If the file cannot be used, in a sentence.
pub(super) fn open(path: &Path, what: &str) -> Result<Database, String> {
    let said = |error: DatabaseError| format!("{}: {error}", path.display());
    match Database::create(path) {
        Err(error @ DatabaseError::Storage(StorageError::Corrupted(_))) => {
            tracing::error!(%error, "{what} is damaged: it is renamed, and a new one is created");
            let aside = path.with_extension("damaged");
            std::fs::rename(path, &aside)
                .map_err(|error| format!("{} cannot be renamed: {error}", path.display()))?;
            Database::create(path).map_err(said)
        }
        opened => opened.map_err(said),
    }
}
