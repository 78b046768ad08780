//! Clusters of real processes on loopback: their nodes, their store and their users, and who owns a
//! machine when nodes, agents and links fail.

mod addresses;
mod certificates;
mod down;
mod events;
mod external_store;
mod failover;
mod failpoints;
mod gossip;
mod leave;
mod life_cycle;
mod log_gap;
mod metrics;
mod node_start;
mod ownership;
mod protected_output;
mod start;
mod store_voters;
mod traces;
mod upgrade;
mod users;
