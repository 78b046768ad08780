//! The faults of the nemesis, and what each may do to machines.

use super::NODES;
use keel_machine::failpoint::{Action, Injection};

/// A temporary fault.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    Nothing,
    Failpoint(String, &'static str, Injection),
    KillAgent(String),
    KillWorker(String, &'static str),
    /// Kills the source's worker while the commit of its move is delayed and its answer will be
    /// lost, so that the owner is in doubt.
    KillInDoubt(String, &'static str),
    StopAgent(String),
    StopWorker(String, &'static str),
    PowerOff(String),
    /// All nodes lose power at once; they return in this order, the last one later.
    AllOff([&'static str; NODES.len()]),
    /// The store goes back to one voter, while a node loses power, and to three after that, while
    /// an agent is killed.
    FewerVoters(String),
    Cut(String),
    CutOneWay(String, String),
    FullDisk(String),
    /// Limited to this rate in Mbit/s.
    SlowLink(String, u32),
    /// Of every 100 packets, this many are lost in each direction.
    LossyLink(String, u32),
    /// The wall clock is this many seconds ahead, or behind if negative.
    Clock(String, i64),
}

impl Fault {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Fault::Nothing => "nothing",
            Fault::Failpoint(_, _, order) => match order.action {
                Action::Kill => "failpoint kill",
                Action::Stop => "failpoint stop",
                Action::Error => "failpoint error",
                Action::Delay(_) => "failpoint delay",
            },
            Fault::KillAgent(_) => "agent killed",
            Fault::KillWorker(..) => "worker killed",
            Fault::KillInDoubt(..) => "worker killed in doubt",
            Fault::StopAgent(_) => "agent stopped",
            Fault::StopWorker(..) => "worker stopped",
            Fault::PowerOff(_) => "node off",
            Fault::AllOff(_) => "all nodes off",
            Fault::FewerVoters(_) => "voters replaced",
            Fault::Cut(_) => "link cut",
            Fault::CutOneWay(..) => "link cut one way",
            Fault::FullDisk(_) => "disk full",
            Fault::SlowLink(..) => "link slow",
            Fault::LossyLink(..) => "link lossy",
            Fault::Clock(..) => "clock set",
        }
    }

    /// The node whose part it is, if it is one node's.
    pub(super) fn node(&self) -> Option<&str> {
        match self {
            Fault::Nothing | Fault::AllOff(_) | Fault::FewerVoters(_) => None,
            Fault::Failpoint(node, ..)
            | Fault::KillAgent(node)
            | Fault::KillWorker(node, _)
            | Fault::KillInDoubt(node, _)
            | Fault::StopAgent(node)
            | Fault::StopWorker(node, _)
            | Fault::PowerOff(node)
            | Fault::Cut(node)
            | Fault::CutOneWay(node, _)
            | Fault::FullDisk(node)
            | Fault::SlowLink(node, _)
            | Fault::LossyLink(node, _)
            | Fault::Clock(node, _) => Some(node),
        }
    }

    /// Whether the fault may kill machines' own processes.
    pub(super) fn kills_machines(&self) -> bool {
        match self {
            Fault::KillWorker(..)
            | Fault::KillInDoubt(..)
            | Fault::PowerOff(_)
            | Fault::FewerVoters(_)
            | Fault::AllOff(_) => true,
            Fault::Failpoint(_, name, order) => {
                order.action == Action::Kill
                    && keel_machine::failpoint::find(name).is_some_and(|it| it.site.is_worker())
            }
            Fault::Nothing
            | Fault::KillAgent(_)
            | Fault::StopAgent(_)
            | Fault::StopWorker(..)
            | Fault::Cut(_)
            | Fault::CutOneWay(..)
            | Fault::FullDisk(_)
            | Fault::SlowLink(..)
            | Fault::LossyLink(..)
            | Fault::Clock(..) => false,
        }
    }
}

impl Fault {
    /// Whether a node, or a machine's process, may be unable to renew its lease.
    pub(super) fn ends_leases(&self) -> bool {
        match self {
            Fault::PowerOff(_)
            | Fault::AllOff(_)
            | Fault::FewerVoters(_)
            | Fault::StopAgent(_)
            | Fault::StopWorker(..)
            | Fault::Cut(_)
            | Fault::CutOneWay(..)
            | Fault::FullDisk(_)
            | Fault::SlowLink(..)
            | Fault::LossyLink(..) => true,
            Fault::Failpoint(_, _, order) => order.action == Action::Stop,
            Fault::Nothing
            | Fault::KillAgent(_)
            | Fault::KillWorker(..)
            | Fault::KillInDoubt(..)
            // Leases are measured by another clock.
            | Fault::Clock(..) => false,
        }
    }
}
