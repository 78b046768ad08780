//! The guests plain, instrumented, and shaken: the output and exit code are the same, however
//! often their threads are captured and resumed.

use crate::keel_wasm::{Finished, MODES, finish, guest, keel, run};

/// Runs a guest in every mode and compares the results. Returns the number of captures.
fn same_in_every_mode(name: &str, args: &[&str]) -> u64 {
    let plain = run(MODES[0], name, args);
    assert_eq!(plain.code, Some(0), "{plain:?}");
    let mut captures = 0;
    for mode in &MODES[1..] {
        let other = run(mode, name, args);
        assert_same(&plain, &other, &format!("{name} {mode:?}"));
        captures += other.captures;
    }
    captures
}

fn assert_same(plain: &Finished, other: &Finished, what: &str) {
    assert_eq!(plain.code, other.code, "{what}: {other:?}");
    assert_eq!(plain.stderr, other.stderr, "{what}");
    assert!(
        plain.stdout == other.stdout,
        "{what}: {:?}, not {:?}",
        other.stdout,
        plain.stdout
    );
}

#[test]
fn counter() {
    assert!(same_in_every_mode("counter", &["40", "2"]) > 20);
}

#[test]
fn spinner() {
    assert!(same_in_every_mode("spinner", &["4", "8000000"]) > 50);
}

#[test]
fn writer() {
    // The amount of writing depends on its run time; its output does not.
    assert!(same_in_every_mode("writer", &["24", "200", "3"]) > 50);
}

#[test]
fn threads() {
    assert!(same_in_every_mode("threads", &["8", "20000"]) > 50);
}

#[test]
fn zstd() {
    assert!(same_in_every_mode("zstd", &["4", "5", "6144", "3"]) > 50);
}

/// zstd's output does not depend on the number of its workers.
#[test]
fn zstd_with_another_number_of_workers() {
    let one = run(&[], "zstd", &["1", "3", "4096"]);
    let many = run(&["--shake", "5000"], "zstd", &["7", "3", "4096"]);
    assert_same(&one, &many, "seven workers");
}

#[test]
fn files() {
    let mut first = None;
    for mode in MODES {
        let folder = tempfile::tempdir().unwrap();
        let dir = format!("{}::/data", folder.path().display());
        let options: Vec<&str> = mode.iter().copied().chain(["--dir", &dir]).collect();
        let finished = run(&options, "files", &["/data", "150"]);
        assert_eq!(finished.code, Some(0), "{mode:?}: {finished:?}");
        let left: Vec<_> = folder.path().read_dir().unwrap().collect();
        assert!(left.is_empty(), "{mode:?} leaves {left:?}");
        match &first {
            None => first = Some(finished),
            Some(first) => assert_same(first, &finished, &format!("{mode:?}")),
        }
    }
}

/// In volumes of the program's own.
#[test]
fn volumes() {
    let folder = tempfile::tempdir().unwrap();
    let dir = format!("{}::/data", folder.path().display());
    let host = run(&["--dir", &dir], "files", &["/data", "150"]);
    for mode in MODES {
        let with = |more: &[&'static str]| [mode, more].concat();
        let own = with(&["--volume", "tmp:1M:/data"]);
        let files = run(&own, "files", &["/data", "150"]);
        assert_same(&host, &files, &format!("{mode:?}"));
        let disk = run(
            &with(&["--volume", "tmp:9M:/d"]),
            "disk",
            &["/d", "8", "300"],
        );
        assert_eq!(disk.code, Some(0), "{mode:?}: {disk:?}");
        assert!(disk.stdout.ends_with("\n300\nall of it is as it must be\n"));
        // A quota looks like a full disk to the program.
        let small = run(
            &with(&["--volume", "tmp:4M:/d"]),
            "disk",
            &["/d", "8", "300"],
        );
        assert_eq!(small.code, Some(4), "{mode:?}: {small:?}");
    }
    // Copies change, originals do not.
    std::fs::write(folder.path().join("big"), "in the way").unwrap();
    let copy = format!("{}::/d", folder.path().display());
    let refused = run(&["--copy", &copy], "disk", &["/d", "1", "1"]);
    assert!(
        refused.stdout.contains("create big: File exists"),
        "{refused:?}"
    );
    std::fs::rename(folder.path().join("big"), folder.path().join("other")).unwrap();
    let copied = run(&["--copy", &copy], "disk", &["/d", "1", "1"]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 1);
}

/// As several parts, between which threads move, also for a single-threaded program.
#[test]
fn several_parts() {
    let folder = tempfile::tempdir().unwrap();
    let dir = format!("{}::/d", folder.path().display());
    let cases: [(&str, &[&str]); 5] = [
        ("counter", &["30", "5"]),
        ("writer", &["16", "100", "3"]),
        ("threads", &["6", "3000"]),
        ("zstd", &["4", "3", "3072"]),
        ("files", &["/d", "150"]),
    ];
    for (name, args) in cases {
        let plain = run(&["--plain", "--dir", &dir], name, args);
        assert_eq!(plain.code, Some(0), "{plain:?}");
        let still = run(&["--parts", "2", "--dir", &dir], name, args);
        assert_same(&plain, &still, &format!("{name} as two parts"));
        let options = [
            "--parts", "3", "--shake", "300", "--seed", "4", "--dir", &dir,
        ];
        let shaken = run(&options, name, args);
        assert_same(&plain, &shaken, &format!("{name} as three parts"));
        assert!(shaken.captures > 3, "{name}: {shaken:?}");
    }
    let none = keel().args(["--parts", "0"]).arg(guest("counter")).output();
    let none = none.unwrap();
    assert_eq!(none.status.code(), Some(2), "{none:?}");
}

/// Programs of many kinds: private bands, rings between stages, locks, tables with many readers,
/// and shared work queues.
#[test]
fn programs_with_threads() {
    let cases: [(&str, &[&str]); 7] = [
        ("stencil", &["4", "130", "60", "4"]),
        ("render", &["4", "200", "120", "6"]),
        ("pipeline", &["4", "300"]),
        ("store", &["4", "8000"]),
        ("matrix", &["4", "200", "4"]),
        ("mapreduce", &["4", "8", "4"]),
        ("ep", &["4", "20", "4"]),
    ];
    for (name, args) in cases {
        assert!(same_in_every_mode(name, args) > 3, "{name}");
        let plain = run(&["--plain"], name, args);
        assert_eq!(plain.code, Some(0), "{plain:?}");
        let shaken = run(
            &["--parts", "3", "--shake", "300", "--seed", "2"],
            name,
            args,
        );
        assert_same(&plain, &shaken, &format!("{name} as three parts"));
        assert!(shaken.captures > 3, "{name}: {shaken:?}");
        // For any number of workers.
        let workers = [&["3"], &args[1..]].concat();
        let other = run(&["--shake", "500"], name, &workers);
        if matches!(name, "stencil" | "render" | "matrix" | "mapreduce" | "ep") {
            assert_same(&plain, &other, &format!("{name} with three workers"));
        }
        assert_eq!(other.code, Some(0), "{name}: {other:?}");
    }
    // Invalid options.
    for (name, args) in [
        ("render", &["0"][..]),
        ("matrix", &["4", "5000"]),
        ("stencil", &["4", "2"]),
        ("ep", &["65", "20"]),
        ("ep", &["4", "33"]),
    ] {
        assert_eq!(run(&[], name, args).code, Some(2), "{name}");
    }
    let full = run(&["--memory", "32M"], "mapreduce", &["2", "64"]);
    assert_eq!(full.code, Some(4), "{full:?}");
    assert!(full.stderr.contains("no memory for 64 MiB"), "{full:?}");
}

/// `ep` compares its sums with those published by the benchmark's authors.
#[test]
fn ep_of_a_class_with_published_sums() {
    let finished = run(&["--shake", "300", "--seed", "7"], "ep", &["4", "24"]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    // 17 digits: the full precision of a double.
    let sums = "0 -3.2478346520346163e+03 -6.9584070783828211e+03 13176389\n";
    assert_eq!(finished.stdout, sums);
}

/// Programs with more memory than any of their parts may keep, also with less total room than they
/// need.
#[test]
fn parts_that_keep_little() {
    let cases: [(&str, &[&str], &str); 4] = [
        ("mapreduce", &["4", "16", "2"], "8M"),
        ("mapreduce", &["3", "8", "2"], "2M"),
        ("matrix", &["4", "300", "3"], "2M"),
        ("zstd", &["4", "2", "3072"], "12M"),
    ];
    for (name, args, most) in cases {
        let plain = run(&["--plain"], name, args);
        assert_eq!(plain.code, Some(0), "{plain:?}");
        let options = ["--parts", "3", "--part-memory", most];
        let parts = run(
            &[&options[..], &["--shake", "100", "--seed", "6"]].concat(),
            name,
            args,
        );
        assert_same(&plain, &parts, &format!("{name}, {most} a part"));
    }
    for (options, why) in [
        (&["--part-memory", "8M"][..], "--parts"),
        (
            &["--parts", "2", "--part-memory", "1K"],
            "at least 1024 KiB",
        ),
        (&["--parts", "2", "--part-memory", "0"], "at least 1024 KiB"),
    ] {
        let refused = keel().args(options).arg(guest("counter")).output();
        let refused = refused.unwrap();
        assert_eq!(refused.status.code(), Some(2));
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(text.contains(why), "{text}");
    }
}

/// Many threads, captured as often as possible, with many seeds.
#[test]
fn threads_at_a_high_rate() {
    let plain = run(&["--plain"], "threads", &["16", "6000"]);
    let mut captures = 0;
    for seed in 0..12 {
        let seed = seed.to_string();
        let options = ["--shake", "50000", "--seed", &seed];
        let shaken = run(&options, "threads", &["16", "6000"]);
        assert_same(&plain, &shaken, &format!("seed {seed}"));
        captures += shaken.captures;
    }
    assert!(captures > 500, "{captures}");
}

#[test]
fn exit_codes() {
    for mode in MODES {
        for code in [0, 1, 7, 255] {
            let finished = run(mode, "hostile", &["exit", &code.to_string()]);
            assert_eq!(finished.code, Some(code), "{mode:?}");
        }
    }
}

#[test]
fn standard_input_is_passed_on() {
    for mode in MODES {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, vec![7; 1_000_003]).unwrap();
        let mut command = keel();
        command.args(mode).arg(guest("hostile")).arg("stdin");
        command.stdin(file.reopen().unwrap());
        let finished = finish(&mut command);
        assert_eq!(finished.stdout, "1000003 bytes\n", "{mode:?}");
    }
}
