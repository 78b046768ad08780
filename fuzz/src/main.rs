//! Under `cargo xtask fuzz`: libFuzzer with the target that `KEEL_FUZZ_TARGET` names. Otherwise:
//! tries the named files with a target, or writes the seeds of all targets into a folder.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    use std::sync::OnceLock;
    static TARGET: OnceLock<&keel_fuzz::Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("KEEL_FUZZ_TARGET").unwrap_or_default();
        keel_fuzz::target(&name).unwrap_or_else(|| panic!("there is no target {name:?}"))
    });
    (target.run)(data);
});

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let first = args.next().unwrap_or_default();
    if first == "--seeds" {
        let folder = std::path::PathBuf::from(args.next().unwrap_or_default());
        for target in keel_fuzz::TARGETS {
            let own = folder.join(target.name);
            std::fs::create_dir_all(&own)?;
            for (number, seed) in (target.seeds)().iter().enumerate() {
                std::fs::write(own.join(format!("seed-{number}")), seed)?;
            }
        }
        return Ok(());
    }
    let Some(target) = keel_fuzz::target(&first) else {
        eprintln!("usage: keel-fuzz TARGET FILE… | --seeds FOLDER; targets:");
        for target in keel_fuzz::TARGETS {
            eprintln!("  {}", target.name);
        }
        std::process::exit(2);
    };
    for file in args {
        let accepted = (target.run)(&std::fs::read(&file)?);
        println!("{file}: {}", if accepted { "accepted" } else { "refused" });
    }
    Ok(())
}
