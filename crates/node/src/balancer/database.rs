//! Databases of a node that explain, and on which nothing depends: a damaged one is put
//! aside, so that the node is not down for it.

use redb::{Database, DatabaseError, StorageError};
use std::path::Path;

/// Opens the one in a file, or makes it; `what` it is, for people.
///
/// # Errors
/// If the file cannot be used, in a sentence.
pub(super) fn open(path: &Path, what: &str) -> Result<Database, String> {
    let said = |error: DatabaseError| format!("{}: {error}", path.display());
    match Database::create(path) {
        Err(error @ DatabaseError::Storage(StorageError::Corrupted(_))) => {
            tracing::error!(%error, "{what} is damaged: it is put aside, a new one begins");
            let aside = path.with_extension("damaged");
            std::fs::rename(path, &aside)
                .map_err(|error| format!("{} cannot be put aside: {error}", path.display()))?;
            Database::create(path).map_err(said)
        }
        opened => opened.map_err(said),
    }
}
