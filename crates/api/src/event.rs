//! Events: changes of machines, moves, checkpoints and nodes, reported by the node on which they
//! happened.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Default number of events of an answer.
pub const EVENTS_DEFAULT: u32 = 1000;
/// The most events of an answer.
pub const EVENTS_MAX: u32 = 10_000;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Increases with each event of the same node, also across restarts of its agent.
    pub id: u64,
    /// Time by the node's wall clock, in milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// The node that reports it.
    pub node: String,
    /// The machine concerned.
    #[serde(default)]
    pub machine: Option<String>,
    /// The machine's epoch.
    #[serde(default)]
    pub epoch: Option<String>,
    /// The kind of event.
    pub kind: EventKind,
    /// A sentence for users.
    pub text: String,
    /// The same data for programs.
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $kind:ident = $name:literal,)+) => {
        /// Kinds of events. Their names are stable: programs may rely on them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $kind,)+
            /// A kind of a newer version that this one does not know.
            #[serde(other, rename = "other")]
            Other,
        }

        impl EventKind {
            /// All kinds that this version reports.
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
    /// A node's agent was stopped on request.
    NodeStopped = "node-stopped",
    /// A node's agent restarts on request; its machines run on.
    AgentRestarts = "agent-restarts",
    /// A node renews its lease; reported by the node with the store.
    NodeAlive = "node-alive",
    /// A node no longer renews its lease; reported by the node with the store.
    NodeAway = "node-away",
    /// This node has a lease.
    LeaseTaken = "lease-taken",
    /// This node's lease was not renewed in time; it keeps trying.
    LeaseLate = "lease-late",
    /// This node's lease is renewed again.
    LeaseRenewed = "lease-renewed",
    /// This node's lease ended.
    LeaseLost = "lease-lost",
    /// A machine was inserted into a node's schedule.
    MachineScheduled = "machine-scheduled",
    /// A machine was started, from its module or a checkpoint.
    MachineStarted = "machine-started",
    /// A machine that was moved runs here.
    MachineArrived = "machine-arrived",
    /// All memory of a machine that already ran here has arrived.
    MachineFilled = "machine-filled",
    /// The agent started, and found the machine running.
    MachineFound = "machine-found",
    /// A machine ended, and is to be restarted.
    MachineRestarting = "machine-restarting",
    /// A machine ended by itself.
    MachineExited = "machine-exited",
    /// A machine was ended by a trap of its program.
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
    /// A part of a machine does not answer its home; requests to it wait.
    PartSilent = "part-silent",
    /// The part answers again.
    PartAnswers = "part-answers",
    /// A user stopped a machine.
    StopAsked = "stop-asked",
    /// The connection to a machine's process was lost.
    WorkerSilent = "worker-silent",
    /// The balancer decided a move (`keel why`).
    BalanceDecided = "balance-decided",
    /// A node has been overloaded for long, and no move would help.
    BalanceHelpless = "balance-helpless",
    /// The kernel killed a machine's process for lack of memory.
    OutOfMemory = "out-of-memory",
    /// The process of a machine that is not scheduled here was ended.
    WorkerEnded = "worker-ended",
    /// A move away from here began.
    MoveStarted = "move-started",
    /// A user asked to cancel a move.
    MoveCancelled = "move-cancelled",
    /// This node accepts a machine that is offered to it.
    MoveAccepted = "move-accepted",
    /// This node refuses a machine that is offered to it.
    MoveRefused = "move-refused",
    /// A machine was moved away from here.
    MoveDone = "move-done",
    /// A move away from here failed; the machine stays, or ended.
    MoveFailed = "move-failed",
    /// A move that an earlier agent began is continued.
    MoveTakenUp = "move-taken-up",
    /// The incomplete copy of a machine was dropped.
    ArrivalDropped = "arrival-dropped",
    /// A checkpoint was made.
    CheckpointMade = "checkpoint-made",
    /// A checkpoint was not made.
    CheckpointFailed = "checkpoint-failed",
    /// Other nodes than before have the newest checkpoint of a machine with high availability.
    CheckpointReplicated = "checkpoint-replicated",
    /// A machine of a node that failed was given to another node.
    MachineFailedOver = "machine-failed-over",
    /// A machine of a node that failed cannot be restarted elsewhere at present.
    FailoverWaits = "failover-waits",
    /// Events were lost here: the disk was too slow.
    EventsLost = "events-lost",
}

// Derived, it would have the names of the variants.
impl PartialSchema for EventKind {
    fn schema() -> RefOr<Schema> {
        let names = Self::ALL.iter().chain([&EventKind::Other]);
        let about = "The kind of an event. The names are stable: programs may rely on them, and must \
            accept names of newer versions.";
        let kind = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some(about))
            .enum_values(Some(names.map(|kind| kind.name())));
        kind.into()
    }
}

impl ToSchema for EventKind {}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One line of the answer to an event query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventLine {
    /// An event.
    Event(Event),
    /// A node does not answer: its events are missing from here on.
    Silent(Silence),
    /// There are older events than those of this answer.
    OlderLeftOut,
}

/// A node that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Silence {
    /// The node.
    pub node: String,
    /// The reason.
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
