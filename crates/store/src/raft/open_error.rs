//! Why the files of a voter cannot be used: whether they are lost, or only not to be had now.

use std::error::Error;
use std::path::Path;

use crate::encoding::WireError;
use crate::interface::StoreError;

/// Said of a file that another process has open.
pub(super) const IN_USE: &str =
    "another process has it open; is a second `keel up` running with this state directory?";

/// Why the files of a voter cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// They are no copy of the store any more, or lack what the voter has said.
    #[error("{0}")]
    Damaged(String),
    /// They may be good: another process or version has them, or the disk does not answer.
    #[error("{0}")]
    Unusable(String),
}

impl OpenError {
    pub(super) fn damaged(reason: impl ToString) -> Self {
        Self::Damaged(reason.to_string())
    }

    pub(super) fn unusable(reason: impl ToString) -> Self {
        Self::Unusable(reason.to_string())
    }

    /// The error of the store in `folder`.
    pub(super) fn at(self, folder: &Path) -> StoreError {
        let path = folder.display().to_string();
        match self {
            Self::Damaged(reason) => StoreError::Damaged { path, reason },
            Self::Unusable(reason) => StoreError::Open { path, reason },
        }
    }

    /// The meaning of an error while the tables of a log are read.
    pub(super) fn of_tables(error: Box<dyn Error>) -> Self {
        let error = match error.downcast::<OpenError>() {
            Ok(known) => return *known,
            Err(error) => error,
        };
        match error.downcast::<WireError>() {
            Ok(error) => (*error).into(),
            Err(error) => Self::unusable(error),
        }
    }
}

/// Of what the files have, whose checksums are right.
impl From<WireError> for OpenError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Damaged { .. } => Self::damaged(error),
            WireError::Version { .. } => Self::unusable(error),
        }
    }
}

impl From<redb::DatabaseError> for OpenError {
    fn from(error: redb::DatabaseError) -> Self {
        match error {
            redb::DatabaseError::DatabaseAlreadyOpen => Self::unusable(IN_USE),
            redb::DatabaseError::Storage(redb::StorageError::Io(error))
                if error.kind() == std::io::ErrorKind::InvalidData =>
            {
                Self::damaged("it is not a store, or its beginning is damaged")
            }
            redb::DatabaseError::Storage(redb::StorageError::Corrupted(what)) => {
                Self::Damaged(what)
            }
            other => Self::unusable(other),
        }
    }
}
