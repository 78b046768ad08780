//! Machines in clusters of real processes on loopback: their files, volumes, checkpoints and limits,
//! and how they are balanced.

mod apply;
mod balance;
mod cgroups;
mod checkpoints;
mod cluster_volumes;
mod compiled_code;
mod cp;
mod drain;
mod fine_grained;
mod images;
mod logs_since;
mod set;
mod volumes;

/// Held by tests that measure processors: one at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
