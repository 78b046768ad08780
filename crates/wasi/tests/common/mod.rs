//! A guest for tests: some memory, one thread, and the functions by name. `sandbox`: what its `/` is.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

mod sandbox;

use keel_wasi::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::cell::{RefCell, UnsafeCell};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use wiggle::{GuestMemory, GuestPtr};

/// Whether calls are packed: in `t95_remote_call`, which includes all other tests.
const IS_PACKED: bool = matches!(module_path!().as_bytes(), [b't', b'9', b'5', ..]);

#[allow(unused_imports, reason = "some test files have no sandbox")]
pub use sandbox::*;

pub type Ret<T> = Result<T, Errno>;

pub const READ: u64 = 1 << 1;
pub const WRITE: u64 = 1 << 6;
pub const RW: u64 = READ | WRITE;
pub const CREAT: u64 = 1;
pub const DIRECTORY: u64 = 2;
pub const EXCL: u64 = 4;
pub const TRUNC: u64 = 8;
pub const APPEND: u64 = 1;
pub const NONBLOCK: u64 = 4;
pub const SYNC: u64 = 16;
pub const FOLLOW: u64 = 1;

const RESULT: u64 = 0;
const VECTORS: u64 = 1024;
const STRINGS: u64 = 4096;
const DATA: u64 = 65536;
pub const MEMORY_BYTES: usize = 4 << 20;

/// A request that a test makes by hand.
pub struct Flag {
    fd: OwnedFd,
    requested: AtomicBool,
}

impl Default for Flag {
    fn default() -> Self {
        Self {
            fd: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            requested: AtomicBool::new(false),
        }
    }
}

impl Flag {
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        rustix::io::write(&self.fd, &1_u64.to_ne_bytes()).unwrap();
    }

    pub fn clear(&self) {
        self.requested.store(false, Ordering::SeqCst);
        rustix::io::read(&self.fd, &mut [0; 8]).unwrap();
    }
}

impl Interrupt for Flag {
    fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    fn wakeup(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A host clock that only advances on demand.
#[derive(Default)]
pub struct Clock {
    pub monotonic_ns: AtomicU64,
    pub realtime_ns: AtomicU64,
}

impl HostClock for Clock {
    fn monotonic_ns(&self) -> u64 {
        self.monotonic_ns.load(Ordering::SeqCst)
    }

    fn realtime_ns(&self) -> u64 {
        self.realtime_ns.load(Ordering::SeqCst)
    }
}

pub struct Guest {
    pub wasi: Arc<Wasi>,
    pub tid: u32,
    pub flag: Arc<Flag>,
    pub state: RefCell<CallState>,
    memory: Vec<UnsafeCell<u8>>,
}

#[derive(Debug, PartialEq, Clone)]
pub struct Stat {
    pub ino: u64,
    pub filetype: u8,
    pub nlink: u64,
    pub size: u64,
    pub atim: u64,
    pub mtim: u64,
}

#[derive(Debug, PartialEq, Clone)]
pub struct Event {
    pub userdata: u64,
    pub error: u16,
    pub kind: u8,
    pub nbytes: u64,
    pub hangup: bool,
}

/// Where the files of a sandbox are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In a directory of the host.
    Host,
    /// In a volume.
    Own,
    /// In a volume with a backend: after each move all bytes are fetched again.
    Kept,
}

/// Runs tests that take a [`Kind`] with all.
#[allow(unused_macros, reason = "some test files have one kind only")]
macro_rules! both {
    ($($name:ident)*) => {
        mod host {
            $(#[test] fn $name() { super::$name(super::common::Kind::Host); })*
        }
        mod own {
            $(#[test] fn $name() { super::$name(super::common::Kind::Own); })*
        }
        mod kept {
            $(#[test] fn $name() { super::$name(super::common::Kind::Kept); })*
        }
    };
}
#[allow(unused_imports, reason = "some test files have one kind only")]
pub(crate) use both;

impl Guest {
    pub fn new(config: Config) -> Self {
        Self::with(Wasi::new(config).unwrap())
    }

    pub fn with(wasi: Wasi) -> Self {
        Self::thread(Arc::new(wasi), 1)
    }

    pub fn thread(wasi: Arc<Wasi>, tid: u32) -> Self {
        let mut memory = Vec::with_capacity(MEMORY_BYTES);
        memory.resize_with(MEMORY_BYTES, || UnsafeCell::new(0));
        Self {
            wasi,
            tid,
            flag: Arc::default(),
            state: RefCell::default(),
            memory,
        }
    }

    /// Captures, serialises and resumes with the same directory.
    pub fn moved(self, dir: &Path) -> Self {
        let resources = Resources {
            preopens: vec![Source::Host(dir.to_owned())],
            ..Resources::default()
        };
        self.moved_with(resources)
    }

    pub fn moved_with(self, resources: Resources) -> Self {
        let snapshot = self.wasi.snapshot().unwrap();
        self.moved_as(&snapshot, resources)
    }

    pub fn moved_as(self, snapshot: &Snapshot, resources: Resources) -> Self {
        let bytes = postcard::to_allocvec(snapshot).unwrap();
        let network = postcard::to_allocvec(&snapshot.network).unwrap();
        let mut snapshot: Snapshot = postcard::from_bytes(&bytes).unwrap();
        snapshot.network = postcard::from_bytes(&network).unwrap();
        let state = postcard::to_allocvec(&self.state.take()).unwrap();
        drop(self);
        let guest = Self::with(Wasi::restore(snapshot, resources).unwrap());
        guest.state.replace(postcard::from_bytes(&state).unwrap());
        guest
    }

    pub fn memory(&self) -> GuestMemory<'_> {
        GuestMemory::Shared(&self.memory)
    }

    pub fn outcome(&self, name: &str, args: &[u64]) -> Outcome {
        let function = Function::by_name(name).unwrap();
        let mut state = self.state.borrow_mut();
        let memory = &mut self.memory();
        let packed = IS_PACKED.then(|| pack(function, args, memory)).flatten();
        let Some((packed, targets)) = packed else {
            return self
                .wasi
                .call(function, args, memory, &mut state, self.tid, &*self.flag);
        };
        let (outcome, output) =
            self.wasi
                .call_packed(function, &packed, &mut state, self.tid, &*self.flag);
        targets.fill(&output, memory).unwrap();
        outcome
    }

    pub fn run(&self, name: &str, args: &[u64]) -> Ret<()> {
        match self.outcome(name, args) {
            Outcome::Done(0) => Ok(()),
            Outcome::Done(errno) => Err(Errno::try_from(errno).unwrap()),
            other => panic!("{name}: {other:?}"),
        }
    }

    pub fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let range = GuestPtr::<[u8]>::new((at as u32, count as u32));
        self.memory().to_vec(range).unwrap()
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        let range = GuestPtr::<[u8]>::new((at as u32, bytes.len() as u32));
        self.memory().copy_from_slice(bytes, range).unwrap();
    }

    pub fn u32_at(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().unwrap())
    }

    pub fn u64_at(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    /// Result in memory as `u32`.
    pub fn run32(&self, name: &str, args: &[u64]) -> Ret<u32> {
        let args = [args, &[RESULT]].concat();
        self.run(name, &args).map(|()| self.u32_at(RESULT))
    }

    pub fn run64(&self, name: &str, args: &[u64]) -> Ret<u64> {
        let args = [args, &[RESULT]].concat();
        self.run(name, &args).map(|()| self.u64_at(RESULT))
    }

    fn string(&self, slot: u64, text: &str) -> [u64; 2] {
        let at = STRINGS + slot * 8192;
        self.put(at, text.as_bytes());
        [at, text.len() as u64]
    }

    pub fn path(&self, name: &str, fd: u32, path: &str) -> Ret<()> {
        let [at, length] = self.string(0, path);
        self.run(name, &[fd.into(), at, length])
    }

    pub fn mkdir(&self, path: &str) -> Ret<()> {
        self.path("path_create_directory", 3, path)
    }

    pub fn rmdir(&self, path: &str) -> Ret<()> {
        self.path("path_remove_directory", 3, path)
    }

    pub fn unlink(&self, path: &str) -> Ret<()> {
        self.path("path_unlink_file", 3, path)
    }

    pub fn open_at(&self, at: u32, follow: u64, path: &str, o: [u64; 3]) -> Ret<u32> {
        let [text, length] = self.string(0, path);
        let [oflags, rights, fdflags] = o;
        let args = [
            at.into(),
            follow,
            text,
            length,
            oflags,
            rights,
            rights,
            fdflags,
        ];
        self.run32("path_open", &args)
    }

    pub fn open(&self, path: &str, oflags: u64, rights: u64) -> Ret<u32> {
        self.open_at(3, 0, path, [oflags, rights, 0])
    }

    pub fn rename(&self, source: &str, target: &str) -> Ret<()> {
        let [a, a_length] = self.string(0, source);
        let [b, b_length] = self.string(1, target);
        self.run("path_rename", &[3, a, a_length, 3, b, b_length])
    }

    pub fn link(&self, flags: u64, source: &str, target: &str) -> Ret<()> {
        let [a, a_length] = self.string(0, source);
        let [b, b_length] = self.string(1, target);
        self.run("path_link", &[3, flags, a, a_length, 3, b, b_length])
    }

    pub fn symlink(&self, contents: &str, path: &str) -> Ret<()> {
        let [a, a_length] = self.string(0, contents);
        let [b, b_length] = self.string(1, path);
        self.run("path_symlink", &[a, a_length, 3, b, b_length])
    }

    pub fn readlink(&self, path: &str, room: u64) -> Ret<Vec<u8>> {
        let [a, length] = self.string(0, path);
        let count = self.run32("path_readlink", &[3, a, length, DATA, room])?;
        Ok(self.bytes(DATA, count as usize))
    }

    /// Writes the vectors of a read or write of `lengths` from `DATA` on.
    pub fn vectors(&self, lengths: &[u32]) -> [u64; 2] {
        let mut at = DATA as u32;
        for (index, &length) in (0_u64..).zip(lengths) {
            self.put(VECTORS + index * 8, &at.to_le_bytes());
            self.put(VECTORS + index * 8 + 4, &length.to_le_bytes());
            at += length;
        }
        [VECTORS, lengths.len() as u64]
    }

    pub fn try_read(&self, fd: u32, lengths: &[u32]) -> Outcome {
        let [iovs, count] = self.vectors(lengths);
        self.outcome("fd_read", &[fd.into(), iovs, count, RESULT])
    }

    pub fn read(&self, fd: u32, length: u32) -> Ret<Vec<u8>> {
        let [iovs, count] = self.vectors(&[length]);
        let count = self.run32("fd_read", &[fd.into(), iovs, count])?;
        Ok(self.bytes(DATA, count as usize))
    }

    pub fn pread(&self, fd: u32, length: u32, offset: u64) -> Ret<Vec<u8>> {
        let [iovs, count] = self.vectors(&[length]);
        let count = self.run32("fd_pread", &[fd.into(), iovs, count, offset])?;
        Ok(self.bytes(DATA, count as usize))
    }

    pub fn write(&self, fd: u32, bytes: &[u8]) -> Ret<u32> {
        self.put(DATA, bytes);
        let [iovs, count] = self.vectors(&[bytes.len() as u32]);
        self.run32("fd_write", &[fd.into(), iovs, count])
    }

    pub fn pwrite(&self, fd: u32, bytes: &[u8], offset: u64) -> Ret<u32> {
        self.put(DATA, bytes);
        let [iovs, count] = self.vectors(&[bytes.len() as u32]);
        self.run32("fd_pwrite", &[fd.into(), iovs, count, offset])
    }

    pub fn seek(&self, fd: u32, delta: i64, whence: u64) -> Ret<u64> {
        self.run64("fd_seek", &[fd.into(), delta as u64, whence])
    }

    pub fn tell(&self, fd: u32) -> Ret<u64> {
        self.run64("fd_tell", &[fd.into()])
    }

    pub fn close(&self, fd: u32) -> Ret<()> {
        self.run("fd_close", &[fd.into()])
    }

    /// (filetype, flags, base, inheriting)
    pub fn fdstat(&self, fd: u32) -> Ret<(u8, u64, u64, u64)> {
        self.run("fd_fdstat_get", &[fd.into(), RESULT])?;
        let head = self.bytes(RESULT, 4);
        let flags = u16::from_le_bytes([head[2], head[3]]).into();
        Ok((head[0], flags, self.u64_at(8), self.u64_at(16)))
    }

    fn filestat(&self) -> Stat {
        Stat {
            ino: self.u64_at(8),
            filetype: self.bytes(16, 1)[0],
            nlink: self.u64_at(24),
            size: self.u64_at(32),
            atim: self.u64_at(40),
            mtim: self.u64_at(48),
        }
    }

    pub fn stat(&self, fd: u32) -> Ret<Stat> {
        self.run("fd_filestat_get", &[fd.into(), RESULT])?;
        Ok(self.filestat())
    }

    pub fn stat_at(&self, follow: u64, path: &str) -> Ret<Stat> {
        let [a, length] = self.string(0, path);
        self.run("path_filestat_get", &[3, follow, a, length, RESULT])?;
        Ok(self.filestat())
    }

    pub fn set_times_at(&self, follow: u64, path: &str, times: [u64; 3]) -> Ret<()> {
        let [a, length] = self.string(0, path);
        let [atim, mtim, flags] = times;
        let args = [3, follow, a, length, atim, mtim, flags];
        self.run("path_filestat_set_times", &args)
    }

    /// (bytes used, names with the cookie after each) of whole entries.
    pub fn readdir(&self, fd: u32, room: u64, cookie: u64) -> Ret<(u32, Vec<(String, u64)>)> {
        let used = self.run32("fd_readdir", &[fd.into(), DATA, room, cookie])?;
        let bytes = self.bytes(DATA, used as usize);
        let mut rest = &bytes[..];
        let mut entries = Vec::new();
        while rest.len() >= 24 {
            let next = u64::from_le_bytes(rest[0..8].try_into().unwrap());
            let length = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            if rest.len() < 24 + length {
                break;
            }
            let name = String::from_utf8(rest[24..24 + length].to_vec()).unwrap();
            entries.push((name, next));
            rest = &rest[24 + length..];
        }
        Ok((used, entries))
    }

    pub fn list(&self, fd: u32) -> Vec<String> {
        let (_, entries) = self.readdir(fd, 1 << 20, 0).unwrap();
        let names = entries.into_iter().map(|(name, _)| name);
        names.filter(|name| name != "." && name != "..").collect()
    }

    pub fn clock_subscription(userdata: u64, id: u32, timeout: u64, absolute: bool) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes[0..8].copy_from_slice(&userdata.to_le_bytes());
        bytes[16..20].copy_from_slice(&id.to_le_bytes());
        bytes[24..32].copy_from_slice(&timeout.to_le_bytes());
        bytes[40] = absolute.into();
        bytes
    }

    /// `kind` is 1 for reading, 2 for writing.
    pub fn fd_subscription(userdata: u64, kind: u8, fd: u32) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes[0..8].copy_from_slice(&userdata.to_le_bytes());
        bytes[8] = kind;
        bytes[16..20].copy_from_slice(&fd.to_le_bytes());
        bytes
    }

    pub fn try_poll(&self, subscriptions: &[[u8; 48]]) -> Outcome {
        self.put(STRINGS, &subscriptions.concat());
        let count = subscriptions.len() as u64;
        self.outcome("poll_oneoff", &[STRINGS, DATA, count, RESULT])
    }

    pub fn poll(&self, subscriptions: &[[u8; 48]]) -> Ret<Vec<Event>> {
        match self.try_poll(subscriptions) {
            Outcome::Done(0) => {}
            Outcome::Done(errno) => return Err(Errno::try_from(errno).unwrap()),
            other => panic!("{other:?}"),
        }
        let events = (0..self.u32_at(RESULT)).map(|index| {
            let at = DATA + u64::from(index) * 32;
            let bytes = self.bytes(at, 32);
            Event {
                userdata: self.u64_at(at),
                error: u16::from_le_bytes([bytes[8], bytes[9]]),
                kind: bytes[10],
                nbytes: self.u64_at(at + 16),
                hangup: bytes[24] & 1 != 0,
            }
        });
        Ok(events.collect())
    }

    pub fn random(&self, count: u64) -> Vec<u8> {
        self.run("random_get", &[DATA, count]).unwrap();
        self.bytes(DATA, count as usize)
    }

    pub fn time(&self, clock: u64) -> u64 {
        self.run64("clock_time_get", &[clock, 0]).unwrap()
    }
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

pub fn resources(dir: &Path) -> Resources {
    Resources {
        preopens: vec![Source::Host(dir.to_owned())],
        ..Resources::default()
    }
}
