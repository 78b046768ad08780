//! Speed of one long nest of loops before and after the thread was captured in
//! its middle and resumed, through the serialised form, in a fresh instance.

use crate::Options;
use crate::guest::{self, Start};
use crate::table::{Table, median};
use anyhow::{Context, Result, ensure};
use keel_wasm::runtime::{Engine, Limits, Machine, Outcome};
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

pub(crate) fn bench(options: &Options) -> Result<()> {
    let path = options.kernels.join("longloop.wasm");
    let module = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
    let engine = Engine::new(keel_wasm::runtime::Options::default())?;
    let program = engine.load(&module)?;
    program.prepare_resume()?;
    let start = Start::args(&["longloop"]);
    let begun = Instant::now();
    guest::machine(&program, &start)?;
    let whole = begun.elapsed();
    let (mut plain, mut before, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        plain.push(median(steps(&guest::plain(&module, &start)?)?));
        let (wasi, output) = start.wasi()?;
        let machine = Machine::start(program.clone(), wasi, Limits::default())?;
        std::thread::sleep(whole / 2);
        ensure!(machine.recapture(0), "the guest ended before it was moved");
        let outcome = machine
            .wait(Some(Duration::from_secs(120)))
            .unwrap_or(Outcome::Stopped);
        let text = guest::ended_well(&outcome, &output)?;
        ensure!(
            machine.captures() == 1,
            "captured {} times",
            machine.captures()
        );
        let steps = steps(&text)?;
        // The move is at about a half.
        let third = steps.len() / 3;
        before.push(median(steps[..third].to_vec()));
        after.push(median(steps[steps.len() - third..].to_vec()));
    }
    let ratios = before
        .iter()
        .zip(&after)
        .map(|(before, after)| before / after);
    let ratio = median(ratios.collect());
    let mut table = Table::new(&["", "ms for a step", "speed"]);
    let mut row = |name: &str, time: f64, speed: f64| {
        table.row(vec![
            name.into(),
            format!("{:.2}", time / 1e6),
            format!("{:.1} %", speed * 100.0),
        ]);
    };
    let (plain, before, after) = (median(plain), median(before), median(after));
    row("plain wasmtime", plain, before / plain);
    row("before the move", before, 1.0);
    row("after the move", after, ratio);
    table.print("A thread moved in the middle of a long loop (speed against before the move)");
    Ok(())
}

fn steps(text: &str) -> Result<Vec<f64>> {
    text.lines().map(|line| Ok(line.parse()?)).collect()
}
