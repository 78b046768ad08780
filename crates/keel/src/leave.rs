//! `keel leave` and `keel node rm`: nodes that are no members of the cluster any more.

use crate::cluster::Reach;
use crate::down;
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use hyper::Method;
use keel_api::{Client, ClusterInfo, GivenUp, Nothing, path};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Subcommand)]
pub(crate) enum NodeCommand {
    /// Removes nodes that are gone for good from the cluster.
    ///
    /// They have no machines in their schedules any more. What they kept of the cluster is refused from
    /// then on, should they come back. A node that is alive leaves by `keel leave`.
    ///
    /// Machines without high availability wait for their node: only you can know that it is dead.
    /// With --node-is-dead they are given up, and fail. If it does run somewhere, so do they there.
    Rm {
        /// Their names.
        #[arg(required = true)]
        nodes: Vec<String>,
        /// They are dead for good: gives up the machines that they still have.
        #[arg(long)]
        node_is_dead: bool,
    },
}

pub(crate) async fn node(reach: &Reach, what: NodeCommand) -> Result<ExitCode> {
    let NodeCommand::Rm {
        nodes,
        node_is_dead,
    } = what;
    let client = reach.client()?;
    for node in nodes {
        if node_is_dead {
            let path = path(["nodes", &node, "give-up"]);
            let given_up: GivenUp = client.post(&path, &()).await?;
            for machine in given_up.machines {
                outln!("machine {machine} is given up");
            }
        }
        remove(&client, &node).await?;
        outln!("{node} is removed");
    }
    Ok(ExitCode::SUCCESS)
}

async fn remove(client: &Client, node: &str) -> Result<()> {
    let path = path(["nodes", node]);
    let _: Nothing = client.call(Method::DELETE, &path, Bytes::new()).await?;
    Ok(())
}

/// Removes the node of this computer from its cluster, stops it, and puts its folder aside.
pub(crate) async fn leave(reach: &Reach) -> Result<ExitCode> {
    ensure!(
        !reach.is_remote(),
        "`keel leave` is for the node of this computer: leave --server, and name its folder with \
         --state-dir; `keel node rm` removes one that is gone"
    );
    let folder = reach.state_dir();
    let node = down::find(&folder.join("api.socket")).await?;
    let client = reach.client()?;
    let info: ClusterInfo = client.get("/v1/status").await?;
    remove(&client, &info.node).await?;
    outln!("{} is no member of the cluster any more", info.node);
    if node.service {
        bail!(
            "it is run by systemd: `systemctl disable --now keel` stops it, then {} is of no use any more",
            folder.display()
        );
    }
    down::end(node, &folder).await?;
    let aside = aside(&folder)?;
    std::fs::rename(&folder, &aside)
        .with_context(|| format!("what it had stays in {}", folder.display()))?;
    outln!("what it had is in {}", aside.display());
    Ok(ExitCode::SUCCESS)
}

/// A free name beside a folder.
fn aside(folder: &Path) -> Result<PathBuf> {
    let name = folder.file_name().context("a folder without a name")?;
    let named = |number: u32| {
        let mut name = name.to_owned();
        match number {
            0 => name.push(".left"),
            number => name.push(format!(".left.{number}")),
        }
        folder.with_file_name(name)
    };
    let mut names = (0..1000).map(named);
    let free = names.find(|name| !name.exists());
    free.context("too many folders of nodes that left")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_were_put_aside_stay() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("a");
        let first = aside(&folder).unwrap();
        assert_eq!(first, parent.path().join("a.left"));
        std::fs::create_dir(&first).unwrap();
        assert_eq!(aside(&folder).unwrap(), parent.path().join("a.left.1"));
    }
}
