//! Error messages of keel, verbatim: `errors.txt` beside this file. `UPDATE_EXPECT=1 cargo test`
//! regenerates that file; check the differences.

use keel_testkit::{Guest, LocalCluster};
use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Without a node, in a folder with some files.
const ALONE: &[&str] = &[
    "wasm missing.wasm",
    "wasm junk.wasm",
    "wasm broken.wasm",
    "wasm strange.wasm",
    "wasm --dir nowhere counter.wasm",
    "wasm --dir nowhere::/x counter.wasm",
    "wasm --copy nowhere counter.wasm",
    "wasm --volume tmp:1G counter.wasm",
    "wasm --volume nowhere:/x counter.wasm",
    "wasm --volume cluster:v:/x counter.wasm",
    "wasm --env NOT_SET_ANYWHERE counter.wasm",
    "wasm --listen nonsense counter.wasm",
    "wasm --memory 1x counter.wasm",
    "wasm --memory 1M counter.wasm",
    "wasm --shake 0 counter.wasm",
    "wasm --cpu-limit 0 counter.wasm",
    "wasm --parts 65 counter.wasm",
    "wasm --parts 2 --part-memory 1k counter.wasm",
    "up",
    "up --detach",
    "up --name A_b",
    "down",
    "reload",
    "join 127.0.0.1:1 --token abc --name b",
    "status",
    "nodes",
    "ps",
    "schedule a",
    "token join",
    "logs m",
    "inspect m",
    "describe m",
    "events",
    "stop m",
    "rm m",
    "move m --to b",
    "balance",
    "drain a",
    "why m",
    "ledger",
    "history a",
    "rule ls",
    "checkpoint m",
    "restore m",
    "volume ls",
    "image ls",
    "image import missing.raw",
    "image import missing",
    "image import counter.wasm",
    "set m --memory 1G",
    "span m --nodes a,b",
    "cp m:/x y",
    "exec m -- true",
    "console m",
    "vnc m",
    "cp a b",
    "run counter.wasm",
    "run missing.wasm",
    "run --env X counter.wasm",
    "run --dir nowhere counter.wasm",
    "run --cpu-limit x counter.wasm",
    "run --ha=colour=red counter.wasm",
    "run --ha=priority=101 counter.wasm",
    "run --ha=fence=wall counter.wasm",
    "run --ha --checkpoint-every 10s counter.wasm",
    "run",
    "run --kind wasm",
    "run --kind qemu",
    "run --kind qemu --net none",
    "apply -f bad.toml",
    "apply -f missing.toml",
    "sim bad.toml",
    "sim missing.toml",
    "man nowhere",
    "completions x",
    "events --since x",
    "move m",
    "exec m",
    "console",
    "vnc",
    "vnc m --listen nowhere",
    "set m",
    "rm",
    "start",
    "image rm",
    "nonsense",
    "-o xml ps",
    "--server 127.0.0.1:1 down",
    "--server 127.0.0.1:1 ps",
    "--server 127.0.0.1:1 --user-token x ps",
    "--server 127.0.0.1:1 --user-token x --authority zz ps",
    "--server 127.0.0.1:1 --user-token x --authority 0000000000000000000000000000000000000000000000000000000000000000 ps",
    "import missing",
    "import bad.toml",
    "import --storage local bad.toml",
];

/// With node a, on which machine m runs and machine done has ended.
const WITH_NODE: &[&str] = &[
    "up --name b",
    "up --name a --store etcd://127.0.0.1:1/site",
    "up --detach",
    "join 127.0.0.1:1 --token abc --name b",
    "token user x --role king",
    "schedule nobody",
    "logs nobody",
    "inspect nobody",
    "describe nobody",
    "inspect No_Name",
    "start nobody",
    "start m",
    "stop nobody",
    "kill nobody",
    "rm nobody",
    "rm m",
    "move nobody --to a",
    "move m --to nobody",
    "move m --to a",
    "move m --cancel",
    "move m/thread/9 --to a",
    "move done --to a",
    "why nobody",
    "why-not nobody --to a",
    "history nobody",
    "drain nobody",
    "rule rm nobody",
    "rule set -f missing.toml",
    "checkpoint nobody",
    "restore nobody",
    "clone nobody --as x",
    "clone m --as m",
    "volume inspect nobody",
    "volume rm nobody",
    "image rm nobody",
    "image rm No_Name",
    "image import counter.wasm",
    "image import bad.toml --name No_Name",
    "run --detach --kind qemu --image nobody",
    "run --detach --kind qemu --image missing.qcow2",
    "set nobody --memory 1G",
    "set m --memory 1k",
    "span m --nodes nobody",
    "unspan m",
    "parts nobody",
    "threads done",
    "cp m:/x y",
    "exec nobody -- true",
    "exec m -- true",
    "console nobody",
    "console m",
    "vnc nobody",
    "vnc m",
    "cp missing m:/x",
    "run --detach --name m counter.wasm",
    "run --detach --name No_Name counter.wasm",
    "run --detach --on nobody counter.wasm",
    "run --detach --memory 1k counter.wasm",
    "run --detach --threads 0 counter.wasm",
    "run --detach --ha --rm counter.wasm",
    "run --detach --ha --dir .::/x counter.wasm",
    "set done --ha",
    "run --detach --volume cluster:nobody:/x counter.wasm",
    "run junk.wasm",
    "run --detach --name strange strange.wasm",
    "run --detach --name broken broken.wasm",
    "apply -f bad.toml",
    "balance policy nonsense=1",
    "balance policy mode=nonsense",
    "label m nonsense",
];

fn said(folder: &Path, line: &str, wrong: &mut Vec<String>) -> String {
    let output = Command::new(KEEL)
        .current_dir(folder)
        .env("KEEL_STATE_DIR", folder.join("a"))
        .env_remove("NOT_SET_ANYWHERE")
        .args(line.split(' '))
        .stdin(Stdio::null())
        .output()
        .expect("keel runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stderr = stderr.replace(&folder.display().to_string(), "FOLDER");
    if output.status.success() {
        wrong.push(format!("keel {line} is no error: {output:?}"));
    }
    for (number, part) in stderr.split(": ").enumerate() {
        let again = stderr.split(": ").skip(number + 1);
        let repeated = part.len() > 12 && again.into_iter().any(|it| it.trim() == part.trim());
        if repeated {
            wrong.push(format!("keel {line} says {part:?} twice: {stderr}"));
        }
    }
    let code = output.status.code().expect("an exit code");
    format!("$ keel {line}\n{}\n= {code}\n\n", stderr.trim_end())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_happened_to_what_and_what_to_do() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let folder = folder.path();
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests");
    let counter = std::fs::read(guests.join("counter.wasm")).expect("a prebuilt guest");
    let strange = r#"(module (import "env" "nonsense" (func)) (func (export "_start")))"#;
    for (name, bytes) in [
        ("counter.wasm", &counter[..]),
        ("junk.wasm", b"junk"),
        ("broken.wasm", b"\0asm\x01\0\0\0junk"),
        ("strange.wasm", &wat::parse_str(strange).expect("a module")),
        ("bad.toml", b"x = "),
    ] {
        std::fs::write(folder.join(name), bytes).expect("a file");
    }
    let (mut text, mut wrong) = (String::new(), Vec::new());
    for line in ALONE {
        text += &said(folder, line, &mut wrong);
    }
    let cluster = LocalCluster::start(Path::new(KEEL), folder, &["a"])
        .await
        .expect("a cluster");
    let endless = Guest::new("m", "a", &counter, &["1000000", "50"]);
    cluster.run(&endless).await.expect("it starts");
    let short = Guest::new("done", "a", &counter, &["1"]);
    cluster.run(&short).await.expect("it starts");
    cluster.wait_end("a", "done").await.expect("it ends");
    writeln!(text, "# with a node\n").expect("text");
    for line in WITH_NODE {
        text += &said(folder, line, &mut wrong);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/errors.txt");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(&path, &text).expect("the file is written");
    }
    assert_eq!(wrong, [""; 0]);
    let expected = std::fs::read_to_string(&path).expect("errors.txt");
    for (said, expected) in text.split("\n\n$").zip(expected.split("\n\n$")) {
        assert_eq!(said, expected);
    }
    assert_eq!(text.len(), expected.len(), "as many errors");
}
