//! The API: JSON over HTTP on the node's own socket, and over TLS with a token. Maps requests to
//! handles; decides nothing.
//!
//! - `server`: listens
//! - `router`: the handler of each request
//! - `openapi`: describes all requests
//! - `caller`: who makes a request, and the role that it needs
//! - `cluster`, `handlers`, `file`, `volume`, `balance`, `logs`: handlers
//! - `display`: the handler of a machine's display, over a WebSocket
//! - `audit`: enters requests that change something in the audit log, and answers it
//! - `health`: metrics, and whether the agent lives and is ready
//! - `reply`: shared by the handlers

mod audit;
mod balance;
mod caller;
mod cluster;
mod display;
mod file;
mod handlers;
mod health;
mod image;
mod logs;
mod openapi;
mod reply;
mod router;
mod server;
mod volume;

pub(crate) use server::serve;
