//! Requests compared with the description of the API.
//!
//! - `recorder`: records what the command line and a node send each other
//! - `checker`: checks a recorded exchange against the description

mod checker;
mod recorder;

pub(crate) use checker::Description;
pub(crate) use recorder::{Exchange, Recorder};
