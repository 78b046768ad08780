//! Tries all targets without a fuzzer: seeds, what fuzzing found, and damaged copies of both.

use keel_fuzz::{TARGETS, Target};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::path::Path;

/// Damaged copies of each input.
const COPIES: u64 = 200;

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    let read = |path| std::fs::read(path).expect("it can be read");
    paths.into_iter().map(read).collect()
}

fn damage(input: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, rng.random()),
            2 => bytes.extend_from_slice(&[0xff; 9]),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = rng.random();
                }
            }
        }
    }
    bytes
}

#[test]
fn no_input_makes_a_decoder_panic() {
    for target in TARGETS {
        let mut inputs = (target.seeds)();
        inputs.extend(corpus(target));
        inputs.push(Vec::new());
        for (number, input) in inputs.iter().enumerate() {
            (target.run)(input);
            let mut rng = StdRng::seed_from_u64(number as u64);
            for _ in 0..COPIES {
                (target.run)(&damage(input, &mut rng));
            }
        }
    }
}

/// A target that refuses everything tries nothing.
#[test]
fn seeds_are_accepted_and_each_target_accepts_something() {
    for target in TARGETS {
        for (number, seed) in (target.seeds)().iter().enumerate() {
            assert!((target.run)(seed), "seed {number} of {}", target.name);
        }
        let mut inputs = (target.seeds)();
        inputs.extend(corpus(target));
        let accepted = inputs.iter().any(|input| (target.run)(input));
        assert!(
            accepted,
            "{} accepts nothing of {} inputs",
            target.name,
            inputs.len()
        );
    }
}

#[test]
fn the_corpus_is_small_and_of_targets_that_there_are() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let target = keel_fuzz::target(&name).unwrap_or_else(|| panic!("no target {name}"));
        bytes += corpus(target).iter().map(Vec::len).sum::<usize>();
    }
    assert!(bytes < 300 << 10, "{bytes} bytes");
}
