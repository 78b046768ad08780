//! Decoders of untrusted bytes: modules, instrumented modules, captured threads, images. Truncated,
//! changed or random bytes yield an error or a usable value, and never a panic.
//!
//! `KEEL_FUZZ_ROUNDS` multiplies the rounds.

mod common;

use common::{LIMIT, Running, guest, program};
use keel_wasi::network::ConnectionId;
use keel_wasi::{Config, Resources, Wasi};
use keel_wasm::instrument;
use keel_wasm::runtime::frame::ThreadState;
use keel_wasm::runtime::{
    Engine, Fiber, HostThread, Image, Limits, Machine, Options, Program, Run, Signal, make_memories,
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use std::sync::Arc;

fn rounds(count: u32) -> u32 {
    match std::env::var("KEEL_FUZZ_ROUNDS") {
        Ok(factor) => count * factor.parse::<u32>().unwrap(),
        Err(_) => count,
    }
}

/// Changes bytes like corruption or an attacker.
fn mutate(random: &mut StdRng, bytes: &[u8], from: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..random.random_range(1..4) {
        let length = bytes.len();
        if length <= from {
            break;
        }
        let at = random.random_range(from..length);
        match random.random_range(0..7) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.next_u32() as u8,
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.next_u32() as u8),
            4 => drop(bytes.remove(at)),
            5 => {
                // The largest numbers in the variable-length coding.
                let value = [0xff, 0xff, 0xff, 0xff, 0x0f];
                let end = (at + 5).min(length);
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
            _ => {
                let end = random.random_range(at..length.min(at + 40) + 1);
                let piece = bytes[at..end].to_vec();
                let to = random.random_range(from..=length);
                bytes.splice(to..to, piece);
            }
        }
    }
    bytes
}

const VARIED: &str = r#"(module
  (memory 1 4)
  (table $t (export "t") 5 20 funcref)
  (elem (i32.const 1) $work $run)
  (global $g (mut funcref) (ref.func $work))
  (global $v (mut v128) (v128.const i64x2 1 2))
  (data $d "passive")
  (func $work (param $n i32) (result i64)
    (local $f funcref) (local $x f64)
    (local.set $f (table.get $t (i32.const 2)))
    (local.set $x (f64.const 1.5))
    (loop $l
      (local.set $x (f64.mul (local.get $x) (f64.const 1.01)))
      (table.set $t (i32.const 3) (local.get $f))
      (drop (memory.grow (i32.const 0)))
      (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    (i64.trunc_sat_f64_s (local.get $x)))
  (func $run (export "run") (param $n i32) (result i64 f32)
    (data.drop $d)
    (i64.add (i64.const 5) (call $work (local.get $n)))
    (f32.const 2.5)))"#;

struct Fixture {
    program: Arc<Program>,
    machine: Machine,
    thread: HostThread,
}

impl Fixture {
    fn new() -> Self {
        let program = program(&wat::parse_str(VARIED).unwrap());
        let wasi = Wasi::new(Config::default()).unwrap();
        let machine = Machine::idle(program.clone(), wasi, Limits::default()).unwrap();
        let thread = HostThread {
            tid: 0,
            signal: Arc::new(Signal::new().unwrap()),
            memories: machine.memories().clone(),
            tables: Arc::default(),
        };
        Fixture {
            program,
            machine,
            thread,
        }
    }

    fn fiber(&self) -> Fiber {
        Fiber::new(
            self.program.clone(),
            self.machine.host(),
            self.thread.clone(),
        )
        .unwrap()
    }

    /// Encoded states of one run, at every safepoint.
    fn states(&self) -> Vec<Vec<u8>> {
        let mut fiber = self.fiber();
        self.thread.signal.step(true);
        let mut states = Vec::new();
        let mut run = fiber
            .call("run", &[keel_wasm::runtime::frame::Value::I32(12)])
            .unwrap();
        while run == Run::Captured {
            states.push(fiber.state().unwrap().encode(self.program.hash()));
            run = fiber.resume().unwrap();
        }
        assert!(states.len() > 12);
        states
    }
}

#[test]
fn captured_threads() {
    let fixture = Fixture::new();
    let states = fixture.states();
    let (hash, meta) = (fixture.program.hash(), fixture.program.meta());
    let mut random = StdRng::seed_from_u64(1);
    for state in &states {
        for end in 0..state.len() {
            assert!(
                ThreadState::decode(&state[..end], hash, meta).is_err(),
                "cut at {end}"
            );
        }
        let mut longer = state.clone();
        longer.push(0);
        assert!(ThreadState::decode(&longer, hash, meta).is_err(), "longer");
    }
    let (mut accepted, mut finished) = (0, 0);
    for round in 0..rounds(40_000) {
        let state = &states[random.random_range(0..states.len())];
        // Mostly behind the header, which is checked first.
        let from = if round % 10 == 0 { 0 } else { 40 };
        let bytes = mutate(&mut random, state, from);
        let Ok(state) = ThreadState::decode(&bytes, hash, meta) else {
            continue;
        };
        accepted += 1;
        if accepted % 10 != 0 {
            continue;
        }
        // It fits: so it runs, or traps.
        let mut fiber = fixture.fiber();
        if fiber.load(state).is_err() {
            continue;
        }
        for _ in 0..30 {
            match fiber.resume() {
                Ok(Run::Captured) => {
                    let bytes = fiber.state().unwrap().encode(hash);
                    ThreadState::decode(&bytes, hash, meta).unwrap();
                }
                Ok(Run::Finished(_)) => {
                    finished += 1;
                    break;
                }
                Err(_) => break,
            }
        }
    }
    println!("{accepted} accepted, {finished} finished");
    assert!(accepted > 100 && finished > 10);
}

#[test]
fn random_bytes() {
    let fixture = Fixture::new();
    let (hash, meta) = (fixture.program.hash(), fixture.program.meta());
    let header = fixture.states()[0][..40].to_vec();
    let mut random = StdRng::seed_from_u64(2);
    for round in 0..rounds(30_000) {
        let mut bytes = vec![0; random.random_range(0..200)];
        random.fill_bytes(&mut bytes);
        // A decoder behind its header.
        let bytes = match round % 4 {
            0 => bytes,
            1 => [header.clone(), bytes].concat(),
            2 => [b"KIMG\x01\0\0\0".to_vec(), bytes].concat(),
            _ => [b"\0asm\x01\0\0\0".to_vec(), bytes].concat(),
        };
        // Whether one of these is accepted does not matter.
        let _ = ThreadState::decode(&bytes, hash, meta);
        let _ = Image::decode(&bytes, &fixture.program);
        let _ = instrument::instrument(&bytes);
        let _ = instrument::read_meta(&bytes);
    }
}

#[test]
fn images() {
    let program = program(&guest("threads"));
    let running = Running::start_listening(&program, &["4", "1000000"]);
    while running.machine.threads().len() < 5 {
        std::thread::yield_now();
    }
    let without = || running.machine.image().unwrap().encode().unwrap();
    running.machine.freeze(LIMIT).unwrap();
    // Older programs read machines that have no connections.
    assert_eq!(without()[4..8], 3_u32.to_le_bytes());
    let (id, address) = (
        ConnectionId {
            carrier: 1,
            number: 2,
        },
        ([127, 0, 0, 1], 80).into(),
    );
    let network = running.machine.wasi().network();
    let connection = network.offer(id, 0, address, address).unwrap();
    connection.deliver(0, b"some bytes").unwrap();
    let bytes = running.machine.image().unwrap().encode().unwrap();
    let image = Image::decode(&bytes, &program).unwrap();
    assert_eq!(image.wasi.network.connections.len(), 1);
    for end in 0..bytes.len() {
        assert!(
            Image::decode(&bytes[..end], &program).is_err(),
            "cut at {end}"
        );
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(Image::decode(&longer, &program).is_err(), "longer");
    let other = common::program(&guest("counter"));
    assert!(Image::decode(&bytes, &other).is_err());
    let mut random = StdRng::seed_from_u64(3);
    let mut prepared = 0;
    for _ in 0..rounds(20_000) {
        let changed = mutate(&mut random, &bytes, 40);
        let Ok(image) = Image::decode(&changed, &program) else {
            continue;
        };
        if prepared >= rounds(100) {
            continue;
        }
        let Ok(wasi) = Wasi::restore(image.wasi.clone(), Resources::default()) else {
            continue;
        };
        let memories = make_memories(program.meta(), 1 << 30).unwrap();
        let machine = Machine::prepare(program.clone(), image, memories, wasi, Limits::default());
        if let Ok(machine) = machine {
            prepared += 1;
            machine.thaw().unwrap();
            machine.stop();
            machine.wait(Some(LIMIT)).unwrap();
        }
    }
    println!("{prepared} prepared");
    assert!(prepared > 5);
}

#[test]
fn every_prefix_of_a_module() {
    for name in ["counter", "threads", "zstd"] {
        let module = guest(name);
        // What ends where a section does may be a module.
        let accepted = (0..1024)
            .filter(|end| instrument::instrument(&module[..*end]).is_ok())
            .count();
        assert!(accepted < 4, "{name}: {accepted}");
        let mut random = StdRng::seed_from_u64(4);
        for _ in 0..rounds(300) {
            let end = random.random_range(1024..module.len());
            assert!(
                instrument::instrument(&module[..end]).is_err(),
                "{name} cut at {end}"
            );
        }
    }
}

/// A changed module is refused, or becomes a valid one.
#[test]
fn changed_modules() {
    let mut random = StdRng::seed_from_u64(5);
    let mut accepted = 0;
    for name in ["counter", "threads", "hostile"] {
        let module = guest(name);
        // The sections before the code: each byte, of the first ones each bit.
        for bit in 0..1024 * 8 {
            let mut changed = module.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            if bit % 8 == (bit / 8) % 8 || bit < 800 {
                accepted += u32::from(instrument::instrument(&changed).is_ok());
            }
        }
        for _ in 0..rounds(600) {
            let changed = mutate(&mut random, &module, 8);
            accepted += u32::from(instrument::instrument(&changed).is_ok());
        }
    }
    println!("{accepted} accepted");
    assert!(accepted > 100);
}

/// Instrumented modules come from other nodes: one that was changed is refused
/// or does harm to nothing but itself.
#[test]
fn changed_instrumented_modules() {
    let bytes = instrument::instrument(&wat::parse_str(VARIED).unwrap()).unwrap();
    let engine = Engine::new(Options::default()).unwrap();
    let mut random = StdRng::seed_from_u64(6);
    let mut loaded = 0;
    // The metadata comes first.
    let metadata = 8..bytes.len() / 3;
    for round in 0..rounds(3000) {
        let changed = if round % 4 == 0 {
            mutate(&mut random, &bytes, 8)
        } else {
            let mut changed = bytes.clone();
            let at = random.random_range(metadata.clone());
            changed[at] = match random.random_range(0..3) {
                0 => changed[at] ^ 1 << random.random_range(0..8),
                1 => random.random_range(0..20),
                _ => random.next_u32() as u8,
            };
            changed
        };
        let Ok(program) = engine.load_instrumented(changed) else {
            continue;
        };
        loaded += 1;
        let wasi = Wasi::new(Config::default()).unwrap();
        let limits = Limits {
            memory_bytes: 16 << 20,
            ..Limits::default()
        };
        let Ok(machine) = Machine::idle(program.clone(), wasi, limits) else {
            continue;
        };
        let thread = HostThread {
            tid: 0,
            signal: Arc::new(Signal::new().unwrap()),
            memories: machine.memories().clone(),
            tables: Arc::default(),
        };
        let Ok(mut fiber) = Fiber::new(program, machine.host(), thread.clone()) else {
            continue;
        };
        thread.signal.step(true);
        let mut run = fiber.call("run", &[keel_wasm::runtime::frame::Value::I32(3)]);
        for _ in 0..30 {
            if !matches!(run, Ok(Run::Captured)) || fiber.state().is_err() {
                break;
            }
            run = fiber.resume();
        }
    }
    println!("{loaded} loaded");
    assert!(loaded > 50);
}
