//! Runs programs with a time limit, and with their output passed on or captured.

use anyhow::{Context, Result, bail, ensure};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The `cargo` that started this program, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(root());
    // `cargo run` sets these for this program. The build script of `ring` runs again when they
    // differ, so that tests would compile again, from TLS upwards, what the demo compiled.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command with its output passed on; fails if the command fails.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let shown = show(command);
    println!("$ {shown}");
    let status = command
        .status()
        .with_context(|| format!("cannot run {shown}"))?;
    // The command is above its output; a filter of tests would hide their summary.
    let brief: String = shown.chars().take(60).collect();
    ensure!(status.success(), "{brief}: {status}");
    Ok(())
}

fn show(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| part.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether a program can be found.
pub(crate) fn has(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    })
}

/// Builds `keel` and returns its path.
pub(crate) fn keel() -> Result<PathBuf> {
    check(cargo().args(["build", "--release", "--package", "keel"]))?;
    Ok(releases().join("keel"))
}

/// Builds `keel-guest`, which needs no library of the system in which it runs, and returns its path.
pub(crate) fn guest_agent() -> Result<PathBuf> {
    let program = [
        "rustc",
        "--release",
        "--package",
        "keel-guest",
        "--bin",
        "keel-guest",
    ];
    let mut build = cargo();
    build.args(program).args(["--features", "program", "--"]);
    // Of the dependencies' flags nothing depends on it.
    check(build.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols"]))?;
    Ok(releases().join("keel-guest"))
}

/// Where programs are built.
fn releases() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or(root().join("target"), PathBuf::from);
    target.join("release")
}

/// The result of a finished program.
pub(crate) struct Finished {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    /// `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) took: Duration,
}

/// Runs a program to its end and captures its output; it is killed after `limit`. Its standard
/// input stays open and empty.
pub(crate) fn finish(command: &mut Command, limit: Duration) -> Result<Finished> {
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", show(command)))?;
    let stdin = child.stdin.take();
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let code = wait(&mut child, begun + limit);
    let took = begun.elapsed();
    drop(stdin);
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| thread.join().unwrap_or_default();
    let (stdout, stderr) = (text(stdout), text(stderr));
    match code? {
        Some(status) => Ok(Finished {
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            code: status.code(),
            took,
        }),
        None => bail!("it did not end within {} s", limit.as_secs()),
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // The output before an error counts.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// `None` after it was killed at the deadline.
fn wait(child: &mut Child, deadline: Instant) -> Result<Option<std::process::ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Installs the packages of programs that are missing, or says which they are.
pub(crate) fn provide(needed: &[(&str, &str)]) -> Result<()> {
    let packages: Vec<&str> = needed
        .iter()
        .filter(|(program, _)| !has(program))
        .map(|(_, package)| *package)
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    let id = Command::new("id").arg("-u").output()?;
    let is_root = id.stdout.trim_ascii() == b"0";
    if !(is_root && has("apt-get")) {
        bail!("missing: {0} (apt-get install {0})", packages.join(" "));
    }
    check(
        Command::new("apt-get")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages),
    )
}
