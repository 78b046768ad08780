//! A machine of 256 MiB with a hot loop over 64 MiB of them, moved by us and by QEMU under TCG
//! alternately: the downtime as seen from outside.
//!
//! Both guests do the same: they touch all of their memory once, then write a word in each page of
//! 64 MiB in a loop as fast as they can, and after each MiB print a byte if about half a
//! millisecond has passed. A prober on the host records the times of the output; the longest gap
//! around a move is the pause. QEMU's guest runs without an operating system and prints by its
//! debug console to a socket; ours by `keel logs --follow`, so its figure includes the latency of
//! that command.

use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, bail, ensure};
use keel_machine::moves::Ending;
use keel_testkit::bare_system::assemble;
use keel_testkit::{Guest, LocalCluster, wait_for};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
const MEMORY_MIB: &str = "256";
const HOT_MIB: &str = "64";
/// Observation time before and after a move, so that the gap has two ends.
const AROUND: Duration = Duration::from_millis(300);
/// Time limit after which an operation counts as blocked.
const LIMIT: Duration = Duration::from_secs(60);

/// Multiboot, 32 bits, no paging: a word in each page of 2 to 255 MiB, then the hot
/// loop over 64 MiB from 32 MiB on; after each MiB a byte to the debug console if bit
/// 20 of the time stamp counter has changed (some 0.4 ms).
const PAYLOAD: &str = r#"
    .section .text
    .long 0x1BADB002, 0, -0x1BADB002
    .globl _start
_start:
    movl $0x200000, %edi
fill:
    movl %edi, (%edi)
    addl $4096, %edi
    cmpl $0xff00000, %edi
    jb fill
    xorl %ebx, %ebx
    movl $0x2000000, %edi
mib:
    movl $256, %ecx
page:
    addl $1, (%edi)
    addl $4096, %edi
    decl %ecx
    jnz page
    cmpl $0x6000000, %edi
    jb time
    movl $0x2000000, %edi
time:
    rdtsc
    shrdl $20, %edx, %eax
    cmpl %ebx, %eax
    je mib
    movl %eax, %ebx
    movb $'.', %al
    outb %al, $0xe9
    jmp mib
"#;

/// One move: the downtime reported by the mover, and the observed one, in milliseconds.
struct Pause {
    reported: f64,
    seen: f64,
    total: f64,
}

pub(crate) fn bench(keel: &Path, guests: &Path, moves: usize) -> Result<()> {
    if Command::new(QEMU).arg("--version").output().is_err() {
        println!("\nBeside QEMU: {QEMU} is not installed (apt-get install qemu-system-x86)");
        return Ok(());
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let folder = tempfile::tempdir()?;
    let payload = assemble(folder.path(), PAYLOAD)?;
    let module = std::fs::read(guests.join("hot.wasm")).context("the guest `hot`")?;
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    // Alternately, so that other load of the host affects both.
    for round in 0..moves.div_ceil(4) {
        let place = folder.path().join(round.to_string());
        std::fs::create_dir_all(&place)?;
        for _ in 0..4 {
            signals::check()?;
            theirs.push(qemu_move(&place, &payload)?);
        }
        let moves = signals::until(our_moves(keel, &place, &module, 4));
        ours.extend(runtime.block_on(moves)?);
    }
    print(&theirs, &ours);
    Ok(())
}

fn print(theirs: &[Pause], ours: &[Pause]) {
    let mut table = Table::new(&[
        "",
        "downtime, as seen p50 ms",
        "max",
        "reported p50",
        "total p50",
    ]);
    let of = |pauses: &[Pause], figure: fn(&Pause) -> f64, share| {
        let mut figures: Vec<f64> = pauses.iter().map(figure).collect();
        percentile(&mut figures, share)
    };
    for (name, pauses) in [("QEMU, TCG", theirs), ("evenkeel", ours)] {
        table.row(vec![
            name.to_owned(),
            format!("{:.1}", of(pauses, |it| it.seen, 0.5)),
            format!("{:.1}", of(pauses, |it| it.seen, 1.0)),
            format!("{:.1}", of(pauses, |it| it.reported, 0.5)),
            format!("{:.0}", of(pauses, |it| it.total, 0.5)),
        ]);
    }
    table.print(&format!(
        "Moves of {MEMORY_MIB} MiB with a hot loop over {HOT_MIB} MiB ({} and {})",
        theirs.len(),
        ours.len()
    ));
    println!(
        "\nratio of the pauses seen: {:.1}",
        of(theirs, |it| it.seen, 0.5) / of(ours, |it| it.seen, 0.5)
    );
}

/// The longest gap between observed outputs.
fn longest(heard: &[Instant]) -> f64 {
    heard
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1000.0)
        .fold(0.0, f64::max)
}

/// Records the time of each output.
fn listen(mut from: impl Read + Send + 'static, heard: Sender<Instant>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(1..) = from.read(&mut buffer) {
            if heard.send(Instant::now()).is_err() {
                return;
            }
        }
    });
}

/// A QEMU process; killed on drop.
struct Qemu {
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
    fn start(
        folder: &Path,
        name: &str,
        payload: &Path,
        more: &[&str],
        heard: Sender<Instant>,
    ) -> Result<Self> {
        let path = |what: &str| folder.join(format!("{name}.{what}"));
        let (monitor, console) = (path("monitor"), path("console"));
        for socket in [&monitor, &console] {
            let _ = std::fs::remove_file(socket);
        }
        let process = Command::new(QEMU)
            .args(["-accel", "tcg", "-machine", "pc-q35-7.2", "-m", MEMORY_MIB])
            .args(["-display", "none", "-nodefaults", "-no-user-config"])
            .arg("-kernel")
            .arg(payload)
            .arg("-chardev")
            .arg(format!(
                "socket,id=c,path={},server=on,wait=off",
                console.display()
            ))
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=c"])
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

fn qemu_move(folder: &Path, payload: &Path) -> Result<Pause> {
    let (send, heard) = channel();
    let mut source = Qemu::start(folder, "source", payload, &[], send.clone())?;
    let socket = folder.join("migration");
    let _ = std::fs::remove_file(&socket);
    let uri = format!("unix:{}", socket.display());
    let more = ["-incoming", uri.as_str()];
    let _target = Qemu::start(folder, "target", payload, &more, send)?;
    // Without a rate limit, or pre-copy would not converge with the loop.
    let fast = json!({ "max-bandwidth": 10_000_000_000u64 });
    source.ask("migrate-set-parameters", fast)?;
    settle(&heard)?;
    let mut marks: Vec<Instant> = heard.try_iter().collect();
    marks.drain(..marks.len().saturating_sub(10));
    let begun = Instant::now();
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
    std::thread::sleep(AROUND);
    marks.extend(heard.try_iter());
    Ok(Pause {
        reported: answer["downtime"].as_f64().unwrap_or_default(),
        total: answer["total-time"].as_f64().unwrap_or_default(),
        seen: longest(&marks),
    })
}

/// Waits until the guest prints steadily.
fn settle(heard: &Receiver<Instant>) -> Result<()> {
    heard
        .recv_timeout(LIMIT)
        .context("the guest printed nothing")?;
    std::thread::sleep(3 * AROUND);
    Ok(())
}

async fn our_moves(keel: &Path, folder: &Path, module: &[u8], count: usize) -> Result<Vec<Pause>> {
    let folder = tempfile::tempdir_in(folder)?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a", "b"]).await?;
    cluster
        .run(&Guest::new("hot", "a", module, &[MEMORY_MIB, HOT_MIB]))
        .await?;
    wait_for("the guest runs its loop", || async {
        let output = cluster.output("a", "hot").await.ok()?;
        (output.lines().count() > 3).then_some(())
    })
    .await?;
    // Settled before the move, as QEMU's is.
    for to in ["b", "a"] {
        cluster.move_machine("a", "hot", to).await?;
    }
    let mut logs = Command::new(keel)
        .arg("--state-dir")
        .arg(folder.path().join("a"))
        .args(["logs", "--follow", "hot"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let (send, heard) = channel();
    listen(logs.stdout.take().context("its output")?, send);
    let mut pauses = Vec::new();
    for round in 0..count {
        settle(&heard)?;
        let mut marks: Vec<Instant> = heard.try_iter().collect();
        marks.drain(..marks.len().saturating_sub(10));
        let to = ["b", "a"][round % 2];
        let report = cluster.move_machine("a", "hot", to).await?;
        ensure!(report.ending == Ending::Moved, "{}", report.line());
        tokio::time::sleep(AROUND).await;
        marks.extend(heard.try_iter());
        pauses.push(Pause {
            reported: report.downtime_micros as f64 / 1000.0,
            total: report.total_micros as f64 / 1000.0,
            seen: longest(&marks),
        });
    }
    // Its state is not needed.
    let _ = logs.kill();
    let _ = logs.wait();
    Ok(pauses)
}
