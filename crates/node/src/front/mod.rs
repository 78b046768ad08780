//! What people and other nodes reach: HTTP and rpc. Requests are decoded, handed to one
//! handle, and answers encoded; nothing is decided here.
//!
//! - `handles`: the parts that requests are handed to
//! - `http`: JSON over HTTP, for users
//! - `rpc`: requests of other nodes

mod handles;
mod http;
mod rpc;

pub(crate) use handles::Handles;
pub(crate) use http::serve;
pub(crate) use rpc::Service;
