//! Users: tokens that expire and are revoked, contexts of `keel login`, and the audit log.

use keel_api::AuditEntry;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// A node whose API is reached over TLS, and a user's home.
struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
    api: String,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir();
        let folder = folder.expect("a folder");
        let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let api = probe.local_addr().expect("an address").to_string();
        drop(probe);
        let cluster =
            LocalCluster::start_with_api(Path::new(KEEL), folder.path(), &["a", "b"], &api).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
            api,
        }
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// What a user without a node of their own gets.
    fn keel(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new(KEEL)
            .args(args)
            .env("XDG_CONFIG_HOME", self.config())
            .env_remove("KEEL_STATE_DIR")
            .output()
            .expect("keel runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).trim_end().to_owned();
        (output.status.success(), said)
    }

    /// What the node's administrator gets at the node.
    fn at_node(&self, args: &[&str]) -> String {
        let state = self.cluster.folder("a").display().to_string();
        let (ok, said) = self.keel(&[&["--state-dir", &state], args].concat());
        assert!(ok, "{args:?}: {said}");
        said
    }

    /// A new token of a user, and the authority.
    fn token(&self, args: &[&str]) -> (String, String) {
        let said = self.at_node(&[&["token", "user"], args].concat());
        let (token, authority) = said.split_once("\nauthority ").expect("both");
        (token.to_owned(), authority.to_owned())
    }

    fn login(&self, name: &str, (token, authority): &(String, String)) -> (bool, String) {
        self.keel(&[
            "login",
            &self.api,
            "--name",
            name,
            "--token",
            token,
            "--authority",
            authority,
        ])
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_log_in_by_name_and_are_refused_once_their_token_is_over() {
    let bench = Bench::new().await;
    let ada = bench.token(&["ada", "--role", "operator"]);
    let (ok, said) = bench.login("site", &ada);
    assert!(ok && said.starts_with("context site: cluster"), "{said}");
    let file = bench.config().join("keel/contexts.toml");
    let mode = std::fs::metadata(&file)
        .expect("a file")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "it has the token");
    // From now on the cluster is meant.
    let (ok, nodes) = bench.keel(&["nodes"]);
    assert!(ok && nodes.contains("alive"), "{nodes}");
    let (ok, said) = bench.keel(&["token", "ls"]);
    assert!(!ok && said.contains("role admin"), "{said}");
    let (ok, said) = bench.keel(&["down"]);
    assert!(!ok && said.contains("this computer"), "{said}");
    // A folder that is named is meant more than a context.
    assert!(bench.at_node(&["token", "ls"]).contains("user ada"));

    // A viewer beside it, whose token expires soon.
    let bob = bench.token(&["bob", "--expires", "2s"]);
    assert!(bench.login("look", &bob).0);
    let (_, list) = bench.keel(&["context", "ls"]);
    assert!(list.contains("*  look"), "{list}");
    let expired = || async {
        let (ok, said) = bench.keel(&["nodes"]);
        (!ok && said.contains("no valid token")).then_some(())
    };
    wait_for("it expires", expired).await.expect("in time");
    assert!(bench.keel(&["--context", "site", "nodes"]).0);
    let (ok, said) = bench.keel(&["context", "use", "nowhere"]);
    assert!(!ok && said.contains("keel context ls"), "{said}");
    assert!(bench.keel(&["context", "use", "site"]).0);

    // Revoked.
    let tokens = bench.at_node(&["token", "ls"]);
    let ada = tokens.lines().find(|line| line.contains("user ada"));
    let id = ada.and_then(|line| line.split_whitespace().next());
    let id = id.expect("its number").to_owned();
    assert!(bench.at_node(&["token", "rm", &id]).contains("removed"));
    let (ok, said) = bench.keel(&["nodes"]);
    assert!(!ok && said.contains("no valid token"), "{said}");
    let state = bench.cluster.folder("a").display().to_string();
    let (ok, said) = bench.keel(&["--state-dir", &state, "token", "rm", &id]);
    assert!(!ok && said.contains("keel token ls"), "{said}");
    assert!(bench.keel(&["context", "rm", "site"]).0);
    let (_, list) = bench.keel(&["context", "ls"]);
    assert!(
        list.contains("*  local") && !list.contains("site"),
        "{list}"
    );

    // What is no login makes no context.
    for (token, authority, reason) in [
        ("keelu1-nonsense", bob.1.as_str(), "no valid token"),
        (bob.0.as_str(), "00", "authority"),
    ] {
        let (ok, said) = bench.login("wrong", &(token.into(), authority.into()));
        assert!(!ok && said.contains(reason), "{said}");
    }
    std::fs::write(&file, "current = 7").expect("written");
    let (ok, said) = bench.keel(&["nodes"]);
    assert!(!ok && said.contains("contexts.toml"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_says_who_asked_for_what() {
    let bench = Bench::new().await;
    let module = guest("counter");
    let machine = Guest::new("m", "a", &module, &["0", "10"]);
    bench.cluster.run(&machine).await.expect("it starts");
    let ada = bench.token(&["ada", "--role", "operator"]);
    assert!(bench.login("site", &ada).0);
    assert!(bench.keel(&["move", "m", "--to", "b"]).0);
    assert!(!bench.keel(&["move", "nothing", "--to", "b"]).0);
    assert!(bench.keel(&["ps"]).0);
    assert!(bench.keel(&["stop", "m"]).0);
    let backup = bench.folder.path().join("backup").display().to_string();
    bench.at_node(&["store", "backup", &backup]);
    // What is refused, once.
    let eve = bench.token(&["eve", "--role", "viewer"]);
    assert!(bench.login("look", &eve).0);
    for _ in 0..3 {
        let (ok, said) = bench.keel(&["move", "m", "--to", "a"]);
        assert!(!ok && said.contains("role operator"), "{said}");
    }
    let log: Vec<AuditEntry> = bench
        .cluster
        .client("b")
        .get("/v1/audit")
        .await
        .expect("the log");
    assert!(log.is_sorted_by_key(|entry| entry.revision));
    let told: Vec<(&str, &str, &str)> = log
        .iter()
        .map(|it| (it.user.as_str(), it.request.as_str(), it.about.as_str()))
        .collect();
    for expected in [
        ("local", "POST /v1/machines", "name m, on a"),
        ("local", "POST /v1/tokens", "name ada, role operator"),
        ("ada", "POST /v1/machines/m/move", "to b"),
        ("ada", "POST /v1/machines/nothing/move", "to b"),
        ("ada", "POST /v1/machines/m/stop", ""),
        ("local", "GET /v1/store/backup", ""),
        ("eve", "POST /v1/machines/m/move", "to a"),
    ] {
        assert!(told.contains(&expected), "{expected:?} of {told:#?}");
    }
    let looks = told.iter().filter(|it| it.1.starts_with("GET"));
    assert_eq!(looks.count(), 1);
    let refused: Vec<_> = log.iter().filter(|it| it.user == "eve").collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].status, Some(403));
    let status = |request: &str| {
        let entry = log.iter().find(|it| it.request == request);
        entry.and_then(|it| it.status)
    };
    assert_eq!(status("POST /v1/machines/nothing/move"), Some(404));
    // For people; not for whoever may not see it.
    let said = bench.at_node(&["audit", "--since", "1h"]);
    assert!(
        said.contains("operator") && said.contains("/m/move"),
        "{said}"
    );
    let (ok, said) = bench.keel(&["audit"]);
    assert!(!ok && said.contains("role admin"), "{said}");
}
