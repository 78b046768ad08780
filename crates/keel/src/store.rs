//! `keel store` and `keel recover`: who holds the store, its backups, and its end without a quorum.

use crate::cluster::Reach;
use crate::input;
use crate::output;
use crate::up::StoreArgs;
use anyhow::{Context, Result, bail, ensure};
use keel_api::{StoreInfo, VotersRequest};
use keel_node::Rebuilt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What is asked of the store.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum StoreCommand {
    /// Shows the voters, and which of them leads.
    Status,
    /// Says how many nodes shall hold the store: 1, 3, 5, or auto.
    ///
    /// `auto`: 3 from 3 nodes on, 5 from 7 on. With 3 voters the store survives the loss of one,
    /// with 5 of two. The leader carries it out while everything goes on.
    Voters {
        /// 1, 3, 5 or auto.
        count: String,
    },
    /// Writes the whole store to a file, from any node, while everything goes on.
    ///
    /// The file has the cluster's secrets in it (tokens as hashes). With --server it needs a token
    /// of role admin.
    Backup {
        /// The file; it must not exist.
        file: PathBuf,
    },
    /// Begins the store anew on this computer's node with the content of a backup. The node must
    /// be down, and must have been a voter.
    ///
    /// Whatever was changed since the backup is forgotten. Other nodes that held the store must
    /// not run again with their copies: remove their state folders, and let them join again.
    Restore {
        /// The file of `keel store backup`.
        file: PathBuf,
        /// Says that no other voter of the old store runs or will run again.
        #[arg(long)]
        others_are_lost: bool,
    },
    /// Moves the store out of this computer's node into an etcd.
    ///
    /// First `keel store voters 1`, then `keel down` on the node that `keel store status` names,
    /// and this there. Machines run on meanwhile. Then start each node with `keel down` and `keel up
    /// --store ADDRESS`, within ten minutes: until then no node counts as failed. May be repeated
    /// after an error.
    Migrate(StoreArgs),
}

#[derive(clap::Args)]
pub(crate) struct RecoverArgs {
    /// Says that the other voters are lost for good, and will never run again with their state.
    #[arg(long)]
    others_are_lost: bool,
}

pub(crate) async fn run(reach: &Reach, what: Option<StoreCommand>) -> Result<ExitCode> {
    match &what {
        Some(StoreCommand::Backup { file }) => return backup(reach, file).await,
        Some(StoreCommand::Restore {
            file,
            others_are_lost,
        }) => return restore(reach, file, *others_are_lost).await,
        Some(StoreCommand::Migrate(to)) => return migrate(reach, to).await,
        _ => {}
    }
    let client = reach.client()?;
    let info: StoreInfo = match what {
        Some(StoreCommand::Voters { count }) => {
            let request = VotersRequest { count };
            client.post("/v1/store/voters", &request).await?
        }
        _ => client.get("/v1/store").await?,
    };
    let name = info.revision.to_string();
    output::one(reach.format(), &info, &name, |info| {
        let voters = info.voters.iter().map(|voter| {
            format!(
                "  {} at {}{}{}",
                voter.node,
                voter.address,
                if voter.leads { ", leads" } else { "" },
                match (voter.alive, voter.closed) {
                    (false, _) => ", away",
                    (true, true) => ", its copy is closed",
                    (true, false) => "",
                },
            )
        });
        let voters: Vec<String> = voters.collect();
        if let Some(address) = &info.external {
            let names: Vec<&str> = info.voters.iter().map(|it| it.node.as_str()).collect();
            return format!(
                "revision {}\nat {address}\nnodes that admit others: {}",
                info.revision,
                names.join(", ")
            );
        }
        format!(
            "revision {}, term {}\nvoters ({} wanted):\n{}\nmay fail: {}",
            info.revision,
            info.term,
            info.wanted,
            voters.join("\n"),
            match info.spare {
                0 => "none; the store answers only while all that are left do".to_owned(),
                spare => format!("{spare}"),
            },
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn backup(reach: &Reach, file: &Path) -> Result<ExitCode> {
    let mut answer = reach.client()?.get_stream("/v1/store/backup").await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    let backup = keel_store::Backup::decode(&bytes).context("the node's answer")?;
    let shown = file.display();
    let mut created = std::os::unix::fs::OpenOptionsExt::mode(
        std::fs::OpenOptions::new().write(true).create_new(true),
        0o600,
    )
    .open(file)
    .with_context(|| format!("{shown}"))?;
    created
        .write_all(&bytes)
        .and_then(|()| created.sync_all())
        .with_context(|| format!("{shown}"))?;
    outln!(
        "{} entries of revision {} are in {shown}",
        backup.entries.len(),
        backup.revision
    );
    Ok(ExitCode::SUCCESS)
}

async fn restore(reach: &Reach, file: &Path, others_are_lost: bool) -> Result<ExitCode> {
    check_confirmed(reach, others_are_lost)?;
    let bytes = input::read(file, input::BACKUP_BYTES_MAX)
        .with_context(|| format!("{}", file.display()))?;
    let rebuilt = keel_node::restore(&reach.state_dir(), &bytes).await?;
    tell(&rebuilt);
    Ok(ExitCode::SUCCESS)
}

async fn migrate(reach: &Reach, to: &StoreArgs) -> Result<ExitCode> {
    check_local(reach)?;
    let to = to.external()?;
    let to = to.context("where to? Name an etcd: --store etcd://HOST:PORT/PREFIX")?;
    let moved = keel_node::migrate(&reach.state_dir(), &to).await?;
    outln!(
        "the store is at {} now: incarnation {}, revision {}. Start this node with `keel up`, and the \
         others with `keel down` and `keel up --store {}`",
        to.address,
        moved.incarnation,
        moved.revision,
        to.address
    );
    if let Some(old) = &moved.old {
        outln!("the old copy is in {}", old.display());
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn recover(reach: &Reach, args: &RecoverArgs) -> Result<ExitCode> {
    check_confirmed(reach, args.others_are_lost)?;
    let rebuilt = keel_node::recover(&reach.state_dir()).await?;
    tell(&rebuilt);
    Ok(ExitCode::SUCCESS)
}

fn check_local(reach: &Reach) -> Result<()> {
    ensure!(
        !reach.is_remote(),
        "this changes the node of this computer: leave --server, and name its folder with --state-dir"
    );
    Ok(())
}

fn check_confirmed(reach: &Reach, others_are_lost: bool) -> Result<()> {
    check_local(reach)?;
    if !others_are_lost {
        bail!(
            "two stores of one cluster would both start its machines. If the other voters can run \
             again, start them instead: most of them suffice. If they are lost for good, say so \
             with --others-are-lost, and never start them again with their state"
        );
    }
    Ok(())
}

fn tell(rebuilt: &Rebuilt) {
    if rebuilt.is_external {
        outln!(
            "the store has incarnation {} now, at revision {}. `keel up` starts the nodes",
            rebuilt.incarnation,
            rebuilt.revision
        );
        return;
    }
    outln!(
        "node {} has the store alone now: revision {}, incarnation {}. `keel up` starts it",
        rebuilt.node,
        rebuilt.revision,
        rebuilt.incarnation
    );
    for other in &rebuilt.others {
        outln!(
            "node {other} must never run again with its state: remove its folder and join it anew"
        );
    }
    if let Some(old) = &rebuilt.old {
        outln!("the old copy is in {}", old.display());
    }
}
