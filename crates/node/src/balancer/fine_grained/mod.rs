//! Threads and memory of the machines of this node that may have parts on others (`max_parts`):
//! observes each of them once a sample, has `keel_balance::fine_grained` decide, and carries out
//! the decision. Every decision is in the ledger with its inputs.
//!
//! Other nodes are asked for the same view as in rounds. Only those with parts are asked, and a
//! few more while parts are sought, so that the cost does not grow with the cluster.
//!
//! - `follow`: one observation of each machine a sample
//! - `observation`, `cores`: measurements of threads, parts, nodes and memory
//! - `tracked_state`: the state of a machine between two samples
//! - `actuator`: carries out a decision

mod actuator;
mod cores;
mod follow;
mod observation;
mod tracked_state;

pub(in crate::balancer) use follow::follow;
