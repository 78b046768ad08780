//! Images of disks that have a name: two nodes keep each, whichever node is lost; systems begin with
//! them.

use anyhow::{Context, Result};
use keel_api::{AuditEntry, ImageInfo, MachineInfo};
use keel_testkit::bare_system::qemu_is_installed;
use keel_testkit::{LocalCluster, wait_for};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NAMES: [&str; 3] = ["a", "b", "c"];

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
        let cluster = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), &NAMES);
        Ok(Bench {
            cluster: cluster.await?,
            folder,
        })
    }

    /// A raw image with a boot sector that halts; its path, and its hash.
    fn image(&self, name: &str, mark: u8) -> Result<(String, String)> {
        let mut image = vec![mark; 3 << 20];
        // cli; hlt; jmp to hlt
        image[..4].copy_from_slice(b"\xfa\xf4\xeb\xfd");
        image[510..512].copy_from_slice(b"\x55\xaa");
        let path = self.folder.path().join(name);
        std::fs::write(&path, &image)?;
        let hash = blake3::hash(&image).to_hex().to_string();
        Ok((path.display().to_string(), hash))
    }

    /// # Errors
    /// What it says, if it fails.
    fn keel(&self, node: &str, args: &[&str]) -> Result<String> {
        let (is_done, said) = self.cluster.keel(node, args);
        anyhow::ensure!(is_done, "{said}");
        Ok(said)
    }

    fn refused(&self, node: &str, args: &[&str]) -> String {
        let (is_done, said) = self.cluster.keel(node, args);
        assert!(!is_done, "{args:?}: {said}");
        said
    }

    async fn named(&self, ask: &str, name: &str) -> Result<ImageInfo> {
        let path = keel_api::path(["images", name]);
        Ok(self.cluster.client(ask).get(&path).await?)
    }

    fn file(&self, node: &str, hash: &str) -> PathBuf {
        self.cluster.folder(node).join("images").join(hash)
    }

    /// How many files were uploaded so far.
    async fn uploads(&self, ask: &str) -> Result<usize> {
        let path = "/v1/audit?limit=1000";
        let entries: Vec<AuditEntry> = self.cluster.client(ask).get(path).await?;
        let uploads = entries.iter().filter(|it| it.request == "PUT /v1/images");
        Ok(uploads.count())
    }
}

/// The nodes that keep an image, once all have it.
fn keepers(image: &ImageInfo) -> Option<Vec<String>> {
    let all = image.keepers.iter();
    all.map(|copy| copy.is_there.then(|| copy.node.clone()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_keep_an_image_whichever_node_is_lost() -> Result<()> {
    let mut bench = Bench::start().await?;
    let (file, hash) = bench.image("debian.raw", 1)?;
    bench.keel("a", &["image", "import", &file])?;
    let image = bench.named("b", "debian").await?;
    assert_eq!(
        (image.hash.as_str(), image.format.as_str()),
        (hash.as_str(), "raw")
    );
    assert_eq!((image.file_bytes, image.disk_bytes), (3 << 20, 3 << 20));
    // They had it when the command ended.
    let kept_by = keepers(&image).context("not all have it")?;
    assert_eq!(kept_by.len(), 2);
    for node in &kept_by {
        assert_eq!(
            std::fs::read(bench.file(node, &hash))?,
            std::fs::read(&file)?
        );
    }
    let listed = bench.keel("c", &["image", "ls"])?;
    assert!(listed.contains("debian"), "{listed}");
    assert!(listed.contains(&kept_by.join(", ")), "{listed}");

    // A node is lost, then a copy.
    let lost = kept_by[0].clone();
    bench.cluster.power_off(&lost);
    let ask = NAMES
        .into_iter()
        .find(|name| *name != lost)
        .context("a node")?;
    let others = wait_for("another node keeps it", || async {
        let nodes = keepers(&bench.named(ask, "debian").await.ok()?)?;
        (!nodes.contains(&lost)).then_some(nodes)
    });
    assert_eq!(others.await?.len(), 2);
    bench.cluster.power_on(&lost).await?;
    let kept_again = wait_for("the node is back", || async {
        let nodes = keepers(&bench.named(ask, "debian").await.ok()?)?;
        nodes.contains(&lost).then_some(nodes)
    });
    assert_eq!(kept_again.await?, kept_by);
    bench.keel(ask, &["image", "rm", "debian"])?;
    let said = bench.refused(ask, &["image", "rm", "debian"]);
    assert!(said.contains("there is no image \"debian\""), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_of_one_image_which_is_uploaded_once() -> Result<()> {
    let bench = Bench::start().await?;
    let (first, hash) = bench.image("first", 1)?;
    let (second, other_hash) = bench.image("second", 2)?;
    let import = |node, file, options: &[&str]| {
        let args = [&["image", "import", file, "--name", "disk"], options].concat();
        bench.cluster.keel(node, &args)
    };
    assert!(import("a", &first, &[]).0);
    assert_eq!(bench.uploads("a").await?, 1);
    // At each node, whether it keeps it or not.
    for node in NAMES {
        let (is_done, said) = import(node, &first, &[]);
        assert!(is_done, "{said}");
    }
    assert_eq!(bench.uploads("a").await?, 1);
    let (is_done, said) = import("b", &second, &[]);
    assert!(!is_done && said.contains("--replace"), "{said}");
    assert_eq!(bench.named("a", "disk").await?.hash, hash);
    let (is_done, said) = import("b", &second, &["--replace"]);
    assert!(is_done, "{said}");
    assert_eq!(bench.named("a", "disk").await?.hash, other_hash);
    assert_eq!(bench.uploads("a").await?, 2);

    // Bad input.
    let text = bench.folder.path().join("text");
    std::fs::write(&text, "no disk")?;
    let text = text.display().to_string();
    let said = bench.refused("a", &["image", "import", &text]);
    assert!(said.contains("that is no disk"), "{said}");
    let said = bench.refused("a", &["image", "import", &first, "--name", "No_Name"]);
    assert!(said.contains("No_Name"), "{said}");
    let client = bench.cluster.client("a");
    let unknown = "ab".repeat(32);
    for (path, status) in [
        (format!("/v1/image-files/{unknown}"), "404"),
        ("/v1/image-files/ab".into(), "400"),
        ("/v1/images/nobody".into(), "404"),
        ("/v1/images/No_Name".into(), "400"),
    ] {
        let refused = client.get::<serde_json::Value>(&path).await;
        let refused = format!("{:?}", refused.err().context("it is not refused")?);
        assert!(refused.contains(status), "{path}: {refused}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn systems_begin_with_images_that_have_a_name() -> Result<()> {
    if !qemu_is_installed() {
        return Ok(());
    }
    let bench = Bench::start().await?;
    let (file, hash) = bench.image("disk.raw", 1)?;
    bench.keel("a", &["image", "import", &file])?;
    let kept_by = keepers(&bench.named("a", "disk").await?).context("not all have it")?;
    let elsewhere = NAMES
        .into_iter()
        .find(|name| !kept_by.contains(&(*name).to_owned()));
    let elsewhere = elsewhere.context("a node that does not keep it")?;
    let run = |name, image| {
        let system = [
            "run",
            "-d",
            "--kind",
            "qemu",
            "--memory",
            "16M",
            "--disk-size",
            "8M",
        ];
        [
            &system[..],
            &["--name", name, "--on", elsewhere, "--image", image],
        ]
        .concat()
    };
    bench.keel("a", &run("one", "disk"))?;
    let runs = async |name: &str| {
        let runs = wait_for("it runs", || async {
            let machine: MachineInfo = bench.cluster.inspect("a", name).await.ok()?;
            (machine.status == "running").then_some(())
        });
        runs.await
    };
    runs("one").await?;
    assert!(bench.file(elsewhere, &hash).exists());
    assert_eq!(bench.named("a", "disk").await?.machines, ["one"]);
    let said = bench.refused("a", &run("two", "nobody"));
    assert!(said.contains("there is no image \"nobody\""), "{said}");

    // The same in a machine file; a machine keeps its image when the name is that of another one.
    let machines = bench.folder.path().join("machines.toml");
    std::fs::write(
        &machines,
        "[machine.three]\nkind = \"qemu\"\nimage = \"disk\"\nmemory = \"16M\"\n",
    )?;
    let machines = machines.display().to_string();
    let apply = |options: &[&str]| {
        bench.keel(
            "b",
            &[&["apply", "--file", &machines][..], options].concat(),
        )
    };
    apply(&[])?;
    runs("three").await?;
    let said = apply(&[])?;
    assert!(said.contains("unchanged three"), "{said}");
    let (other, other_hash) = bench.image("other.raw", 2)?;
    bench.keel(
        "a",
        &["image", "import", &other, "--name", "disk", "--replace"],
    )?;
    let said = apply(&["--diff"])?;
    assert!(said.contains("replace   three"), "{said}");
    bench.keel("a", &["image", "rm", "disk"])?;

    // A day later: what a machine needs stays, and what has a name where it is kept.
    let mut is_kept_there = false;
    for number in 0..20 {
        let name = format!("other-{number}");
        bench.keel("a", &["image", "import", &other, "--name", &name])?;
        let kept_by = keepers(&bench.named("a", &name).await?).context("not all have it")?;
        is_kept_there |= kept_by.iter().any(|node| node == elsewhere);
    }
    anyhow::ensure!(is_kept_there, "no name of 20 is kept by {elsewhere}");
    let unused = bench.file(elsewhere, &"ab".repeat(32));
    std::fs::write(&unused, "nothing needs it")?;
    let long_ago = SystemTime::now() - Duration::from_secs(25 * 3600);
    let needed = [&hash, &other_hash].map(|hash| bench.file(elsewhere, hash));
    for file in needed.iter().chain([&unused]) {
        File::open(file)?.set_modified(long_ago)?;
    }
    // An agent looks soon after its start.
    bench.cluster.kill_agent(elsewhere)?;
    let looked = wait_for("only what is needed is left", || async {
        let is_young = |file: &PathBuf| {
            let age = file.metadata().ok()?.modified().ok()?.elapsed().ok()?;
            Some(age < Duration::from_secs(3600))
        };
        let are_young = needed.iter().all(|file| is_young(file) == Some(true));
        (are_young && !unused.exists()).then_some(())
    });
    looked.await
}
