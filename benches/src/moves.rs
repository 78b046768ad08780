//! Moves between two nodes as real processes on loopback, compared with a plain TLS stream in the
//! same run.

use crate::signals;
use crate::table::{Table, median, percentile};
use anyhow::{Context, Result, ensure};
use keel_machine::moves::{Ending, MoveReport};
use keel_net::{ClientTls, PinnedIdentity, ServerTls};
use keel_testkit::{Guest, LocalCluster};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

/// Bytes of the plain stream.
const STREAM_BYTES: usize = 1 << 30;
/// Bytes of one write to it, as in moves.
const WRITE_BYTES: usize = 256 << 10;

pub(crate) fn bench(keel: &Path, guests: &Path, moves: usize) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(signals::until(measure(keel, guests, moves)))
}

async fn measure(keel: &Path, guests: &Path, moves: usize) -> Result<()> {
    let writer = std::fs::read(guests.join("writer.wasm")).context("the guest `writer`")?;
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a", "b"]).await?;
    cluster
        .run(&Guest::new("busy", "a", &writer, &["1024", "200"]))
        .await?;
    wait_memory(&cluster, "busy", 1 << 30).await?;
    let mut streams = Vec::new();
    let mut reports = Vec::new();
    for round in 0..moves {
        if round % 5 == 0 {
            streams.push(stream_rate()?);
        }
        let to = ["b", "a"][round % 2];
        let report = cluster.move_machine("a", "busy", to).await?;
        ensure!(report.ending == Ending::Moved, "{}", report.line());
        eprintln!("{}", rounds_line(&report));
        reports.push(report);
    }
    cluster
        .run(&Guest::new("idle", "a", &writer, &["64", "1"]))
        .await?;
    wait_memory(&cluster, "idle", 64 << 20).await?;
    let mut idle = Vec::new();
    for round in 0..moves {
        let to = ["b", "a"][round % 2];
        idle.push(ms(cluster
            .move_machine("a", "idle", to)
            .await?
            .total_micros));
    }
    print_busy(&reports, streams);
    println!(
        "\n64 MiB that writes 1 MB/s, its module compiled at the target: total {:.1} ms p50, {:.1} ms p99",
        percentile(&mut idle, 0.5),
        percentile(&mut idle, 0.99),
    );
    let cold = cold_move(keel, &writer).await?;
    println!(
        "the same with a target that has neither the module nor its code: {:.0} ms, {:.0} ms of them until it accepts",
        ms(cold.total_micros),
        ms(cold.offer_micros)
    );
    Ok(())
}

/// The copy rounds, for tuning.
fn rounds_line(report: &MoveReport) -> String {
    let rounds: Vec<String> = report
        .rounds
        .iter()
        .map(|round| {
            format!(
                "{:.1} MB in {:.1} ms",
                round.bytes as f64 / 1e6,
                ms(round.micros)
            )
        })
        .collect();
    format!(
        "{}; then {:.2} MB in its downtime",
        rounds.join(", "),
        report.last_bytes as f64 / 1e6
    )
}

async fn cold_move(keel: &Path, writer: &[u8]) -> Result<MoveReport> {
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a", "b"]).await?;
    cluster
        .run(&Guest::new("idle", "a", writer, &["64", "1"]))
        .await?;
    wait_memory(&cluster, "idle", 64 << 20).await?;
    cluster.move_machine("a", "idle", "b").await
}

/// Waits until the guest has filled its memory, which it reports by its first output.
async fn wait_memory(cluster: &LocalCluster, machine: &str, bytes: u64) -> Result<()> {
    keel_testkit::wait_for("the guest has its memory", || async {
        let info = cluster.inspect("a", machine).await.ok()?;
        let lines = cluster.output("a", machine).await.ok()?.lines().count();
        (info.memory_bytes? >= bytes && lines > 2).then_some(())
    })
    .await
}

/// Microseconds of one phase of a move.
type Phase = fn(&MoveReport) -> u64;

fn print_busy(reports: &[MoveReport], streams: Vec<f64>) {
    let phases: [(&str, Phase); 7] = [
        ("downtime", |report| report.downtime_micros),
        ("freeze", |report| report.freeze_micros),
        ("last pages", |report| report.last_pages_micros),
        ("state", |report| report.state_micros),
        ("commit", |report| report.commit_micros),
        ("resume", |report| report.resume_micros),
        ("total", |report| report.total_micros),
    ];
    let mut table = Table::new(&["phase", "p50 ms", "p90 ms", "p99 ms"]);
    for (name, value) in phases {
        let mut values: Vec<f64> = reports.iter().map(|report| ms(value(report))).collect();
        let mut row = vec![name.to_owned()];
        row.extend([0.5, 0.9, 0.99].map(|share| format!("{:.2}", percentile(&mut values, share))));
        table.row(row);
    }
    table.print(&format!(
        "Moves of 1 GiB that writes 200 MB/s ({})",
        reports.len()
    ));
    let rates = reports
        .iter()
        .filter_map(|report| report.rounds.first())
        .map(|round| round.bytes as f64 / round.micros.max(1) as f64)
        .collect();
    let (rate, stream) = (median(rates), median(streams));
    println!(
        "\nfirst round: {rate:.0} MB/s; plain TLS stream beside it: {stream:.0} MB/s; ratio {:.2} (the guest runs during both)",
        rate / stream
    );
    let slowed = reports.iter().filter(|report| report.slowed).count();
    println!("\nmoves in which the guest was throttled: {slowed}");
}

fn ms(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

/// Megabytes a second of one TLS stream between two threads, with the ciphers
/// and the write size of moves.
fn stream_rate() -> Result<f64> {
    let (one, other) = (PinnedIdentity::generate()?, PinnedIdentity::generate()?);
    let server = ServerTls::pinned(&other, one.fingerprint)?;
    let client = ClientTls::pinned(&one, other.fingerprint)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let receiver = std::thread::spawn(move || -> Result<usize> {
        let (socket, _) = listener.accept()?;
        let mut stream = StreamOwned::new(ServerConnection::new(server.config().clone())?, socket);
        let mut buffer = vec![0; WRITE_BYTES];
        let mut count = 0;
        while count < STREAM_BYTES {
            count += stream.read(&mut buffer)?;
        }
        stream.write_all(b"done")?;
        stream.flush()?;
        Ok(count)
    });
    let socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let name = rustls::pki_types::ServerName::try_from("worker.keel")?;
    let mut stream = StreamOwned::new(
        ClientConnection::new(client.config().clone(), name)?,
        socket,
    );
    let bytes = vec![0x5a; WRITE_BYTES];
    let begun = Instant::now();
    for _ in 0..STREAM_BYTES / WRITE_BYTES {
        stream.write_all(&bytes)?;
    }
    stream.flush()?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    let took = begun.elapsed();
    receiver.join().ok().context("the receiver")??;
    Ok(STREAM_BYTES as f64 / took.as_micros().max(1) as f64)
}
