//! What the agent in a guest tells of its system: its names, addresses, load and file systems
//! (docs/interop/qemu-ga-ref.rst of QEMU). An agent may not know all of it: that is left out.
//!
//! Texts are shown to users, and may be anything: control characters, with which terminals do
//! something, are taken out, and there is a bound on all of them.

use crate::guest_agent::{AgentError, Answer, GuestAgent};
use keel_machine::worker::control::{GuestFileSystem, GuestSystem};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use std::time::{Duration, Instant};

/// The longest text that is passed on, in characters.
const TEXT_CHARACTERS_MAX: usize = 200;
/// The most interfaces, addresses of one of them, and file systems that are passed on.
const LISTED_MAX: usize = 64;
/// The longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// After this time no more is asked: what is known by then is enough.
const PATIENCE: Duration = Duration::from_secs(15);

/// The answer to `guest-get-host-name`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct HostName {
    host_name: String,
}

/// The answer to `guest-get-osinfo`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct System {
    pretty_name: Option<String>,
    name: Option<String>,
    kernel_release: Option<String>,
}

/// One of the answer to `guest-network-get-interfaces`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Interface {
    name: String,
    #[serde(default)]
    ip_addresses: Vec<Address>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Address {
    ip_address: std::net::IpAddr,
    prefix: u8,
}

/// The answer to `guest-get-load`, which agents have from 10.0 on.
#[derive(Debug, Deserialize)]
struct Load {
    #[serde(rename = "load1m")]
    minute: f64,
    #[serde(rename = "load5m")]
    five_minutes: f64,
    #[serde(rename = "load15m")]
    fifteen_minutes: f64,
}

/// One of the answer to `guest-get-fsinfo`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FileSystem {
    mountpoint: String,
    used_bytes: Option<u64>,
    total_bytes: Option<u64>,
}

impl GuestAgent {
    /// What the agent tells of its system.
    ///
    /// # Errors
    /// [`AgentError`], if it does not answer.
    pub(crate) fn system(&self) -> Result<GuestSystem, AgentError> {
        let until = Instant::now() + PATIENCE;
        let host: Option<HostName> = self.told("guest-get-host-name", until)?;
        let system: Option<System> = self.told("guest-get-osinfo", until)?;
        let interfaces: Option<Vec<Interface>> =
            self.told("guest-network-get-interfaces", until)?;
        let load: Option<Load> = self.told("guest-get-load", until)?;
        let file_systems: Option<Vec<FileSystem>> = self.told("guest-get-fsinfo", until)?;
        let (name, kernel) = system.map_or((None, None), |system| {
            (system.pretty_name.or(system.name), system.kernel_release)
        });
        Ok(GuestSystem {
            host_name: host.map(|host| plain(&host.host_name)),
            name: name.as_deref().map(plain),
            kernel: kernel.as_deref().map(plain),
            interfaces: addresses(interfaces.unwrap_or_default()),
            load: load.and_then(averages),
            file_systems: sizes(file_systems.unwrap_or_default()),
        })
    }

    /// The answer to a question; `None` if the agent does not know it, or not in this form, or there
    /// is no time left to ask.
    fn told<T: DeserializeOwned>(
        &self,
        command: &'static str,
        until: Instant,
    ) -> Result<Option<T>, AgentError> {
        if Instant::now() > until {
            return Ok(None);
        }
        let answer = self.ask(command, &json!({}), ANSWER_BYTES_MAX)?;
        Ok(value(&answer))
    }
}

/// A text without what a terminal would do something with, and not long.
fn plain(text: &str) -> String {
    let visible = text.chars().filter(|it| !it.is_control());
    visible.take(TEXT_CHARACTERS_MAX).collect()
}

/// Those that others can reach, by interface.
fn addresses(interfaces: Vec<Interface>) -> Vec<(String, Vec<String>)> {
    let addresses = interfaces.into_iter().map(|interface| {
        let addresses = interface.ip_addresses.into_iter();
        let reachable = addresses.filter(|it| !it.ip_address.is_loopback());
        let texts = reachable.map(|it| format!("{}/{}", it.ip_address, it.prefix));
        (plain(&interface.name), texts.take(LISTED_MAX).collect())
    });
    let reachable = addresses.filter(|(_, addresses): &(_, Vec<_>)| !addresses.is_empty());
    reachable.take(LISTED_MAX).collect()
}

fn averages(load: Load) -> Option<[f64; 3]> {
    let averages = [load.minute, load.five_minutes, load.fifteen_minutes];
    averages
        .iter()
        .all(|it| it.is_finite() && *it >= 0.0)
        .then_some(averages)
}

/// Those of which the size is known.
fn sizes(file_systems: Vec<FileSystem>) -> Vec<GuestFileSystem> {
    let known = file_systems.into_iter().filter_map(|it| {
        Some(GuestFileSystem {
            mount_point: plain(&it.mountpoint),
            used_bytes: it.used_bytes?,
            total_bytes: it.total_bytes?,
        })
    });
    let mut known: Vec<_> = known.take(LISTED_MAX).collect();
    known.sort_by(|one, other| one.mount_point.cmp(&other.mount_point));
    known
}

/// What a line answers, if that is of this form.
fn value<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    serde_json::from_slice::<Answer<T>>(line).ok()?.value
}

/// Whether a line is an answer that is understood here, for fuzzing.
pub(crate) fn is_told(line: &[u8]) -> bool {
    value::<HostName>(line).is_some_and(|host| plain(&host.host_name).len() <= host.host_name.len())
        || value(line).is_some_and(|interfaces| !addresses(interfaces).is_empty())
        || value(line).is_some_and(|load| averages(load).is_some())
        || value(line).is_some_and(|file_systems| !sizes(file_systems).is_empty())
        || value::<System>(line).is_some_and(|system| system.kernel_release.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_agent::tests::agent;

    fn answer(command: &str) -> Option<&'static str> {
        Some(match command {
            "guest-get-host-name" => r#"{"return": {"host-name": "web\u001b[31m"}}"#,
            "guest-get-osinfo" => {
                r#"{"return": {"name": "Debian", "pretty-name": "Debian 12", "kernel-release": "6.1.0"}}"#
            }
            "guest-network-get-interfaces" => {
                r#"{"return": [
                    {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8, "ip-address-type": "ipv4"}]},
                    {"name": "eth0", "hardware-address": "02:00:00:00:00:01", "ip-addresses": [
                        {"ip-address": "10.0.0.5", "prefix": 24, "ip-address-type": "ipv4"},
                        {"ip-address": "fe80::1", "prefix": 64, "ip-address-type": "ipv6"}]},
                    {"name": "eth1"}]}"#
            }
            "guest-get-load" => {
                r#"{"error": {"class": "CommandNotFound", "desc": "The command guest-get-load has not been found"}}"#
            }
            "guest-get-fsinfo" => {
                r#"{"return": [
                    {"name": "sr0", "mountpoint": "/media", "type": "iso9660", "disk": []},
                    {"name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 7, "total-bytes": 9, "disk": []}]}"#
            }
            _ => return None,
        })
    }

    #[test]
    fn what_an_agent_does_not_know_is_left_out() {
        let agent = agent(b"", |command, _| {
            answer(command).map(|it| it.replace('\n', ""))
        });
        let system = agent.system().unwrap();
        let eth0 = ["10.0.0.5/24", "fe80::1/64"].map(str::to_owned).to_vec();
        assert_eq!(
            system,
            GuestSystem {
                host_name: Some("web[31m".into()),
                name: Some("Debian 12".into()),
                kernel: Some("6.1.0".into()),
                interfaces: vec![("eth0".into(), eth0)],
                load: None,
                file_systems: vec![GuestFileSystem {
                    mount_point: "/".into(),
                    used_bytes: 7,
                    total_bytes: 9,
                }],
            }
        );
    }

    #[test]
    fn answers_of_other_forms_are_left_out() {
        let agent = agent(b"", |command, _| {
            let load = r#"{"return": {"load1m": 0.5, "load5m": 1.0, "load15m": 2.25}}"#;
            Some(match command {
                "guest-get-load" => load.to_owned(),
                _ => r#"{"return": [{"name": 7}]}"#.to_owned(),
            })
        });
        let told = GuestSystem {
            load: Some([0.5, 1.0, 2.25]),
            ..GuestSystem::default()
        };
        assert_eq!(agent.system().unwrap(), told);
        assert_eq!(plain(&"x".repeat(1000)).len(), TEXT_CHARACTERS_MAX);
        let negative = Load {
            minute: -1.0,
            five_minutes: 0.0,
            fifteen_minutes: 0.0,
        };
        assert_eq!(averages(negative), None);
    }
}
