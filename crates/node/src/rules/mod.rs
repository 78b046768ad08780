//! Placement rules and labels in the store: reads and changes them, and builds the compares and
//! writes of a transaction that places a machine, so that the rules hold with or without a
//! balancer.
//!
//! The allowed nodes are computed from the machines' records. The keys of a rule's domains
//! (`rule/ID/DOMAIN`) make one of two concurrent placements fail: each is read before the records,
//! compared, and written.
//!
//! - `handle`: the rules of the cluster, their commands
//! - `claims`: the compares and writes of a placement
//! - `cache`: the rules, followed, for frequent decisions without requests
//! - `rule_set`: rules and labels of one instant
//! - `hosts`: what hosts execute and offer, and so which machines can run there

mod cache;
mod claims;
mod handle;
mod hosts;
mod rule_set;

pub(crate) use cache::RuleSnapshot;
pub(crate) use claims::{ClaimError, Claims};
pub(crate) use handle::{Rules, check_label};
pub(crate) use rule_set::{Drain, RuleSet};
