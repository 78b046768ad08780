//! Processes that the host has started here, until it has learnt their ends.

use crate::failure::Failure;
use crate::programs;
use data_encoding::BASE64;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Processes that run at the same time, at most.
const RUNNING_MAX: usize = 64;
/// Ends that are kept for a host that does not ask for them, at most; the oldest is forgotten.
const ENDS_MAX: usize = 32;
/// Bytes of each output that are kept: as many as a node passes on to a user.
const OUTPUT_BYTES_MAX: usize = 1 << 20;

/// The arguments of `guest-exec`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Start {
    path: String,
    #[serde(default)]
    arg: Vec<String>,
    /// Its whole environment, as `NAME=VALUE`; that of the agent if it is left out.
    env: Option<Vec<String>>,
    /// Its input, in Base64.
    input_data: Option<String>,
    #[serde(default)]
    capture_output: bool,
}

impl Start {
    /// # Errors
    /// If it is not Base64.
    pub(crate) fn input(&self) -> Result<Option<Vec<u8>>, Failure> {
        let text = self.input_data.as_ref();
        let bytes = text.map(|text| BASE64.decode(text.as_bytes()));
        Ok(bytes.transpose()?)
    }
}

/// An output of a process.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    is_cut: bool,
}

/// What became of a process.
#[derive(Debug)]
enum Process {
    Runs,
    Ended {
        /// How many had ended before.
        number: u64,
        status: io::Result<ExitStatus>,
        outputs: [Output; 2],
    },
}

#[derive(Debug, Default)]
struct Known {
    processes: BTreeMap<i64, Process>,
    /// How many have ended.
    ended: u64,
}

/// All of them, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    known: Arc<Mutex<Known>>,
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Processes {
    /// Starts one; returns its number.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) fn start(&self, start: Start) -> Result<i64, Failure> {
        let input = start.input()?;
        let known = lock(&self.known);
        let running = known.processes.values();
        if running.filter(|it| matches!(it, Process::Runs)).count() >= RUNNING_MAX {
            let reason = format!("{RUNNING_MAX} processes of the agent run already");
            return Err(Failure::new(reason));
        }
        drop(known);
        let mut command = command(&start, input.is_some());
        let (started, number) = sync_channel(1);
        let known = self.known.clone();
        spawn("process", move || {
            let child = match command.spawn() {
                Ok(child) => child,
                Err(error) => return drop(started.send(Err(error))),
            };
            let number = i64::from(child.id());
            lock(&known).processes.insert(number, Process::Runs);
            // Whoever waits for it is there.
            let _ = started.send(Ok(number));
            let (status, outputs) = wait(child, input.unwrap_or_default());
            lock(&known).end(number, status, outputs);
        })?;
        let number = number.recv()?;
        number.map_err(|error| Failure::new(format!("{}: {error}", start.path)))
    }

    /// What became of one, as `guest-exec-status` answers; forgets it if it has ended.
    ///
    /// # Errors
    /// If none of this number is known.
    pub(crate) fn status(&self, number: i64) -> Result<Value, Failure> {
        let mut known = lock(&self.known);
        let process = known.processes.remove(&number);
        let process = process.ok_or_else(|| {
            // As the QEMU guest agent says it.
            Failure::new(format!("PID {number} does not exist"))
        })?;
        let (status, outputs) = match process {
            Process::Runs => {
                known.processes.insert(number, Process::Runs);
                return Ok(json!({ "exited": false }));
            }
            Process::Ended {
                status, outputs, ..
            } => (status?, outputs),
        };
        let mut answer = json!({ "exited": true });
        if let Some(code) = status.code() {
            answer["exitcode"] = json!(code);
        }
        if let Some(signal) = status.signal() {
            answer["signal"] = json!(signal);
        }
        for (name, output) in ["out", "err"].into_iter().zip(outputs) {
            if !output.bytes.is_empty() {
                answer[format!("{name}-data")] = json!(BASE64.encode(&output.bytes));
            }
            if output.is_cut {
                answer[format!("{name}-truncated")] = json!(true);
            }
        }
        Ok(answer)
    }
}

impl Known {
    fn end(&mut self, number: i64, status: io::Result<ExitStatus>, outputs: [Output; 2]) {
        let ended = Process::Ended {
            number: self.ended,
            status,
            outputs,
        };
        self.ended += 1;
        self.processes.insert(number, ended);
        let mut ends = self.processes.iter().filter_map(|(pid, it)| match it {
            Process::Ended { number, .. } => Some((*number, *pid)),
            Process::Runs => None,
        });
        let oldest = ends.clone().min();
        if let Some((_, pid)) = oldest
            && ends.by_ref().count() > ENDS_MAX
        {
            self.processes.remove(&pid);
        }
    }
}

fn command(start: &Start, has_input: bool) -> Command {
    let output = || match start.capture_output {
        true => Stdio::piped(),
        false => Stdio::null(),
    };
    // (Its own environment may have no path.)
    let program = programs::find(&start.path).unwrap_or_else(|| start.path.clone().into());
    let mut command = Command::new(program);
    command
        .args(&start.arg)
        .stdin(match has_input {
            true => Stdio::piped(),
            false => Stdio::null(),
        })
        .stdout(output())
        .stderr(output())
        // Signals to the agent are not for it.
        .process_group(0);
    if let Some(environment) = &start.env {
        let pairs = environment.iter();
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        command.env_clear().envs(pairs);
    }
    command
}

fn spawn<T: Send + 'static>(
    name: &str,
    does: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.into()).spawn(does)
}

/// Waits until the outputs of a process, and then it, have ended: its number is its own until then.
fn wait(mut child: Child, input: Vec<u8>) -> (io::Result<ExitStatus>, [Output; 2]) {
    match outputs(&mut child, input) {
        Ok(outputs) => (child.wait(), outputs),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            (Err(error), Default::default())
        }
    }
}

/// # Errors
/// If there is no thread to read them.
fn outputs(child: &mut Child, input: Vec<u8>) -> io::Result<[Output; 2]> {
    if let Some(mut stdin) = child.stdin.take() {
        // Who has it open need not read all of it, nor end with the process.
        spawn("input", move || drop(stdin.write_all(&input)))?;
    }
    let output = child.stdout.take();
    let output = spawn("output", move || output.map(read).unwrap_or_default())?;
    let error_output = child.stderr.take().map(read).unwrap_or_default();
    Ok([output.join().unwrap_or_default(), error_output])
}

/// Reads an output until its end, and keeps its beginning.
fn read(mut from: impl Read) -> Output {
    let mut output = Output::default();
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut piece) {
            Ok(0) => return output,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return output,
        };
        let room = OUTPUT_BYTES_MAX - output.bytes.len();
        output.bytes.extend_from_slice(&piece[..count.min(room)]);
        output.is_cut |= count > room;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    fn shell(script: &str) -> Start {
        Start {
            path: "sh".into(),
            arg: vec!["-c".into(), script.into()],
            capture_output: true,
            ..Start::default()
        }
    }

    fn end(processes: &Processes, number: i64) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let status = processes.status(number).unwrap();
            if status["exited"] == true {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::yield_now();
        }
    }

    fn text(status: &Value, name: &str) -> String {
        let text = status[name].as_str().unwrap_or_default();
        String::from_utf8(BASE64.decode(text.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn a_process_has_its_input_and_environment_and_its_end_is_told_once() {
        let processes = Processes::default();
        let number = processes.start(Start {
            env: Some(vec!["A=b c".into(), "PATH=/usr/bin:/bin".into()]),
            input_data: Some(BASE64.encode(b"in")),
            ..shell("cat; echo \"$A$HOME\" >&2; exit 3")
        });
        let number = number.unwrap();
        let status = end(&processes, number);
        assert_eq!(status["exitcode"], 3);
        assert_eq!(text(&status, "out-data"), "in");
        assert_eq!(text(&status, "err-data"), "b c\n");
        let refused = processes.status(number).unwrap_err().to_json();
        assert_eq!(refused["desc"], format!("PID {number} does not exist"));
        // Its environment has no path, and what it leaves behind has its input open and reads nothing.
        let leaves = "exec 3<&0; sleep 600 <&3 > /dev/null 2>&1 & echo $!";
        let number = processes.start(Start {
            env: Some(vec!["A=b".into()]),
            input_data: Some(BASE64.encode(&vec![b'x'; 1 << 20])),
            ..shell(leaves)
        });
        let left = text(&end(&processes, number.unwrap()), "out-data");
        let number = processes.start(shell(&format!("kill {left}"))).unwrap();
        assert_eq!(end(&processes, number)["exitcode"], 0);
        let number = processes.start(shell("kill -9 $$")).unwrap();
        assert_eq!(end(&processes, number)["signal"], 9);
    }

    #[test]
    fn of_much_output_the_beginning_is_kept() {
        let processes = Processes::default();
        let number = processes.start(shell("head -c 3000000 /dev/zero; echo x >&2"));
        let status = end(&processes, number.unwrap());
        assert_eq!(text(&status, "out-data").len(), OUTPUT_BYTES_MAX);
        assert_eq!(status["out-truncated"], true);
        assert_eq!(status["err-truncated"], Value::Null);
        let uncaptured = Start {
            capture_output: false,
            ..shell("echo x")
        };
        let number = processes.start(uncaptured).unwrap();
        assert_eq!(end(&processes, number)["out-data"], Value::Null);
    }

    #[test]
    fn what_cannot_be_started_is_refused() {
        let processes = Processes::default();
        let missing = Start {
            path: "/no/such/program".into(),
            ..Start::default()
        };
        let refused = processes.start(missing).unwrap_err().to_json();
        let said = refused["desc"].as_str().unwrap();
        assert!(said.starts_with("/no/such/program: "), "{said}");
        let no_base64 = Start {
            input_data: Some("?".into()),
            ..shell("cat")
        };
        processes.start(no_base64).unwrap_err();
        assert!(lock(&processes.known).processes.is_empty());
    }

    #[test]
    fn few_run_and_few_ends_are_kept() {
        let processes = Processes::default();
        // Each runs until nobody has the other end of its pipe.
        let (reader, writer) = io::pipe().unwrap();
        let (process, descriptor) = (std::process::id(), reader.as_raw_fd());
        let script = format!("exec cat /proc/{process}/fd/{descriptor}");
        let numbers = (0..RUNNING_MAX).map(|_| processes.start(shell(&script)).unwrap());
        let numbers: Vec<_> = numbers.collect();
        let refused = processes.start(shell("true")).unwrap_err().to_json();
        assert!(refused["desc"].as_str().unwrap().contains("run already"));
        drop(writer);
        let deadline = Instant::now() + Duration::from_secs(60);
        while lock(&processes.known).ended < RUNNING_MAX as u64 {
            assert!(Instant::now() < deadline, "they do not end");
            thread::yield_now();
        }
        assert_eq!(lock(&processes.known).processes.len(), ENDS_MAX);
        let known = numbers.iter().filter(|it| processes.status(**it).is_ok());
        assert_eq!(known.count(), ENDS_MAX);
    }
}
