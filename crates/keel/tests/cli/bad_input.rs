//! Modules and programs that misbehave: a clear error, and no harm.

use crate::keel_wasm::{MODES, Running, finish, guest, keel, run};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::Stdio;

#[test]
fn traps_have_a_backtrace() {
    for (how, message, names) in [
        (
            "divide",
            "integer divide by zero",
            "0: divide\n  1: outer\n",
        ),
        ("wild", "out of bounds memory access", "0: main\n"),
        ("abort", "unreachable", "0: abort\n"),
        (
            "recurse",
            "call stack exhausted",
            "0: recurse\n  1: recurse\n",
        ),
    ] {
        for mode in &MODES[1..] {
            let finished = run(mode, "hostile", &[how]);
            assert_eq!(finished.code, Some(134), "{mode:?}: {finished:?}");
            for part in ["hostile.wasm: trap: ", message, names] {
                assert!(finished.stderr.contains(part), "{mode:?}: {finished:?}");
            }
        }
        let plain = run(&["--plain"], "hostile", &[how]);
        assert_eq!(plain.code, Some(134));
        assert!(plain.stderr.contains(message), "{plain:?}");
    }
}

#[test]
fn memory_ends_at_its_limit() {
    for mode in MODES {
        let options: Vec<&str> = mode.iter().copied().chain(["--memory", "48M"]).collect();
        let finished = run(&options, "hostile", &["allocate"]);
        assert_eq!(finished.code, Some(0), "{mode:?}: {finished:?}");
        let (mib, _) = finished.stdout.split_once(" MiB").unwrap();
        let mib: u64 = mib.parse().unwrap();
        assert!((8..=48).contains(&mib), "{mode:?}: {mib} MiB");
    }
}

#[test]
fn a_memory_that_is_too_large_at_the_start_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.wasm");
    for (memory, modes) in [
        // Plain wasmtime has a message of its own.
        ("(memory 2000)", &MODES[1..]),
        (
            r#"(import "env" "memory" (memory 2000 3000 shared))"#,
            &MODES[..],
        ),
    ] {
        let module = format!(r#"(module {memory} (func (export "_start")))"#);
        std::fs::write(&path, wat::parse_str(module).unwrap()).unwrap();
        for mode in modes {
            let finished = finish(keel().args(*mode).args(["--memory", "64M"]).arg(&path));
            assert_eq!(finished.code, Some(1), "{mode:?}: {finished:?}");
            for part in ["large.wasm", "131072000 bytes"] {
                assert!(finished.stderr.contains(part), "{mode:?}: {finished:?}");
            }
        }
    }
}

#[test]
fn threads_end_at_their_limit() {
    for mode in MODES {
        let options: Vec<&str> = mode.iter().copied().chain(["--threads", "3"]).collect();
        let finished = run(&options, "threads", &["8", "100"]);
        assert_eq!(finished.code, Some(4), "{mode:?}: {finished:?}");
        assert_eq!(
            finished.stderr, "thread 2: no more threads (6)\n",
            "{mode:?}"
        );
    }
}

#[test]
fn descriptors_end_at_their_limit() {
    for mode in MODES {
        let folder = tempfile::tempdir().unwrap();
        let dir = format!("{}::/", folder.path().display());
        let options: Vec<&str> = mode.iter().copied().chain(["--dir", &dir]).collect();
        let finished = run(&options, "hostile", &["descriptors"]);
        assert_eq!(finished.code, Some(0), "{mode:?}: {finished:?}");
        assert!(finished.stdout.starts_with("4092 "), "{finished:?}");
    }
}

/// A program that floods its output is slowed by its reader, and gets an error when the reader is
/// gone.
#[test]
fn a_flood_waits_for_its_reader() {
    for mode in MODES {
        let mut command = keel();
        command.args(mode).arg(guest("hostile")).arg("flood");
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = Running(command.spawn().unwrap());
        let mut stdout = child.0.stdout.take().unwrap();
        let mut bytes = vec![0; 32 << 20];
        stdout.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == b'x'), "{mode:?}");
        drop(stdout);
        assert_eq!(child.0.wait().unwrap().code(), Some(5), "{mode:?}");
    }
}

#[test]
fn a_spinning_program_ends_by_a_signal() {
    for mode in MODES {
        let mut command = keel();
        command.args(mode).arg(guest("spinner")).args(["0", "1000"]);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = Running(command.spawn().unwrap());
        let mut first = [0; 1];
        child
            .0
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        let pid = rustix::process::Pid::from_child(&child.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        drop(child.0.stdout.take());
        assert!(!child.0.wait().unwrap().success(), "{mode:?}");
    }
}

#[test]
fn unknown_imports_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.wasm");
    let module = wat::parse_str(
        r#"(module
            (import "env" "launch" (func (param i32)))
            (import "wasi_snapshot_preview1" "fd_teleport" (func (result i32)))
            (import "wasi_snapshot_preview1" "fd_close" (func (param i64) (result i32)))
            (func (export "_start")))"#,
    )
    .unwrap();
    std::fs::write(&path, module).unwrap();
    let finished = finish(keel().arg(path));
    assert_eq!(finished.code, Some(1));
    for part in [
        "foreign.wasm cannot run",
        "has unknown imports",
        "env.launch",
        "wasi_snapshot_preview1.fd_teleport",
        "wasi_snapshot_preview1.fd_close",
    ] {
        assert!(finished.stderr.contains(part), "{finished:?}");
    }
}

#[test]
fn what_is_no_program_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let spinner = std::fs::read(guest("spinner")).unwrap();
    let library = wat::parse_str(r#"(module (func (export "add")))"#).unwrap();
    let externref =
        wat::parse_str(r#"(module (func (export "_start")) (func (param externref)))"#).unwrap();
    let global =
        wat::parse_str(r#"(module (import "env" "g" (global i32)) (func (export "_start")))"#)
            .unwrap();
    let cases: [(&str, &[u8], &str); 8] = [
        ("empty", b"", "not a WebAssembly module"),
        ("text", b"(module)", "not a WebAssembly module"),
        ("component", b"\0asm\x0d\0\x01\0", "a component"),
        ("version", b"\0asm\x07\0\0\0", "not valid"),
        ("cut", &spinner[..spinner.len() / 2], "not valid"),
        ("library", &library, "exports no function \"_start\""),
        ("externref", &externref, "externref"),
        ("global", &global, "import env.g"),
    ];
    for (name, bytes, message) in cases {
        let path = folder.path().join(name).with_extension("wasm");
        std::fs::write(&path, bytes).unwrap();
        let finished = finish(keel().arg(&path));
        assert_eq!(finished.code, Some(1), "{name}: {finished:?}");
        let named = finished.stderr.contains(&format!("{name}.wasm"));
        assert!(
            named && finished.stderr.contains(message),
            "{name}: {finished:?}"
        );
    }
    let finished = finish(keel().arg(folder.path().join("missing.wasm")));
    assert!(finished.stderr.contains("cannot read"), "{finished:?}");
    assert!(finished.stderr.contains("missing.wasm"), "{finished:?}");
}

/// No path outside a given directory can be reached.
#[test]
fn directories_are_a_sandbox() {
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("given");
    std::fs::create_dir_all(given.join("inner")).unwrap();
    std::fs::write(folder.path().join("secret"), "secret").unwrap();
    std::fs::write(given.join("inner/plain"), "plain").unwrap();
    symlink("../secret", given.join("up")).unwrap();
    symlink(folder.path().join("secret"), given.join("absolute")).unwrap();
    symlink("..", given.join("parent")).unwrap();
    symlink("inner/plain", given.join("fine")).unwrap();
    symlink("loop", given.join("loop")).unwrap();
    let paths = [
        "/d/inner/plain",
        "/d/inner/../inner/plain",
        "/d/fine",
        "/d/../secret",
        "/d/inner/../../secret",
        "/d/up",
        "/d/absolute",
        "/d/parent/secret",
        "/d/loop",
        "/etc/passwd",
        "secret",
    ];
    for mode in MODES {
        let dir = format!("{}::/d", given.display());
        let options: Vec<&str> = mode.iter().copied().chain(["--dir", &dir]).collect();
        let mut args = vec!["open"];
        args.extend(paths);
        let finished = run(&options, "hostile", &args);
        for (line, path) in finished.stdout.lines().zip(paths) {
            let inside = paths[..3].contains(&path);
            assert_eq!(line.ends_with(": opened"), inside, "{mode:?}: {line}");
        }
        assert_eq!(finished.stdout.lines().count(), paths.len());
    }
    let dir = format!("{}::/d::ro", given.display());
    let finished = run(&["--dir", &dir], "hostile", &["write", "/d/new"]);
    assert!(!finished.stdout.contains("opened"), "{finished:?}");
    assert!(!given.join("new").exists());
}

#[test]
fn options_that_cannot_be_are_named() {
    for (options, message) in [
        (vec!["--dir", "/no/such/folder"], "/no/such/folder"),
        (vec!["--memory", "many"], "is not a size"),
        (vec!["--cpu-limit", "half"], "is not a number of cores"),
        (vec!["--cpu-limit", "0"], "0.01 to 1000 are possible"),
        (vec!["--env", "KEEL_SURELY_NOT_SET"], "is set here"),
        (vec!["--listen", "nowhere"], "nowhere"),
        (vec!["--shake", "0"], "more than 0"),
        (vec!["--plain", "--shake", "1"], "cannot be used with"),
    ] {
        let finished = run(&options, "hostile", &["exit", "0"]);
        assert_ne!(finished.code, Some(0), "{options:?}");
        assert!(
            finished.stderr.contains(message),
            "{options:?}: {finished:?}"
        );
    }
}

/// As in `keel doctor | true`: no output about it, and no panic.
#[test]
fn nobody_reads_what_is_said() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut doctor = std::process::Command::new(env!("CARGO_BIN_EXE_keel"));
    let unread = doctor.arg("doctor").stdout(writer).output().unwrap();
    assert_eq!(unread.status.code(), Some(128 + 13));
    assert_eq!(String::from_utf8_lossy(&unread.stderr), "");
}
