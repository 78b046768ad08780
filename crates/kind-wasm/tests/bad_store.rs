//! Checkpoints in a store that is slow, fails, truncates answers and returns outdated
//! listings. It implements the necessary part of S3, on loopback.

use keel_cluster::Epoch;
use keel_kind_wasm::checkpoint::{Checkpointer, Destination, RemainingMemory, restore};
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::checkpoint::{MemoryRestore, Origin, Repository, Retention, Subject, compact};
use keel_machine::log::Log;
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Balancing, Spec};
use keel_store::clock::unix_ms;
use keel_wasi::{Config, MemorySink, Wasi};
use keel_wasm::runtime::{Engine, Machine, Options};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Objects = BTreeMap<String, Vec<u8>>;

/// A bucket that misbehaves as configured.
#[derive(Default)]
struct Bad {
    objects: Mutex<Objects>,
    /// The content of listings, while they are outdated.
    listed: Mutex<Option<Objects>>,
    /// One in this many requests fails (0: none).
    one_fails_of: AtomicU64,
    /// Delay of each answer in milliseconds.
    slow_ms: AtomicU64,
    /// Objects cannot be read; listings can.
    unreadable: AtomicBool,
    asked: AtomicU64,
    failed: AtomicU64,
}

struct Request {
    method: String,
    path: String,
    query: String,
    range: Option<(usize, usize)>,
    body: Vec<u8>,
}

fn read_request(stream: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    stream
        .read_line(&mut line)
        .ok()
        .filter(|bytes| *bytes > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut range) = (0, None);
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).ok()?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        let (name, value) = header.split_once(':')?;
        match name {
            "content-length" => length = value.trim().parse().ok()?,
            "range" => {
                let (from, to) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
                range = Some((from.parse().ok()?, to.parse::<usize>().ok()? + 1));
            }
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Some(Request {
        method,
        path: path.strip_prefix("/kept/").unwrap_or("").to_owned(),
        query: query.to_owned(),
        range,
        body,
    })
}

fn answer(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> bool {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"e\"\r\nLast-Modified: Fri, 20 Nov 2026 12:00:00 GMT\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).is_ok() && stream.write_all(body).is_ok()
}

impl Bad {
    fn serve(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let bad = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let bad = bad.clone();
                std::thread::spawn(move || bad.talk(stream));
            }
        });
        address
    }

    fn talk(&self, stream: TcpStream) {
        let Ok(mut out) = stream.try_clone() else {
            return;
        };
        let mut stream = BufReader::new(stream);
        while let Some(request) = read_request(&mut stream) {
            let number = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
            std::thread::sleep(Duration::from_millis(self.slow_ms.load(Ordering::Relaxed)));
            let of = self.one_fails_of.load(Ordering::Relaxed);
            if of > 0 && number.is_multiple_of(of) {
                let failed = self.failed.fetch_add(1, Ordering::Relaxed);
                match failed % 3 {
                    0 => {
                        answer(&mut out, "503 Slow Down", "", b"");
                        continue;
                    }
                    1 => {
                        answer(&mut out, "500 Internal Server Error", "", b"<Error/>");
                        continue;
                    }
                    // The request is executed, and the answer is lost.
                    _ => {
                        self.reply(&request, None);
                        return;
                    }
                }
            }
            let reads = request.method == "GET" && !request.path.is_empty();
            if reads && self.unreadable.load(Ordering::Relaxed) {
                answer(&mut out, "500 Internal Server Error", "", b"<Error/>");
                continue;
            }
            if !self.reply(&request, Some(&mut out)) {
                return;
            }
        }
    }

    fn reply(&self, request: &Request, out: Option<&mut TcpStream>) -> bool {
        let mut objects = self.objects.lock().unwrap();
        let (status, headers, body) = match request.method.as_str() {
            "PUT" => {
                objects.insert(request.path.clone(), request.body.clone());
                ("200 OK", String::new(), Vec::new())
            }
            // Several objects at once, named in XML.
            "POST" => {
                let text = String::from_utf8_lossy(&request.body).into_owned();
                let mut done = String::new();
                for piece in text.split("<Key>").skip(1) {
                    let name = piece.split("</Key>").next().unwrap();
                    objects.remove(name);
                    done += &format!("<Deleted><Key>{name}</Key></Deleted>");
                }
                let done = format!("<?xml version=\"1.0\"?><DeleteResult>{done}</DeleteResult>");
                ("200 OK", String::new(), done.into_bytes())
            }
            "GET" if request.path.is_empty() => {
                let stale = self.listed.lock().unwrap();
                let listed = stale.as_ref().unwrap_or(&objects);
                ("200 OK", String::new(), list(listed, &request.query))
            }
            "GET" | "HEAD" => match (objects.get(&request.path), request.range) {
                (None, _) => ("404 Not Found", String::new(), Vec::new()),
                (Some(bytes), Some((from, to))) => {
                    let to = to.min(bytes.len());
                    let range =
                        format!("Content-Range: bytes {from}-{}/{}\r\n", to - 1, bytes.len());
                    ("206 Partial Content", range, bytes[from..to].to_vec())
                }
                (Some(bytes), None) => ("200 OK", String::new(), bytes.clone()),
            },
            _ => ("405 Method Not Allowed", String::new(), Vec::new()),
        };
        drop(objects);
        let Some(out) = out else { return false };
        if request.method == "HEAD" {
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"e\"\r\nLast-Modified: Fri, 20 Nov 2026 12:00:00 GMT\r\n\r\n",
                body.len()
            );
            return out.write_all(head.as_bytes()).is_ok();
        }
        answer(out, status, &headers, &body)
    }
}

fn list(objects: &Objects, query: &str) -> Vec<u8> {
    let prefix = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("prefix="))
        .unwrap_or("")
        .replace("%2F", "/");
    let entries: String = objects
        .iter()
        .filter(|(name, _)| name.starts_with(&prefix))
        .map(|(name, bytes)| {
            format!(
                "<Contents><Key>{name}</Key><LastModified>2026-11-20T12:00:00.000Z</LastModified><ETag>\"e\"</ETag><Size>{}</Size></Contents>",
                bytes.len()
            )
        })
        .collect();
    format!(
        "<?xml version=\"1.0\"?><ListBucketResult><Name>kept</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    )
    .into_bytes()
}

struct Running {
    machine: Machine,
    engine: Engine,
    log: Log,
    checkpointer: Checkpointer,
    runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
    repository: Repository,
    spec: Spec,
}

impl Running {
    fn start(address: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/writer.wasm");
        let engine = Engine::new(Options::default()).unwrap();
        let program = engine.load(&std::fs::read(path).unwrap()).unwrap();
        program.prepare_resume().unwrap();
        let output = Arc::new(MemorySink::default());
        let config = Config {
            args: ["writer", "8", "20"].map(str::to_owned).to_vec(),
            stdout: Box::new(output.clone()),
            ..Config::default()
        };
        let spec = Spec {
            kind: WasmKind::kind_name(),
            kind_spec: WasmSpec {
                module: String::new(),
                args: vec!["writer".into()],
                env: Vec::new(),
                threads_max: 1,
            }
            .to_kind_spec()
            .unwrap(),
            volumes: Vec::new(),
            memory_bytes: 64 << 20,
            cpu_limit_millis: None,
            output_bytes_per_s: 1 << 20,
            remove_at_end: false,
            restart: Restart::No,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
        };
        let folder = tempfile::tempdir().unwrap();
        let settings = [
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "key"),
            ("AWS_REGION", "here"),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let machine = Machine::start(program, Wasi::new(config).unwrap(), limits(&spec)).unwrap();
        while output.bytes().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Running {
            machine,
            engine,
            log: Log::open(folder.path(), 0).unwrap(),
            checkpointer: Checkpointer::default(),
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            folder,
            repository: Repository::open_with("s3://kept", settings, Duration::from_secs(3))
                .unwrap(),
            spec,
        }
    }

    fn take(&mut self) -> Result<keel_machine::checkpoint::CreatedCheckpoint, String> {
        let subject = Subject {
            name: "m".parse().unwrap(),
            spec: self.spec.clone(),
            epoch: Epoch::default(),
        };
        let destination = Destination {
            repository: &self.repository,
            runtime: self.runtime.handle(),
            full: false,
            after: None,
            give_up: &AtomicBool::new(false),
            cluster_volumes: Vec::new(),
        };
        self.checkpointer
            .take(&self.machine, None, subject, &self.log, destination)
            .map_err(|error| error.to_string())
    }

    /// The id of the restored checkpoint, and a hash of its memory.
    fn restore(&self, warm: bool) -> Result<(String, blake3::Hash), String> {
        let origin = Origin {
            repository: "s3://kept".into(),
            machine: "m".parse().unwrap(),
            id: None,
            is_clone: false,
            memory: match warm {
                true => MemoryRestore::Lazy,
                false => MemoryRestore::Eager,
            },
        };
        let folder = self.folder.path().join("volumes");
        let (repository, limits) = (&self.repository, limits(&self.spec));
        let runtime = self.runtime.handle();
        let restored = restore(&origin, repository, &self.engine, limits, runtime, &folder)
            .map_err(|error| error.to_string())?;
        if let RemainingMemory::Lazy(behind) = &restored.rest {
            behind.begin(|_| {}).map_err(|error| error.to_string())?;
            behind.wait()?;
        }
        let mut hash = blake3::Hasher::new();
        for memory in restored.memories.iter() {
            let mut bytes = vec![0; memory.size_bytes() as usize];
            memory.read(0, &mut bytes).unwrap();
            hash.update(&bytes);
        }
        Ok((restored.manifest.id.to_string(), hash.finalize()))
    }
}

/// Errors and slowness are tolerated when checkpoints are made and by both kinds of
/// restore; the machine is not affected.
#[test]
fn errors_and_slowness_are_tolerated() {
    let bad = Arc::new(Bad::default());
    let mut running = Running::start(&bad.serve());
    bad.one_fails_of.store(3, Ordering::Relaxed);
    bad.slow_ms.store(20, Ordering::Relaxed);
    let mut newest = None;
    for _ in 0..4 {
        newest = Some(running.take().unwrap().manifest);
    }
    assert!(bad.failed.load(Ordering::Relaxed) > 5);
    let newest = newest.unwrap();
    assert!(newest.parent.is_some());
    let (id, cold) = running.restore(false).unwrap();
    assert_eq!(id, newest.id.to_string());
    assert_eq!(running.restore(true).unwrap(), (id, cold));
    let (runtime, name) = (running.runtime.handle().clone(), "m".parse().unwrap());
    assert!(
        compact(&running.repository, &runtime, &name, &newest.id)
            .unwrap()
            .is_some()
    );
    assert_eq!(
        running.restore(false).unwrap(),
        (newest.id.to_string(), cold)
    );
    assert!(running.machine.wait(Some(Duration::ZERO)).is_none());
}

/// Outdated listings at worst lead to an older checkpoint: intact checkpoints are not
/// reported as damaged, and required objects are not deleted.
#[test]
fn outdated_listings_do_no_harm() {
    let bad = Arc::new(Bad::default());
    let mut running = Running::start(&bad.serve());
    let first = running.take().unwrap().manifest;
    *bad.listed.lock().unwrap() = Some(bad.objects.lock().unwrap().clone());
    // Its parent is not in the listing yet.
    let second = running.take().unwrap().manifest;
    assert_eq!(second.parent.as_ref(), Some(&first.id));
    let third = running.take().unwrap().manifest;
    assert_eq!(third.parent.as_ref(), Some(&second.id));
    assert_eq!(running.restore(false).unwrap().0, first.id.to_string());
    // With an incomplete listing no newer object is deleted.
    let one = Retention {
        newest: Some(1),
        for_s: None,
    };
    let (runtime, name) = (running.runtime.handle().clone(), "m".parse().unwrap());
    let kept = running
        .repository
        .apply_retention(&runtime, &name, one, unix_ms());
    assert_eq!(kept.unwrap(), []);
    let then = bad.objects.lock().unwrap().clone();
    *bad.listed.lock().unwrap() = None;
    let (id, cold) = running.restore(false).unwrap();
    assert_eq!(id, third.id.to_string());
    assert_eq!(running.restore(true).unwrap(), (id, cold));
    // A listing with objects that were deleted.
    assert!(
        compact(&running.repository, &runtime, &name, &third.id)
            .unwrap()
            .is_some()
    );
    assert_eq!(
        running
            .repository
            .apply_retention(&runtime, &name, one, unix_ms())
            .unwrap()
            .len(),
        2
    );
    *bad.listed.lock().unwrap() = Some(then);
    assert!(
        running
            .repository
            .apply_retention(&runtime, &name, one, unix_ms())
            .is_ok()
    );
    assert_eq!(
        running.restore(false).unwrap(),
        (third.id.to_string(), cold)
    );
    let fourth = running.take().unwrap().manifest;
    assert_eq!(fourth.parent.as_ref(), Some(&third.id));
}

/// An unreachable store is reported, and the machine runs on; when the store is back,
/// checkpoints work again.
#[test]
fn an_unreachable_store_is_reported() {
    let bad = Arc::new(Bad::default());
    let mut running = Running::start(&bad.serve());
    let first = running.take().unwrap().manifest;
    bad.one_fails_of.store(1, Ordering::Relaxed);
    let error = running.take().unwrap_err();
    assert!(error.contains("checkpoint store"), "{error}");
    assert!(running.machine.wait(Some(Duration::ZERO)).is_none());
    let error = running.restore(false).unwrap_err();
    assert!(error.contains("checkpoint store"), "{error}");
    bad.one_fails_of.store(0, Ordering::Relaxed);
    assert_eq!(running.restore(false).unwrap().0, first.id.to_string());
    // It contains the writes made meanwhile: a full one.
    let next = running.take().unwrap().manifest;
    assert!(next.parent.is_none());
    assert_eq!(running.restore(false).unwrap().0, next.id.to_string());
}

/// If the ancestors of a checkpoint cannot be read, none of them is deleted.
#[test]
fn unread_ancestors_are_not_deleted() {
    let bad = Arc::new(Bad::default());
    let mut running = Running::start(&bad.serve());
    running.take().unwrap();
    let second = running.take().unwrap().manifest;
    assert!(second.parent.is_some());
    let one = Retention {
        newest: Some(1),
        for_s: None,
    };
    let (runtime, name) = (running.runtime.handle().clone(), "m".parse().unwrap());
    let before = bad.objects.lock().unwrap().len();
    bad.unreadable.store(true, Ordering::Relaxed);
    let kept = running
        .repository
        .apply_retention(&runtime, &name, one, unix_ms());
    assert!(kept.is_err());
    bad.unreadable.store(false, Ordering::Relaxed);
    assert_eq!(bad.objects.lock().unwrap().len(), before);
    assert_eq!(running.restore(false).unwrap().0, second.id.to_string());
}

/// Limits that the runtime enforces.
fn limits(spec: &Spec) -> keel_wasm::runtime::Limits {
    WasmSpec::of(spec).unwrap().limits(spec)
}
