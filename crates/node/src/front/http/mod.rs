//! The API: JSON over HTTP on the node's own socket, and over TLS with a token. Only maps
//! requests to handles; decides nothing.
//!
//! - `server`: listens
//! - `router`: which request goes to which handler, and who may make it
//! - `machine`, `file`, `balance`: handlers
//! - `reply`: what handlers share

mod balance;
mod file;
mod machine;
mod reply;
mod router;
mod server;

pub(crate) use server::serve;
