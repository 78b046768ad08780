//! The processes of this node's machines: starting them, finding them again,
//! speaking to them.

use crate::state_dir::StateDir;
use keel_cluster::MachineName;
use keel_machine::worker::SOCKET;
use keel_machine::worker::control::{Report, State, kind, pack, unpack};
use keel_net::{Client, Options, RpcError, rpc::StreamReceiver};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::net::UnixStream;

/// How long a new worker has until it answers.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long a worker may take for what takes no time.
pub(crate) const PROMPT: Duration = Duration::from_secs(10);
/// How long it may take to compile a module.
pub(crate) const COMPILE_PATIENCE: Duration = Duration::from_secs(1800);

/// A worker that answers.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    client: Client,
    /// Tells it from earlier and later workers of the same machine.
    id: u64,
}

impl Worker {
    /// Connects to the worker whose folder this is.
    pub(crate) async fn connect(folder: &Path) -> Result<Self, String> {
        let path = folder.join(SOCKET);
        let stream = UnixStream::connect(&path)
            .await
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let place = path.display().to_string();
        let client = Client::over(stream, "worker", &place, Options::default())
            .await
            .map_err(|error| error.to_string())?;
        Ok(Worker {
            client,
            id: rand::random(),
        })
    }

    pub(crate) async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: u16,
        question: &Q,
        patience: Duration,
    ) -> Result<A, RpcError> {
        let answer = self.client.call(kind, pack(question)?, patience).await?;
        unpack(&answer)
    }

    pub(crate) async fn stream<Q: Serialize>(
        &self,
        kind: u16,
        question: &Q,
    ) -> Result<StreamReceiver, RpcError> {
        self.client.stream(kind, pack(question)?).await
    }

    pub(crate) async fn report(&self) -> Result<Report, RpcError> {
        self.ask(kind::REPORT, &(), PROMPT).await
    }

    pub(crate) async fn state(&self) -> Result<State, RpcError> {
        Ok(self.report().await?.state)
    }

    /// Ends the process.
    pub(crate) async fn forget(&self) {
        // It may have ended already.
        let _: Result<(), _> = self.ask(kind::FORGET, &(), PROMPT).await;
    }
}

/// All workers of this node.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    table: Mutex<HashMap<MachineName, Worker>>,
}

impl Workers {
    fn table(&self) -> MutexGuard<'_, HashMap<MachineName, Worker>> {
        self.table.lock().unwrap_or_else(|error| error.into_inner())
    }

    pub(crate) fn get(&self, machine: &MachineName) -> Option<Worker> {
        self.table().get(machine).cloned()
    }

    pub(crate) fn names(&self) -> Vec<MachineName> {
        self.table().keys().cloned().collect()
    }

    fn remove(&self, machine: &MachineName) -> Option<Worker> {
        self.table().remove(machine)
    }

    /// Takes this very worker out: a machine that left and came back has
    /// another one. False if it was not there any more.
    pub(crate) fn remove_exactly(&self, machine: &MachineName, worker: &Worker) -> bool {
        let mut table = self.table();
        let same = table
            .get(machine)
            .is_some_and(|known| known.id == worker.id);
        if same {
            table.remove(machine);
        }
        same
    }

    /// Finds the workers that an earlier agent started.
    pub(crate) async fn adopt(&self, dir: &StateDir) {
        let Ok(entries) = std::fs::read_dir(dir.workers()) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(machine) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match Worker::connect(&entry.path()).await {
                Ok(worker) => {
                    tracing::info!(%machine, "found its worker running");
                    self.table().insert(machine, worker);
                }
                Err(error) => tracing::debug!(%machine, error, "no worker runs in its folder"),
            }
        }
    }

    /// Starts a worker for a machine that has none here. What an earlier one
    /// left in the machine's folder is removed.
    pub(crate) async fn start(
        self: &Arc<Self>,
        dir: &StateDir,
        machine: &MachineName,
    ) -> Result<Worker, String> {
        if self.get(machine).is_some() {
            return Err(format!(
                "machine {machine:?} has a worker on this node already"
            ));
        }
        let folder = dir.worker(machine);
        let fail = |what: &str, error: std::io::Error| format!("{what}: {error}");
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(fail("an earlier folder of the machine", error));
            }
            _ => {}
        }
        std::fs::create_dir_all(&folder).map_err(|error| fail("the machine's folder", error))?;
        let log = std::fs::File::create(folder.join("worker.log"))
            .map_err(|error| fail("the worker's log", error))?;
        let program = std::env::current_exe().map_err(|error| fail("this program", error))?;
        let mut command = tokio::process::Command::new(program);
        command
            .arg("worker")
            .arg("--folder")
            .arg(&folder)
            .arg("--cache")
            .arg(dir.cache())
            .arg("--programs")
            .arg(dir.programs())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // It outlives the agent, and a Ctrl-C at the agent's terminal.
            .process_group(0);
        let mut child = command.spawn().map_err(|error| fail("a worker", error))?;
        let deadline = tokio::time::Instant::now() + START_PATIENCE;
        let worker = loop {
            match Worker::connect(&folder).await {
                Ok(worker) => break worker,
                Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
                Err(_) => {}
            }
            if let Ok(Some(status)) = child.try_wait() {
                let log = std::fs::read_to_string(folder.join("worker.log")).unwrap_or_default();
                return Err(format!(
                    "the worker ended at once ({status}): {}",
                    log.trim()
                ));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        tokio::spawn(async move {
            // Reaped here while this agent lives, else by the system.
            let _ = child.wait().await;
        });
        self.table().insert(machine.clone(), worker.clone());
        Ok(worker)
    }

    /// Ends a machine's worker and removes its folder.
    pub(crate) async fn forget(&self, dir: &StateDir, machine: &MachineName) {
        if let Some(worker) = self.remove(machine) {
            worker.forget().await;
        }
        let folder = dir.worker(machine);
        if let Err(error) = std::fs::remove_dir_all(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, folder = %folder.display(), "a machine's folder stays");
        }
    }
}
