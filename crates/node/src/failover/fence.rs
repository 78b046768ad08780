//! The operator's fencing program: for what no receiver can refuse, such as writes to `host:`
//! directories. It makes certain that a node is off, by IPMI, a power switch or the API of a cloud
//! (as STONITH does in Pacemaker), before a machine of that node begins elsewhere.
//!
//! It is a file of each node, named `fence-node` in its state folder, because no program comes from
//! another node. It gets the name of the node that failed as its argument, and says by status 0 that
//! nothing runs there any more. It may be started again for the same node, also by another node.

use crate::processes::spawn;
use keel_cluster::NodeName;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// The program's name in the state folder.
const NAME: &str = "fence-node";
/// The longest time for which it may run; then it is killed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause after it failed.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Characters of what it says that are told.
const SAID_CHARS_MAX: usize = 200;

/// The fencing program in a state folder.
pub(crate) fn program(state_dir: &Path) -> PathBuf {
    state_dir.join(NAME)
}

/// Nodes that failed, as the fencing program sees them.
#[derive(Default)]
pub(super) struct Fences(BTreeMap<NodeName, State>);

enum State {
    Runs(JoinHandle<Result<(), String>>),
    Failed { reason: String, at: Instant },
    Off,
}

/// Whether a node is certainly off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fenced {
    Yes,
    /// Not yet.
    Pending,
    /// The program failed, for this reason, and is tried again.
    Failed(String),
}

impl Fences {
    /// Forgets nodes that are alive again.
    pub(super) fn forget(&mut self, alive: &BTreeSet<NodeName>) {
        self.0.retain(|node, _| !alive.contains(node));
    }

    /// Starts the program for a node that failed, unless that was done, and says how far it is.
    pub(super) async fn fence(&mut self, program: &Path, node: &NodeName) -> Fenced {
        let state = self.0.remove(node);
        let state = match state {
            Some(State::Runs(task)) if task.is_finished() => match task.await {
                Ok(Ok(())) => State::Off,
                Ok(Err(reason)) => State::Failed {
                    reason,
                    at: Instant::now(),
                },
                Err(error) => State::Failed {
                    reason: error.to_string(),
                    at: Instant::now(),
                },
            },
            Some(State::Failed { at, .. }) if at.elapsed() >= RETRY_AFTER => begin(program, node),
            Some(state) => state,
            None => begin(program, node),
        };
        let fenced = match &state {
            State::Runs(_) => Fenced::Pending,
            State::Failed { reason, .. } => Fenced::Failed(reason.clone()),
            State::Off => Fenced::Yes,
        };
        self.0.insert(node.clone(), state);
        fenced
    }
}

fn begin(program: &Path, node: &NodeName) -> State {
    tracing::warn!(%node, program = %program.display(), "fencing a node that failed");
    State::Runs(tokio::spawn(run(program.to_owned(), node.clone())))
}

async fn run(program: PathBuf, node: NodeName) -> Result<(), String> {
    let shown = program.display();
    let mut command = Command::new(&program);
    command
        .arg(node.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let running = async { spawn(command).await?.wait_with_output().await };
    let ended = tokio::time::timeout(PATIENCE, running).await;
    let ended = ended.map_err(|_| format!("{shown} did not end within {PATIENCE:?}"))?;
    let ended = ended.map_err(|error| format!("{shown} cannot be started: {error}"))?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let said: String = said.trim().chars().take(SAID_CHARS_MAX).collect();
    Err(format!("{shown} ended with {}: {said}", ended.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn until_settled(fences: &mut Fences, program: &Path, node: &NodeName) -> Fenced {
        loop {
            match fences.fence(program, node).await {
                Fenced::Pending => tokio::task::yield_now().await,
                settled => return settled,
            }
        }
    }

    #[tokio::test]
    async fn a_node_is_off_only_when_the_program_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = program(folder.path());
        let node: NodeName = "a".parse().unwrap();
        let mut fences = Fences::default();
        let Fenced::Failed(reason) = until_settled(&mut fences, &path, &node).await else {
            panic!("there is no program");
        };
        assert!(reason.contains("cannot be started"), "{reason}");
        let script = "#!/bin/sh\necho \"$1 answers no switch\" >&2\ntest -e \"$0.off\"\n";
        let written = folder.path().join("script");
        std::fs::write(&written, script).unwrap();
        // By another process: what this one has open for writing, or a fork of it, cannot be run.
        let mut install = std::process::Command::new("install");
        install.args(["-m", "755"]).args([&written, &path]);
        assert!(install.status().unwrap().success());
        let other: NodeName = "b".parse().unwrap();
        let Fenced::Failed(reason) = until_settled(&mut fences, &path, &other).await else {
            panic!("it ends with 1");
        };
        assert!(reason.contains("b answers no switch"), "{reason}");
        // Not again at once.
        assert!(matches!(
            fences.fence(&path, &other).await,
            Fenced::Failed(_)
        ));
        std::fs::write(path.with_file_name("fence-node.off"), "").unwrap();
        let third: NodeName = "c".parse().unwrap();
        assert_eq!(until_settled(&mut fences, &path, &third).await, Fenced::Yes);
        assert_eq!(fences.fence(&path, &third).await, Fenced::Yes);
        // Whoever came back may fail again.
        fences.forget(&BTreeSet::from([third.clone()]));
        assert_eq!(fences.fence(&path, &third).await, Fenced::Pending);
    }
}
