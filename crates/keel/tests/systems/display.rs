//! A system's display: what a viewer sees and types, by the protocol of RFC 6143, on any node and
//! beside moves.

use anyhow::{Context, Result, ensure};
use keel_api::{ClientError, MachineInfo, RunRequest};
use keel_kind_qemu::{QemuKind, QemuSpec};
use keel_machine::moves::Ending;
use keel_testkit::bare_system::{assemble, qemu_is_installed};
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
/// Would be noticed if it were waited for.
const LONG: Duration = Duration::from_secs(60);

/// Makes the screen blue, and prints the code of each key (IBM's set 1) in hexadecimal to the first serial
/// line. It asks the keyboard's controller, without interrupts.
const KEYS: &str = r#"
    .section .text
    .long 0x1BADB002, 0, -0x1BADB002
    .globl _start
_start:
    movl $0x80000, %esp
    movl $0xb8000, %edi
    movl $2000, %ecx
    movw $0x1f20, %ax
    rep stosw
next:
    inb $0x64, %al
    testb $1, %al
    jz next
    inb $0x60, %al
    movb %al, %bl
    shrb $4, %al
    call digit
    movb %bl, %al
    andb $15, %al
    call digit
    movb $10, %al
    call put
    jmp next
digit:
    addb $'0', %al
    cmpb $'9' + 1, %al
    jb put
    addb $39, %al
    jmp put
"#;

/// `keel vnc`, and where viewers find it.
struct Proxy {
    keel: Child,
    address: String,
}

impl Proxy {
    /// Asked as `reach` says.
    fn begin(reach: &[String], machine: &str) -> Result<Self> {
        let mut keel = Command::new(KEEL)
            .args(reach)
            .args(["vnc", machine, "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let output = keel.stdout.take().context("its output")?;
        BufReader::new(output).read_line(&mut line)?;
        let address = line.split("at ").nth(1).and_then(|it| it.split(',').next());
        let address = address.with_context(|| format!("an address in {line:?}"))?;
        Ok(Proxy {
            keel,
            address: address.to_owned(),
        })
    }

    /// Ends it; returns what it has said of views that ended.
    fn end(mut self) -> Result<String> {
        self.keel.kill()?;
        let mut said = String::new();
        let mut output = self.keel.stderr.take().context("its output")?;
        output.read_to_string(&mut said)?;
        Ok(said)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.keel.kill();
        let _ = self.keel.wait();
    }
}

/// A viewer, after the handshake (sections 7.1 to 7.3).
struct Viewer {
    stream: TcpStream,
    width: u16,
    height: u16,
}

impl Viewer {
    /// `shared`: whether it lets others see the display, too.
    fn connect(address: &str, shared: bool) -> Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LONG))?;
        let mut version = [0; 12];
        stream.read_exact(&mut version)?;
        ensure!(&version == b"RFB 003.008\n", "{version:?}");
        stream.write_all(&version)?;
        let [count] = read(&mut stream)?;
        let mut securities = vec![0; usize::from(count)];
        stream.read_exact(&mut securities)?;
        ensure!(securities.contains(&1), "it asks for more: {securities:?}");
        stream.write_all(&[1])?;
        ensure!(read(&mut stream)? == [0; 4], "it is refused");
        stream.write_all(&[shared.into()])?;
        let head: [u8; 24] = read(&mut stream)?;
        let name_bytes = u32::from_be_bytes([head[20], head[21], head[22], head[23]]);
        let mut name = vec![0; usize::try_from(name_bytes)?];
        stream.read_exact(&mut name)?;
        // Only pixels as they are (section 7.7.1).
        stream.write_all(&[2, 0, 0, 1, 0, 0, 0, 0])?;
        Ok(Viewer {
            stream,
            width: u16::from_be_bytes([head[0], head[1]]),
            height: u16::from_be_bytes([head[2], head[3]]),
        })
    }

    /// The pixel in the middle: blue, green, red, and nothing.
    fn middle(&mut self) -> Result<[u8; 4]> {
        let [x, y] = [self.width / 2, self.height / 2].map(u16::to_be_bytes);
        let request = [3, 0, x[0], x[1], y[0], y[1], 0, 1, 0, 1];
        self.stream.write_all(&request)?;
        let head: [u8; 4] = read(&mut self.stream)?;
        ensure!(head[0] == 0, "no update of the screen: {head:?}");
        let mut pixel = None;
        for _ in 0..u16::from_be_bytes([head[2], head[3]]) {
            let rectangle: [u8; 12] = read(&mut self.stream)?;
            let [width, height] = [4, 6].map(|at| {
                let bytes = [rectangle[at], rectangle[at + 1]];
                usize::from(u16::from_be_bytes(bytes))
            });
            let mut pixels = vec![0; width * height * 4];
            self.stream.read_exact(&mut pixels)?;
            pixel = pixels.first_chunk().copied();
        }
        pixel.context("a pixel")
    }

    /// Presses a key, and releases it (section 7.5.4).
    fn press(&mut self, key: u8) -> Result<()> {
        for is_down in [1, 0] {
            self.stream.write_all(&[4, is_down, 0, 0, 0, 0, 0, key])?;
        }
        Ok(())
    }
}

fn read<const N: usize>(stream: &mut TcpStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Waits until the system has seen a key pressed and released.
async fn sees_key(cluster: &LocalCluster, code: u8) -> Result<()> {
    let lines = format!("{code:02x}\n{:02x}\n", code | 0x80);
    let seen = wait_for("the system has the key", || async {
        let output = cluster.output("a", "shown").await.ok()?;
        output.contains(&lines).then_some(())
    });
    let output = cluster.output("a", "shown").await;
    seen.await
        .with_context(|| format!("{lines:?} in {output:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_sees_a_system_and_types_there_from_any_node() -> Result<()> {
    if !qemu_is_installed() {
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
    let probe = std::net::TcpListener::bind("127.0.0.1:0")?;
    let api = probe.local_addr()?.to_string();
    drop(probe);
    let cluster =
        LocalCluster::start_with_api(Path::new(KEEL), folder.path(), &["a", "b"], &api).await?;
    let client = cluster.client("a");
    let image = std::fs::read(assemble(folder.path(), KEYS)?)?;
    let kind = QemuKind::kind_name();
    let uploaded = client.upload(&kind, image.into()).await?;
    for (name, display) in [("shown", true), ("headless", false)] {
        let spec = QemuSpec {
            shutdown_s: 1,
            display,
            ..QemuSpec::of_kernel(uploaded.hash.clone())
        };
        let spec = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
        let guest = Guest {
            memory_bytes: 32 << 20,
            ..Guest::new(name, "a", &[], &[])
        };
        let request: RunRequest = guest.request((kind.clone(), spec));
        client
            .post::<_, MachineInfo>("/v1/machines", &request)
            .await?;
        wait_for("the system runs", || async {
            let shown = cluster.inspect("a", name).await.ok()?;
            (shown.status == "running").then_some(())
        })
        .await?;
    }

    let at_node = |name: &str| {
        let folder = cluster.folder(name).display().to_string();
        vec!["--state-dir".to_owned(), folder]
    };
    let as_user = |name: &str, role: &str| {
        let (made, said) = cluster.keel("a", &["token", "user", name, "--role", role]);
        ensure!(made, "{said}");
        let (token, authority) = said.split_once("\nauthority ").context("both")?;
        let words = [
            "--server",
            &api,
            "--user-token",
            token,
            "--authority",
            authority,
        ];
        anyhow::Ok(words.map(|word| word.trim().to_owned()).to_vec())
    };
    // From its own node, from another one and from none, before and after moves.
    for (reach, to, keys) in [
        (at_node("a"), None, [(b'a', 0x1e), (b's', 0x1f)]),
        (at_node("b"), Some("b"), [(b'd', 0x20), (b'f', 0x21)]),
        (at_node("b"), Some("a"), [(b'q', 0x10), (b'w', 0x11)]),
        (
            as_user("ada", "operator")?,
            None,
            [(b'e', 0x12), (b'r', 0x13)],
        ),
    ] {
        let proxy = Proxy::begin(&reach, "shown")?;
        let mut viewer = Viewer::connect(&proxy.address, true)?;
        wait_for("the screen is blue", || {
            let middle = viewer.middle();
            async move {
                match middle {
                    Ok([0x80..=0xff, 0, 0, _]) => Some(Ok(())),
                    Ok(_) => None,
                    Err(error) => Some(Err(error)),
                }
            }
        })
        .await??;
        // It cannot shut the first one out.
        let mut second = Viewer::connect(&proxy.address, false)?;
        let [(key, code), (last_key, last_code)] = keys;
        viewer.press(key)?;
        sees_key(&cluster, code).await?;
        if let Some(to) = to {
            let report = cluster.move_machine("a", "shown", to).await?;
            assert_eq!(report.ending, Ending::Moved, "{}", report.line());
            for viewer in [&mut viewer, &mut second] {
                viewer.stream.read_to_end(&mut Vec::new())?;
            }
            let said = proxy.end()?;
            assert!(said.contains("has moved, ended or begun anew"), "{said}");
        } else {
            // What was typed last reaches the system.
            viewer.press(last_key)?;
            drop((viewer, second));
            sees_key(&cluster, last_code).await?;
        }
    }

    // A system that goes on from a checkpoint has its display, too.
    let place = folder.path().join("backup").display().to_string();
    for (node, words) in [
        ("a", &["checkpoint", "shown", "--to", &place][..]),
        ("a", &["rm", "--force", "shown"]),
        ("a", &["restore", "shown", "--from", &place, "--on", "b"]),
    ] {
        let (done, said) = cluster.keel(node, words);
        ensure!(done, "{words:?}: {said}");
    }
    let proxy = Proxy::begin(&at_node("a"), "shown")?;
    let mut viewer = Viewer::connect(&proxy.address, true)?;
    viewer.press(b'g')?;
    sees_key(&cluster, 0x22).await?;

    // What cannot be seen, or not by everyone, is refused with its reason.
    let viewer = as_user("bob", "viewer")?;
    let refused = Command::new(KEEL)
        .args(viewer)
        .args(["vnc", "shown"])
        .output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("role operator"), "{said}");
    let (seen, said) = cluster.keel("b", &["vnc", "headless"]);
    assert!(!seen && said.contains("it has no display"), "{said}");
    let module = guest("counter");
    let program = Guest::new("program", "a", &module, &["1000000", "20"]);
    cluster.run(&program).await?;
    let (seen, said) = cluster.keel("b", &["vnc", "program"]);
    assert!(!seen && said.contains("have no display"), "{said}");
    let no_socket = client.get::<MachineInfo>("/v1/machines/shown/display");
    let refused = no_socket.await.map(drop);
    assert!(
        matches!(refused, Err(ClientError::Problem { status: 400, .. })),
        "{refused:?}"
    );
    Ok(())
}
