//! A node whose own copy of a machine's checkpoint is damaged cannot restart the machine from it, and
//! would try that again and again. So what is damaged is put aside, and the next attempt fetches it
//! from another node that has the checkpoint.

use super::super::handle::{Checkpoints, open};
use crate::error::CommandError;
use crate::events::Note;
use crate::records;
use keel_cluster::MachineName;
use keel_machine::checkpoint::CheckpointId;
use keel_machine::high_availability::HighAvailability;
use std::path::PathBuf;
use tokio::runtime::Handle;

/// Suffix of what is put aside, which no part of a checkpoint has.
const DAMAGED: &str = "damaged";

impl Checkpoints {
    /// Looks through the copy of the checkpoint from which a machine did not start here, and puts
    /// aside what of it is damaged, if another node has the checkpoint too.
    pub(crate) async fn put_damage_aside(&self, machine: &MachineName, ha: &HighAvailability) {
        if ha.to.is_some() {
            return;
        }
        match self.try_put_damage_aside(machine).await {
            Ok(None) => {}
            Ok(Some(what)) => {
                tracing::warn!(%machine, what);
                let told = Note::checkpoint(machine, &Err(CommandError::Conflict(what)));
                self.context.events.record(told);
            }
            Err(error) => {
                tracing::warn!(%machine, error, "its checkpoint here cannot be looked through");
            }
        }
    }

    /// What was put aside, in a sentence; `None` if nothing is damaged.
    async fn try_put_damage_aside(&self, machine: &MachineName) -> Result<Option<String>, String> {
        let set = records::in_sync_set(&*self.context.store, machine).await;
        let Some((set, _)) = set.map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        let is_elsewhere = set.members.iter().any(|node| *node != self.context.name);
        let Some(checkpoint) = set.checkpoint.filter(|_| is_elsewhere) else {
            return Ok(None);
        };
        let url = self.context.dir.replicas().display().to_string();
        let repository = open(url).await.map_err(|error| error.to_string())?;
        let (runtime, of, id) = (Handle::current(), machine.clone(), checkpoint.clone());
        let moved = tokio::task::spawn_blocking(move || {
            let damaged = repository.damaged_files(&runtime, &of, &id);
            let damaged = damaged.map_err(|error| error.to_string())?;
            put_aside(damaged)
        });
        let moved = moved.await.map_err(|error| error.to_string())??;
        Ok(told(&checkpoint, &moved))
    }
}

fn told(checkpoint: &CheckpointId, moved: &[String]) -> Option<String> {
    (!moved.is_empty()).then(|| {
        format!(
            "this node's copy of checkpoint {checkpoint} is damaged ({}): it is fetched again from another node",
            moved.join(", ")
        )
    })
}

/// Renames files; returns the names of those that are there. Blocks.
fn put_aside(files: Vec<PathBuf>) -> Result<Vec<String>, String> {
    let mut moved = Vec::new();
    for file in files.iter().filter(|file| file.exists()) {
        let name = file.file_name().and_then(|name| name.to_str());
        let name = name.unwrap_or_default();
        let aside = file.with_file_name(format!("{name}.{DAMAGED}"));
        let renamed = std::fs::rename(file, aside);
        renamed.map_err(|error| format!("{}: {error}", file.display()))?;
        moved.push(name.to_owned());
    }
    Ok(moved)
}
