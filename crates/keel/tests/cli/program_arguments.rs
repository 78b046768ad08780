//! All arguments after the module belong to the program.

use keel_testkit::LocalCluster;
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Prints its arguments, each followed by a NUL.
const ARGUMENTS: &str = r#"(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (drop (call $sizes (i32.const 0) (i32.const 12)))
    (drop (call $args (i32.const 1024) (i32.const 4096)))
    (i32.store (i32.const 8) (i32.const 4096))
    (drop (call $write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 4)))))"#;

/// Options that only the program gets, even if keel has options with these names.
const OPTIONS: [&[&str]; 7] = [
    &["-o", "x"],
    &["-h"],
    &["--help"],
    &["--name", "y", "-d"],
    &["--", "-o", "json"],
    &["x", "-o", "json"],
    &["--state-dir"],
];

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().expect("keel runs");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn options_behind_the_module_are_the_programs() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let module = folder.path().join("arguments.wasm");
    let code = wat::parse_str(ARGUMENTS).expect("a module");
    std::fs::write(&module, code).expect("a file");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"])
        .await
        .expect("a cluster");
    let state = cluster.folder("a");
    for options in OPTIONS {
        let mut expected = String::from("arguments.wasm\0");
        for option in options {
            expected.push_str(option);
            expected.push('\0');
        }
        for command in ["wasm", "run"] {
            let (code, out, err) = output(
                Command::new(KEEL)
                    .arg("--state-dir")
                    .arg(&state)
                    .arg(command)
                    .arg(&module)
                    .args(options),
            );
            assert_eq!(
                (code, out.as_str()),
                (Some(0), expected.as_str()),
                "keel {command} M {options:?}: {err}"
            );
        }
    }
    // Before the module they are keel's, and unknown ones are reported.
    for command in ["wasm", "run"] {
        let (code, out, err) = output(Command::new(KEEL).args([command, "--nmae", "x", "M.wasm"]));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{err}");
        assert!(err.contains("'--nmae'"), "{err}");
        let (code, out, err) = output(Command::new(KEEL).arg(command));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{err}");
        assert!(err.contains("MODULE"), "{err}");
    }
}
