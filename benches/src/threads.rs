//! Threads of a spanning machine: the downtime of one that moves to another part and back, and the
//! throughput of two parts of one processor each compared with one of two.
//!
//! Both parts are in this process, connected over TLS on loopback as they are between nodes; the
//! home has the directory. The downtime lasts from leaving the code at one part to entering it at
//! the other. Figures of other systems are published ones: PM2 75 µs (Antoniu and others,
//! "Generating adaptive migration policies", 2000s), Nu about 100 µs (Ruan and others, NSDI 2023).

use crate::spanned::{LIMIT, Spanned};
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_kind_wasm::span::{PartId, PartLimits};
use keel_wasm::runtime::parts::SpawnPolicy;
use std::time::{Duration, Instant};

/// Warm-up moves: code and connections are warm after them.
const WARM: usize = 50;
/// How long a thread runs between two moves.
const PAUSE: Duration = Duration::from_millis(2);

/// A thread that computes, two calls deep, with some locals; the main one waits.
const GUEST: &str = r#"(module
    (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
    (memory (export "memory") 2 2 shared)
    (func $work (param $x i64) (result i64) (local $i i32)
        (local.set $i (i32.const 4096))
        (loop $more
            (local.set $x (i64.xor (i64.mul (local.get $x) (i64.const 6364136223846793005))
                (i64.shr_u (local.get $x) (i64.const 29))))
            (local.set $i (i32.sub (local.get $i) (i32.const 1)))
            (br_if $more (local.get $i)))
        (local.get $x))
    (func (export "wasi_thread_start") (param $tid i32) (param $arg i32) (local $x i64)
        (local.set $x (i64.const 88172645463325252))
        (loop $more
            (local.set $x (call $work (local.get $x)))
            (br_if $more (i64.ne (local.get $x) (i64.const 0)))))
    (func (export "_start")
        (drop (call $spawn (i32.const 0)))
        (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;

pub(crate) fn bench(moves: usize) -> Result<()> {
    let spanned = Spanned::begin(GUEST, 2, SpawnPolicy::Here, PartLimits::default())?;
    let (machine, parts) = (&spanned.machine, &spanned.parts);
    let member = parts.members().values().next().context("a member")?;
    let there = PartId::new(1).context("a part")?;
    let begun = Instant::now();
    while machine.threads().len() < 2 {
        ensure!(begun.elapsed() < LIMIT, "its thread does not start");
        std::thread::sleep(PAUSE);
    }
    let tid = 1;
    let home_signal = machine.signal(tid).context("its thread")?;
    let mut there_signal = None;
    let (mut away, mut home) = (Vec::new(), Vec::new());
    for turn in 0..2 * (WARM + moves) {
        std::thread::sleep(PAUSE);
        let goes = turn % 2 == 0;
        if !goes {
            there_signal = member.signal(tid);
        }
        let asked = home_signal
            .ran()
            .max(there_signal.as_ref().map_or((0, 0), |it| it.ran()));
        machine.move_thread(tid, if goes { there } else { PartId::HOME })?;
        let begun = Instant::now();
        let stood = loop {
            ensure!(begun.elapsed() < LIMIT, "it does not arrive");
            std::thread::sleep(Duration::from_micros(300));
            if goes {
                there_signal = member.signal(tid);
            }
            let Some(there_signal) = &there_signal else {
                continue;
            };
            let (left, entered) = match goes {
                true => (home_signal.ran().1, there_signal.ran().0),
                false => (there_signal.ran().1, home_signal.ran().0),
            };
            // Both figures are of this move.
            if left > asked.0 && entered > left {
                break entered - left;
            }
        };
        if turn >= 2 * WARM {
            let stood = stood as f64 / 1000.0;
            if goes { &mut away } else { &mut home }.push(stood);
        }
    }
    spanned.end()?;
    let mut table = Table::new(&["downtime of a thread", "p50 µs", "p90", "p99", "most"]);
    for (name, figures) in [("home → member", &mut away), ("member → home", &mut home)] {
        let mut row = vec![name.to_owned()];
        row.extend([0.5, 0.9, 0.99, 1.0].map(|share| format!("{:.1}", percentile(figures, share))));
        table.row(row);
    }
    table.print(&format!("Moves of a thread ({moves} each way)"));
    others()
}

/// Measured rounds, and the length of each.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);
/// First bytes of the counters of the threads: a page each.
const COUNTERS: [u64; 2] = [0x2_0000, 0x3_0000];

/// Throughput of two threads, one at each part, while two others contend for one page, compared
/// with the same while those two spin without sharing.
fn others() -> Result<()> {
    let (mut shared, mut own) = (0.0, 0.0);
    // Alternately, so that other load of the host affects both.
    for _ in 0..ROUNDS {
        shared += counted("(i32.const 0x4000)")?;
        own += counted("(i32.add (i32.const 0x4000) (i32.shl (local.get $arg) (i32.const 12)))")?;
    }
    let per_second = |count: f64| count / ROUNDS as f64 / ROUND.as_secs_f64() / 1e6;
    println!(
        "\ntwo threads count {:.1} million times a second beside two that take a page from each other, {:.1} beside two that spin: ratio {:.2}",
        per_second(shared),
        per_second(own),
        shared / own
    );
    Ok(())
}

/// Counts of two threads in a round, while two others write at an address.
fn counted(address: &str) -> Result<f64> {
    let text = format!(
        r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (memory (export "memory") 8 8 shared)
        (func (export "wasi_thread_start") (param $tid i32) (param $arg i32) (local $at i32)
            (if (i32.lt_u (local.get $arg) (i32.const 2))
                (then
                    (local.set $at {address})
                    (loop $more
                        (drop (i32.atomic.rmw.add (local.get $at) (i32.const 1)))
                        (br $more)))
                (else
                    (local.set $at (i32.shl (local.get $arg) (i32.const 16)))
                    (loop $more
                        (i64.store (local.get $at)
                            (i64.add (i64.load (local.get $at)) (i64.const 1)))
                        (br $more)))))
        (func (export "_start") (local $n i32)
            (loop $more
                (drop (call $spawn (local.get $n)))
                (local.set $n (i32.add (local.get $n) (i32.const 1)))
                (br_if $more (i32.lt_u (local.get $n) (i32.const 4))))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#
    );
    // One of each kind at each part.
    let spanned = Spanned::begin(&text, 2, SpawnPolicy::Even, PartLimits::default())?;
    let (machine, parts) = (&spanned.machine, &spanned.parts);
    let begun = Instant::now();
    while machine.threads().len() < 5 {
        ensure!(begun.elapsed() < LIMIT, "its threads do not start");
        std::thread::sleep(PAUSE);
    }
    let count = || -> Result<u64> {
        let mut all = 0;
        for at in COUNTERS {
            let mut word = [0; 8];
            parts.home().pages().read(0, at, &mut word, LIMIT)?;
            all += u64::from_le_bytes(word);
        }
        Ok(all)
    };
    std::thread::sleep(PAUSE * 50);
    let before = count()?;
    std::thread::sleep(ROUND);
    let counted = count()? - before;
    spanned.end()?;
    Ok(counted as f64)
}
