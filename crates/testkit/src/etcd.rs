//! A real etcd on loopback, of one member or three, for what uses one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use data_encoding::BASE64;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::network::Network;

/// Settings that the store's engine needs.
pub const ETCD_LIMITS: [&str; 4] = ["--max-txn-ops", "512", "--max-request-bytes", "4194304"];

/// Ports of a member that has an address of its own: for clients and for other members.
const PORTS: [u16; 2] = [2379, 2380];

#[derive(Debug)]
struct Member {
    /// Runs `etcd` where the member is.
    program: Vec<String>,
    client: String,
    peer: String,
    process: Option<Child>,
}

/// An authority, what it certified for an etcd and for a client, and another authority, in files:
/// `ca.pem`, `server.pem`, `server.key`, `client.pem`, `client.key` and `foreign-ca.pem`.
#[derive(Debug)]
pub struct Certificates(TempDir);

impl Certificates {
    /// # Errors
    /// Those of files.
    pub fn new() -> Result<Self> {
        let files = Certificates(tempfile::tempdir()?);
        let authority = |name: &str| -> Result<_> {
            let mut params = CertificateParams::new(Vec::new())?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
            std::fs::write(files.file(name), issuer.pem())?;
            Ok(issuer)
        };
        let (ours, _) = (authority("ca.pem")?, authority("foreign-ca.pem")?);
        for name in ["server", "client"] {
            let key = KeyPair::generate()?;
            let names = vec!["127.0.0.1".to_owned()];
            let certificate = CertificateParams::new(names)?.signed_by(&key, &ours)?;
            std::fs::write(files.file(&format!("{name}.pem")), certificate.pem())?;
            std::fs::write(files.file(&format!("{name}.key")), key.serialize_pem())?;
        }
        Ok(files)
    }

    /// The path of a file.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// An etcd of our own. Ends when dropped.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    arguments: Vec<String>,
    scheme: &'static str,
    folder: TempDir,
}

fn is_installed() -> bool {
    let etcd = Command::new("etcd")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    etcd.is_ok_and(|status| status.success())
}

fn free_address() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

impl Etcd {
    /// An empty etcd with the settings that the engine needs; `None` where none is installed.
    ///
    /// # Errors
    /// The log of a member that did not start.
    pub fn start(members: usize) -> Result<Option<Self>> {
        Self::start_with(members, &ETCD_LIMITS, "http")
    }

    /// As [`Etcd::start`], with these settings instead; `scheme` is `http` or `https`.
    ///
    /// # Errors
    /// The log of a member that did not start.
    pub fn start_with(
        members: usize,
        arguments: &[&str],
        scheme: &'static str,
    ) -> Result<Option<Self>> {
        if !is_installed() {
            eprintln!("skipped: no etcd here (apt-get install etcd-server)");
            return Ok(None);
        }
        let member = |_| -> Result<Member> {
            Ok(Member {
                program: vec!["etcd".into()],
                client: free_address()?,
                peer: free_address()?,
                process: None,
            })
        };
        let members = (0..members).map(member).collect::<Result<_>>()?;
        let arguments = arguments.iter().map(|it| (*it).to_owned()).collect();
        Ok(Some(Self::run_all(members, arguments, scheme)?))
    }

    /// An etcd of one member that takes only connections of its clients' certificate.
    ///
    /// # Errors
    /// The log of a member that did not start.
    pub fn start_encrypted(certificates: &Certificates) -> Result<Option<Self>> {
        let path = |name: &str| certificates.file(name).display().to_string();
        let (certificate, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
        let mut arguments = ETCD_LIMITS.to_vec();
        arguments.extend(["--cert-file", &certificate, "--key-file", &key]);
        arguments.extend(["--client-cert-auth", "--trusted-ca-file", &ca]);
        Self::start_with(1, &arguments, "https")
    }

    /// An etcd whose members are nodes of a network. The calling thread has to be another.
    ///
    /// # Errors
    /// The log of a member that did not start.
    pub fn start_in(network: &Network, nodes: &[&str]) -> Result<Option<Self>> {
        if !is_installed() {
            eprintln!("skipped: no etcd here (apt-get install etcd-server)");
            return Ok(None);
        }
        let member = |node: &&str| -> Result<Member> {
            let host = network.host(node)?;
            let command = network.command(node, Path::new("etcd"));
            let parts = [command.get_program()]
                .into_iter()
                .chain(command.get_args());
            Ok(Member {
                program: parts.map(|it| it.to_string_lossy().into_owned()).collect(),
                client: format!("{host}:{}", PORTS[0]),
                peer: format!("{host}:{}", PORTS[1]),
                process: None,
            })
        };
        let members = nodes.iter().map(member).collect::<Result<_>>()?;
        let arguments = ETCD_LIMITS.map(str::to_owned).to_vec();
        Ok(Some(Self::run_all(members, arguments, "http")?))
    }

    fn run_all(members: Vec<Member>, arguments: Vec<String>, scheme: &'static str) -> Result<Self> {
        let mut etcd = Self {
            members,
            arguments,
            scheme,
            folder: tempfile::tempdir()?,
        };
        for member in 0..etcd.members.len() {
            etcd.run(member)?;
        }
        etcd.wait()?;
        Ok(etcd)
    }

    /// Starts a member, the first time or again.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn run(&mut self, member: usize) -> Result<()> {
        let peers: Vec<String> = self.members.iter().enumerate().map(peer_of).collect();
        let Member {
            program,
            client,
            peer,
            ..
        } = &self.members[member];
        let client = format!("{}://{client}", self.scheme);
        let peer = format!("http://{peer}");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("m{member}.log")))?;
        let process = Command::new(&program[0])
            .args(&program[1..])
            .args(["--name", &format!("m{member}")])
            .arg("--data-dir")
            .arg(self.folder.path().join(format!("m{member}")))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")])
            .args(&self.arguments)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.members[member].process = Some(process);
        Ok(())
    }

    /// Waits until all members take connections.
    fn wait(&self) -> Result<()> {
        let begun = Instant::now();
        for member in &self.members {
            while TcpStream::connect(&member.client).is_err() {
                if begun.elapsed() > Duration::from_secs(60) {
                    let log = std::fs::read_to_string(self.folder.path().join("m0.log"))?;
                    bail!("etcd does not start: {log}");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Ends a member at once; its files stay.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn kill(&mut self, member: usize) -> Result<()> {
        if let Some(mut process) = self.members[member].process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Stops a member with its connections open, or lets it go on.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn pause(&self, member: usize, is_paused: bool) -> Result<()> {
        let process = self.members[member]
            .process
            .as_ref()
            .context("not running")?;
        let pid = Pid::from_raw(i32::try_from(process.id())?).context("no such process")?;
        let signal = if is_paused {
            Signal::STOP
        } else {
            Signal::CONT
        };
        Ok(kill_process(pid, signal)?)
    }

    /// What a client is given: `etcd://` and all members, with a prefix.
    pub fn address(&self, prefix: &str) -> String {
        let members: Vec<&str> = self.members.iter().map(|it| it.client.as_str()).collect();
        format!("etcd://{}/{prefix}", members.join(","))
    }

    /// From now on asks for a user and a password; this user may use the keys under a prefix.
    ///
    /// # Errors
    /// Its answer, if it is not a good one.
    pub fn ask_for_user(&self, user: &str, password: &str, prefix: &str) -> Result<()> {
        for (user, role) in [("root", "root"), (user, "cluster")] {
            let add = format!(r#"{{"name":"{user}","password":"{password}"}}"#);
            self.post("/v3/auth/user/add", &add)?;
            self.post("/v3/auth/role/add", &format!(r#"{{"name":"{role}"}}"#))?;
            let grant = format!(r#"{{"user":"{user}","role":"{role}"}}"#);
            self.post("/v3/auth/user/grant", &grant)?;
        }
        // All keys from `prefix/` to `prefix0`, the next character.
        let key = BASE64.encode(format!("{prefix}/").as_bytes());
        let end = BASE64.encode(format!("{prefix}0").as_bytes());
        let range = format!(r#""key":"{key}","range_end":"{end}""#);
        let permission = format!(r#"{{"name":"cluster","perm":{{"permType":2,{range}}}}}"#);
        self.post("/v3/auth/role/grant", &permission)?;
        self.post("/v3/auth/enable", "{}")?;
        Ok(())
    }

    /// Asks the gateway of the first member.
    fn post(&self, path: &str, body: &str) -> Result<String> {
        let mut stream = TcpStream::connect(&self.members[0].client)?;
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.0 200"), answer);
        Ok(answer)
    }
}

fn peer_of((index, member): (usize, &Member)) -> String {
    format!("m{index}=http://{}", member.peer)
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in 0..self.members.len() {
            self.kill(member).ok();
        }
    }
}
