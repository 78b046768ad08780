//! Checkpoints into a directory compared with plain writing and reading of as many bytes there,
//! alternately; and the cost of incremental checkpoints.
//!
//! *Plain writing* is one file, written in pieces of 1 MiB from a buffer, and synced
//! once; *plain reading* reads those files again in such pieces. Before each reading
//! the files are dropped from the page cache, so that both come from the disk.

use crate::signals;
use crate::table::{Table, median};
use anyhow::{Context, Result};
use keel_kind_wasm::checkpoint::{Checkpointer, Destination, restore};
use keel_kind_wasm::span::{InProcess, Pages, PartLimits, SpanConfig};
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::checkpoint::{CreatedCheckpoint, MemoryRestore, Origin, Repository, Subject};
use keel_machine::log::Log;
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Balancing, Spec};
use keel_wasi::{Config, MemorySink, Wasi};
use keel_wasm::coherence::PartId;
use keel_wasm::runtime::parts::SpawnPolicy;
use keel_wasm::runtime::{Engine, Machine, Options};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Bytes of one plain write or read.
const PIECE_BYTES: usize = 1 << 20;
const MEMORY_MIB: &str = "1024";
/// Time limit after which an operation counts as blocked.
const PATIENCE: Duration = Duration::from_secs(60);

struct Bench {
    machine: Machine,
    output: Arc<MemorySink>,
    engine: Engine,
    log: Log,
    runtime: Runtime,
    place: PathBuf,
    spec: Spec,
}

pub(crate) fn bench(guests: &Path, rounds: usize) -> Result<()> {
    let folder = tempfile::tempdir_in(".")?;
    let mut table = Table::new(&["", "MB/s p50", "beside it, plain", "ratio"]);
    let quiet = Bench::start(guests, folder.path(), "1")?;
    let (mut taking, mut writing) = (Vec::new(), Vec::new());
    let (mut cold, mut reading) = (Vec::new(), Vec::new());
    let mut pauses = Vec::new();
    for _ in 0..rounds {
        signals::check()?;
        let (taken, rate) = quiet.take(&mut Checkpointer::default())?;
        taking.push(rate);
        pauses.push(taken.pause.as_secs_f64() * 1e3);
        writing.push(plain_write(&quiet.place, taken.manifest.stored_bytes())?);
        cold.push(quiet.restore()?);
        reading.push(plain_read(&quiet.place)?);
        std::fs::remove_dir_all(&quiet.place)?;
    }
    for (name, ours, plain) in [
        ("taking a full one", taking, writing),
        ("restoring it", cold, reading),
    ] {
        let (ours, plain) = (median(ours), median(plain));
        table.row(vec![
            name.to_owned(),
            format!("{ours:.0}"),
            format!("{plain:.0}"),
            format!("{:.2}", ours / plain),
        ]);
    }
    table.print(&format!("Checkpoints of 1 GiB ({rounds} rounds)"));
    println!("\ndowntime of one: {:.2} ms p50", median(pauses));
    drop(quiet);
    apart(guests, folder.path(), rounds)?;
    increments(guests, folder.path(), rounds)
}

/// A machine of two parts that have half of its memory each, while it writes.
fn apart(guests: &Path, folder: &Path, rounds: usize) -> Result<()> {
    let bench = Bench::start(guests, folder, "50")?;
    let how = SpanConfig {
        spawning: SpawnPolicy::Here,
        patience: PATIENCE,
        limits: PartLimits::default(),
        stays_stopped: false,
    };
    let parts = InProcess::begin(&bench.machine, 2, bench.spec.memory_bytes, how)?;
    let pages = parts.home().pages();
    let member = PartId::new(1).context("a member")?;
    let (mut rates, mut writing, mut pauses) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        signals::check()?;
        let half = bench.machine.memories()[0].size_bytes() / 2;
        pages.move_object(0, half / 2..half + half / 2, member, PATIENCE)?;
        let (taken, rate) = bench.take_of(Some(pages), &mut Checkpointer::default())?;
        rates.push(rate);
        pauses.push(taken.pause.as_secs_f64() * 1e3);
        writing.push(plain_write(&bench.place, taken.manifest.stored_bytes())?);
        std::fs::remove_dir_all(&bench.place)?;
    }
    let (rate, plain) = (median(rates), median(writing));
    println!(
        "\nof a machine with two parts that writes 50 MB/s: {rate:.0} MB/s p50, plain writing beside it {plain:.0}, ratio {:.2}; downtime {:.2} ms p50",
        rate / plain,
        median(pauses)
    );
    Ok(())
}

/// Cost of increments with different shares of memory.
fn increments(guests: &Path, folder: &Path, rounds: usize) -> Result<()> {
    let mut table = Table::new(&[
        "written in between, MB/s",
        "stored MB p50",
        "ms p50",
        "MB/s",
    ]);
    for rate in ["10", "50", "200"] {
        let bench = Bench::start(guests, folder, rate)?;
        let mut checkpointer = Checkpointer::default();
        bench.take(&mut checkpointer)?;
        let (mut stored, mut times) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            signals::check()?;
            std::thread::sleep(Duration::from_millis(500));
            let (taken, _) = bench.take(&mut checkpointer)?;
            stored.push(taken.manifest.stored_bytes() as f64 / 1e6);
            times.push(taken.total.as_secs_f64() * 1e3);
        }
        let (stored, time) = (median(stored), median(times));
        table.row(vec![
            rate.to_owned(),
            format!("{stored:.1}"),
            format!("{time:.0}"),
            format!("{:.0}", stored / time * 1e3),
        ]);
        std::fs::remove_dir_all(&bench.place)?;
    }
    table.print("Incremental checkpoints of 1 GiB, one each half second");
    Ok(())
}

impl Bench {
    fn start(guests: &Path, folder: &Path, rate: &str) -> Result<Self> {
        let module = std::fs::read(guests.join("writer.wasm")).context("the guest `writer`")?;
        // With a cache, as on a node: compiling does not count as reading.
        let engine = Engine::with_cache(Options::default(), &folder.join("code"))?;
        let program = engine.load(&module)?;
        program.prepare_resume()?;
        let output = Arc::new(MemorySink::default());
        let args = ["writer", MEMORY_MIB, rate];
        let config = Config {
            args: args.map(str::to_owned).to_vec(),
            stdout: Box::new(output.clone()),
            ..Config::default()
        };
        let own = WasmSpec {
            module: String::new(),
            args: args.map(str::to_owned).to_vec(),
            env: Vec::new(),
            threads_max: 1,
        };
        let spec = Spec {
            kind: WasmKind::kind_name(),
            kind_spec: own.to_kind_spec().map_err(anyhow::Error::msg)?,
            volumes: Vec::new(),
            // The guest passes through twice the size while it allocates.
            memory_bytes: 3 << 30,
            cpu_limit_millis: None,
            output_bytes_per_s: 1 << 20,
            remove_at_end: false,
            restart: Restart::No,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
        };
        let bench = Bench {
            machine: Machine::start(program, Wasi::new(config)?, own.limits(&spec))?,
            output,
            engine,
            log: Log::open(&folder.join("log"), 0)?,
            runtime: Runtime::new()?,
            place: folder.join("kept"),
            spec,
        };
        while bench.output.bytes().len() < 4 {
            if let Some(outcome) = bench.machine.wait(Some(Duration::from_millis(20))) {
                anyhow::bail!("the guest `writer` ended before it wrote: {outcome:?}");
            }
        }
        Ok(bench)
    }

    fn repository(&self) -> Result<Repository> {
        let place = std::path::absolute(&self.place)?;
        Ok(Repository::create(&place.display().to_string())?)
    }

    /// Takes one, and returns its rate in megabytes a second.
    fn take(&self, checkpointer: &mut Checkpointer) -> Result<(CreatedCheckpoint, f64)> {
        self.take_of(None, checkpointer)
    }

    /// As [`Self::take`], of a machine with parts.
    fn take_of(
        &self,
        apart: Option<&Pages>,
        checkpointer: &mut Checkpointer,
    ) -> Result<(CreatedCheckpoint, f64)> {
        let repository = self.repository()?;
        let destination = Destination {
            repository: &repository,
            runtime: self.runtime.handle(),
            full: false,
            after: None,
            give_up: &AtomicBool::new(false),
            cluster_volumes: Vec::new(),
        };
        let subject = Subject {
            name: "m".parse().map_err(anyhow::Error::msg)?,
            spec: self.spec.clone(),
            epoch: keel_cluster::Epoch::default(),
        };
        let taken = checkpointer.take(&self.machine, apart, subject, &self.log, destination)?;
        let rate = taken.manifest.stored_bytes() as f64 / taken.total.as_micros() as f64;
        Ok((taken, rate))
    }

    fn restore(&self) -> Result<f64> {
        let bytes = drop_from_cache(&self.place)?;
        let repository = self.repository()?;
        let origin = Origin {
            repository: repository.url().to_owned(),
            machine: "m".parse().map_err(anyhow::Error::msg)?,
            id: None,
            is_clone: false,
            memory: MemoryRestore::Eager,
        };
        let limits = WasmSpec::of(&self.spec)
            .map_err(anyhow::Error::msg)?
            .limits(&self.spec);
        let begun = Instant::now();
        let volumes = self.place.with_extension("volumes");
        let runtime = self.runtime.handle();
        let restored = restore(
            &origin,
            &repository,
            &self.engine,
            limits,
            runtime,
            &volumes,
        )?;
        let took = begun.elapsed();
        drop(restored);
        Ok(bytes as f64 / took.as_micros() as f64)
    }
}

fn packs(place: &Path) -> Result<Vec<PathBuf>> {
    let folder = place.join("machines/m");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "pack") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Drops the files from the page cache, so that the next read comes from the disk; returns the
/// bytes of all packs.
fn drop_from_cache(place: &Path) -> Result<u64> {
    let mut bytes = 0;
    for path in packs(place)? {
        let file = File::open(path)?;
        bytes += file.metadata()?.len();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(bytes)
}

/// Megabytes a second of writing this many bytes to one file.
fn plain_write(place: &Path, bytes: u64) -> Result<f64> {
    let path = place.join("plain");
    let piece: Vec<u8> = (0..PIECE_BYTES).map(|at| (at * 31) as u8).collect();
    let begun = Instant::now();
    let mut file = File::create(&path)?;
    let mut left = bytes;
    while left > 0 {
        let now = left.min(PIECE_BYTES as u64);
        file.write_all(&piece[..now as usize])?;
        left -= now;
    }
    file.sync_all()?;
    let rate = bytes as f64 / begun.elapsed().as_micros() as f64;
    std::fs::remove_file(&path)?;
    Ok(rate)
}

/// Megabytes a second of reading all packs.
fn plain_read(place: &Path) -> Result<f64> {
    let bytes = drop_from_cache(place)?;
    let mut piece = vec![0; PIECE_BYTES];
    let begun = Instant::now();
    for path in packs(place)? {
        let mut file = File::open(path)?;
        while file.read(&mut piece)? > 0 {}
    }
    Ok(bytes as f64 / begun.elapsed().as_micros() as f64)
}
