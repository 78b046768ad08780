//! A real etcd on loopback, of one member or three, for what uses one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Settings that the store's engine needs.
pub const ETCD_LIMITS: [&str; 4] = ["--max-txn-ops", "512", "--max-request-bytes", "4194304"];

#[derive(Debug)]
struct Member {
    client: String,
    peer: String,
    process: Option<Child>,
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
        let mut etcd = Self {
            members: Vec::new(),
            arguments: arguments.iter().map(|it| (*it).to_owned()).collect(),
            scheme,
            folder: tempfile::tempdir()?,
        };
        for _ in 0..members {
            etcd.members.push(Member {
                client: free_address()?,
                peer: free_address()?,
                process: None,
            });
        }
        for member in 0..members {
            etcd.run(member)?;
        }
        etcd.wait()?;
        Ok(Some(etcd))
    }

    /// Starts a member, the first time or again.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn run(&mut self, member: usize) -> Result<()> {
        let peers: Vec<String> = self.members.iter().enumerate().map(peer_of).collect();
        let Member { client, peer, .. } = &self.members[member];
        let client = format!("{}://{client}", self.scheme);
        let peer = format!("http://{peer}");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("m{member}.log")))?;
        let process = Command::new("etcd")
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

    /// Asks the gateway of the first member.
    ///
    /// # Errors
    /// Its answer, if it is not a good one.
    pub fn post(&self, path: &str, body: &str) -> Result<String> {
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
