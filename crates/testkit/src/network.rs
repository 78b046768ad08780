//! Nodes in separate network namespaces, whose links can be cut.
//!
//! ```text
//!   keel-ID-a ── eth0 ─┐
//!   keel-ID-b ── eth0 ─┼─ bridge in keel-ID-switch
//!   keel-ID-c ── eth0 ─┘
//! ```
//!
//! Created by `ip`, which needs root; [`Network::new`] reports a missing privilege or tool. The
//! namespaces are isolated from the host, and are removed on drop.

use crate::far_link::{self, Distance};
use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

/// The port at which every node listens.
const PORT: u16 = 7411;
/// An unused address.
const NOBODY: &str = "02:00:00:00:de:ad";

/// Namespaces and the switch between them.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    /// Numbers of the nodes, from 1.
    nodes: BTreeMap<String, u8>,
    /// Nodes whose links pass through this process.
    far: BTreeSet<String>,
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program} (apt-get install iproute2)"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Moves the calling thread into a network namespace.
pub(crate) fn enter(space: &str) -> Result<()> {
    let file = format!("/run/netns/{space}");
    let space = std::fs::File::open(&file).with_context(|| file.clone())?;
    move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("entering {file}"))
}

impl Network {
    /// Creates a network for these nodes.
    ///
    /// # Errors
    /// A missing privilege or tool; partial state is removed.
    pub fn new(names: &[&str]) -> Result<Self> {
        let mut network = Network {
            prefix: format!("keel-{:06x}", rand::random::<u32>() & 0xff_ffff),
            nodes: BTreeMap::new(),
            far: BTreeSet::new(),
        };
        let switch = network.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "bridge", "up"])?;
        for (number, name) in (1u8..).zip(names) {
            network.nodes.insert((*name).to_owned(), number);
            let (space, port) = (network.space(name), format!("port{number}"));
            ip(&["netns", "add", &space])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
            ip(&[
                "-n", &space, "link", "add", "eth0", "type", "veth", "peer", "name", &port,
                "netns", &switch,
            ])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "bridge"])?;
            ip(&["-n", &switch, "link", "set", &port, "up"])?;
            let address = format!("{}/24", network.host(name)?);
            ip(&["-n", &space, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
        }
        Ok(network)
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.prefix)
    }

    fn space(&self, node: &str) -> String {
        format!("{}-{node}", self.prefix)
    }

    fn number(&self, node: &str) -> Result<u8> {
        match self.nodes.get(node) {
            Some(number) => Ok(*number),
            None => bail!("no node {node:?} in this network"),
        }
    }

    /// The IP address of a node.
    pub(crate) fn host(&self, node: &str) -> Result<String> {
        Ok(format!("10.214.0.{}", self.number(node)?))
    }

    /// The address on which a node listens.
    ///
    /// # Errors
    /// If the node is not in this network.
    pub fn address(&self, node: &str) -> Result<String> {
        Ok(format!("{}:{PORT}", self.host(node)?))
    }

    /// A command that runs a program as a process of this node.
    pub fn command(&self, node: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.space(node)])
            .arg(program);
        command
    }

    /// Makes the calling thread a part of this node: connections that it opens or accepts from now
    /// on are the node's.
    ///
    /// # Errors
    /// Missing privileges.
    pub fn enter(&self, node: &str) -> Result<()> {
        enter(&self.space(node))
    }

    /// Gives a node a bridge of this name, to which its link is connected as well: what else is
    /// connected to it is in one network with the bridges of other nodes. To be done before the
    /// node runs.
    ///
    /// The bridge has the hardware address of that link, which is a high one: a bridge takes the
    /// lowest of its ports', so that it would take one of most others that are connected to it.
    ///
    /// # Errors
    /// The error of `ip`.
    pub fn bridge(&self, node: &str, name: &str) -> Result<()> {
        let (space, address) = (self.space(node), format!("{}/24", self.host(node)?));
        let hardware = format!("fe:fe:00:00:00:{:02x}", self.number(node)?);
        ip(&["-n", &space, "link", "set", "eth0", "address", &hardware])?;
        ip(&["-n", &space, "link", "add", name, "type", "bridge"])?;
        ip(&["-n", &space, "addr", "del", &address, "dev", "eth0"])?;
        ip(&["-n", &space, "link", "set", "eth0", "master", name])?;
        ip(&["-n", &space, "addr", "add", &address, "dev", name])?;
        ip(&["-n", &space, "link", "set", name, "up"])
    }

    /// As [`Self::enter`], for a thread that is still to come.
    ///
    /// # Errors
    /// If the node is not in this network.
    pub fn entrance(&self, node: &str) -> Result<impl FnOnce() -> Result<()> + Send + use<>> {
        self.number(node)?;
        let space = self.space(node);
        Ok(move || enter(&space))
    }

    /// Disconnects a node, or reconnects it.
    ///
    /// # Errors
    /// The error of `ip`.
    pub fn cut(&self, node: &str, cut: bool) -> Result<()> {
        let port = format!("port{}", self.number(node)?);
        let state = if cut { "down" } else { "up" };
        ip(&["-n", &self.switch(), "link", "set", &port, state])
    }

    /// Limits the link of a node, in both directions, to a rate in Mbit/s, or removes the limit.
    /// Faster traffic is queued for up to 200 ms, then dropped.
    ///
    /// # Errors
    /// The error of `tc`.
    pub fn slow(&self, node: &str, mbit: Option<u32>) -> Result<()> {
        let port = format!("port{}", self.number(node)?);
        let (space, switch) = (self.space(node), self.switch());
        for (space, device) in [(&space, "eth0"), (&switch, port.as_str())] {
            let of = ["dev", device, "root"];
            match mbit {
                Some(mbit) => {
                    let rate = format!("{mbit}mbit");
                    let bucket = ["tbf", "rate", &rate, "burst", "64kbit", "latency", "200ms"];
                    let mut arguments = vec!["-n", space, "qdisc", "replace"];
                    arguments.extend(of.iter().chain(&bucket));
                    run("tc", &arguments)?;
                }
                None => {
                    let mut arguments = vec!["-n", space, "qdisc", "del"];
                    arguments.extend(of);
                    run("tc", &arguments)?;
                }
            }
        }
        Ok(())
    }

    /// Replaces the link of a node, which must not run yet, by one with a delay and a rate.
    ///
    /// # Errors
    /// The error of `ip`, or no `/dev/net/tun`.
    pub fn distance(&mut self, node: &str, distance: Distance) -> Result<()> {
        let port = format!("port{}", self.number(node)?);
        let (space, switch) = (self.space(node), self.switch());
        ip(&["-n", &space, "link", "del", "eth0"])?;
        far_link::connect([(&space, "eth0"), (&switch, &port)], distance)?;
        self.far.insert(node.to_owned());
        ip(&["-n", &switch, "link", "set", &port, "master", "bridge"])?;
        ip(&["-n", &switch, "link", "set", &port, "up"])?;
        let address = format!("{}/24", self.host(node)?);
        ip(&["-n", &space, "addr", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &space, "link", "set", "eth0", "up"])
    }

    /// Drops a share of the packets that a node sends, and of those that it receives, or none of
    /// them again.
    ///
    /// # Errors
    /// The error of `iptables`.
    pub fn lose(&self, node: &str, share: Option<f64>) -> Result<()> {
        let space = self.space(node);
        for chain in ["INPUT", "OUTPUT"] {
            let mut arguments = vec!["netns", "exec", &space, "iptables", "-w"];
            let probability = share.unwrap_or_default().to_string();
            match share {
                Some(_) => arguments.extend([
                    "-A",
                    chain,
                    "-m",
                    "statistic",
                    "--mode",
                    "random",
                    "--probability",
                    &probability,
                    "-j",
                    "DROP",
                ]),
                None => arguments.extend(["-F", chain]),
            }
            ip(&arguments).context("packets are dropped by iptables (apt-get install iptables)")?;
        }
        Ok(())
    }

    /// Blocks all traffic from one node to another, or allows it again; the other direction is not
    /// affected.
    ///
    /// # Errors
    /// The error of `ip`.
    pub fn cut_one_way(&self, from: &str, to: &str, cut: bool) -> Result<()> {
        let (space, host) = (self.space(from), self.host(to)?);
        let mut arguments = vec!["-n", &space, "neigh"];
        match cut {
            // A wrong neighbour entry: its packets have no receiver.
            true => arguments.extend([
                "replace",
                &host,
                "lladdr",
                NOBODY,
                "dev",
                "eth0",
                "nud",
                "permanent",
            ]),
            false => arguments.extend(["del", &host, "dev", "eth0"]),
        }
        ip(&arguments)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A device that this process holds would keep its namespace. The other end goes with it,
        // sooner or later.
        for node in &self.far {
            if let Err(error) = ip(&["-n", &self.space(node), "link", "del", "eth0"]) {
                eprintln!("{error}");
            }
            let port = format!("port{}", self.nodes[node]);
            let _ = ip(&["-n", &self.switch(), "link", "del", &port]);
        }
        let spaces: Vec<String> = self.nodes.keys().map(|node| self.space(node)).collect();
        for space in spaces.iter().chain([&self.switch()]) {
            if let Err(error) = ip(&["netns", "del", space]) {
                eprintln!("{error}");
            }
        }
    }
}
