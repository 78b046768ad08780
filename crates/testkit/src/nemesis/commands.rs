//! Users' commands while faults are injected. Each must be answered; what was accepted must end, and
//! what was acknowledged must hold once the faults are repaired.

use crate::requests::program;
use crate::{Guest, LocalCluster, wait_for};
use anyhow::{Result, ensure};
use keel_api::{Client, MachineInfo, SetRequest};
use keel_kind_wasm::WasmKind;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Lines of a machine that ends by itself, a millisecond apart.
const SHORT_LINES: &str = "100";

/// What users asked for. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Commands(Arc<Mutex<Asked>>);

#[derive(Debug, Default)]
struct Asked {
    /// Counts machines and values, so that each is another one.
    count: u32,
    /// Machines that end by themselves, and whether the request was accepted.
    short: BTreeMap<String, bool>,
    /// What each machine's `cpu.target` may be: what was acknowledged last, and what was asked for
    /// since without an answer.
    targets: BTreeMap<&'static str, Vec<Option<u32>>>,
}

impl Commands {
    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> u32 {
        let mut asked = self.asked();
        asked.count += 1;
        asked.count
    }

    /// Starts a machine that ends by itself.
    pub(super) async fn run(self, client: Client, on: String, module: Arc<[u8]>) {
        let name = format!("short-{}", self.next());
        // Whoever asked may never learn whether it was accepted.
        self.asked().short.insert(name.clone(), false);
        let args = ["-", "1", "1000", SHORT_LINES];
        let guest = Guest::new(&name, &on, &module, &args);
        let Ok(kind_spec) = program(&client, &guest).await else {
            return;
        };
        let request = guest.request((WasmKind::kind_name(), kind_spec));
        let started: Result<MachineInfo, _> = client.post("/v1/machines", &request).await;
        if started.is_ok() {
            self.asked().short.insert(name, true);
        }
    }

    /// Changes a machine's spec.
    pub(super) async fn set(self, client: Client, machine: &'static str) {
        let value = self.next();
        {
            let mut asked = self.asked();
            let possible = asked.targets.entry(machine).or_insert(vec![None]);
            possible.push(Some(value));
        }
        let request = SetRequest {
            cpu_target_millis: Some(value),
            ..SetRequest::default()
        };
        let path = format!("/v1/machines/{machine}/set");
        let answer: Result<serde::de::IgnoredAny, _> = client.post(&path, &request).await;
        if answer.is_ok() {
            self.asked().targets.insert(machine, vec![Some(value)]);
        }
    }

    /// Waits until all that was accepted has ended, removes it, and compares what was acknowledged.
    ///
    /// # Errors
    /// A machine that was accepted is lost or does not end, or a change was undone.
    pub(super) async fn settle(&self, cluster: &LocalCluster, ask: &str) -> Result<()> {
        let short = std::mem::take(&mut self.asked().short);
        for (name, is_accepted) in short {
            let ended = wait_for(&format!("{name} ends"), || async {
                let all: Vec<MachineInfo> = cluster.client(ask).get("/v1/machines").await.ok()?;
                match all.into_iter().find(|it| it.name == name) {
                    Some(info) => (!info.is_live()).then_some(true),
                    None => Some(false),
                }
            })
            .await?;
            ensure!(ended || !is_accepted, "{name} was accepted, and is lost");
            if ended {
                cluster.remove(ask, &name).await?;
            }
        }
        let targets = self.asked().targets.clone();
        for (machine, possible) in targets {
            let info = cluster.inspect(ask, machine).await?;
            let now = info.balancing.cpu_target_millis;
            ensure!(
                possible.contains(&now),
                "{machine} has the target {now:?}, but {possible:?} was acknowledged or asked for"
            );
            self.asked().targets.insert(machine, vec![now]);
        }
        Ok(())
    }
}
