//! Checkpoints of running machines in a directory: full, incremental, damaged, and
//! restored.

mod parts;
mod running;

use running::*;

use keel_cluster::Epoch;
use keel_kind_wasm::checkpoint::{
    Checkpointer, CreateError, Destination, RemainingMemory, RestoreError, Restored,
    SpanningRestore, restore,
};
use keel_kind_wasm::span::{InProcess, Pages, PartLimits, SpanConfig, SpanError};
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::checkpoint::{
    CHAIN_MAX, CheckpointId, CreatedCheckpoint, MemoryRestore, Origin, Repository, RepositoryError,
    Retention, Subject, compact,
};
use keel_machine::log::Log;
use keel_machine::spec::{Balancing, Spec, Volume, VolumeKind};
use keel_store::clock::unix_ms;
use keel_wasi::volume::VolumeLimits;
use keel_wasi::{Config, MemorySink, Preopen, Resources, Source, Wasi};
use keel_wasm::coherence::PartId;
use keel_wasm::memory::DirtyTracker;
use keel_wasm::runtime::parts::SpawnPolicy;
use keel_wasm::runtime::{Engine, Limits, Machine, MachineError, Options, Outcome};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Size limit of a machine's volume.
const VOLUME_BYTES: u64 = 64 << 20;

/// A longer duration counts as a hang.
const LIMIT: Duration = Duration::from_secs(120);

/// The writer checks its memory with each write; its lines are numbered.
#[test]
fn every_checkpoint_of_a_chain_can_be_restored() {
    let mut running = Running::start("writer", &["16", "8", "30"]);
    running.wait_lines(2);
    let mut taken = Vec::new();
    for round in 0..5 {
        let before = running.lines();
        taken.push((before, running.take(round == 3), running.lines()));
        running.wait_lines(running.lines() + 1);
    }
    for (round, (_, taken, _)) in taken.iter().enumerate() {
        let full = round == 0 || round == 3;
        assert_eq!(taken.manifest.parent.is_none(), full, "{round}");
        let stored = taken.manifest.stored_bytes();
        assert_eq!(stored >= 16 << 20, full, "{round}: {stored} bytes");
    }
    for (round, (before, taken, after)) in taken.iter().enumerate().rev() {
        let memory = match round % 2 {
            1 => MemoryRestore::Lazy,
            _ => MemoryRestore::Eager,
        };
        let restored = running.restore_as(Some(&taken.manifest.id), memory);
        let text = running.finish(restored.unwrap());
        let numbers: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert!((*before..=*after).contains(&numbers[0]), "{numbers:?}");
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert_eq!(numbers.last(), Some(&29));
    }
    // The machine itself is not affected.
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
    assert_eq!(running.lines(), 30);
}

#[test]
fn threads_and_their_waits_are_restored() {
    let alone = {
        let running = Running::start("threads", &["3", "100000"]);
        assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
        String::from_utf8(running.output.bytes()).unwrap()
    };
    let mut running = Running::start("threads", &["3", "100000"]);
    let mut taken = Vec::new();
    while running
        .machine
        .wait(Some(Duration::from_millis(20)))
        .is_none()
    {
        let before = running.output.bytes();
        // It may end meanwhile.
        if let Ok(checkpoint) = running.try_take(false, &AtomicBool::new(false))
            && running.output.bytes() == before
        {
            taken.push((before, checkpoint.manifest.id));
        }
    }
    assert!(!taken.is_empty());
    for (before, id) in taken.iter().take(10) {
        let rest = running.finish(running.restore(Some(id)).unwrap());
        let whole = String::from_utf8(before.clone()).unwrap() + &rest;
        assert_eq!(whole, alone);
    }
}

/// The guest compares a file with its memory: pages and file blocks must be of one
/// instant.
#[test]
fn volumes_are_part_of_checkpoints() {
    let mut running = Running::start("disk", &["/own", "32", "3000", "1"]);
    running.wait_lines(1);
    let mut taken = Vec::new();
    for round in 0..6 {
        taken.push(running.take(round == 4).manifest);
        running.wait_lines(running.lines() + 40);
    }
    for (round, manifest) in taken.iter().enumerate() {
        let full = round == 0 || round == 4;
        assert_eq!(manifest.parent.is_none(), full, "{round}");
        let bytes: u64 = manifest.block_packs.iter().map(|pack| pack.bytes).sum();
        // Bytes that the guest just truncated are missing.
        assert_eq!(bytes >= 31 << 20, full, "{round}: {bytes} bytes");
        assert!(bytes > 0 && !manifest.block_runs.is_empty());
    }
    for manifest in taken.iter().rev() {
        let restored = running.restore(Some(&manifest.id)).unwrap();
        let text = running.finish(restored);
        assert!(text.ends_with("\n3000\nall of it is as it must be\n"));
    }
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
    // A flipped bit of a block.
    let folder = running.place().join("machines/m");
    let pack = folder.join(format!("{}.v0.pack", taken[5].id));
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let restored = running.restore(None).unwrap();
    assert_eq!(restored.manifest.id, taken[4].id);
    assert!(restored.passed_over[0].contains("pack v0"));
    let text = running.finish(restored);
    assert!(text.ends_with("all of it is as it must be\n"));
}

fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(end))
        .collect();
    found.sort();
    found
}

#[test]
fn the_newest_intact_checkpoint_is_used() {
    let mut running = Running::start("counter", &["0", "1"]);
    running.wait_lines(1);
    let ids: Vec<CheckpointId> = (0..4).map(|_| running.take(true).manifest.id).collect();
    running.machine.stop();
    let folder = running.place().join("machines/m");
    let restored = running.restore(None).unwrap();
    assert_eq!(restored.manifest.id, ids[3]);
    // Truncated, as by a full disk or a lost write.
    let manifests = files(&folder, ".manifest");
    let bytes = std::fs::read(&manifests[3]).unwrap();
    std::fs::write(&manifests[3], &bytes[..bytes.len() / 2]).unwrap();
    // A flipped bit of a page.
    let pack = files(&folder, "pack")
        .into_iter()
        .find(|path| path.to_string_lossy().contains(&ids[2].to_string()))
        .unwrap();
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&pack, bytes).unwrap();
    let restored = running.restore(None).unwrap();
    assert_eq!(restored.manifest.id, ids[1]);
    assert_eq!(restored.passed_over.len(), 2);
    assert!(restored.passed_over[0].contains("manifest"));
    assert!(restored.passed_over[1].contains("pack 0"));
    // A named checkpoint is not replaced by another.
    let error = running.restore(Some(&ids[2])).err().unwrap().to_string();
    assert!(
        error.contains("pack 0") && error.contains("damaged"),
        "{error}"
    );
    // Missing altogether.
    std::fs::remove_file(&pack).unwrap();
    let error = running.restore(Some(&ids[2])).err().unwrap().to_string();
    assert!(error.contains("missing"), "{error}");
    std::fs::remove_dir_all(running.place().join("programs")).unwrap();
    let error = running.restore(None).err().unwrap().to_string();
    assert!(
        error.contains("is intact") && error.contains("its program"),
        "{error}"
    );
    std::fs::remove_dir_all(&folder).unwrap();
    let error = running.restore(None).err().unwrap().to_string();
    assert!(error.contains("has no checkpoint there"), "{error}");
}

/// A lazy restore runs at once; the pages read later are verified, and so are those of
/// ancestors.
#[test]
fn a_lazy_restore_runs_before_its_memory_is_read() {
    let mut running = Running::start("writer", &["16", "8", "60"]);
    running.wait_lines(2);
    running.take(false);
    running.wait_lines(running.lines() + 1);
    let taken = running.take(false);
    running.machine.stop();
    let restored = running.restore_as(None, MemoryRestore::Lazy).unwrap();
    let populated: u64 = restored
        .memories
        .iter()
        .flat_map(|memory| memory.populated().unwrap())
        .map(|range| range.end - range.start)
        .sum();
    assert_eq!(populated, 0);
    let RemainingMemory::Lazy(behind) = &restored.rest else {
        panic!("it is not a lazy restore");
    };
    let (tell, told) = std::sync::mpsc::channel();
    behind
        .begin(move |result| tell.send(result).unwrap())
        .unwrap();
    assert_eq!(told.recv_timeout(LIMIT).unwrap(), Ok(()));
    assert_eq!(behind.wait(), Ok(()));
    // The result equals that of an eager restore, and writes can be tracked.
    let cold = running.restore(None).unwrap();
    for (warm, cold) in restored.memories.iter().zip(cold.memories.iter()) {
        assert_eq!(warm.size_bytes(), cold.size_bytes());
        let mut bytes = [vec![0; 1 << 20], vec![0; 1 << 20]];
        for at in (0..warm.size_bytes()).step_by(1 << 16) {
            warm.read(at, &mut bytes[0][..1 << 16]).unwrap();
            cold.read(at, &mut bytes[1][..1 << 16]).unwrap();
            assert!(bytes[0] == bytes[1], "at {at}");
        }
        DirtyTracker::start(warm.clone()).unwrap();
    }
    // Damage of pages read later is reported.
    let pack = files(&running.place().join("machines/m"), "pack")
        .into_iter()
        .find(|path| {
            !path
                .to_string_lossy()
                .contains(&taken.manifest.id.to_string())
        })
        .unwrap();
    let mut bytes = std::fs::read(&pack).unwrap();
    let last = bytes.len() - 1;
    for at in (0..=last).step_by(4096) {
        bytes[at] ^= 4;
    }
    std::fs::write(&pack, &bytes).unwrap();
    let restored = running.restore_as(None, MemoryRestore::Lazy).unwrap();
    let RemainingMemory::Lazy(behind) = restored.rest else {
        panic!("it is not a lazy restore");
    };
    let (tell, told) = std::sync::mpsc::channel();
    behind
        .begin(move |result| tell.send(result).unwrap())
        .unwrap();
    let error = told.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert!(error.contains("pack 0: it is damaged"), "{error}");
    assert_eq!(behind.wait(), Err(error));
    // Truncated and missing parts are found before the machine runs.
    std::fs::write(&pack, &bytes[..last]).unwrap();
    let error = running
        .restore_as(None, MemoryRestore::Lazy)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("no checkpoint of machine"), "{error}");
}

/// The parent of the next checkpoint was deleted.
#[test]
fn deleted_checkpoints_are_not_parents() {
    let mut running = Running::start("counter", &["0", "1"]);
    running.wait_lines(1);
    running.take(false);
    assert!(running.take(false).manifest.parent.is_some());
    let packs = files(&running.place().join("machines/m"), ".0.pack");
    std::fs::remove_file(&packs[0]).unwrap();
    assert!(running.take(false).manifest.parent.is_none());
    assert!(running.take(false).manifest.parent.is_some());
    let packs = files(&running.place().join("machines/m"), ".manifest");
    std::fs::remove_file(packs.last().unwrap()).unwrap();
    assert!(running.take(false).manifest.parent.is_none());
    assert!(running.restore(None).is_ok());
}

#[test]
fn old_checkpoints_are_deleted_and_ancestors_stay() {
    let mut running = Running::start("writer", &["16", "1", "100000"]);
    running.wait_lines(1);
    // Two chains: 0-1-2 and 3-4.
    let mut ids = Vec::new();
    for round in 0..5 {
        ids.push(running.take(round == 3).manifest.id);
        running.wait_lines(running.lines() + 1);
    }
    let (repository, name) = (running.repository(), "m".parse().unwrap());
    let keep = |count| {
        let retention = Retention {
            newest: Some(count),
            for_s: None,
        };
        let runtime = running.runtime.handle();
        repository
            .apply_retention(runtime, &name, retention, unix_ms())
            .unwrap()
            .len()
    };
    let list = || running.runtime.block_on(repository.list(&name)).unwrap();
    assert_eq!(keep(3), 0);
    assert_eq!(list().len(), 5);
    assert_eq!(keep(1), 3);
    assert_eq!(list(), [ids[4].clone(), ids[3].clone()]);
    let packs = files(&running.place().join("machines/m"), "pack");
    assert!(packs.iter().all(|pack| {
        let pack = pack.to_string_lossy();
        pack.contains(&ids[4].to_string()) || pack.contains(&ids[3].to_string())
    }));
    assert!(running.restore(None).is_ok());
    let all = running.runtime.block_on(repository.machines()).unwrap();
    assert_eq!(all, [name]);
}

/// Compaction of a chain preserves the machine; later checkpoints still refer to it.
#[test]
fn compaction_preserves_the_machine() {
    let mut running = Running::start("disk", &["/own", "8", "3000", "1"]);
    running.wait_lines(1);
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(running.take(false).manifest);
        running.wait_lines(running.lines() + 20);
    }
    // On a slow disk it would end before all of them were examined.
    running.machine.freeze(LIMIT).unwrap();
    let (repository, name) = (running.repository(), "m".parse().unwrap());
    let runtime = running.runtime.handle().clone();
    let state = |id: &CheckpointId| {
        let restored = running.restore(Some(id)).unwrap();
        let mut hash = blake3::Hasher::new();
        for memory in restored.memories.iter() {
            let mut bytes = vec![0; memory.size_bytes() as usize];
            memory.read(0, &mut bytes).unwrap();
            hash.update(&bytes);
        }
        let mut volume = Vec::new();
        for path in files(&running.volumes().join("0"), "") {
            let name = path.file_name().unwrap().to_owned();
            let mut bytes = std::fs::read(path).unwrap();
            // The length of a file is in the machine's image.
            while bytes.last() == Some(&0) {
                bytes.pop();
            }
            volume.push((name, blake3::hash(&bytes)));
        }
        (hash.finalize(), volume, restored.manifest.parent.is_none())
    };
    let before: Vec<_> = taken.iter().map(|it| state(&it.id)).collect();
    assert!(!before[2].1.is_empty() && !before[2].2);
    let bytes = compact(&repository, &runtime, &name, &taken[2].id).unwrap();
    let all: u64 = taken[..3].iter().map(|it| it.stored_bytes()).sum();
    assert!(bytes.is_some_and(|bytes| bytes < all), "{bytes:?} of {all}");
    let after = state(&taken[2].id);
    assert!(after.2);
    assert_eq!((after.0, after.1), (before[2].0, before[2].1.clone()));
    assert_eq!(state(&taken[3].id), before[3]);
    // It is full: there is nothing to do.
    assert_eq!(
        compact(&repository, &runtime, &name, &taken[2].id).unwrap(),
        None
    );
    // Its ancestors can be deleted now, with its own old packs; repeatedly.
    let two = Retention {
        newest: Some(2),
        for_s: None,
    };
    assert_eq!(
        repository
            .apply_retention(&runtime, &name, two, unix_ms())
            .unwrap()
            .len(),
        2
    );
    assert_eq!(state(&taken[3].id), before[3]);
    for pack in files(&running.place().join("machines/m"), "pack") {
        let pack = pack.to_string_lossy().into_owned();
        let old = pack.contains(&taken[2].id.to_string()) && !pack.contains(".g1.");
        assert!(!old, "{pack}");
    }
    assert!(running.restore(Some(&taken[0].id)).is_err());
    // The machine goes on with incremental checkpoints.
    running.machine.thaw().unwrap();
    let next = running.take(false).manifest;
    assert_eq!(next.parent.as_ref(), Some(&taken[3].id));
    running.machine.stop();
    let text = running.finish(running.restore(Some(&next.id)).unwrap());
    assert!(text.ends_with("all of it is as it must be\n"));
}

/// Nodes with different clocks make checkpoints of one machine.
#[test]
fn ids_increase_with_any_clock() {
    let mut running = Running::start("writer", &["16", "1", "100000"]);
    running.wait_lines(1);
    let first = running.take(false).manifest;
    // A checkpoint of a node whose clock was ahead by an hour.
    let ahead = CheckpointId::new(first.id.unix_ms() + 3_600_000);
    let folder = running.place().join("machines/m");
    std::fs::write(folder.join(format!("{ahead}.manifest")), "torn").unwrap();
    let second = running.take(false).manifest;
    assert!(second.id > ahead && second.parent == Some(first.id.clone()));
    // One that counts, which is not in this repository.
    let counts = CheckpointId::new(ahead.unix_ms() + 3_600_000);
    running.after = Some(counts.clone());
    let third = running.take(true).manifest;
    assert!(third.id > counts);
    let one = Retention {
        newest: Some(1),
        for_s: None,
    };
    let (repository, name) = (running.repository(), "m".parse().unwrap());
    let runtime = running.runtime.handle();
    let gone = repository
        .apply_retention(runtime, &name, one, unix_ms())
        .unwrap();
    assert_eq!(gone, [first.id, ahead, second.id]);
    assert_eq!(running.restore(None).unwrap().manifest.id, third.id);
}

/// A lazy restore reads for a while: what it reads is not deleted.
#[test]
fn checkpoints_being_read_are_not_deleted() {
    let mut running = Running::start("writer", &["16", "1", "100000"]);
    running.wait_lines(1);
    let first = running.take(false).manifest;
    let second = running.take(false).manifest;
    let (repository, name) = (running.repository(), "m".parse().unwrap());
    let runtime = running.runtime.handle().clone();
    let reading = runtime.block_on(repository.begin_reading(&second)).unwrap();
    let third = running.take(true).manifest;
    let one = Retention {
        newest: Some(1),
        for_s: None,
    };
    let keep = |now| {
        repository
            .apply_retention(&runtime, &name, one, now)
            .unwrap()
    };
    assert_eq!(keep(unix_ms()), []);
    let restored = running
        .restore_as(Some(&second.id), MemoryRestore::Lazy)
        .unwrap();
    let RemainingMemory::Lazy(behind) = &restored.rest else {
        panic!("it is not a lazy restore");
    };
    runtime
        .block_on(repository.end_reading(&second, &reading))
        .unwrap();
    // The machine's own mark counts as well, until it has all pages.
    assert_eq!(keep(unix_ms()), []);
    let (tell, told) = std::sync::mpsc::channel();
    behind
        .begin(move |result| tell.send(result).unwrap())
        .unwrap();
    assert_eq!(told.recv_timeout(LIMIT).unwrap(), Ok(()));
    assert_eq!(keep(unix_ms()), [first.id, second.id]);
    // A forgotten mark counts for an hour.
    runtime.block_on(repository.begin_reading(&third)).unwrap();
    let fourth = running.take(true).manifest;
    assert_eq!(keep(unix_ms()), []);
    assert_eq!(keep(unix_ms() + 3_700_000), [third.id]);
    let left = std::fs::read_dir(running.place().join("machines/m")).unwrap();
    let all_of_it = left
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .all(|name| name.starts_with(&fourth.id.to_string()));
    assert!(all_of_it);
}

/// Retention by age, and automatic compaction of superseded chains.
#[test]
fn checkpoints_are_kept_by_age_and_superseded_bytes_are_not() {
    let mut running = Running::start("writer", &["16", "400", "100000"]);
    running.wait_lines(2);
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(running.take(false).manifest.id);
        running.wait_lines(running.lines() + 2);
    }
    running.machine.stop();
    let (repository, name) = (running.repository(), "m".parse().unwrap());
    let runtime = running.runtime.handle();
    let list = || runtime.block_on(repository.list(&name)).unwrap();
    let now = ids[4].unix_ms() + 1000;
    let keep = |newest, for_s| {
        let retention = Retention { newest, for_s };
        repository
            .apply_retention(runtime, &name, retention, now)
            .unwrap()
            .len()
    };
    assert!(Retention::default().is_all());
    assert_eq!(keep(None, None), 0);
    assert_eq!(keep(None, Some(3600)), 0);
    assert_eq!(keep(Some(1), Some(3600)), 0);
    assert_eq!(list().len(), 5);
    // Each rewrites most of the 16 MiB: the fifth alone is a fifth of the chain.
    assert_eq!(keep(None, Some(0)), 4);
    assert_eq!(list(), [ids[4].clone()]);
    let restored = running.restore(None).unwrap();
    assert_eq!(restored.manifest.generation, 1);
    assert!(restored.manifest.stored_bytes() < 20 << 20);
}

#[test]
fn chains_are_bounded_and_abandoned_checkpoints_do_not_count() {
    let mut running = Running::start("counter", &["0", "1"]);
    running.wait_lines(1);
    let full: Vec<bool> = (0..=CHAIN_MAX)
        .map(|_| running.take(false).manifest.parent.is_none())
        .collect();
    let expected: Vec<bool> = (0..=CHAIN_MAX)
        .map(|number| number % CHAIN_MAX == 0)
        .collect();
    assert_eq!(full, expected);
    let before = running.restore(None).unwrap().manifest.id;
    running.wait_lines(running.lines() + 1);
    let error = running.try_take(false, &AtomicBool::new(true));
    assert!(matches!(error, Err(CreateError::GivenUp)));
    assert_eq!(running.restore(None).unwrap().manifest.id, before);
    // Writes of the abandoned checkpoint are not lost: the next one is full.
    assert!(running.take(false).manifest.parent.is_none());
}

#[test]
fn too_large_and_ended_machines_are_reported() {
    let mut running = Running::start("writer", &["16", "1"]);
    running.wait_lines(1);
    running.take(false);
    let origin = Origin {
        repository: String::new(),
        machine: "m".parse().unwrap(),
        id: None,
        is_clone: false,
        memory: MemoryRestore::Eager,
    };
    let limits = Limits {
        memory_bytes: 20 << 20,
        ..Limits::default()
    };
    let repository = running.repository();
    let result = restore(
        &origin,
        &repository,
        &running.engine,
        limits,
        running.runtime.handle(),
        &running.volumes(),
    );
    let error = result.err().unwrap().to_string();
    assert!(error.contains("the limit is 20971520 bytes"), "{error}");
    running.machine.stop();
    running.machine.wait(Some(LIMIT)).unwrap();
    let error = running.try_take(false, &AtomicBool::new(false));
    assert!(matches!(error, Err(CreateError::Machine(_))));
}

#[test]
fn invalid_locations_are_reported() {
    for (url, part) in [
        ("ftp://somewhere", "neither a directory nor s3://"),
        ("relative/path", "neither a directory nor s3://"),
        ("/dev/null/no", "Not a directory"),
    ] {
        for repository in [Repository::open(url), Repository::create(url)] {
            let error = repository.unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(url), "{error}");
        }
    }
    // Opening creates nothing.
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    assert!(Repository::open(&missing.display().to_string()).is_err());
    assert!(!missing.exists());
    assert!(Repository::create(&missing.display().to_string()).is_ok());
}
