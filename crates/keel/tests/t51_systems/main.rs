//! Linux systems on a network: `networks`: moves and balancing; `failover`: high availability;
//! `systems`: the cluster in which they run.

mod failover;
mod networks;
mod systems;
