//! The interfaces for users and other nodes: HTTP and rpc. Each decodes a request, passes it to
//! one handle, and encodes the answer; it decides nothing.
//!
//! - `decoders`: what bytes of other nodes are decoded by, for fuzzing
//! - `handles`: the handles to which requests are passed
//! - `http`: JSON over HTTP, for users
//! - `rpc`: requests of other nodes

mod decoders;
mod handles;
mod http;
mod rpc;

pub(crate) use decoders::decoders;
pub(crate) use handles::Handles;
pub(crate) use http::serve;
pub(crate) use rpc::{Entry, Service};
