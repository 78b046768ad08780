//! Program images, by hash: what machines start from (for `wasm`, modules as their authors built
//! them) and what runs (instrumented modules). Both are sent between nodes; code compiled for a
//! processor never is, see `compilation`.
//!
//! - `files`: the files of this node, uploaded or fetched
//! - `writer`: writes an image while its pieces arrive
//! - `repositories`: images in repositories of checkpoints
//! - `records`: images of disks that have a name in the cluster, in the store
//! - `names`: requests of users about these
//! - `copies`: copies of these, at two nodes
//! - `unused`: removes what nothing needs any more

mod copies;
mod files;
mod names;
mod records;
mod repositories;
mod unused;
mod writer;

pub(crate) use copies::{COPY, keep};
pub(crate) use files::{FETCH, Images, send_file};
pub(crate) use repositories::StoredImages;
pub(crate) use unused::remove_unused;
