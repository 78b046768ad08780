//! Threads and memory of the machines of this node that may have parts on others
//! (`max_parts`): looks at each of them once a sample, lets `keel_balance::fine_grained` decide,
//! and does it. Every decision is in the ledger with what it was made of.
//!
//! Of other nodes it asks what rounds ask: their view. Only those with parts are asked,
//! and a few more while parts are sought, so that it costs the same in a cluster of
//! thousands.
//!
//! - `follow`: one look at each machine a sample
//! - `observation`, `cores`: threads, parts, nodes and memory, measured
//! - `memory`: what is remembered of a machine between two looks
//! - `actuator`: carries out a decision

mod actuator;
mod cores;
mod follow;
mod memory;
mod observation;

pub(in crate::balancer) use follow::follow;
