//! Commands in machines: requests, and the lines of their answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A command to execute in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecuteRequest {
    /// A program, by its path in the machine or by a name that is searched for there.
    pub command: String,
    /// Its arguments, without its own name.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// Its whole environment as `NAME=VALUE`; that of the guest agent if empty.
    #[serde(default)]
    pub environment: Vec<String>,
    /// Its standard input, in Base64 (RFC 4648, section 4): at most 1 MiB of bytes.
    #[serde(default)]
    pub input: String,
}

/// How a command in a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecuteEnd {
    /// Its exit code, if it ended by itself.
    pub exit_code: Option<i32>,
    /// The number of the signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Its standard output in Base64: the first 1 MiB.
    pub output: String,
    /// Its standard error output in Base64: the first 1 MiB.
    pub error_output: String,
    /// Whether it printed more.
    pub is_cut: bool,
}

/// One line of the answer to a command in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ExecuteLine {
    /// It was started, and how it ended is not known yet.
    Running,
    /// It has ended.
    Ended(ExecuteEnd),
    /// How it ends will not be known.
    Error(String),
}
