//! This node's copy of the store, if it has one, and who else has one.
//!
//! - Every agent reaches the store by a [`StoreClient`], which goes to the leader, wherever it is.
//! - A voter answers the other voters before anything else of the agent runs: no voter can be
//!   elected, and no agent can start, before.
//! - A copy that stopped because its disk could not be written is opened again ([`reopen`]).
//! - [`follow`] keeps the list of voters: for the client, and in the node's settings for its next
//!   start. [`manage`] is the leader's: it carries out what `keel_cluster::voters` decides.
//! - `addresses` finds voters that have another address, or are other nodes, than this node knows.
//! - [`recover`] and [`restore`] begin the store anew, while the agent does not run.
//! - [`migrate`] moves the store out of the nodes.
//! - A cluster may have its store in an etcd outside of it; then nobody is a voter, and
//!   `authority` keeps the cluster's authority, which admits nodes, at some of them.
//! - A node becomes a voter by the leader's request, which also brings the cluster's authority: any
//!   voter admits nodes. It is sent over TLS between members. `rotation` replaces the authority.

mod addresses;
mod authority;
mod handle;
mod manage;
mod migrate;
mod rebuild;
mod rotation;

pub(crate) use addresses::{find_voters, tell_address};
pub(crate) use authority::spread_authority;
pub use handle::VoterError;
pub(crate) use handle::{Voters, decoders};
pub(crate) use manage::{follow, manage, reopen};
pub use migrate::{follow_store, migrate};
pub use rebuild::{RebuildError, Rebuilt, recover, restore};
pub(crate) use rotation::rotate_authority;
