//! Pages of a spanning machine: the time that a thread waits for one in another process, compared
//! with a plain round trip over TCP; the throughput of moving a set of pages, compared with a
//! plain TLS stream; the gain of moving directories along with objects; and the speed of a program
//! whose part keeps less than it uses.
//!
//! The other part is a process of its own (this program again, [`home`]), which holds all pages.
//! It also answers 64 bytes with 4 KiB on a plain socket, both sides blocking.

use crate::cores;
use crate::spanned::{LIMIT, Spanned};
use crate::table::{Table, micros, percentile};
use anyhow::{Context, Result, ensure};
use keel_cluster::Epoch;
use keel_kind_wasm::span::{Hello, Pages, PartConfig, PartLimits, PeerConnections};
use keel_net::{BulkStream, ClientTls, PinnedIdentity, ServerTls};
use keel_wasm::coherence::PartId;
use keel_wasm::memory::{GuestMemory, PAGE_BYTES};
use keel_wasm::runtime::parts::SpawnPolicy;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The option that runs this program as the other part.
pub(crate) const HOME: &str = "--span-home";
/// Bytes of the memory; the first are touched page by page, the rest moves.
const MEMORY_BYTES: u64 = TOUCHED_PAGES * PAGE_BYTES + SETS_MAX as u64 * MOVED_BYTES;
/// Pages that are touched, and the stride between consecutive touches: odd, so that each page is
/// touched once.
const TOUCHED_PAGES: u64 = 1 << 16;
const STRIDE: u64 = 40_503;
/// Pages touched in a round, and round trips for comparison.
const TOUCHES: u64 = 2000;
const QUESTION_BYTES: usize = 64;
/// Bytes of one move and of the plain stream; and the most moves.
const MOVED_BYTES: u64 = 64 << 20;
const SETS_MAX: usize = 12;

fn part(number: usize) -> Result<PartId> {
    PartId::new(number).context("a part's number")
}

/// The first message of each side: its certificate, then ports.
struct Greeting {
    fingerprint: String,
    ports: Vec<u16>,
}

impl Greeting {
    fn send(&self, to: &mut impl Write) -> Result<()> {
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        writeln!(to, "{} {}", self.fingerprint, ports.join(" "))?;
        Ok(to.flush()?)
    }

    fn receive(from: &mut impl BufRead) -> Result<Self> {
        let mut line = String::new();
        from.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        Ok(Greeting {
            fingerprint: words.next().context("the other part sent nothing")?.into(),
            ports: words.map(str::parse).collect::<Result<_, _>>()?,
        })
    }
}

/// Connects one side.
fn begin(
    me: usize,
    identity: &PinnedIdentity,
    listener: &TcpListener,
    greeting: &Greeting,
    memory: Arc<GuestMemory>,
) -> Result<Pages> {
    let pinned = greeting.fingerprint.parse().context("a fingerprint")?;
    let client = ClientTls::pinned(identity, pinned)?;
    let server = ServerTls::pinned(identity, pinned)?;
    let out = TcpStream::connect(("127.0.0.1", greeting.ports[0]))?;
    let (heard, _) = listener.accept()?;
    let (mine, other) = (part(me)?, part(1 - me)?);
    let machine = "bench".parse().map_err(anyhow::Error::msg)?;
    let hello = Hello::new(machine, Epoch::default(), mine, other);
    let ends = PeerConnections::greet((out, &client), (heard, &server), &hello)?;
    let setup = PartConfig {
        me: mine,
        parts: [mine, other].into_iter().collect(),
        origin: PartId::HOME,
        memories: Arc::new([memory]),
        segment_pages: 512,
        hold: Duration::from_micros(100),
        seed: me as u64,
        room_bytes: None,
    };
    Ok(Pages::begin(
        setup,
        BTreeMap::from([(other, ends)]),
        Arc::new(()),
    )?)
}

fn memory() -> Result<Arc<GuestMemory>> {
    let pages = MEMORY_BYTES >> 16;
    let memory = GuestMemory::new(pages, Some(pages), false, MEMORY_BYTES)?;
    Ok(Arc::new(memory))
}

/// Runs the other part, until its input ends.
pub(crate) fn home() -> Result<()> {
    let identity = PinnedIdentity::generate()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let plain = TcpListener::bind("127.0.0.1:0")?;
    let memory = memory()?;
    let mut bytes = vec![0; PAGE_BYTES as usize];
    for at in (0..MEMORY_BYTES).step_by(bytes.len()) {
        bytes.fill((at / PAGE_BYTES % 255) as u8 + 1);
        memory.write(at, &bytes)?;
    }
    let greeting = Greeting {
        fingerprint: identity.fingerprint.to_string(),
        ports: vec![listener.local_addr()?.port(), plain.local_addr()?.port()],
    };
    greeting.send(&mut std::io::stdout())?;
    let mut input = std::io::stdin().lock();
    let greeting = Greeting::receive(&mut input)?;
    let pages = begin(0, &identity, &listener, &greeting, memory)?;
    let (mut answering, _) = plain.accept()?;
    answering.set_nodelay(true)?;
    std::thread::spawn(move || {
        let mut question = [0; QUESTION_BYTES];
        let answer = vec![7; PAGE_BYTES as usize];
        while answering.read_exact(&mut question).is_ok() {
            if answering.write_all(&answer).is_err() {
                return;
            }
        }
    });
    // Moves a set of pages for each start address in its input, until that ends.
    let mut line = String::new();
    while input.read_line(&mut line)? > 0 {
        let at: u64 = line.trim().parse().context("where it begins")?;
        let begun = Instant::now();
        let moved = pages.move_object(0, at..at + MOVED_BYTES, part(1)?, LIMIT)?;
        ensure!(moved == MOVED_BYTES, "only {moved} bytes moved");
        let mut out = std::io::stdout();
        writeln!(out, "{}", micros(begun.elapsed()))?;
        out.flush()?;
        line.clear();
    }
    drop(pages);
    Ok(())
}

/// The other process; killed on drop.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn bench(rounds: usize, only: Option<&str>) -> Result<()> {
    let mut other = Command::new(std::env::current_exe()?)
        .arg(HOME)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map(Other)?;
    let mut output = BufReader::new(other.0.stdout.take().context("its output")?);
    let mut input = other.0.stdin.take().context("its input")?;
    let greeting = Greeting::receive(&mut output)?;
    let identity = PinnedIdentity::generate()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mine = Greeting {
        fingerprint: identity.fingerprint.to_string(),
        ports: vec![listener.local_addr()?.port()],
    };
    mine.send(&mut input)?;
    let memory = memory()?;
    let pages = begin(1, &identity, &listener, &greeting, memory.clone())?;
    let mut plain = TcpStream::connect(("127.0.0.1", greeting.ports[1]))?;
    plain.set_nodelay(true)?;
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only));
    if wanted("faults") {
        let mut next = 0;
        let mut faults = |how: &str| faults(&pages, &memory, &mut plain, (rounds, how, &mut next));
        faults("as the kernel places them")?;
        let processes = [std::process::id().to_string(), other.0.id().to_string()];
        let count = std::thread::available_parallelism()?.get();
        if count > 1 {
            for (process, core) in processes.iter().zip(["0", "1"]) {
                cores::bind(process, core)?;
            }
            faults("with a core for each process, as nodes have")?;
            for process in &processes {
                cores::bind(process, &format!("0-{}", count - 1))?;
            }
        }
    }
    if wanted("sets") {
        moves(&memory, rounds, (&mut input, &mut output))?;
    }
    if wanted("directories") {
        directories()?;
    }
    if wanted("limits") {
        limits()?;
    }
    Ok(())
}

/// Pages that are touched one by one, from `next` on, compared with plain round trips.
fn faults(
    pages: &Pages,
    memory: &GuestMemory,
    plain: &mut TcpStream,
    (rounds, how, next): (usize, &str, &mut u64),
) -> Result<()> {
    let (mut trips, mut touches) = (Vec::new(), Vec::new());
    let before = pages.latency();
    let mut answer = vec![0; PAGE_BYTES as usize];
    // Alternately, so that other load of the host affects both.
    for _ in 0..rounds {
        for _ in 0..TOUCHES {
            let begun = Instant::now();
            plain.write_all(&[1; QUESTION_BYTES])?;
            plain.read_exact(&mut answer)?;
            trips.push(micros(begun.elapsed()));
        }
        for _ in 0..TOUCHES {
            // In random order: sequential access would be prefetched.
            let page = *next * STRIDE % TOUCHED_PAGES;
            *next += 1;
            let begun = Instant::now();
            let word = memory.load_u32(page * PAGE_BYTES);
            let word = word.context("a word of the memory")?;
            touches.push(micros(begun.elapsed()));
            ensure!(word as u8 == (page % 255) as u8 + 1, "page {page}");
        }
    }
    let mut table = Table::new(&["", "p50 µs", "p90", "p99"]);
    for (name, figures) in [
        ("64 B → 4 KiB over TCP, blocking", &mut trips),
        ("a page that is in another process", &mut touches),
    ] {
        let mut row = vec![name.to_owned()];
        row.extend([0.5, 0.9, 0.99].map(|share| format!("{:.1}", percentile(figures, share))));
        table.row(row);
    }
    table.print(&format!(
        "Remote read faults ({} of each), {how}",
        touches.len()
    ));
    println!(
        "\nratio: {:.2}",
        percentile(&mut touches, 0.5) / percentile(&mut trips, 0.5)
    );
    let after = pages.latency();
    let buckets: Vec<String> = (0..after.buckets.len())
        .map(|at| (at, after.buckets[at] - before.buckets[at]))
        .filter(|(_, count)| *count > 0)
        .map(|(at, count)| format!("{count} below {} µs", 1u64 << at))
        .collect();
    println!("as the part counts them: {}", buckets.join(", "));
    Ok(())
}

/// A program that waits for ever, with 33 MiB.
const WAITS: &str = r#"(module (memory (export "memory") 528 528 shared)
    (func (export "_start")
        (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;
/// Pages of each of two objects.
const OBJECT_PAGES: u64 = 4096;
/// Pages of one object that are read before some of the other.
const TURNS: u64 = 256;

/// Pages of one member that another one reads, with their directory at the home or at the member
/// that holds them; alternately. All three parts are in this process.
fn directories() -> Result<()> {
    let spanned = Spanned::begin(WAITS, 3, SpawnPolicy::Here, PartLimits::default())?;
    let parts = &spanned.parts;
    let home = parts.home().pages();
    let bytes = OBJECT_PAGES * PAGE_BYTES;
    // The first page belongs to the program.
    let first = 1 << 20;
    for page in 0..2 * OBJECT_PAGES {
        let at = first + page * PAGE_BYTES;
        home.write(0, at, &(page + 1).to_le_bytes(), LIMIT)?;
    }
    home.pin_directories(true);
    home.move_object(0, first..first + bytes, part(1)?, LIMIT)?;
    home.pin_directories(false);
    home.move_object(0, first + bytes..first + 2 * bytes, part(1)?, LIMIT)?;
    let reader = &parts.members()[&part(2)?];
    let begun = Instant::now();
    while (reader.pages().directories().len() as u64) < bytes >> 16 {
        ensure!(begun.elapsed() < LIMIT, "directories do not move");
        std::thread::sleep(Duration::from_millis(1));
    }
    let memory = &reader.memories()[0];
    let (mut of_home, mut of_owner) = (Vec::new(), Vec::new());
    // Alternately, but not one by one: a part polls for more requests for a moment after each, and
    // takes a processor from the others.
    for turns in 0..OBJECT_PAGES / TURNS {
        for (figures, first_page) in [(&mut of_home, 0), (&mut of_owner, OBJECT_PAGES)] {
            for turn in turns * TURNS..(turns + 1) * TURNS {
                // In random order: sequential access would be prefetched.
                let page = first_page + turn * STRIDE % OBJECT_PAGES;
                let begun = Instant::now();
                let word = memory.load_u32(first + page * PAGE_BYTES);
                figures.push(micros(begun.elapsed()));
                ensure!(word == Some(page as u32 + 1), "page {page}: {word:?}");
            }
        }
    }
    let mut table = Table::new(&[
        "a page of another member, its directory",
        "p50 µs",
        "p90",
        "p99",
    ]);
    for (name, figures) in [
        ("at the home", &mut of_home),
        ("where the page is", &mut of_owner),
    ] {
        let mut row = vec![name.to_owned()];
        row.extend([0.5, 0.9, 0.99].map(|share| format!("{:.1}", percentile(figures, share))));
        table.row(row);
    }
    table.print(&format!("Directories ({OBJECT_PAGES} of each)"));
    spanned.end()
}

/// Increments a word in one page of 64 MiB after the other, and counts: in random order, some
/// pages much more often than others (the page number is the cube of a random number: an eighth of
/// the pages have half of the accesses).
const USES: &str = r#"(module (memory (export "memory") 1040 1040 shared)
    (func (export "_start") (local $x i64) (local $u i64) (local $at i32) (local $turn i32)
        (local.set $x (i64.const 88172645463325252))
        (loop $more
            (local.set $turn (i32.const 64))
            (loop $turns
                (local.set $x (i64.xor (local.get $x) (i64.shl (local.get $x) (i64.const 13))))
                (local.set $x (i64.xor (local.get $x) (i64.shr_u (local.get $x) (i64.const 7))))
                (local.set $x (i64.xor (local.get $x) (i64.shl (local.get $x) (i64.const 17))))
                (local.set $u (i64.and (local.get $x) (i64.const 65535)))
                (local.set $u (i64.shr_u
                    (i64.mul (local.get $u) (i64.mul (local.get $u) (local.get $u)))
                    (i64.const 34)))
                (local.set $u (i64.and (i64.mul (local.get $u) (i64.const 12345)) (i64.const 16383)))
                (local.set $at (i32.add (i32.const 0x100000)
                    (i32.shl (i32.wrap_i64 (local.get $u)) (i32.const 12))))
                (i64.store (local.get $at) (i64.add (i64.load (local.get $at)) (i64.const 1)))
                (local.set $turn (i32.sub (local.get $turn) (i32.const 1)))
                (br_if $turns (local.get $turn)))
            (i64.atomic.store (i32.const 8)
                (i64.add (i64.atomic.load (i32.const 8)) (i64.const 1)))
            (br $more))))"#;
/// Its parts: the others have room for all of it.
const PARTS: usize = 8;
/// The limit of each.
const KEPT: [u64; 3] = [16 << 20, 32 << 20, 48 << 20];
/// Warm-up and measured time.
const WARM: Duration = Duration::from_secs(3);
const COUNTED: Duration = Duration::from_secs(4);

/// A program with skewed access, whose part may keep less than it has.
fn limits() -> Result<()> {
    let mut table = Table::new(&["limit of a part", "uses/s", "waits/s", "uses for one wait"]);
    for kept in std::iter::once(None).chain(KEPT.into_iter().rev().map(Some)) {
        let limits = PartLimits {
            part_bytes: kept,
            room_bytes: None,
        };
        let spanned = Spanned::begin(USES, PARTS, SpawnPolicy::Here, limits)?;
        let pages = spanned.parts.home().pages();
        let memory = &spanned.machine.memories()[0];
        let count = || {
            let low = memory.load_u32(8).context("its count")?;
            anyhow::Ok((low, pages.latency().count()))
        };
        std::thread::sleep(WARM);
        let before = count()?;
        let begun = Instant::now();
        std::thread::sleep(COUNTED);
        let after = count()?;
        let seconds = begun.elapsed().as_secs_f64();
        let uses = 64.0 * f64::from(after.0.wrapping_sub(before.0));
        let waits = (after.1 - before.1) as f64;
        table.row(vec![
            kept.map_or("all".into(), |kept| format!("{} of 65 MiB", kept >> 20)),
            format!("{:.0}", uses / seconds),
            format!("{:.0}", waits / seconds),
            match waits > 0.0 {
                true => format!("{:.2}", uses / waits),
                false => "-".into(),
            },
        ]);
        spanned.end()?;
    }
    table.print("64 MiB, some of which are used more");
    Ok(())
}

/// Moves sets of pages, as a user moves an object, compared with plain streams.
fn moves(
    memory: &GuestMemory,
    rounds: usize,
    (to_home, from_home): (&mut impl Write, &mut impl BufRead),
) -> Result<()> {
    let (mut ours, mut streams) = (Vec::new(), Vec::new());
    let (mut copies, mut machines) = (Vec::new(), Vec::new());
    let mut at = MEMORY_BYTES;
    for _ in 0..rounds.min(SETS_MAX) {
        at -= MOVED_BYTES;
        writeln!(to_home, "{at}")?;
        to_home.flush()?;
        let mut took = String::new();
        from_home.read_line(&mut took)?;
        let took: f64 = took.trim().parse().context("how long it took")?;
        ours.push(MOVED_BYTES as f64 / took);
        ensure!(is_all_here(memory, at)?, "pages are missing");
        let nothing = |_, _: &mut [u8]| Ok(());
        streams.push(stream(nothing, |_, _| Ok(()))?);
        let copy = self::memory()?;
        copies.push(stream(nothing, |at, bytes| Ok(copy.write(at, bytes)?))?);
        // The set that has just moved here.
        let copy = self::memory()?;
        machines.push(stream(
            |from, piece| Ok(memory.read(at + from, piece)?),
            |at, bytes| Ok(copy.write(at, bytes)?),
        )?);
    }
    let ours = percentile(&mut ours, 0.5);
    println!(
        "\na set of pages of {} MiB moves at {ours:.0} MB/s",
        MOVED_BYTES >> 20
    );
    for (name, beside) in [
        ("whose bytes are dropped", &mut streams),
        ("whose bytes are written to pages that are new", &mut copies),
        (
            "of a memory to another one, as a machine is copied",
            &mut machines,
        ),
    ] {
        let beside = percentile(beside, 0.5);
        println!(
            "plain TLS stream {name}: {beside:.0} MB/s; ratio {:.2}",
            ours / beside
        );
    }
    Ok(())
}

fn is_all_here(memory: &GuestMemory, at: u64) -> Result<bool> {
    let ranges = memory.populated()?;
    Ok(ranges
        .iter()
        .any(|range| range.start <= at && at + MOVED_BYTES <= range.end))
}

/// Megabytes a second of the same bytes over TLS from this thread to one that runs the given
/// function on them.
fn stream(
    mut gives: impl FnMut(u64, &mut [u8]) -> Result<()>,
    mut takes: impl FnMut(u64, &[u8]) -> Result<()> + Send,
) -> Result<f64> {
    let identity = PinnedIdentity::generate()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let socket = TcpStream::connect(listener.local_addr()?)?;
    let (accepted, _) = listener.accept()?;
    let client = ClientTls::pinned(&identity, identity.fingerprint)?;
    let server = ServerTls::pinned(&identity, identity.fingerprint)?;
    std::thread::scope(|scope| {
        let heard = scope.spawn(move || -> Result<()> {
            let mut stream = BulkStream::server(accepted, &server)?;
            let mut at = 0;
            while at < MOVED_BYTES {
                stream.read(&mut |bytes| {
                    takes(at, bytes)?;
                    at += bytes.len() as u64;
                    Ok::<_, anyhow::Error>(bytes.len())
                })?;
            }
            Ok(())
        });
        let mut stream = BulkStream::client(socket, &client)?;
        let mut piece = vec![7; 256 << 10];
        let begun = Instant::now();
        for at in (0..MOVED_BYTES).step_by(piece.len()) {
            gives(at, &mut piece)?;
            stream.write(&piece)?;
        }
        heard
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(MOVED_BYTES as f64 / micros(begun.elapsed()))
    })
}
