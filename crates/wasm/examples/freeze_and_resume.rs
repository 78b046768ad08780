//! Captures a running program as plain data and resumes it from that data in
//! fresh instances, in the same process, over and over:
//!
//! `cargo run --release -p keel-wasm --example freeze_and_resume -- APP.wasm [ARGS]`

use keel_wasi::{Config, FdSink, Resources, Wasi};
use keel_wasm::runtime::{Engine, Image, Limits, Machine, Options};
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args
        .first()
        .ok_or("usage: freeze_and_resume APP.wasm [ARGS]")?;
    let engine = Engine::new(Options::default())?;
    let program = engine.load(&std::fs::read(path)?)?;
    let wasi = Wasi::new(Config {
        stdout: Box::new(FdSink::duplicate(std::io::stdout())?),
        args,
        ..Config::default()
    })?;
    let limits = Limits::default();
    let mut machine = Machine::start(program.clone(), wasi, limits)?;
    loop {
        if let Some(outcome) = machine.wait(Some(Duration::from_millis(300))) {
            machine.wasi().finish();
            eprintln!("{outcome:?}");
            return Ok(());
        }
        let begun = Instant::now();
        machine.freeze(Duration::from_secs(5))?;
        let frozen = begun.elapsed();
        let bytes = machine.image()?.encode()?;
        eprintln!(
            "frozen in {frozen:?}: {} bytes beside the memory",
            bytes.len()
        );

        // From here on this might be another process on another computer, with
        // a copy of the memories.
        let image = Image::decode(&bytes, &program)?;
        let resources = Resources {
            stdout: Box::new(FdSink::duplicate(std::io::stdout())?),
            ..Resources::default()
        };
        let wasi = Wasi::restore(image.wasi.clone(), resources)?;
        let memories = machine.memories().clone();
        let resumed = Machine::prepare(program.clone(), image, memories, wasi, limits)?;
        machine.stop();
        machine = resumed;
        machine.thaw()?;
    }
}
