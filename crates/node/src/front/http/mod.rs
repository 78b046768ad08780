//! The API: JSON over HTTP on the node's own socket, and over TLS with a token. Maps requests to
//! handles; decides nothing.
//!
//! - `server`: listens
//! - `router`: the handler of each request, and the role that it needs
//! - `handlers`, `file`, `balance`: handlers
//! - `health`: metrics, and whether the agent lives and is ready
//! - `reply`: shared by the handlers

mod audit;
mod balance;
mod caller;
mod file;
mod handlers;
mod health;
mod reply;
mod router;
mod server;

pub(crate) use server::serve;
