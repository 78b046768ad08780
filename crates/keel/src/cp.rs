//! `keel cp`: files between this computer and the volumes of machines.
//!
//! A copy is written under a temporary name beside its target and renamed when it is complete:
//! readers see the old or the new file, never a partial one.

use crate::cluster::Reach;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use form_urlencoded::byte_serialize;
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use keel_api::{Client, FileStat, Nothing, RenameRequest};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Bytes of one piece.
const PIECE_BYTES: usize = 1 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The source: a file, or MACHINE:/PATH in a volume of the machine.
    source: String,
    /// The target: a file or directory, or MACHINE:/PATH in a volume of the machine.
    target: String,
}

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Here(PathBuf),
    Machine { name: String, path: String },
}

impl End {
    fn parse(text: &str) -> Self {
        match text.split_once(":/") {
            // ./a:/b is a local file.
            Some((name, path)) if !name.is_empty() && !name.contains('/') => End::Machine {
                name: name.to_owned(),
                path: format!("/{path}"),
            },
            _ => End::Here(text.into()),
        }
    }
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let client = reach.client()?;
    match (End::parse(&args.source), End::parse(&args.target)) {
        (End::Here(source), End::Machine { name, path }) => {
            put(&Remote { client, name }, &source, path).await?;
        }
        (End::Machine { name, path }, End::Here(target)) => {
            get(&Remote { client, name }, &path, &target).await?;
        }
        (End::Here(_), End::Here(_)) => bail!(
            "neither {} nor {} is in a machine: one of them is written MACHINE:/PATH",
            args.source,
            args.target
        ),
        (End::Machine { .. }, End::Machine { .. }) => {
            bail!("both are in machines: copy to a local file first, and from there to the other")
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A machine's files.
struct Remote {
    client: Client,
    name: String,
}

impl Remote {
    fn at(&self, what: &str, path: &str) -> String {
        let path: String = byte_serialize(path.as_bytes()).collect();
        let files = keel_api::path(["machines", &self.name, "files"]);
        format!("{files}{what}?path={path}")
    }

    async fn stat(&self, path: &str) -> Result<FileStat> {
        Ok(self.client.get(&self.at("/stat", path)).await?)
    }

    async fn read(&self, path: &str, offset: u64) -> Result<Vec<u8>> {
        let request = format!("{}&offset={offset}&length={PIECE_BYTES}", self.at("", path));
        let mut answer = self.client.get_stream(&request).await?;
        let mut bytes = Vec::new();
        while let Some(more) = answer.chunk().await? {
            bytes.extend_from_slice(&more);
        }
        Ok(bytes)
    }

    async fn write(&self, path: &str, offset: u64, bytes: Bytes) -> Result<()> {
        let begin = offset == 0;
        let request = format!("{}&offset={offset}&begin={begin}", self.at("", path));
        let _: Nothing = self.client.call(Method::PUT, &request, bytes).await?;
        Ok(())
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let path = keel_api::path(["machines", &self.name, "files", "rename"]);
        let request = RenameRequest {
            from: from.to_owned(),
            to: to.to_owned(),
        };
        let _: Nothing = self.client.post(&path, &request).await?;
        Ok(())
    }

    async fn remove(&self, path: &str) -> Result<()> {
        let request = self.at("", path);
        let _: Nothing = self
            .client
            .call(Method::DELETE, &request, Bytes::new())
            .await?;
        Ok(())
    }
}

/// A progress bar on a terminal.
fn progress(bytes: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}");
    let bar = ProgressBar::new(bytes);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name();
    let name = name.with_context(|| format!("{} has no file name", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

async fn put(machine: &Remote, source: &Path, path: String) -> Result<()> {
    let shown = source.display();
    let found = std::fs::metadata(source).with_context(|| format!("cannot read {shown}"))?;
    if !found.is_file() {
        bail!("{shown} is not a file: only files are copied");
    }
    let mut file = File::open(source).with_context(|| format!("cannot read {shown}"))?;
    let into = path.ends_with('/') || machine.stat(&path).await.is_ok_and(|found| found.directory);
    let target = match into {
        true => format!("{}/{}", path.trim_end_matches('/'), file_name(source)?),
        false => path,
    };
    let temporary = format!("{target}.keel-{:08x}", rand::random::<u32>());
    let bar = progress(found.len());
    let copied = async {
        let mut offset = 0;
        loop {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            let more = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece);
            more.with_context(|| format!("cannot read {shown}"))?;
            let count = piece.len() as u64;
            // An empty file has one write too.
            if count > 0 || offset == 0 {
                machine.write(&temporary, offset, piece.into()).await?;
            }
            offset += count;
            bar.set_position(offset);
            if count < PIECE_BYTES as u64 {
                return machine.rename(&temporary, &target).await;
            }
        }
    };
    let copied = copied.await;
    bar.finish_and_clear();
    if copied.is_err() {
        // The temporary file may not exist yet.
        let _ = machine.remove(&temporary).await;
    }
    copied
}

async fn get(machine: &Remote, path: &str, target: &Path) -> Result<()> {
    let found = machine.stat(path).await?;
    if found.directory {
        bail!(
            "{}:{path} is a directory: only files are copied",
            machine.name
        );
    }
    let target = match target.is_dir() {
        true => target.join(file_name(Path::new(path))?),
        false => target.to_owned(),
    };
    let folder = match target.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let shown = target.display().to_string();
    let cannot = || format!("cannot write {shown}");
    let mut file = tempfile::Builder::new()
        .prefix(".keel-")
        // The mode of any new file of this user, by the umask.
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .tempfile_in(folder)
        .with_context(cannot)?;
    let bar = progress(found.bytes);
    let mut offset = 0;
    loop {
        let piece = machine.read(path, offset).await?;
        file.write_all(&piece).with_context(cannot)?;
        offset += piece.len() as u64;
        bar.set_position(offset);
        if piece.len() < PIECE_BYTES {
            break;
        }
    }
    bar.finish_and_clear();
    file.persist(&target)
        .map_err(|error| error.error)
        .with_context(cannot)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::End;

    #[test]
    fn ends_are_told_apart() {
        let machine = |name: &str, path: &str| End::Machine {
            name: name.into(),
            path: path.into(),
        };
        assert_eq!(End::parse("m:/data/x"), machine("m", "/data/x"));
        assert_eq!(End::parse("m:/"), machine("m", "/"));
        for here in ["file", "/a:/b", "./m:/data", "m:data", ":/x", "c:"] {
            assert_eq!(End::parse(here), End::Here(here.into()), "{here}");
        }
    }
}
