//! The HTTP API: its types, and a client. JSON over HTTP/1.1, on a Unix socket
//! of the node or over TLS with a token.
//!
//! `GET /v1/openapi.json` describes all requests in OpenAPI, with the role that each needs. It is made
//! from the handlers and from the types here. In short:
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`ClusterInfo`] |
//! | `GET /v1/failover` | [`NodeLoss`], each |
//! | `GET /healthz`, `/readyz`, `/metrics` | text, also without a token for the first two |
//! | `GET /v1/nodes` | list of [`NodeInfo`] |
//! | `GET /v1/store` | [`StoreInfo`] |
//! | `GET /v1/store/backup` | the file of a backup |
//! | `POST /v1/store/voters` [`VotersRequest`] | [`StoreInfo`]: the change begins |
//! | `GET /v1/machines`, `GET /v1/machines/NAME` | (list of) [`MachineInfo`] |
//! | `GET /v1/schedule/NODE` | list of machine names |
//! | `PUT /v1/images?kind=KIND` (a file that machines start from) | [`Uploaded`] |
//! | `GET /v1/image-files/HASH?kind=KIND` | [`Uploaded`]; 404 if it has to be uploaded |
//! | `GET /v1/images`, `GET /v1/images/NAME` | (list of) [`ImageInfo`] |
//! | `PUT /v1/images/NAME` [`ImageRequest`] | [`ImageInfo`] |
//! | `DELETE /v1/images/NAME` | `{}` |
//! | `POST /v1/machines` [`RunRequest`] | [`MachineInfo`] |
//! | `POST /v1/machines/NAME/start` (one that has ended) | [`MachineInfo`] |
//! | `POST /v1/machines/NAME/stop`, `/kill` | `{}` |
//! | `POST /v1/machines/NAME/execute` [`ExecuteRequest`] | lines of [`ExecuteLine`] |
//! | `POST /v1/machines/NAME/input` (what is typed into its console) | `{}` |
//! | `GET /v1/machines/NAME/system` (what its guest agent tells) | [`SystemInfo`] |
//! | `GET /v1/machines/NAME/display` (RFB over a WebSocket) | a [`WebSocket`] |
//! | `POST /v1/machines/NAME/move` [`MoveRequest`] | lines of [`MoveLine`] |
//! | `POST /v1/machines/NAME/dry-run` [`MoveRequest`] | [`DryRun`] |
//! | `POST /v1/machines/NAME/cancel-move` | `{}` |
//! | `POST /v1/machines/NAME/diff` [`RunRequest`] | [`MachineDiff`]; nothing is changed |
//! | `POST /v1/machines/NAME/set` [`SetRequest`] | [`MachineInfo`] |
//! | `DELETE /v1/machines/NAME` | `{}` |
//! | `POST /v1/agent/restart` | [`AgentRestart`]; the agent of the node that answers ends, and is started again |
//! | `POST /v1/checkpoints/prune` [`PruneRequest`] | [`PruneInfo`] |
//! | `GET /v1/checkpoints/quota?from=PLACE` | [`QuotaInfo`] |
//! | `POST /v1/checkpoints/quota` [`QuotaRequest`] | [`QuotaInfo`] |
//! | `GET /v1/machines/NAME/logs?from=N&follow=true` | the log, in the format of `keel_machine::log` |
//! | `GET /v1/machines/NAME/logs/offset?since=UNIX_MS` | [`LogOffset`] |
//! | `GET /v1/machines/NAME/files/stat?path=PATH` | [`FileStat`] |
//! | `GET /v1/machines/NAME/files?path=PATH&offset=N&length=N` | bytes, fewer at the end of the file |
//! | `PUT /v1/machines/NAME/files?path=PATH&offset=N&begin=true` (bytes; `begin` creates a file that must not exist) | `{}` |
//! | `DELETE /v1/machines/NAME/files?path=PATH` | `{}` |
//! | `POST /v1/machines/NAME/files/rename` [`RenameRequest`] | `{}` |
//! | `GET /v1/events?machine=NAME&since=UNIX_MS&limit=N&follow=true` | lines of [`EventLine`] |
//! | `GET /v1/balance` | [`BalanceInfo`] |
//! | `POST /v1/balance/policy` [`PolicyRequest`] | `{}` |
//! | `POST /v1/machines/NAME/confirm-move` | `{}`: a proposed move is made |
//! | `GET /v1/machines/NAME/why-not?to=NODE` | [`WhyNot`] |
//! | `GET /v1/nodes/NAME/history?since=UNIX_MS&until=UNIX_MS&points=N`, `GET /v1/machines/NAME/history?...` | [`HistoryInfo`] |
//! | `GET /v1/ledger?machine=NAME&since=UNIX_MS&until=UNIX_MS&limit=N` | [`LedgerInfo`] |
//! | `GET /v1/rules` | [`RulesInfo`] |
//! | `POST /v1/rules` (a rule) | `{}` |
//! | `DELETE /v1/rules/NAME` | `{}` |
//! | `POST /v1/labels` [`LabelRequest`] | all labels of that node or machine |
//! | `GET /v1/tokens` | list of [`TokenInfo`] |
//! | `POST /v1/tokens` [`TokenRequest`] | [`Token`] |
//! | `DELETE /v1/tokens/ID` | `{}` |
//! | `GET /v1/audit?since=UNIX_MS&limit=N` | list of [`AuditEntry`] |
//!
//! Errors are [`Problem`]s with status 4xx for causes that the user can remove and 5xx for others.
//!
//! - `cluster`: the cluster and its nodes
//! - `machine`: machines, and what is requested of one
//! - `image`: images of disks that have a name
//! - `execute`: commands in machines
//! - `moves`: moves of machines, and their predictions
//! - `parts`: the parts, threads and objects of a spanning machine
//! - `checkpoint`: checkpoints, and machines restored from them
//! - `volume`: volumes and their files
//! - `balance`: balancing, drains, plans and rules
//! - `event`: what happened
//! - `history`: loads over time
//! - `token`: tokens for nodes and users
//! - `audit`: who did what
//! - `client`: the client
//!
//! Errors, failpoints and the answer without content are in this file.

#![forbid(unsafe_code)]

mod audit;
mod authority;
mod balance;
mod checkpoint;
mod client;
mod cluster;
mod event;
mod execute;
mod history;
mod image;
mod machine;
mod moves;
mod parts;
mod system;
mod token;
mod volume;
mod web_socket;

pub use audit::{AUDIT_DEFAULT, AUDIT_MAX, AuditEntry};
pub use authority::{AuthorityChange, AuthorityInfo, CertificateInfo, TrustedAuthority};
pub use balance::{
    BalanceInfo, DrainInfo, DrainRequest, DrainState, LEDGER_DEFAULT, LEDGER_MAX, LabelRequest,
    LedgerInfo, LeftBehind, NodeLoad, PeerTraffic, PlanGoal, PlanInfo, PlanLine, PlanRequest,
    PlanStep, PlannedMachine, PolicyRequest, RulesInfo, WhyNot,
};
pub use checkpoint::{
    CheckpointInfo, CheckpointRequest, PruneInfo, PruneRequest, PrunedMachine, QuotaInfo,
    QuotaRequest, RestoreRequest,
};
pub use client::{Client, ClientError, Lines, path};
pub use cluster::{
    AgentRestart, ClusterInfo, GivenUp, NodeInfo, NodeLoss, StoreInfo, VoterInfo, VotersRequest,
};
pub use event::{EVENTS_DEFAULT, EVENTS_MAX, Event, EventKind, EventLine, Silence};
pub use execute::{ExecuteEnd, ExecuteLine, ExecuteRequest};
pub use history::{HISTORY_DEFAULT, HISTORY_MAX, HistoryInfo, HistoryPoint, history_in_points};
pub use image::{ImageCopy, ImageInfo, ImageRequest};
pub use machine::{
    CheckpointChange, FieldChange, HighAvailabilityChange, LogOffset, MachineDiff, MachineInfo,
    RunRequest, SetRequest, StartPhaseInfo, Uploaded,
};
pub use moves::{DryRun, MoveLine, MoveRequest, Urgency};
pub use parts::{
    ObjectInfo, ObjectMoved, PartInfo, PartMemoryInfo, PartsInfo, SpanRequest, ThreadInfo,
    ThreadMove, object_range, object_range_name,
};
pub use system::{FileSystemInfo, InterfaceInfo, SystemInfo};
pub use token::{Token, TokenInfo, TokenRequest, TokenUseInfo};
pub use volume::{
    ClusterVolumeInfo, FileStat, RenameRequest, VolumeContent, VolumeCreateRequest, VolumeInfo,
    VolumeRequest,
};
pub use web_socket::WebSocket;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The error, its object, and the remedy.
    pub error: String,
}

/// Sets or clears a failpoint; only nodes that were built for tests support it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FailpointRequest {
    /// Its name.
    pub name: String,
    /// `kill`, `stop`, `error` or `delay(MILLISECONDS)`, with an optional suffix `@N` or `*`;
    /// clears the failpoint if absent.
    #[serde(default)]
    pub order: Option<String>,
}

/// An answer without content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Nothing {}
