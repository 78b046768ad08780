//! Events: what became of machines, moves, checkpoints and nodes, told by the
//! node where it happened.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// How many events an answer has if nothing else is asked for.
pub const EVENTS_DEFAULT: u32 = 1000;
/// How many events an answer has at most.
pub const EVENTS_MAX: u32 = 10_000;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Rises with each event of the same node, also over restarts of its agent.
    pub id: u64,
    /// When, by the node's wall clock, in milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// The node that tells it.
    pub node: String,
    /// The machine that it is about.
    #[serde(default)]
    pub machine: Option<String>,
    /// Under which epoch.
    #[serde(default)]
    pub epoch: Option<String>,
    /// What sort of thing.
    pub kind: EventKind,
    /// A sentence for people.
    pub text: String,
    /// The same for programs.
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $kind:ident = $name:literal,)+) => {
        /// Sorts of events. Their names are stable: programs may rely on them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $kind,)+
            /// One that a newer version tells and this one does not know.
            #[serde(other, rename = "other")]
            Other,
        }

        impl EventKind {
            /// All that this version tells.
            pub const ALL: &[EventKind] = &[$(EventKind::$kind),+];

            /// Its stable name.
            pub fn name(self) -> &'static str {
                match self {
                    $(EventKind::$kind => $name,)+
                    EventKind::Other => "other",
                }
            }
        }
    };
}

kinds! {
    /// A node's agent started.
    NodeStarted = "node-started",
    /// A node's agent was told to stop.
    NodeStopped = "node-stopped",
    /// A node renews its lease (told by the node with the store).
    NodeAlive = "node-alive",
    /// A node no longer renews its lease (told by the node with the store).
    NodeAway = "node-away",
    /// This node has a lease.
    LeaseTaken = "lease-taken",
    /// This node's lease was not renewed in time; it tries on.
    LeaseLate = "lease-late",
    /// This node's lease is renewed again.
    LeaseRenewed = "lease-renewed",
    /// This node's lease ended.
    LeaseLost = "lease-lost",
    /// A machine was put into a node's schedule.
    MachineScheduled = "machine-scheduled",
    /// A machine was started, from its module or a checkpoint.
    MachineStarted = "machine-started",
    /// A machine that was moved runs here.
    MachineArrived = "machine-arrived",
    /// All of the memory of a machine that ran here already has come.
    MachineFilled = "machine-filled",
    /// The agent started, and found the machine running.
    MachineFound = "machine-found",
    /// A machine ended, and is to be started again.
    MachineRestarting = "machine-restarting",
    /// A machine ended by itself.
    MachineExited = "machine-exited",
    /// A machine was ended by its program's fault.
    MachineTrapped = "machine-trapped",
    /// A machine was ended by a command.
    MachineStopped = "machine-stopped",
    /// A machine could not start, or was lost.
    MachineFailed = "machine-failed",
    /// A machine was removed, with its output.
    MachineRemoved = "machine-removed",
    /// Limits of a machine, or its restart policy, were changed.
    MachineChanged = "machine-changed",
    /// A machine has parts on several nodes.
    MachineSpans = "machine-spans",
    /// A machine is on one node again.
    MachineAlone = "machine-alone",
    /// A part of a machine does not answer its home: what needs it waits.
    PartSilent = "part-silent",
    /// It answers again.
    PartAnswers = "part-answers",
    /// A user asked to end a machine.
    StopAsked = "stop-asked",
    /// The connection to a machine's process was lost.
    WorkerSilent = "worker-silent",
    /// The balancer decided a move (`keel why`).
    BalanceDecided = "balance-decided",
    /// A node has been pressed for long, and no move would help.
    BalanceHelpless = "balance-helpless",
    /// The kernel ended a machine's process for want of memory.
    OutOfMemory = "out-of-memory",
    /// The process of a machine that is not to run here was ended.
    WorkerEnded = "worker-ended",
    /// A move away from here began.
    MoveStarted = "move-started",
    /// A user asked to cancel a move.
    MoveCancelled = "move-cancelled",
    /// This node takes in a machine that is offered to it.
    MoveAccepted = "move-accepted",
    /// This node does not take in a machine that is offered to it.
    MoveRefused = "move-refused",
    /// A machine was moved away from here.
    MoveDone = "move-done",
    /// A move away from here failed; the machine stays, or ended.
    MoveFailed = "move-failed",
    /// A move that an earlier agent began is taken up.
    MoveTakenUp = "move-taken-up",
    /// What had arrived of a machine was dropped.
    ArrivalDropped = "arrival-dropped",
    /// A checkpoint was made.
    CheckpointMade = "checkpoint-made",
    /// A checkpoint was not made.
    CheckpointFailed = "checkpoint-failed",
    /// Events were lost here: more came than could be written.
    EventsLost = "events-lost",
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One line of the answer to a question for events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventLine {
    /// An event.
    Event(Event),
    /// A node does not answer: its events are missing from here on.
    Silent(Silence),
    /// There are older events than those that follow or were told.
    OlderLeftOut,
}

/// A node that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    /// The node.
    pub node: String,
    /// Why.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_their_names_everywhere() {
        for kind in EventKind::ALL {
            let text = serde_json::to_string(kind).unwrap();
            assert_eq!(text, format!("{:?}", kind.name()));
            assert_eq!(serde_json::from_str::<EventKind>(&text).unwrap(), *kind);
            assert!(
                kind.name()
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
            );
        }
        let newer: EventKind = serde_json::from_str("\"machine-sings\"").unwrap();
        assert_eq!(newer, EventKind::Other);
    }

    #[test]
    fn lines_are_as_documented() {
        let text = r#"{"event":{"id":7,"at_unix_ms":5,"node":"a","kind":"node-started","text":"it started"}}"#;
        let line: EventLine = serde_json::from_str(text).unwrap();
        let EventLine::Event(event) = line else {
            panic!("{line:?}")
        };
        assert_eq!((event.id, event.machine, event.fields.len()), (7, None, 0));
        let silent: EventLine =
            serde_json::from_str(r#"{"silent":{"node":"c","reason":"gone"}}"#).unwrap();
        assert!(matches!(silent, EventLine::Silent(_)));
    }
}
