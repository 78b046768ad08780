//! Volumes in user syntax: `tmp:1G:/scratch`, `cluster:data:/data`, `/srv/data:/data:ro`; and
//! `keel volume`.

use crate::cluster::Reach;
use crate::output;
use anyhow::Result;
use hyper::Method;
use keel_api::{ClusterVolumeInfo, VolumeCreateRequest, VolumeInfo};
use std::path::PathBuf;
use std::process::ExitCode;

/// A volume in a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VolumeArg {
    /// A directory of the host.
    Host {
        host: PathBuf,
        guest: String,
        read_only: bool,
    },
    /// The machine's own.
    Tmp { bytes: u64, guest: String },
    /// One of the cluster's.
    Cluster {
        name: String,
        guest: String,
        read_only: bool,
    },
}

#[derive(clap::Subcommand)]
pub(crate) enum VolumeCommand {
    /// Creates a volume that machines can hold one after the other.
    Create {
        /// Its name.
        name: String,
        /// Its place: a directory that all nodes see, or s3://bucket/prefix.
        #[arg(long, value_name = "PLACE")]
        at: String,
        /// The most bytes of its files.
        #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, default_value = "1G")]
        size: u64,
    },
    /// Lists the cluster's volumes.
    Ls,
    /// Shows a volume and its stored content.
    Inspect {
        /// The volume.
        name: String,
    },
    /// Removes volumes that no machine holds, with their stored content.
    Rm {
        /// The volumes.
        #[arg(required = true)]
        names: Vec<String>,
        /// Leaves the stored content in place: for places that are gone.
        #[arg(long)]
        forget: bool,
    },
}

pub(crate) async fn run(reach: &Reach, command: VolumeCommand) -> Result<ExitCode> {
    let client = reach.client()?;
    match command {
        VolumeCommand::Create { name, at, size } => {
            let request = VolumeCreateRequest {
                name,
                at: crate::checkpoint::place(&at)?,
                bytes: size,
                inodes: None,
            };
            let made: ClusterVolumeInfo = client.post("/v1/volumes", &request).await?;
            output::one(reach.format(), &made, &made.name, |made| made.name.clone())?;
        }
        VolumeCommand::Ls => {
            let found: Vec<ClusterVolumeInfo> = client.get("/v1/volumes").await?;
            output::list(
                reach.format(),
                &found,
                &["volume", "machine", "size", "age", "at"],
                |info| info.name.clone(),
                |info| {
                    vec![
                        info.name.clone(),
                        holder(info),
                        output::bytes(info.bytes_max),
                        output::ago(info.created_unix_ms),
                        info.at.clone(),
                    ]
                },
            )?;
        }
        VolumeCommand::Inspect { name } => {
            let path = keel_api::path(["volumes", &name]);
            let info: ClusterVolumeInfo = client.get(&path).await?;
            output::one(reach.format(), &info, &info.name, page)?;
            if info.damage.is_some() {
                return Ok(ExitCode::from(1));
            }
        }
        VolumeCommand::Rm { names, forget } => {
            for name in names {
                let path = format!("{}?forget={forget}", keel_api::path(["volumes", &name]));
                let _: serde_json::Value = client
                    .call(Method::DELETE, &path, bytes::Bytes::new())
                    .await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn holder(info: &ClusterVolumeInfo) -> String {
    match (&info.machine, info.removing) {
        (Some(machine), _) => machine.clone(),
        (None, true) => "(being removed)".into(),
        (None, false) => "-".into(),
    }
}

fn page(info: &ClusterVolumeInfo) -> String {
    let mut lines = vec![
        format!("volume    {}", info.name),
        format!("at        {}", info.at),
        format!("machine   {}", holder(info)),
        format!("made      {} ago", output::ago(info.created_unix_ms)),
    ];
    match (&info.content, &info.damage) {
        (Some(content), _) => {
            let (used, most) = (output::bytes(content.bytes), output::bytes(info.bytes_max));
            lines.push(format!(
                "content   {used} of {most} in {} files",
                content.inodes
            ));
            lines.push(format!(
                "log       segment {}, {} ago, by writer {}",
                content.segment,
                output::ago(content.written_unix_ms),
                content.writer
            ));
            for snapshot in &content.snapshots {
                lines.push(format!("snapshot  {snapshot}"));
            }
        }
        (None, damage) => lines.push(format!(
            "content   cannot be read: {}",
            damage.as_deref().unwrap_or("not known why")
        )),
    }
    lines.join("\n")
}

/// Parses `tmp:SIZE:GUEST`, `cluster:NAME:GUEST[:ro]` or `HOST:GUEST[:ro]`.
///
/// # Errors
/// A sentence with the given text and the expected form.
pub(crate) fn parse(text: &str) -> Result<VolumeArg, String> {
    let bad = |what: &str| {
        Err(format!(
            "{text:?}: {what} (examples: tmp:1G:/scratch, cluster:data:/data, /srv/data:/data, /srv/data:/data:ro)"
        ))
    };
    let parts = text.split(':').collect::<Vec<_>>();
    let absolute = |guest: &str| guest.starts_with('/');
    match parts[..] {
        ["tmp", size, guest] if absolute(guest) => Ok(VolumeArg::Tmp {
            bytes: crate::size::parse(size)?,
            guest: guest.to_owned(),
        }),
        ["tmp", ..] => bad("a size and the program's name for it, an absolute path, are expected"),
        ["cluster", name, guest] | ["cluster", name, guest, "ro"]
            if !name.is_empty() && absolute(guest) =>
        {
            Ok(VolumeArg::Cluster {
                name: name.to_owned(),
                guest: guest.to_owned(),
                read_only: parts.len() == 4,
            })
        }
        ["cluster", ..] => {
            bad("a volume's name and the program's name for it, an absolute path, are expected")
        }
        [host, guest] | [host, guest, "ro"] if absolute(host) && absolute(guest) => {
            Ok(VolumeArg::Host {
                host: host.into(),
                guest: guest.to_owned(),
                read_only: parts.len() == 3,
            })
        }
        _ => bad("this is no volume"),
    }
}

/// A volume in one line.
pub(crate) fn line(volume: &VolumeInfo) -> String {
    let how = if volume.read_only {
        "read only"
    } else {
        "read and write"
    };
    let size = match (volume.bytes, volume.bytes_max) {
        (Some(bytes), Some(max)) => {
            format!(", {} of {}", output::bytes(bytes), output::bytes(max))
        }
        (None, Some(max)) => format!(", at most {}", output::bytes(max)),
        _ => String::new(),
    };
    format!("{} as {} ({how}){size}", volume.kind, volume.guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        let tmp = VolumeArg::Tmp {
            bytes: 1 << 30,
            guest: "/scratch".into(),
        };
        assert_eq!(parse("tmp:1G:/scratch"), Ok(tmp));
        for (text, read_only) in [("/a/b:/c", false), ("/a/b:/c:ro", true)] {
            let host = VolumeArg::Host {
                host: "/a/b".into(),
                guest: "/c".into(),
                read_only,
            };
            assert_eq!(parse(text), Ok(host), "{text}");
        }
        for (text, read_only) in [("cluster:data:/c", false), ("cluster:data:/c:ro", true)] {
            let cluster = VolumeArg::Cluster {
                name: "data".into(),
                guest: "/c".into(),
                read_only,
            };
            assert_eq!(parse(text), Ok(cluster), "{text}");
        }
        for bad in [
            "cluster",
            "cluster:data",
            "cluster::/c",
            "cluster:data:c",
            "cluster:data:/c:rw",
            "",
            "tmp",
            "tmp:1G",
            "tmp:1G:x",
            "tmp:x:/a",
            "tmp:1G:/a:ro",
            "a:/b",
            "/a",
            "/a:/b:rw",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
