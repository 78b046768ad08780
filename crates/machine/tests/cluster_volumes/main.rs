//! Writers of cluster volumes with stores that fail at any put: after a crash the volume
//! has its state of some instant at or after the last commit, and of two writers only the
//! newer one commits.

mod faulty_store;

use faulty_store::*;

use async_trait::async_trait;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use keel_cluster::MachineName;
use keel_machine::cluster_volume::{
    DirtyBlock, VolumeError, VolumeState, VolumeStore, Writer, WriterEpoch,
};
use keel_machine::object_storage::ObjectStorage;
use keel_net::Bytes;
use keel_wasi::volume::{BLOCK_BYTES, NodeBody, NodeRecord, VolumeLimits, VolumeRecord};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

const BLOCK: usize = BLOCK_BYTES as usize;
const ID: [u8; 16] = [7; 16];

fn name() -> MachineName {
    "data".parse().unwrap()
}

fn volume(store: Arc<dyn ObjectStore>) -> VolumeStore {
    volume_of(ID, store)
}

fn volume_of(id: [u8; 16], store: Arc<dyn ObjectStore>) -> VolumeStore {
    let place = ObjectStorage::of(store, Path::from("some/prefix"), "memory");
    VolumeStore::new(name(), id, place)
}

fn limits() -> VolumeLimits {
    VolumeLimits::of_bytes(1 << 30)
}

fn epoch(counter: u64) -> WriterEpoch {
    WriterEpoch {
        incarnation: 1,
        holding: 1,
        counter,
    }
}

/// Files of a volume, all in its root, as programs see them.
type Files = BTreeMap<u64, Vec<u8>>;

/// A model of a volume that is written here.
#[derive(Debug, Clone)]
struct Model {
    files: Files,
    next_inode: u64,
    dirty: BTreeSet<(u64, u64)>,
}

impl Model {
    fn new(files: Files, next_inode: u64) -> Self {
        Model {
            files,
            next_inode,
            dirty: BTreeSet::new(),
        }
    }

    fn change(&mut self, random: &mut ChaCha8Rng) {
        let known = self.files.keys().copied().collect::<Vec<_>>();
        let some = (!known.is_empty()).then(|| known[random.random_range(0..known.len())]);
        match (some, random.random_range(0..10)) {
            (None, _) | (_, 0) => {
                self.files.insert(self.next_inode, Vec::new());
                self.next_inode += 1;
            }
            (Some(file), 1) => {
                self.files.remove(&file);
                self.dirty.retain(|(inode, _)| *inode != file);
            }
            (Some(file), 2) => {
                let bytes = self.files.get_mut(&file).unwrap();
                let size = random.random_range(0..=bytes.len());
                bytes.truncate(size);
                self.dirty
                    .retain(|(inode, block)| *inode != file || (*block as usize) * BLOCK < size);
                if !size.is_multiple_of(BLOCK) {
                    self.dirty.insert((file, (size / BLOCK) as u64));
                }
            }
            (Some(file), _) => {
                let bytes = self.files.get_mut(&file).unwrap();
                let at = random.random_range(0..=bytes.len().min(3 * BLOCK));
                // Few values, so that chunks repeat.
                let new = vec![random.random_range(0..3_u8); random.random_range(1..BLOCK)];
                let end = at + new.len();
                bytes.resize(end.max(bytes.len()), 0);
                bytes[at..end].copy_from_slice(&new);
                let blocks = at / BLOCK..end.div_ceil(BLOCK);
                self.dirty.extend(blocks.map(|block| (file, block as u64)));
            }
        }
    }

    fn record(&self) -> VolumeRecord {
        let mut record = VolumeRecord::empty(1);
        record.next_inode = self.next_inode;
        let entries = self
            .files
            .keys()
            .map(|inode| (format!("{inode:08}"), *inode));
        record.nodes[0].body = NodeBody::Directory {
            parent: 1,
            entries: entries.collect(),
        };
        for (inode, bytes) in &self.files {
            let blocks = bytes.len().div_ceil(BLOCK) as u64;
            record.nodes.push(NodeRecord {
                inode: *inode,
                access_ns: 1,
                modification_ns: 2,
                change_ns: 3,
                body: NodeBody::File {
                    size: bytes.len() as u64,
                    blocks: (blocks > 0).then_some((0, blocks)).into_iter().collect(),
                },
            });
        }
        record
    }

    fn blocks(&self) -> Vec<DirtyBlock> {
        let block = |(inode, block): &(u64, u64)| {
            let bytes = self.files.get(inode)?;
            let rest = bytes.get(*block as usize * BLOCK..)?;
            let bytes = Bytes::copy_from_slice(&rest[..rest.len().min(BLOCK)]);
            Some(DirtyBlock::new(*inode, *block, bytes))
        };
        self.dirty.iter().filter_map(block).collect()
    }
}

/// Reads all files; each chunk must exist and be intact.
async fn files_of(store: &VolumeStore, state: &VolumeState) -> Files {
    let mut files = Files::new();
    for node in state.record().nodes {
        let NodeBody::File { size, blocks } = node.body else {
            continue;
        };
        let mut bytes = vec![0; size as usize];
        for block in blocks
            .iter()
            .flat_map(|(first, count)| *first..first + count)
        {
            let chunk = state.chunk(node.inode, block).expect("a chunk");
            let content = store.chunk(&chunk).await.expect("a store").expect("bytes");
            let at = block as usize * BLOCK;
            let end = (at + content.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&content[..end - at]);
        }
        files.insert(node.inode, bytes);
    }
    files
}

async fn commit(writer: &mut Writer, model: &mut Model) -> Result<(), VolumeError> {
    writer.commit(model.record(), model.blocks()).await?;
    model.dirty.clear();
    Ok(())
}

/// Random changes; the store fails at any request, or the writer's process ends there.
/// The next writer finds the last commit or the one in progress.
#[tokio::test]
async fn crashes_lose_no_commits() {
    let mut crashes = 0;
    for seed in 0..300 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let faulty = Faulty::new(seed, false);
        let store = volume(faulty.clone());
        store.create(limits()).await.unwrap();
        let mut counter = 1;
        let mut writer = Writer::claim(store.clone(), epoch(counter), None)
            .await
            .unwrap();
        let mut model = Model::new(Files::new(), 2);
        // The committed content, and the content that may have been committed since.
        let mut committed = model.files.clone();
        let mut doubts: Vec<Files> = Vec::new();
        let mut snapshots: Vec<(String, Files)> = Vec::new();
        for _ in 0..30 {
            for _ in 0..random.random_range(0..6) {
                model.change(&mut random);
            }
            faulty.plan(match random.random_range(0..4) {
                0 => Plan::Fails {
                    after: random.random_range(0..8),
                    done: random.random(),
                },
                1 => Plan::Flaky(20),
                _ => Plan::Works,
            });
            let outcome = match random.random_range(0..14) {
                0 => writer.compact().await,
                1 => writer.collect().await.map(drop),
                2 => writer.tidy(3).await,
                3 => {
                    let kept = format!("m.{}", snapshots.len());
                    let kept_now = writer.snapshot(&kept).await;
                    if kept_now.is_ok() {
                        let files = files_of(&store, writer.state()).await;
                        assert!(committed == files || doubts.contains(&files), "seed {seed}");
                        snapshots.push((kept, files));
                    }
                    kept_now
                }
                _ => {
                    let done = commit(&mut writer, &mut model).await;
                    match &done {
                        Ok(()) => {
                            committed.clone_from(&model.files);
                            doubts.clear();
                        }
                        Err(_) => doubts.push(model.files.clone()),
                    }
                    done
                }
            };
            if let Err(error) = &outcome {
                assert!(error.is_temporary(), "seed {seed}: {error}");
            }
            // It tries again, or its process ends.
            if outcome.is_err() && random.random() {
                crashes += 1;
                faulty.plan(Plan::Works);
                counter += 1;
                writer = Writer::claim(store.clone(), epoch(counter), None)
                    .await
                    .unwrap();
                let found = files_of(&store, writer.state()).await;
                assert!(
                    found == committed || doubts.contains(&found),
                    "seed {seed}: neither what was committed nor what was to be"
                );
                model = Model::new(found, model.next_inode);
                committed.clone_from(&model.files);
                doubts.clear();
            }
            if random.random_ratio(1, 20)
                && let Some((kept, files)) = snapshots.last()
            {
                faulty.plan(Plan::Works);
                counter += 1;
                let state = store.snapshot(kept).await.unwrap();
                let wanted = Some(Arc::new(state));
                writer = Writer::claim(store.clone(), epoch(counter), wanted)
                    .await
                    .unwrap();
                assert!(
                    files_of(&store, writer.state()).await == *files,
                    "seed {seed}"
                );
                model = Model::new(files.clone(), model.next_inode);
                committed.clone_from(&model.files);
                doubts.clear();
            }
        }
        faulty.plan(Plan::Works);
        commit(&mut writer, &mut model).await.unwrap();
        writer.compact().await.unwrap();
        writer.forget_claimed_content();
        writer.collect().await.unwrap();
        let last = Writer::claim(store.clone(), epoch(counter + 1), None)
            .await
            .unwrap();
        assert_eq!(
            files_of(&store, last.state()).await,
            model.files,
            "seed {seed}"
        );
        for (kept, files) in &snapshots {
            let state = store.snapshot(kept).await.unwrap();
            assert!(files_of(&store, &state).await == *files, "seed {seed}");
        }
    }
    assert!(crashes > 300, "{crashes}");
}

/// A writer that commits until it is fenced; returns the commits in order.
async fn write_on(
    mut writer: Writer,
    mut model: Model,
    seed: u64,
    rounds: u32,
) -> (Vec<Files>, Option<VolumeError>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut committed = vec![model.files.clone()];
    for _ in 0..rounds {
        model.change(&mut random);
        let done = match random.random_range(0..9) {
            0 => writer.compact().await,
            1 => writer.collect().await.map(drop),
            2 => writer.tidy(9).await,
            _ => {
                let done = commit(&mut writer, &mut model).await;
                if done.is_ok() {
                    committed.push(model.files.clone());
                }
                done
            }
        };
        if let Err(error) = done {
            return (committed, Some(error));
        }
    }
    (committed, None)
}

/// A second writer claims the volume at any point of the first one's work, which still
/// considers itself the owner.
#[tokio::test]
async fn only_one_of_two_writers_commits() {
    let mut fenced = 0;
    for seed in 0..400 {
        let faulty = Faulty::new(seed, true);
        let store = volume(faulty.clone());
        store.create(limits()).await.unwrap();
        let first = Writer::claim(store.clone(), epoch(1), None).await.unwrap();
        let old = tokio::spawn(write_on(first, Model::new(Files::new(), 2), seed, 40));
        for _ in 0..seed % 200 {
            tokio::task::yield_now().await;
        }
        let second = Writer::claim(store.clone(), epoch(2), None).await.unwrap();
        let found = files_of(&store, second.state()).await;
        let next_inode = second.state().record().next_inode;
        let (new, none) = write_on(second, Model::new(found.clone(), next_inode), !seed, 20).await;
        assert!(none.is_none(), "seed {seed}: {none:?}");
        let (old, error) = old.await.unwrap();
        // All acknowledged commits of the first writer are found, and possibly the one in
        // progress; no later one.
        let last = old.last().unwrap();
        if let Some(error) = error {
            fenced += 1;
            let by_second = matches!(&error, VolumeError::Fenced { by, .. } if *by == epoch(2));
            assert!(by_second, "seed {seed}: {error}");
            let known = old.iter().rev().take(1).any(|files| *files == found);
            // The first writer's uncertain commit may have been found.
            assert!(
                known || !old.contains(&found),
                "seed {seed}: an older state was found"
            );
        } else {
            assert!(*last == found, "seed {seed}");
        }
        let third = Writer::claim(store.clone(), epoch(3), None).await.unwrap();
        let now = files_of(&store, third.state()).await;
        assert!(now == *new.last().unwrap(), "seed {seed}");
        // A late writer does not claim.
        for late in [epoch(1), epoch(2)] {
            let error = Writer::claim(store.clone(), late, None).await.unwrap_err();
            assert!(matches!(error, VolumeError::Fenced { .. }), "{error}");
        }
    }
    assert!(fenced > 200, "{fenced}");
}

async fn with_a_file() -> (Arc<Faulty>, VolumeStore, Writer, Model) {
    let faulty = Faulty::new(1, false);
    let store = volume(faulty.clone());
    store.create(limits()).await.unwrap();
    let mut writer = Writer::claim(store.clone(), epoch(1), None).await.unwrap();
    let mut model = Model::new(Files::new(), 3);
    model.files.insert(2, vec![9; BLOCK + 5]);
    model.dirty.extend([(2, 0), (2, 1)]);
    commit(&mut writer, &mut model).await.unwrap();
    (faulty, store, writer, model)
}

async fn objects(faulty: &Faulty, part: &str) -> Vec<Path> {
    let all = faulty.inner.list(None).map_ok(|object| object.location);
    let all: Vec<Path> = all.try_collect().await.unwrap();
    all.into_iter()
        .filter(|path| path.as_ref().contains(part))
        .collect()
}

#[tokio::test]
async fn damaged_and_missing_objects_are_reported() {
    let (faulty, store, mut writer, mut model) = with_a_file().await;
    let state = writer.state().clone();
    // A copied log.
    let other = volume_of([8; 16], faulty.clone());
    for path in objects(&faulty, "/log/").await {
        let to = path.as_ref().replace(&"07".repeat(16), &"08".repeat(16));
        faulty.inner.copy(&path, &Path::from(to)).await.unwrap();
    }
    let error = Writer::claim(other.clone(), epoch(9), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another volume"), "{error}");
    other.destroy().await.unwrap();
    // A chunk, then a segment, with a flipped bit.
    for part in ["/chunks/", "/log/00000000000000000003"] {
        let path = objects(&faulty, part).await.remove(0);
        let good = faulty
            .inner
            .get(&path)
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap();
        let mut bad = good.to_vec();
        bad[3] ^= 1;
        faulty.inner.put(&path, bad.into()).await.unwrap();
        let error = match part {
            "/chunks/" => {
                let mut errors = Vec::new();
                for chunk in state.chunks() {
                    errors.extend(store.chunk(&chunk).await.err());
                }
                errors.remove(0)
            }
            _ => Writer::claim(store.clone(), epoch(9), None)
                .await
                .unwrap_err(),
        };
        let damaged =
            matches!(&error, VolumeError::Damaged { object, .. } if *object == path.to_string());
        assert!(damaged && error.to_string().contains("data"), "{error}");
        faulty.inner.put(&path, good.into()).await.unwrap();
    }
    // The volume exists already.
    let error = store.create(limits()).await.unwrap_err();
    assert!(matches!(error, VolumeError::Exists { .. }), "{error}");
    // A segment in the middle.
    let path = objects(&faulty, "/log/00000000000000000002")
        .await
        .remove(0);
    let segment = faulty
        .inner
        .get(&path)
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    faulty.inner.delete(&path).await.unwrap();
    let error = Writer::claim(store.clone(), epoch(9), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("is missing"), "{error}");
    faulty.inner.put(&path, segment.into()).await.unwrap();
    assert!(matches!(
        store.snapshot("m.1").await.unwrap_err(),
        VolumeError::NoSnapshot { .. }
    ));
    // All objects: nothing is put into a volume that disappeared.
    store.destroy().await.unwrap();
    assert_eq!(objects(&faulty, "").await, []);
    model.files.insert(2, vec![1; 9]);
    model.dirty.insert((2, 0));
    let error = commit(&mut writer, &mut model).await.unwrap_err();
    assert!(matches!(error, VolumeError::Vanished { .. }), "{error}");
    assert_eq!(objects(&faulty, "").await, []);
    let error = Writer::claim(store.clone(), epoch(9), None)
        .await
        .unwrap_err();
    assert!(matches!(error, VolumeError::Vanished { .. }), "{error}");
}

/// A put during the disappearance creates the location anew, without the former content:
/// this is not damage, and the writer goes on once the location is back.
#[tokio::test]
async fn a_commit_survives_a_location_that_disappears() {
    let mut vanished = 0;
    // Three chunks and a segment; then the same into the new location.
    for after in 0..6 {
        let (faulty, store, mut writer, mut model) = with_a_file().await;
        faulty.plan(Plan::Vanishes(after));
        let change = |model: &mut Model, byte: u8| {
            let bytes = (0..3).flat_map(|at| vec![byte + at; BLOCK]).collect();
            model.files.insert(2, bytes);
            model.dirty.extend((0..3).map(|block| (2, block)));
        };
        change(&mut model, 10);
        let first = commit(&mut writer, &mut model).await;
        assert_eq!(first.is_err(), after < 4, "{first:?}");
        change(&mut model, 20);
        for outcome in [first, commit(&mut writer, &mut model).await] {
            if let Err(error) = outcome {
                let is_named = matches!(error, VolumeError::Vanished { .. });
                assert!(is_named && error.is_temporary(), "after {after}: {error}");
                vanished += 1;
            }
        }
        faulty.put_back().await;
        commit(&mut writer, &mut model).await.unwrap();
        let again = Writer::claim(store.clone(), epoch(9), None).await.unwrap();
        assert_eq!(files_of(&store, again.state()).await, model.files);
    }
    assert_eq!(vanished, 4 * 2 + 2);
}

#[tokio::test]
async fn unused_objects_are_deleted() {
    let (faulty, store, mut writer, mut model) = with_a_file().await;
    writer.snapshot("m.1").await.unwrap();
    let chunks = async || objects(&faulty, "/chunks/").await.len();
    assert_eq!(chunks().await, 2);
    for byte in 0..10 {
        model.files.insert(2, vec![byte; BLOCK]);
        model.dirty.insert((2, 0));
        commit(&mut writer, &mut model).await.unwrap();
    }
    assert!(!writer.needs_collection());
    // The first block of the snapshot has the same bytes as one of those.
    assert_eq!(chunks().await, 11);
    assert_eq!(writer.collect().await.unwrap(), 9);
    store
        .delete_snapshots(&["m.1".to_owned(), "m.2".to_owned()])
        .await
        .unwrap();
    assert_eq!(store.snapshots().await.unwrap(), [""; 0]);
    writer.collect().await.unwrap();
    assert_eq!(chunks().await, 1);
    writer.compact().await.unwrap();
    writer.tidy(usize::MAX).await.unwrap();
    assert_eq!(objects(&faulty, "/log/").await.len(), 1);
    // The log does not grow indefinitely.
    for byte in 0..400_u32 {
        model.files.insert(2, byte.to_le_bytes().to_vec());
        model.dirty.insert((2, 0));
        commit(&mut writer, &mut model).await.unwrap();
        writer.tidy(2).await.unwrap();
    }
    assert!(objects(&faulty, "/log/").await.len() <= 200);
    let mut last = Writer::claim(store.clone(), epoch(2), None).await.unwrap();
    assert_eq!(files_of(&store, last.state()).await, model.files);
    // The content at the claim stays as long as the predecessor may return.
    let found = model.clone();
    last.collect().await.unwrap();
    for number in 0..1100_u32 {
        assert!(!last.needs_collection());
        model.files.insert(2, number.to_be_bytes().to_vec());
        model.dirty.insert((2, 0));
        commit(&mut last, &mut model).await.unwrap();
        if last.needs_collection() {
            assert!(number >= 1024 && last.collect().await.unwrap() > 1000);
            break;
        }
    }
    let left = chunks().await;
    assert_eq!(left, 2);
    let wanted = writer.state().clone();
    let first = Writer::claim(store.clone(), epoch(3), Some(wanted))
        .await
        .unwrap();
    assert_eq!(files_of(&store, first.state()).await, found.files);
    last.forget_claimed_content();
}

/// A writer that paused while another one claimed the volume deletes none of its chunks,
/// and no chunk of a newer writer at all.
#[tokio::test]
async fn a_writer_deletes_no_chunks_of_newer_ones() {
    let (faulty, store, mut first, mut old) = with_a_file().await;
    old.files.insert(2, vec![1; BLOCK]);
    old.dirty.insert((2, 0));
    commit(&mut first, &mut old).await.unwrap();
    let mut second = Writer::claim(store.clone(), epoch(2), None).await.unwrap();
    let mut new = Model::new(old.files.clone(), 3);
    new.files.insert(2, vec![2; 2 * BLOCK]);
    new.dirty.extend([(2, 0), (2, 1)]);
    commit(&mut second, &mut new).await.unwrap();
    let before = objects(&faulty, "").await;
    let error = first.collect().await.unwrap_err();
    let by_second = matches!(&error, VolumeError::Fenced { by, .. } if *by == epoch(2));
    assert!(by_second, "{error}");
    assert_eq!(objects(&faulty, "").await, before);
    // No other writer has claimed as far as this one knows; other objects stay, too.
    second.forget_claimed_content();
    let folder = before[0].as_ref().split_once("/log/");
    let folder = folder
        .or_else(|| before[0].as_ref().split_once("/chunks/"))
        .unwrap()
        .0;
    let chunk =
        |writer: &str| Path::from(format!("{folder}/chunks/ab/{}-{writer}", "ab".repeat(32)));
    let stays = [
        chunk("1.1.3"),
        chunk("1.2.0"),
        chunk("2.0.0"),
        chunk("1.1"),
        chunk("1.1.2.0"),
    ];
    let goes = [
        chunk("1.1.2"),
        chunk("1.1.1"),
        chunk("1.0.9"),
        chunk("0.9.9"),
    ];
    for path in stays.iter().chain(&goes) {
        faulty.inner.put(path, "chunk".into()).await.unwrap();
    }
    // These, and chunks that only the first writer had.
    assert_eq!(second.collect().await.unwrap(), goes.len() as u64 + 3);
    let after = objects(&faulty, "/chunks/").await;
    assert!(stays.iter().all(|path| after.contains(path)), "{after:?}");
    assert!(!goes.iter().any(|path| after.contains(path)), "{after:?}");
    assert_eq!(files_of(&store, second.state()).await, new.files);
}

/// A volume that is removed and created again under its name in the same location: a user
/// of the first one does not touch the second.
#[tokio::test]
async fn a_recreated_volume_is_distinct() {
    let (faulty, first, mut writer, mut model) = with_a_file().await;
    first.destroy().await.unwrap();
    let second = volume_of([8; 16], faulty.clone());
    second.create(limits()).await.unwrap();
    let mut claimed = Writer::claim(second.clone(), epoch(1), None).await.unwrap();
    let mut made = Model::new(Files::new(), 3);
    made.files.insert(2, vec![3; BLOCK]);
    made.dirty.insert((2, 0));
    commit(&mut claimed, &mut made).await.unwrap();
    claimed.snapshot("m.1").await.unwrap();
    let before = objects(&faulty, "").await;
    assert_eq!(writer.collect().await.unwrap(), 0);
    model.files.insert(2, vec![4; 9]);
    model.dirty.insert((2, 0));
    let error = commit(&mut writer, &mut model).await.unwrap_err();
    assert!(matches!(error, VolumeError::Vanished { .. }), "{error}");
    // A slow removal.
    first.delete_snapshots(&["m.1".to_owned()]).await.unwrap();
    first.destroy().await.unwrap();
    assert_eq!(objects(&faulty, "").await, before);
    assert_eq!(files_of(&second, claimed.state()).await, made.files);
}
