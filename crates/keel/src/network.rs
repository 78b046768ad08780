//! Network interfaces of whole systems, as users write them, with the addresses that
//! cloud-init gives them.
//!
//! ```text
//!   br0                                            a hardware address at random, DHCP
//!   br0,mac=02:00:00:00:00:01                      this one
//!   br0,ip=10.0.0.5/24,gateway=10.0.0.1,dns=…      addresses that its system has, by cloud-init
//! ```
//!
//! Whether somebody else has an address is not known here.

use ipnet::IpNet;
use keel_kind_qemu::Interface;
use serde_json::{Value, json};
use std::net::IpAddr;

/// A network interface, as users write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetworkArg {
    bridge: String,
    /// None if nobody has chosen one.
    mac: Option<String>,
    /// Its addresses in their networks, with the gateways there.
    addresses: Vec<(IpNet, Option<IpAddr>)>,
    name_servers: Vec<IpAddr>,
}

/// Reads one.
///
/// # Errors
/// What it is not.
pub(crate) fn parse(text: &str) -> Result<NetworkArg, String> {
    let mut options = text.split(',');
    let mut network = NetworkArg {
        bridge: options.next().unwrap_or_default().to_owned(),
        mac: None,
        addresses: Vec::new(),
        name_servers: Vec::new(),
    };
    let mut gateways = Vec::new();
    for option in options {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let address = || {
            let address = value.parse::<IpAddr>();
            address.map_err(|_| format!("{option:?}: an IP address is expected"))
        };
        match name {
            "mac" if network.mac.is_none() => network.mac = Some(value.to_lowercase()),
            "mac" => return Err(format!("{option:?}: it has one already")),
            "ip" => network.addresses.push((own_address(value)?, None)),
            "gateway" => gateways.push(address()?),
            "dns" => network.name_servers.push(address()?),
            _ => {
                return Err(format!(
                    "{option:?} is none of mac=ADDRESS, ip=ADDRESS/BITS, gateway=ADDRESS and dns=ADDRESS"
                ));
            }
        }
    }
    network.interface(None).check()?;
    for gateway in gateways {
        network.add_gateway(gateway)?;
    }
    match network.name_servers.first() {
        Some(server) if network.addresses.is_empty() => {
            Err(format!("dns={server} is for interfaces with an ip="))
        }
        _ => Ok(network),
    }
}

/// An address that one interface of a network can have.
fn own_address(text: &str) -> Result<IpNet, String> {
    let address: IpNet = text.parse().map_err(|_| {
        format!("ip={text}: an address and the bits of its network are expected, as in 10.0.0.5/24")
    })?;
    // Networks of two addresses, and single ones, have no other (RFC 3021, RFC 6164).
    let is_small = address.max_prefix_len() - address.prefix_len() < 2;
    let is_broadcast = address.addr().is_ipv4() && address.addr() == address.broadcast();
    if !is_small && (address.addr() == address.network() || is_broadcast) {
        return Err(format!(
            "ip={text}: that is the network itself, and no address in it"
        ));
    }
    Ok(address)
}

impl NetworkArg {
    /// # Errors
    /// If it is in no network of its addresses, or that has one already.
    fn add_gateway(&mut self, gateway: IpAddr) -> Result<(), String> {
        let is_local = matches!(gateway, IpAddr::V6(it) if it.is_unicast_link_local());
        let is_there = |own: &IpNet| own.contains(&gateway) || is_local && own.addr().is_ipv6();
        let mut addresses = self.addresses.iter_mut();
        match addresses.find(|(own, known)| known.is_none() && is_there(own)) {
            Some((_, known)) => *known = Some(gateway),
            None => {
                return Err(format!(
                    "gateway={gateway} is in no network of an ip= that has none yet"
                ));
            }
        }
        Ok(())
    }

    /// The interface: with its own hardware address, or that of the one `before`, or one at random.
    fn interface(&self, before: Option<&Interface>) -> Interface {
        let bridge = self.bridge.clone();
        match self.mac.clone().or_else(|| Some(before?.mac.clone())) {
            Some(mac) => Interface { bridge, mac },
            None => Interface::with_random_mac(bridge, rand::random()),
        }
    }
}

/// The interfaces of a machine. One without a hardware address keeps that of the first one `before` on
/// its bridge that no other has.
pub(crate) fn interfaces(networks: &[NetworkArg], before: &[Interface]) -> Vec<Interface> {
    let chosen = |mac: &str| networks.iter().any(|it| it.mac.as_deref() == Some(mac));
    let mut left: Vec<&Interface> = before.iter().filter(|it| !chosen(&it.mac)).collect();
    let interfaces = networks.iter().map(|network| {
        let is_kept = |it: &&Interface| network.mac.is_none() && it.bridge == network.bridge;
        let kept = left.iter().position(is_kept).map(|at| left.remove(at));
        network.interface(kept)
    });
    interfaces.collect()
}

/// What cloud-init is told of the network, if users chose addresses: JSON, which is YAML too, of version
/// 1, as every system's tools for networks are given it
/// (<https://docs.cloud-init.io/en/latest/reference/network-config-format-v1.html>).
pub(crate) fn config(networks: &[NetworkArg], interfaces: &[Interface]) -> Option<Vec<u8>> {
    if networks.iter().all(|network| network.addresses.is_empty()) {
        return None;
    }
    let of_interfaces = networks.iter().zip(interfaces).enumerate();
    let mut entries: Vec<Value> = of_interfaces
        .map(|(number, (network, interface))| {
            json!({
                "type": "physical",
                "name": format!("eth{number}"),
                "mac_address": interface.mac,
                "subnets": subnets(network),
            })
        })
        .collect();
    let servers = networks.iter().flat_map(|network| &network.name_servers);
    let servers: Vec<&IpAddr> = servers.collect();
    if !servers.is_empty() {
        entries.push(json!({ "type": "nameserver", "address": servers }));
    }
    let config = json!({ "version": 1, "config": entries });
    Some(config.to_string().into_bytes())
}

fn subnets(network: &NetworkArg) -> Value {
    if network.addresses.is_empty() {
        return json!([{ "type": "dhcp4" }]);
    }
    let subnets = network.addresses.iter().map(|(address, gateway)| {
        let kind = match address {
            IpNet::V4(_) => "static",
            IpNet::V6(_) => "static6",
        };
        let mut subnet = json!({ "type": kind, "address": address });
        if let Some(gateway) = gateway {
            subnet["gateway"] = json!(gateway);
        }
        subnet
    });
    subnets.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_keeps_its_hardware_address_or_gets_one() {
        let given = parse("br0,mac=02:AB:00:00:00:01").unwrap();
        let before = Interface {
            bridge: "br0".into(),
            mac: "02:00:00:00:00:07".into(),
        };
        assert_eq!(given.interface(Some(&before)).mac, "02:ab:00:00:00:01");
        let open = parse("br0").unwrap();
        let (first, second) = (open.interface(None), open.interface(None));
        assert_eq!(first.bridge, "br0");
        assert_ne!(first.mac, second.mac);
        assert_eq!(open.interface(Some(&before)), before);
        // The first one of that bridge, wherever it is, unless it is given away.
        let made = |texts: &[&str]| {
            let networks = texts.iter().map(|text| parse(text).unwrap());
            interfaces(&networks.collect::<Vec<_>>(), std::slice::from_ref(&before))
        };
        let moved = made(&["br1", "br0"]);
        assert_ne!(moved[0].mac, before.mac);
        assert_eq!(moved[1], before);
        let given_away = made(&["br0,mac=02:00:00:00:00:07", "br0"]);
        assert_ne!(given_away[1].mac, before.mac);
    }

    #[test]
    fn what_an_interface_cannot_be_is_refused() {
        for wrong in [
            "",
            "a/b",
            "a-name-of-16-byt",
            "br0,mac=",
            "br0,mac=01:00:5e:00:00:01",
            "br0,mac=fe:00:00:00:00:01",
            "br0,mac=0200.0000.0107",
            "br0,vlan=3",
            "br0,ip=10.0.0.5",
            "br0,ip=10.0.0.0/24",
            "br0,ip=10.0.0.255/24",
            "br0,ip=2001:db8::/64",
            "br0,ip=dhcp",
            "br0,ip=10.0.0.5/24,gateway=10.0.1.1",
            "br0,ip=10.0.0.5/24,gateway=10.0.0.1/24",
            "br0,gateway=10.0.0.1",
            "br0,gateway=fe80::1",
            "br0,ip=10.0.0.5/24,gateway=fe80::1",
            "br0,ip=10.0.0.5/24,gateway=10.0.0.1,gateway=10.0.0.2",
            "br0,mac=02:00:00:00:00:01,mac=02:00:00:00:00:02",
            "br0,dns=10.0.0.1",
            "br0,ip=10.0.0.5/24,dns=name",
        ] {
            parse(wrong).unwrap_err();
        }
        for right in [
            "br0,ip=10.0.0.4/31,gateway=10.0.0.5",
            "br0,ip=10.0.0.0/32",
            "br0,ip=2001:db8::5/64,gateway=fe80::1",
        ] {
            parse(right).unwrap();
        }
    }

    #[test]
    fn cloud_init_is_told_the_addresses_of_all_interfaces() {
        let texts = [
            "br0,mac=02:00:00:00:00:01,ip=10.1.0.5/24,ip=10.0.0.5/24,ip=2001:db8::5/64,\
             gateway=fe80::1,gateway=10.0.0.1,dns=10.0.0.2,dns=2001:db8::2",
            "br1,mac=02:00:00:00:00:02",
        ];
        let networks = texts.map(|text| parse(text).unwrap());
        let made = interfaces(&networks, &[]);
        let told = config(&networks, &made).unwrap();
        let told: Value = serde_json::from_slice(&told).unwrap();
        let expected = json!({
            "version": 1,
            "config": [
                {
                    "type": "physical",
                    "name": "eth0",
                    "mac_address": "02:00:00:00:00:01",
                    "subnets": [
                        { "type": "static", "address": "10.1.0.5/24" },
                        { "type": "static", "address": "10.0.0.5/24", "gateway": "10.0.0.1" },
                        { "type": "static6", "address": "2001:db8::5/64", "gateway": "fe80::1" },
                    ],
                },
                {
                    "type": "physical",
                    "name": "eth1",
                    "mac_address": "02:00:00:00:00:02",
                    "subnets": [{ "type": "dhcp4" }],
                },
                { "type": "nameserver", "address": ["10.0.0.2", "2001:db8::2"] },
            ],
        });
        assert_eq!(told, expected);
        assert_eq!(config(&networks[1..], &made[1..]), None);
    }
}
