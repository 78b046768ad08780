//! A system of 256 MiB with a hot loop over 64 MiB of them, moved by QEMU that is driven by hand and
//! by us, and as a program by us, alternately: the downtime as seen from outside, and the whole
//! time. And how long a Linux takes to boot by hand and as a machine, and what it costs.
//!
//! The guests do the same: they touch all of their memory once, then write a word in each page of
//! 64 MiB in a loop as fast as they can, and after each MiB print a byte if about half a
//! millisecond has passed. A prober on the host records the times of the output; the longest gap
//! around a move is the pause. The system runs without an operating system and prints by its
//! serial line: by hand to a socket, as a machine to `keel logs --follow`, so that our figures
//! include the latency of that command.
//!
//! The whole time begins when the QEMU of the target is started, by hand as by us. Ours go over TLS;
//! by hand that is what they are compared with.
//!
//! - `by_hand`: QEMU driven by hand
//! - `boots`: how long a Linux takes to boot
//! - `cost`: what one costs beside its QEMU

mod boots;
mod by_hand;
mod cost;

use crate::Options;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_kind_qemu::{QemuKind, QemuSpec};
use keel_machine::moves::Ending;
use keel_testkit::bare_system::{assemble, qemu_is_installed};
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const MEMORY_MIB: &str = "256";
const MEMORY_BYTES: u64 = 256 << 20;
const HOT_MIB: &str = "64";
/// Observation time before and after a move, so that the gap has two ends.
const AROUND: Duration = Duration::from_millis(300);
/// Time limit after which an operation counts as blocked.
const LIMIT: Duration = Duration::from_secs(60);

/// Multiboot, 32 bits, no paging: a word in each page of 2 to 255 MiB, then the hot
/// loop over 64 MiB from 32 MiB on; after each MiB a byte to the serial line if bit
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
    movw $0x3f8, %dx
    outb %al, %dx
    jmp mib
"#;

/// One move: the downtime reported by the mover, and the observed one, in milliseconds.
struct Pause {
    reported: f64,
    seen: f64,
    total: f64,
}

/// What is moved as a machine.
enum Machine<'a> {
    /// A WebAssembly program.
    Program(&'a [u8]),
    /// A system for QEMU.
    System(&'a Path),
}

pub(crate) fn bench(keel: &Path, options: &Options) -> Result<()> {
    if !qemu_is_installed() {
        return Ok(());
    }
    let wanted = |figures: &str| {
        let only = options.only.as_deref();
        only.is_none_or(|only| figures.contains(only))
    };
    let runtime = tokio::runtime::Runtime::new()?;
    if wanted("moves") {
        bench_moves(&runtime, keel, options)?;
    }
    if wanted("boots") {
        runtime.block_on(signals::until(boots::bench(keel, options.moves)))?;
    }
    if wanted("cost") {
        runtime.block_on(signals::until(cost::bench(keel)))?;
    }
    Ok(())
}

fn bench_moves(runtime: &Runtime, keel: &Path, options: &Options) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let payload = assemble(folder.path(), PAYLOAD)?;
    let module = std::fs::read(options.guests.join("hot.wasm")).context("the guest `hot`")?;
    by_hand::write_key(folder.path())?;
    let names = [
        "QEMU by hand, TLS",
        "QEMU by hand, in the clear",
        "evenkeel, qemu",
        "evenkeel, wasm",
    ];
    let mut pauses = names.map(|name| (name, Vec::new()));
    // Alternately, so that other load of the host affects all.
    for round in 0..options.moves.div_ceil(4) {
        let place = folder.path().join(round.to_string());
        std::fs::create_dir_all(&place)?;
        for _ in 0..4 {
            signals::check()?;
            for (at, psk) in [Some(folder.path()), None].into_iter().enumerate() {
                pauses[at].1.push(by_hand::moved(&place, &payload, psk)?);
            }
        }
        for (at, machine) in [Machine::System(&payload), Machine::Program(&module)]
            .into_iter()
            .enumerate()
        {
            let moves = signals::until(our_moves(keel, &place, &machine, 4));
            pauses[at + 2].1.extend(runtime.block_on(moves)?);
        }
    }
    print(&pauses);
    Ok(())
}

fn print(pauses: &[(&str, Vec<Pause>)]) {
    let mut table = Table::new(&[
        "",
        "downtime, as seen p50 ms",
        "max",
        "ratio",
        "reported p50",
        "total p50",
        "ratio",
    ]);
    let of = |pauses: &[Pause], figure: fn(&Pause) -> f64, share| {
        let mut figures: Vec<f64> = pauses.iter().map(figure).collect();
        percentile(&mut figures, share)
    };
    let by_hand = &pauses[0].1;
    for (name, pauses) in pauses {
        let (seen, total) = (
            of(pauses, |it| it.seen, 0.5),
            of(pauses, |it| it.total, 0.5),
        );
        table.row(vec![
            (*name).to_owned(),
            format!("{seen:.1}"),
            format!("{:.1}", of(pauses, |it| it.seen, 1.0)),
            format!("{:.2}", seen / of(by_hand, |it| it.seen, 0.5)),
            format!("{:.1}", of(pauses, |it| it.reported, 0.5)),
            format!("{total:.0}"),
            format!("{:.2}", total / of(by_hand, |it| it.total, 0.5)),
        ]);
    }
    table.print(&format!(
        "{} moves each of {MEMORY_MIB} MiB with a hot loop over {HOT_MIB} MiB",
        by_hand.len()
    ));
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

/// Waits until the guest prints steadily.
fn settle(heard: &Receiver<Instant>) -> Result<()> {
    heard
        .recv_timeout(LIMIT)
        .context("the guest printed nothing")?;
    std::thread::sleep(3 * AROUND);
    Ok(())
}

/// The newest observations before a move.
fn marks_of(heard: &Receiver<Instant>) -> Vec<Instant> {
    let mut marks: Vec<Instant> = heard.try_iter().collect();
    marks.drain(..marks.len().saturating_sub(10));
    marks
}

/// Gives the nodes a file to start from; returns its hash.
async fn upload(cluster: &LocalCluster, file: Vec<u8>) -> Result<String> {
    let client = cluster.client("a");
    let uploaded = client.upload(&QemuKind::kind_name(), file.into()).await?;
    Ok(uploaded.hash)
}

/// The spec of a system that boots this file, which the nodes have.
async fn spec_of(cluster: &LocalCluster, system: &Path) -> Result<QemuSpec> {
    let hash = upload(cluster, std::fs::read(system)?).await?;
    Ok(QemuSpec {
        shutdown_s: 1,
        ..QemuSpec::of_kernel(hash)
    })
}

async fn our_moves(
    keel: &Path,
    folder: &Path,
    machine: &Machine<'_>,
    count: usize,
) -> Result<Vec<Pause>> {
    let folder = tempfile::tempdir_in(folder)?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a", "b"]).await?;
    let arguments = [MEMORY_MIB, HOT_MIB];
    let guest = match machine {
        Machine::Program(module) => Guest::new("hot", "a", module, &arguments),
        Machine::System(payload) => {
            let spec = spec_of(&cluster, payload).await?;
            let own = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
            Guest {
                memory_bytes: MEMORY_BYTES,
                kind: Some((QemuKind::kind_name(), own)),
                ..Guest::new("hot", "a", &[], &[])
            }
        }
    };
    cluster.run(&guest).await?;
    wait_for("the guest runs its loop", || async {
        let output = cluster.output("a", "hot").await.ok()?;
        (output.len() > 8).then_some(())
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
        let mut marks = marks_of(&heard);
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
