//! QEMU driven by hand, as its documentation says: its process, its monitor protocol (QMP), and a
//! migration between two of them.

use super::{AROUND, LIMIT, MEMORY_MIB, Pause, listen, longest, marks_of, settle};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// Whose key it is.
const USER: &str = "qemu";

/// Writes a key for TLS (RFC 4279), as both ends read it.
pub(super) fn write_key(folder: &Path) -> Result<()> {
    let key = format!("{USER}:{:032x}\n", rand::random::<u128>());
    Ok(std::fs::write(folder.join("keys.psk"), key)?)
}

/// A QEMU process; killed on drop.
pub(super) struct Qemu {
    process: Child,
    monitor: BufReader<UnixStream>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qemu {
    /// One that boots this kernel, with more arguments; what its serial line prints is heard.
    pub(super) fn start(
        folder: &Path,
        name: &str,
        kernel: &Path,
        more: &[String],
        heard: Sender<Instant>,
    ) -> Result<Self> {
        let path = |what: &str| folder.join(format!("{name}.{what}"));
        let (monitor, console) = (path("monitor"), path("console"));
        for socket in [&monitor, &console] {
            let _ = std::fs::remove_file(socket);
        }
        let process = Command::new(QEMU)
            .args(["-accel", "tcg", "-machine", "pc-q35-7.2", "-cpu", "qemu64"])
            .args(["-display", "none", "-nodefaults", "-no-user-config"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-chardev")
            .arg(format!(
                "socket,id=c,path={},server=on,wait=off",
                console.display()
            ))
            .args(["-serial", "chardev:c"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .context(QEMU)?;
        let connect = |path: &Path| -> Result<UnixStream> {
            let begun = Instant::now();
            loop {
                match UnixStream::connect(path) {
                    Ok(stream) => return Ok(stream),
                    Err(error) if begun.elapsed() > LIMIT => return Err(error.into()),
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        };
        listen(connect(&console)?, heard);
        let stream = connect(&monitor)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qemu = Qemu {
            process,
            monitor: BufReader::new(stream),
        };
        qemu.line()?;
        qemu.ask("qmp_capabilities", json!({}))?;
        Ok(qemu)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.monitor.read_line(&mut line)? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a command of its monitor protocol (QMP).
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.monitor
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }
}

/// Moves a system from one QEMU to another one, by hand; over TLS if `psk` is a folder with a key
/// for it.
pub(super) fn moved(folder: &Path, payload: &Path, psk: Option<&Path>) -> Result<Pause> {
    let (send, heard) = channel();
    let credentials = |endpoint: &str| {
        let of = |psk: &Path| {
            let dir = psk.display();
            let object = format!("tls-creds-psk,id=tls,dir={dir},endpoint={endpoint}");
            ["-object".to_owned(), object]
        };
        psk.map(of).into_iter().flatten().collect::<Vec<String>>()
    };
    let arguments = |own: &[&str], more: Vec<String>| {
        let own = own.iter().map(|it| (*it).to_owned());
        own.chain(more).collect::<Vec<String>>()
    };
    let of_source = arguments(
        &["-m", MEMORY_MIB],
        credentials(&format!("client,username={USER}")),
    );
    let mut source = Qemu::start(folder, "source", payload, &of_source, send.clone())?;
    let socket = folder.join("migration");
    let _ = std::fs::remove_file(&socket);
    let uri = format!("unix:{}", socket.display());
    // Without a rate limit, and with a downtime in which the loop's memory can be sent over TLS, or
    // pre-copy would not converge with the loop.
    let converging = json!({ "max-bandwidth": 10_000_000_000u64, "downtime-limit": 500 });
    source.ask("migrate-set-parameters", converging)?;
    settle(&heard)?;
    let mut marks = marks_of(&heard);
    let begun = Instant::now();
    let of_target = arguments(
        &["-m", MEMORY_MIB, "-incoming", "defer"],
        credentials("server"),
    );
    let mut target = Qemu::start(folder, "target", payload, &of_target, send)?;
    if psk.is_some() {
        for qemu in [&mut source, &mut target] {
            qemu.ask("migrate-set-parameters", json!({ "tls-creds": "tls" }))?;
        }
    }
    target.ask("migrate-incoming", json!({ "uri": uri }))?;
    source.ask("migrate", json!({ "uri": uri }))?;
    let answer = loop {
        let answer = source.ask("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => break answer,
            Some("failed") => bail!("QEMU's migration failed: {answer}"),
            _ if begun.elapsed() > LIMIT => bail!("QEMU's migration does not end: {answer}"),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let total = begun.elapsed().as_secs_f64() * 1000.0;
    std::thread::sleep(AROUND);
    marks.extend(heard.try_iter());
    Ok(Pause {
        reported: answer["downtime"].as_f64().unwrap_or_default(),
        total,
        seen: longest(&marks),
    })
}
