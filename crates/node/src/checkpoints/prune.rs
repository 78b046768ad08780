//! Deletes checkpoints that are not to be kept, and what writers left that were killed, when an
//! operator asks for it. What is kept of a running machine's checkpoints is decided when each is
//! made; a machine that is gone makes none.

use super::handle::{Checkpoints, check_retention, open, place, repository_error};
use crate::error::CommandError;
use crate::volumes::delete_snapshots;
use keel_api::{PruneInfo, PruneRequest, PrunedMachine};
use keel_cluster::MachineName;
use keel_machine::checkpoint::{Repository, Retention, snapshot_name};
use keel_machine::spec::Spec;
use keel_store::clock::unix_ms;

impl Checkpoints {
    /// Deletes what a request names, in the order of machines. What was deleted before an error
    /// stays deleted; the request can be repeated.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn prune(&self, request: PruneRequest) -> Result<PruneInfo, CommandError> {
        let retention = Retention {
            newest: request.keep,
            for_s: request.keep_for_s,
        };
        check_retention(retention)?;
        let url = place(&self.context, request.from.as_deref());
        self.refuse_replicas(&url)?;
        let repository = open(url).await?;
        let there = repository.machines().await;
        let there = there.map_err(|error| repository_error(&error))?;
        let machines = match &request.machine {
            None => there,
            Some(name) => {
                let name = MachineName::new(name)
                    .map_err(|error| CommandError::Invalid(format!("machine: {error}")))?;
                if !there.contains(&name) {
                    return Err(CommandError::NotFound(format!(
                        "machine {name:?} has no checkpoint in {}",
                        repository.url()
                    )));
                }
                vec![name]
            }
        };
        let mut info = PruneInfo {
            repository: repository.url().to_owned(),
            machines: Vec::new(),
            programs: 0,
            program_bytes: 0,
            images: 0,
            image_bytes: 0,
            message: None,
        };
        for machine in machines {
            let pruned = self.prune_one(&repository, &machine, retention, request.dry_run);
            info.machines.extend(pruned.await?);
        }
        if request.machine.is_none() {
            let kinds = &self.context.kinds;
            let images_of = |spec: &Spec| kinds.of(spec)?.images(spec);
            let pruned = repository.prune_shared(unix_ms(), images_of, request.dry_run);
            match pruned.await {
                Ok(pruned) => {
                    (info.programs, info.program_bytes) = (pruned.programs, pruned.program_bytes);
                    (info.images, info.image_bytes) = (pruned.images, pruned.image_bytes);
                }
                Err(error) => info.message = Some(format!("all programs and images stay: {error}")),
            }
        }
        Ok(info)
    }

    /// The in-sync sets in the store say what is kept among replicas.
    fn refuse_replicas(&self, url: &str) -> Result<(), CommandError> {
        let folder = url.strip_prefix("file://").unwrap_or(url);
        let replicas = self.context.dir.replicas();
        match std::path::Path::new(folder).starts_with(&replicas) {
            true => Err(CommandError::Invalid(format!(
                "{url} has the checkpoints of machines with high availability: the cluster deletes \
                 them itself"
            ))),
            false => Ok(()),
        }
    }

    async fn prune_one(
        &self,
        repository: &Repository,
        machine: &MachineName,
        retention: Retention,
        dry_run: bool,
    ) -> Result<Option<PrunedMachine>, CommandError> {
        let pruned = repository.prune(machine, retention, unix_ms(), dry_run);
        let pruned = pruned.await.map_err(|error| repository_error(&error))?;
        let ids = pruned.checkpoints.iter().chain(&pruned.unfinished);
        if !dry_run && ids.clone().next().is_some() {
            let snapshots: Vec<String> = ids.map(|id| snapshot_name(machine, id)).collect();
            delete_snapshots(&self.context, &snapshots).await?;
        }
        Ok((pruned.objects > 0).then(|| PrunedMachine {
            machine: machine.to_string(),
            checkpoints: pruned.checkpoints.iter().map(ToString::to_string).collect(),
            objects: pruned.objects,
            bytes: pruned.bytes,
        }))
    }
}
