//! Why a command was not carried out, as the protocol says it.

use serde_json::{Value, json};
use std::fmt::Display;

/// An error of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    class: &'static str,
    reason: String,
}

impl Failure {
    /// The command is not known.
    pub(crate) fn unknown_command(command: &str) -> Self {
        Failure {
            class: "CommandNotFound",
            reason: format!("The command {command} has not been found"),
        }
    }

    /// Any other one.
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Failure {
            class: "GenericError",
            reason: reason.into(),
        }
    }

    /// As an answer has it.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "class": self.class, "desc": self.reason })
    }
}

impl<T: Display> From<T> for Failure {
    fn from(error: T) -> Self {
        Failure::new(error.to_string())
    }
}
