//! A machine's network interfaces on its node: for each one a tap device, which is a port of a
//! bridge of the operator.
//!
//! A tap device exists as long as QEMU has it open, so none is left behind. It is down until its
//! machine runs here: what arrives by a move has no effect on the network before the commit, and
//! receives nothing. Which addresses a guest uses is left to it and to whoever assigns them on that
//! network; its interface's hardware address is part of its spec and moves along.

use crate::spec::Interface;
use futures::TryStreamExt;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use tun_rs::{DeviceBuilder, Layer};

/// How tap devices are named: the kernel puts a number there.
const NAME: &str = "keel%d";

/// The first bytes of a tap's own address: a bridge without an address of its own takes the lowest
/// of its ports', and must not change it with each machine that comes and goes. (libvirt has one
/// such byte, and after it the guest's. While a machine moves, two nodes have a tap for it, in one
/// network: with equal addresses, of which one bridge had taken one, its node could not be reached
/// from the other.)
const FIRST_BYTES: [u8; 2] = [0xfe, 0xff];

/// The tap devices of one machine.
#[derive(Debug, Default)]
pub(crate) struct Taps {
    /// Indices of the devices.
    devices: Vec<u32>,
}

impl Taps {
    /// Creates them, down. QEMU is to inherit the descriptors, in the order of the interfaces.
    ///
    /// # Errors
    /// What is missing, with the bridge's name, and a remedy.
    pub(crate) fn create(interfaces: &[Interface]) -> Result<(Self, Vec<OwnedFd>), String> {
        if interfaces.is_empty() {
            return Ok((Taps::default(), Vec::new()));
        }
        with_netlink(async |handle| {
            let (mut devices, mut descriptors) = (Vec::new(), Vec::new());
            for interface in interfaces {
                let bridge = find_bridge(&handle, &interface.bridge).await?;
                let (index, descriptor) = open_tap()?;
                let address = own_address(rand::random());
                let port = LinkUnspec::new_with_index(index)
                    .address(address.to_vec())
                    .mtu(bridge.mtu)
                    .controller(bridge.index)
                    .build();
                let set = handle.link().set(port).execute().await;
                set.map_err(|error| format!("no port of bridge {}: {error}", interface.bridge))?;
                devices.push(index);
                descriptors.push(descriptor);
            }
            Ok((Taps { devices }, descriptors))
        })
    }

    /// Lets the machine send and receive.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn go_up(&self) -> Result<(), String> {
        if self.devices.is_empty() {
            return Ok(());
        }
        with_netlink(async |handle| {
            for index in &self.devices {
                let up = LinkUnspec::new_with_index(*index).up().build();
                let set = handle.link().set(up).execute().await;
                set.map_err(|error| format!("its network interface cannot go up: {error}"))?;
            }
            Ok(())
        })
    }
}

/// # Errors
/// What this node lacks for them. Blocks.
pub(crate) fn check(interfaces: &[Interface]) -> Result<(), String> {
    if interfaces.is_empty() {
        return Ok(());
    }
    with_netlink(async |handle| {
        for interface in interfaces {
            find_bridge(&handle, &interface.bridge).await?;
        }
        Ok(())
    })
}

/// A hardware address for a tap, which no other device has.
fn own_address(random: [u8; 4]) -> [u8; 6] {
    let mut address = [0; 6];
    address[..2].copy_from_slice(&FIRST_BYTES);
    address[2..].copy_from_slice(&random);
    address
}

struct Bridge {
    index: u32,
    mtu: u32,
}

async fn find_bridge(handle: &Handle, name: &str) -> Result<Bridge, String> {
    let mut found = handle.link().get().match_name(name).execute();
    let link = match found.try_next().await {
        Ok(Some(link)) => link,
        Ok(None) | Err(rtnetlink::Error::NetlinkError(_)) => {
            return Err(format!(
                "this node has no bridge {name} (ip link add {name} type bridge; ip link set {name} up)"
            ));
        }
        Err(error) => return Err(format!("bridge {name}: {error}")),
    };
    if !is_bridge(&link) {
        return Err(format!("{name} is a network interface, but no bridge"));
    }
    let mtu = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
    Ok(Bridge {
        index: link.header.index,
        mtu: mtu.ok_or_else(|| format!("bridge {name} does not say its MTU"))?,
    })
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

/// A new tap device: its index, and what keeps it.
#[allow(unsafe_code)]
fn open_tap() -> Result<(u32, OwnedFd), String> {
    let builder = DeviceBuilder::new().name(NAME).layer(Layer::L2);
    let builder = builder.packet_information(false).offload(true);
    let device = builder.enable(false).build_sync().map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => " (root or CAP_NET_ADMIN is needed)",
            io::ErrorKind::NotFound => " (no /dev/net/tun: modprobe tun)",
            _ => "",
        };
        format!("no tap device: {error}{remedy}")
    })?;
    let index = device
        .if_index()
        .map_err(|error| format!("a tap device without an index: {error}"))?;
    // SAFETY: `into_raw_fd` gives its descriptor up, which nobody else has.
    let descriptor = unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) };
    Ok((index, descriptor))
}

/// Blocks while `talk` talks to the kernel.
fn with_netlink<T>(talk: impl AsyncFnOnce(Handle) -> Result<T, String>) -> Result<T, String> {
    let failed = |error: io::Error| format!("no netlink socket: {error}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
        tokio::spawn(connection);
        talk(handle).await
    })
}
