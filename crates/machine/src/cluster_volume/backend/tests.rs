//! A backend whose store is blocked at a chosen step.

use super::*;
use crate::cluster_volume::UnfinishedSnapshots;
use crate::object_storage::ObjectStorage;
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

/// An in-memory store that blocks puts and lists.
#[derive(Debug, Clone)]
struct Gate {
    inner: Arc<InMemory>,
    /// Part of the paths that are blocked.
    held: watch::Sender<Option<&'static str>>,
    /// A request is or was blocked.
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
    backend: VolumeBackend,
    folder: tempfile::TempDir,
}

fn limits() -> VolumeLimits {
    VolumeLimits::of_bytes(1 << 30)
}

impl Bench {
    /// A claimed volume, and a backend without an attached volume.
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let gate = Gate::new();
        let place = ObjectStorage::of(Arc::new(gate.clone()), Path::default(), "memory");
        let store = VolumeStore::new("data".parse().unwrap(), [7; 16], place);
        runtime.block_on(store.create(limits())).unwrap();
        let backend = VolumeBackend::new(BackendOptions {
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
        backend.begin(epoch).unwrap();
        Bench {
            runtime,
            gate,
            store,
            backend,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn volume(&self) -> Arc<Volume> {
        Volume::new(&self.folder.path().join("v"), limits(), Arc::default(), 1).unwrap()
    }

    /// Waits until a request is blocked.
    fn reached(&self) {
        let mut reached = self.gate.reached.subscribe();
        let reached = reached.wait_for(|reached| *reached);
        self.runtime.block_on(reached).unwrap();
    }
}

/// Blocks taken by a commit that is not stored are uncommitted: a move transfers them,
/// whatever is written meanwhile.
#[test]
fn blocks_of_a_pending_commit_are_uncommitted() {
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
    bench.backend.attach(&volume, &local);
    let _synced = bench.backend.sync();
    bench.reached();
    assert_eq!(bench.backend.uncommitted(), [(2, bytes(0..10))]);
    // As if the guest appended.
    let tracker = &bench.backend.0.attached.get().unwrap().tracker;
    tracker.note(&[(2, bytes(10..11))]);
    assert_eq!(bench.backend.uncommitted(), [(2, bytes(0..11))]);
    bench.gate.held.send_replace(None);
    bench.backend.finish();
    assert_eq!(bench.backend.uncommitted(), []);
    let state = bench.runtime.block_on(bench.store.load()).unwrap().state;
    assert_eq!(state.map.get(&2).unwrap().len(), 10);
}

/// After the freeze for a move no object is deleted: the volume may belong to another
/// machine.
#[test]
fn a_paused_backend_deletes_nothing() {
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
    let shared = bench.backend.0.clone();
    bench.runtime.block_on(async {
        let mut writer = shared.writer.lock().await;
        let writer = writer.as_mut().unwrap();
        writer.commit(record, dirty).await.unwrap();
    });
    let chunks = || bench.runtime.block_on(bench.gate.chunks());
    assert_eq!(chunks(), FILES as usize);
    bench.gate.held.send_replace(Some("/chunks"));
    // The volume is empty: the first commit makes those chunks unused.
    let volume = bench.volume();
    bench.backend.attach(&volume, &LocalBlocks::default());
    let _synced = bench.backend.sync();
    bench.reached();
    bench.backend.pause();
    // No operation is in progress any more, though the store has not answered.
    drop(bench.runtime.block_on(shared.writer.lock()));
    bench.gate.held.send_replace(None);
    assert_eq!(chunks(), FILES as usize);
    // The machine resumes here.
    bench.backend.claim_under(WriterEpoch {
        incarnation: 1,
        holding: 1,
        counter: 3,
    });
    bench.backend.wait_claimed(Duration::from_secs(60)).unwrap();
}

#[test]
fn snapshots_of_failed_checkpoints_are_deleted() {
    let bench = Bench::new();
    let volume = bench.volume();
    bench.backend.attach(&volume, &LocalBlocks::default());
    let snapshots = || bench.runtime.block_on(bench.store.snapshots()).unwrap();
    let keep = |name: &str| {
        let unfinished = UnfinishedSnapshots::new(vec![bench.backend.clone()], name.to_owned());
        bench.backend.hold().unwrap().keep(name).unwrap();
        unfinished
    };
    keep("m.1").done();
    let unfinished = keep("m.2");
    assert_eq!(snapshots(), ["m.1", "m.2"]);
    drop(unfinished);
    assert_eq!(snapshots(), ["m.1"]);
}

#[test]
fn a_hanging_store_is_reported() {
    let bench = Bench::new();
    bench.gate.held.send_replace(Some("/log"));
    let mut store = bench.store.clone();
    store.patience = Duration::from_millis(20);
    let error = bench.runtime.block_on(store.destroy()).unwrap_err();
    assert!(error.is_temporary(), "{error}");
    assert!(error.to_string().contains("does not answer"), "{error}");
}
