//! A keeper whose store is held back at a chosen step.

use super::*;
use crate::cluster_volume::UnfinishedSnapshots;
use crate::storage_location::StorageLocation;
use async_trait::async_trait;
use futures::stream::BoxStream;
use keel_wasi::volume::{NodeBody, NodeRecord, VolumeLimits};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use tokio::runtime::Runtime;

type Answer<T> = object_store::Result<T>;

/// A store in memory that lets puts and lists wait.
#[derive(Debug, Clone)]
struct Gate {
    inner: Arc<InMemory>,
    /// Part of the paths that wait.
    held: watch::Sender<Option<&'static str>>,
    /// Something waits, or did.
    reached: watch::Sender<bool>,
}

impl Gate {
    fn new() -> Self {
        Gate {
            inner: Arc::new(InMemory::new()),
            held: watch::Sender::new(None),
            reached: watch::Sender::new(false),
        }
    }

    async fn pass(&self, path: &str) {
        let waits = |held: &Option<&str>| held.is_some_and(|part| path.contains(part));
        let mut held = self.held.subscribe();
        if waits(&held.borrow()) {
            self.reached.send_replace(true);
            let _ = held.wait_for(|held| !waits(held)).await;
        }
    }

    async fn chunks(&self) -> usize {
        let all = self.inner.list(None).try_collect::<Vec<_>>().await.unwrap();
        let chunks = all.iter().map(|object| object.location.as_ref());
        chunks.filter(|path| path.contains("/chunks/")).count()
    }
}

impl std::fmt::Display for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("gate")
    }
}

#[async_trait]
impl ObjectStore for Gate {
    async fn put_opts(&self, at: &Path, bytes: PutPayload, how: PutOptions) -> Answer<PutResult> {
        self.pass(at.as_ref()).await;
        self.inner.put_opts(at, bytes, how).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        how: PutMultipartOptions,
    ) -> Answer<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, how).await
    }

    async fn get_opts(&self, at: &Path, how: GetOptions) -> Answer<GetResult> {
        self.inner.get_opts(at, how).await
    }

    fn delete_stream(
        &self,
        all: BoxStream<'static, Answer<Path>>,
    ) -> BoxStream<'static, Answer<Path>> {
        self.inner.delete_stream(all)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Answer<ObjectMeta>> {
        let (gate, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            gate.pass(prefix.as_ref().map_or("", Path::as_ref)).await;
            gate.inner.list(prefix.as_ref())
        };
        futures::stream::once(listed).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Answer<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, how: CopyOptions) -> Answer<()> {
        self.inner.copy_opts(from, to, how).await
    }
}

struct Bench {
    runtime: Runtime,
    gate: Gate,
    store: VolumeStore,
    keeper: VolumeBackend,
    folder: tempfile::TempDir,
}

fn limits() -> VolumeLimits {
    VolumeLimits::of_bytes(1 << 30)
}

impl Bench {
    /// A volume that was claimed, and a keeper to which none is attached.
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let gate = Gate::new();
        let place = StorageLocation::of(Arc::new(gate.clone()), Path::default(), "memory");
        let store = VolumeStore::new("data".parse().unwrap(), [7; 16], place);
        runtime.block_on(store.create(limits())).unwrap();
        let keeper = VolumeBackend::new(BackendOptions {
            store: store.clone(),
            runtime: runtime.handle().clone(),
            stalls: Arc::default(),
            folder: "data".into(),
            lost: Box::new(|reason| panic!("{reason}")),
            damaged: Box::new(|reason| panic!("{reason}")),
        });
        let epoch = WriterEpoch {
            incarnation: 1,
            holding: 1,
            counter: 1,
        };
        keeper.begin(epoch).unwrap();
        Bench {
            runtime,
            gate,
            store,
            keeper,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn volume(&self) -> Arc<Volume> {
        Volume::new(&self.folder.path().join("v"), limits(), Arc::default(), 1).unwrap()
    }

    /// Waits until something waits at the gate.
    fn reached(&self) {
        let mut reached = self.gate.reached.subscribe();
        let reached = reached.wait_for(|reached| *reached);
        self.runtime.block_on(reached).unwrap();
    }
}

/// What a commit has taken, and was not put yet, is not in the store: a move takes it
/// along, whatever is written meanwhile.
#[test]
fn what_is_being_committed_is_uncommitted() {
    let bench = Bench::new();
    let bytes = |blocks: Range<u64>| blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES;
    let from = bench.folder.path().join("from");
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("f"), vec![5; 10 * BLOCK_BYTES as usize]).unwrap();
    let volume = bench.volume();
    volume.import(&from, 1).unwrap();
    let mut local = LocalBlocks::default();
    local.insert(2, bytes(0..10));
    bench.gate.held.send_replace(Some("/log/"));
    bench.keeper.attach(&volume, &local);
    let _synced = bench.keeper.sync();
    bench.reached();
    assert_eq!(bench.keeper.uncommitted(), [(2, bytes(0..10))]);
    // As if the guest appended.
    let tracker = &bench.keeper.0.attached.get().unwrap().tracker;
    tracker.note(&[(2, bytes(10..11))]);
    assert_eq!(bench.keeper.uncommitted(), [(2, bytes(0..11))]);
    bench.gate.held.send_replace(None);
    bench.keeper.finish();
    assert_eq!(bench.keeper.uncommitted(), []);
    let state = bench.runtime.block_on(bench.store.load()).unwrap().state;
    assert_eq!(state.map.get(&2).unwrap().len(), 10);
}

/// A machine that is frozen to be given away deletes nothing more: the volume may be
/// another's already.
#[test]
fn one_that_rests_deletes_nothing() {
    const FILES: u64 = 1100;
    let bench = Bench::new();
    let file = |inode: u64| NodeRecord {
        inode,
        access_ns: 1,
        modification_ns: 1,
        change_ns: 1,
        body: NodeBody::File {
            size: 8,
            blocks: vec![(0, 1)],
        },
    };
    let mut record = VolumeRecord::empty(1);
    record.next_inode = 2 + FILES;
    record.nodes.extend((2..2 + FILES).map(file));
    let dirty = (2..2 + FILES).map(|inode| {
        let bytes = inode.to_be_bytes().to_vec().into();
        DirtyBlock::new(inode, 0, bytes)
    });
    let dirty = dirty.collect();
    let shared = bench.keeper.0.clone();
    bench.runtime.block_on(async {
        let mut writer = shared.writer.lock().await;
        let writer = writer.as_mut().unwrap();
        writer.commit(record, dirty).await.unwrap();
    });
    let chunks = || bench.runtime.block_on(bench.gate.chunks());
    assert_eq!(chunks(), FILES as usize);
    bench.gate.held.send_replace(Some("/chunks"));
    // It is empty: with the first commit nobody needs those any more.
    let volume = bench.volume();
    bench.keeper.attach(&volume, &LocalBlocks::default());
    let _synced = bench.keeper.sync();
    bench.reached();
    bench.keeper.rest();
    // Nothing is under way any more, though the store has not answered.
    drop(bench.runtime.block_on(shared.writer.lock()));
    bench.gate.held.send_replace(None);
    assert_eq!(chunks(), FILES as usize);
    // It goes on here.
    bench.keeper.claim_under(WriterEpoch {
        incarnation: 1,
        holding: 1,
        counter: 3,
    });
    bench.keeper.wait_claimed(Duration::from_secs(60)).unwrap();
}

#[test]
fn snapshots_of_what_was_not_made_are_deleted() {
    let bench = Bench::new();
    let volume = bench.volume();
    bench.keeper.attach(&volume, &LocalBlocks::default());
    let snapshots = || bench.runtime.block_on(bench.store.snapshots()).unwrap();
    let keep = |name: &str| {
        let unfinished = UnfinishedSnapshots::new(vec![bench.keeper.clone()], name.to_owned());
        bench.keeper.hold().unwrap().keep(name).unwrap();
        unfinished
    };
    keep("m.1").done();
    let unfinished = keep("m.2");
    assert_eq!(snapshots(), ["m.1", "m.2"]);
    drop(unfinished);
    assert_eq!(snapshots(), ["m.1"]);
}

#[test]
fn a_store_that_hangs_is_named() {
    let bench = Bench::new();
    bench.gate.held.send_replace(Some("/log"));
    let mut store = bench.store.clone();
    store.patience = Duration::from_millis(20);
    let error = bench.runtime.block_on(store.destroy()).unwrap_err();
    assert!(error.is_away(), "{error}");
    assert!(error.to_string().contains("does not answer"), "{error}");
}
