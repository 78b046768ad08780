//! Checkpoints and cluster volumes in an S3-compatible store: that of `moto` (PyPI
//! `moto[server]`), if it is installed.

use keel_cluster::Epoch;
use keel_machine::checkpoint::{
    CheckpointId, Manifest, Pack, PackName, Repository, RepositoryError, Retention, Run,
};
use keel_machine::cluster_volume::{DirtyBlock, VolumeError, VolumeStore, Writer, WriterEpoch};
use keel_machine::kind::KindSpec;
use keel_machine::object_storage::ObjectStorage;
use keel_machine::spec::{Balancing, Spec};
use keel_wasi::volume::{NodeBody, NodeRecord, VolumeLimits, VolumeRecord};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Server {
    process: Child,
    address: String,
}

impl Server {
    /// `None` if the program is missing.
    fn start() -> Option<Self> {
        // The port was free a moment ago; no other process requests it on loopback.
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let process = Command::new("moto_server")
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let mut server = Server {
            process,
            address: format!("http://127.0.0.1:{port}"),
        };
        let mut lines = BufReader::new(server.process.stderr.take().unwrap());
        let begun = Instant::now();
        let mut line = String::new();
        while !line.contains("Running on") {
            line.clear();
            let ended = lines.read_line(&mut line).unwrap() == 0;
            assert!(!ended && begun.elapsed() < Duration::from_secs(60));
        }
        // Its output may exceed a pipe's buffer.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Some(server)
    }

    fn make_bucket(&self, name: &str) {
        let host = self.address.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host).unwrap();
        let request = format!(
            "PUT /{name} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    fn settings(&self) -> [(String, String); 4] {
        [
            ("AWS_ENDPOINT_URL", self.address.as_str()),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
    }
}

fn manifest(parent: Option<&CheckpointId>, time: u64, pages: &[u8]) -> Manifest {
    Manifest {
        id: CheckpointId::new(time),
        machine: "web-1".parse().unwrap(),
        parent: parent.cloned(),
        generation: 0,
        epoch: Epoch::default(),
        created_unix_ms: time,
        spec: Spec {
            kind: "wasm".parse().unwrap(),
            kind_spec: KindSpec::default(),
            volumes: Vec::new(),
            memory_bytes: 1 << 20,
            cpu_limit_millis: None,
            output_bytes_per_s: 1000,
            remove_at_end: false,
            restart: keel_machine::restart_policy::Restart::No,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
        },
        program: Some([3; 32]),
        log_end: 0,
        memory_pages: vec![16],
        runs: vec![Run {
            memory: 0,
            first: 1,
            pages: (pages.len() / 4096) as u32,
        }],
        packs: vec![Pack::of(pages)],
        block_runs: Vec::new(),
        block_packs: Vec::new(),
        image: vec![1, 2, 3],
    }
}

#[test]
fn a_bucket_keeps_checkpoints() {
    let Some(server) = Server::start() else {
        println!("skipped: moto_server is not installed (pip install 'moto[server]')");
        return;
    };
    let settings = || server.settings();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let repository =
            Repository::open_with("s3://kept/some/prefix", settings(), Duration::from_secs(30))
                .unwrap();
        let name = "web-1".parse().unwrap();
        // The bucket does not exist yet.
        let error = repository.list(&name).await.unwrap_err();
        assert!(matches!(error, RepositoryError::Store(_)), "{error}");
        server.make_bucket("kept");
        assert!(repository.list(&name).await.unwrap().is_empty());
        let mut ids: Vec<CheckpointId> = Vec::new();
        for number in 0..3u8 {
            let pages = vec![number; 5 * 4096];
            let manifest = manifest(ids.last(), 1000 + u64::from(number), &pages);
            repository
                .put_pack(
                    &name,
                    (&manifest.id, 0),
                    PackName::Pages(0),
                    pages.clone().into(),
                )
                .await
                .unwrap();
            // The checkpoint does not exist before its manifest.
            assert_eq!(repository.list(&name).await.unwrap().len(), ids.len());
            repository.put_manifest(&manifest).await.unwrap();
            let block = repository
                .block(&manifest, PackName::Pages(0), &manifest.packs[0], 0)
                .await;
            assert_eq!(block.unwrap(), pages);
            repository
                .check_parts(&name, &[manifest.outline()])
                .await
                .unwrap();
            ids.push(manifest.id);
        }
        let newest_first: Vec<_> = ids.iter().rev().cloned().collect();
        assert_eq!(repository.list(&name).await.unwrap(), newest_first);
        let chain = repository.chain(&name, &ids[2]).await.unwrap();
        assert!(chain.iter().map(|manifest| &manifest.id).eq(&ids));
        // Another prefix is another repository.
        let other =
            Repository::open_with("s3://kept/other", settings(), Duration::from_secs(30)).unwrap();
        assert!(other.machines().await.unwrap().is_empty());
        assert_eq!(
            repository.machines().await.unwrap(),
            std::slice::from_ref(&name)
        );
        let program = b"\0asm of a kind";
        let hash = *blake3::hash(program).as_bytes();
        for _ in 0..2 {
            let bytes = program.to_vec().into();
            repository.put_program(&hash, bytes).await.unwrap();
        }
        let full = manifest(None, 2000, &[1; 4096]);
        let of_it = Manifest {
            program: Some(hash),
            ..full.clone()
        };
        assert_eq!(repository.program(&of_it).await.unwrap(), &program[..]);
        let error = repository.program(&full).await.unwrap_err().to_string();
        assert!(error.contains("its program: it is missing"), "{error}");
        // A full checkpoint makes the chain before it superfluous.
        repository.put_manifest(&full).await.unwrap();
        let retention = Retention {
            newest: Some(1),
            for_s: None,
        };
        let (repository_2, name_2) = (repository.clone(), name.clone());
        let runtime = tokio::runtime::Handle::current();
        let kept = tokio::task::spawn_blocking(move || {
            repository_2.apply_retention(&runtime, &name_2, retention, 3000)
        });
        assert_eq!(kept.await.unwrap().unwrap().len(), 3);
        assert_eq!(
            repository.list(&name).await.unwrap(),
            std::slice::from_ref(&full.id)
        );
        // Its pack was never stored.
        let error = repository
            .block(&full, PackName::Pages(0), &full.packs[0], 0)
            .await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("pack 0: it is missing"), "{error}");
        let error = repository.check_parts(&name, &[full.outline()]).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("pack 0: it is missing"), "{error}");
    });
}

/// Conditional puts decide which writer succeeds.
#[test]
fn a_bucket_keeps_volumes() {
    let Some(server) = Server::start() else {
        println!("skipped: moto_server is not installed (pip install 'moto[server]')");
        return;
    };
    server.make_bucket("volumes");
    let place = ObjectStorage::open_with(
        "s3://volumes/some/prefix",
        server.settings(),
        Duration::from_secs(30),
    )
    .unwrap();
    let store = VolumeStore::new("data".parse().unwrap(), [1; 16], place);
    let epoch = |counter| WriterEpoch {
        incarnation: 1,
        holding: 1,
        counter,
    };
    let content = |byte: u8, bytes: usize| {
        let mut record = VolumeRecord::empty(1);
        record.next_inode = 3;
        record.nodes[0].body = NodeBody::Directory {
            parent: 1,
            entries: vec![("f".into(), 2)],
        };
        record.nodes.push(NodeRecord {
            inode: 2,
            body: NodeBody::File {
                size: bytes as u64,
                blocks: vec![(0, 1)],
            },
            ..record.nodes[0].clone()
        });
        let bytes = vec![byte; bytes].into();
        (record, vec![DirtyBlock::new(2, 0, bytes)])
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let error = Writer::claim(store.clone(), epoch(1), None)
            .await
            .unwrap_err();
        assert!(matches!(error, VolumeError::Vanished { .. }), "{error}");
        let limits = VolumeLimits::of_bytes(1 << 20);
        store.create(limits).await.unwrap();
        let error = store.create(limits).await.unwrap_err();
        assert!(matches!(error, VolumeError::Exists { .. }), "{error}");
        let mut first = Writer::claim(store.clone(), epoch(1), None).await.unwrap();
        let (record, dirty) = content(1, 5000);
        first.commit(record, dirty).await.unwrap();
        first.snapshot("m.1").await.unwrap();
        let mut second = Writer::claim(store.clone(), epoch(2), None).await.unwrap();
        let (record, dirty) = content(2, 65_536);
        let error = first
            .commit(record.clone(), dirty.clone())
            .await
            .unwrap_err();
        let fenced = matches!(&error, VolumeError::Fenced { by, .. } if *by == epoch(2));
        assert!(fenced, "{error}");
        second.commit(record, dirty).await.unwrap();
        second.compact().await.unwrap();
        // The chunk that the first writer stored and could not commit.
        assert_eq!(second.collect().await.unwrap(), 1);
        let third = Writer::claim(store.clone(), epoch(3), None).await.unwrap();
        let chunk = third.state().chunk(2, 0).unwrap();
        let bytes = store.chunk(&chunk).await.unwrap().unwrap();
        assert!(bytes.len() == 65_536 && bytes.iter().all(|byte| *byte == 2));
        let kept = store.snapshot("m.1").await.unwrap();
        let bytes = store.chunk(&kept.chunk(2, 0).unwrap()).await.unwrap();
        assert_eq!(bytes.unwrap(), vec![1; 5000]);
        let summary = store.summary().await.unwrap();
        assert_eq!((summary.inodes, summary.bytes), (2, 65_536));
        store.destroy().await.unwrap();
        let error = store.summary().await.unwrap_err();
        assert!(matches!(error, VolumeError::Vanished { .. }), "{error}");
    });
}
