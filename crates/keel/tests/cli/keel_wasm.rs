//! Runs `keel wasm` on the guests of `guests/`.

#![allow(dead_code, reason = "not every test file uses all of it")]

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Time limit after which a program counts as blocked.
const LIMIT: Duration = Duration::from_secs(120);

/// How a program is run.
pub(crate) const MODES: [&[&str]; 5] = [
    &["--plain"],
    &[],
    &["--shake", "300", "--seed", "1"],
    &["--shake", "3000", "--seed", "2"],
    &["--shake", "20000", "--seed", "3"],
];

pub(crate) fn guest(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../guests")
        .join(name)
        .with_extension("wasm")
}

#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: Option<i32>,
    /// The number of captures that `--shake` reports.
    pub(crate) captures: u64,
}

pub(crate) fn keel() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keel"));
    command.arg("wasm").stdin(Stdio::null());
    command
}

/// Runs `keel wasm OPTIONS GUEST ARGS` to its end.
pub(crate) fn run(options: &[&str], name: &str, args: &[&str]) -> Finished {
    finish(keel().args(options).arg(guest(name)).args(args))
}

/// Kills a child process on drop.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn finish(command: &mut Command) -> Finished {
    let mut child = Running(
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let stdout = collect(child.0.stdout.take());
    let stderr = collect(child.0.stderr.take());
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < LIMIT, "{command:?} hangs");
        std::thread::sleep(Duration::from_millis(2));
    };
    let stderr = stderr.join().unwrap();
    let (ours, theirs): (Vec<&str>, Vec<&str>) = stderr
        .split_inclusive('\n')
        .partition(|line| line.starts_with("keel: ") && line.contains(" captures, "));
    Finished {
        stdout: stdout.join().unwrap(),
        stderr: theirs.concat(),
        code: status.code(),
        captures: ours
            .iter()
            .filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok())
            .sum(),
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        stream.unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    })
}
