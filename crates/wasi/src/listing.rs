//! The entries of a directory at one moment, as `fd_readdir` gives them to the guest.

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) inode: u64,
    pub(crate) filetype: u8,
}

/// A directory listing of one moment, without `.` and `..`. Cookie `n + 2` precedes entry `n`.
pub(crate) type Listing = Vec<Entry>;
