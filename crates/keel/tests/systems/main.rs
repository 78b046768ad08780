//! Linux systems: `agent`, `console`: commands in them, and what is typed there; `networks`: moves and
//! balancing; `failover`: high availability; `systems`: the cluster in which they run. `cloud_init`:
//! what a system is told at its first boot; `full_disk`: one whose disk has no room; `limits`: one with
//! a limit of its CPU time; `own_disk`: a disk from an image; `checkpoints`: systems that go on from
//! one; `display`: what viewers see of one; `memory`: memory that they give back; `scripted`: systems
//! that run a script; `placement`: nodes without QEMU; `processors`: nodes that lack a feature;
//! `post_copy`: memory that comes after its system.

mod agent;
mod checkpoints;
mod cloud_init;
mod console;
mod display;
mod failover;
mod full_disk;
mod limits;
mod memory;
mod networks;
mod own_disk;
mod placement;
mod post_copy;
mod processors;
mod qemu;
mod scripted;
mod systems;
