//! Placement rules and labels in the store: reading and changing them, and what a
//! transaction that places a machine must compare and write so that the rules hold
//! whatever places it, balancer or not.
//!
//! Who may be where is computed from the machines' records. The keys of a rule's domains
//! (`rule/ID/DOMAIN`) let one of two placements at the same time fail: each is read
//! before the records are, compared, and written.
//!
//! - `handle`: the rules of the cluster, their commands
//! - `claims`: what a placement adds to its transaction
//! - `cache`: the rules, followed, for what decides often and asks nobody
//! - `rule_set`: rules and labels of one instant

mod cache;
mod claims;
mod handle;
mod rule_set;

pub(crate) use cache::RuleSnapshot;
pub(crate) use claims::{ClaimError, Claims};
pub(crate) use handle::Rules;
pub(crate) use rule_set::{Drain, RuleSet};
