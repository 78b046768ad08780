//! The disk from which cloud-init learns, at a system's first boot, how to set it up: the NoCloud
//! data source, a FAT file system of the label `CIDATA`
//! (<https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html>).
//!
//! ```text
//!   user-data         --user-data, as it is
//!   network-config    --network-config, as it is, or the addresses of --net
//!   meta-data         the machine's name, the keys of --ssh-key, and an identity
//!   vendor-data       a script that installs the guest agent, if the machine is given one
//! ```
//!
//! Equal settings make equal bytes, so a machine file that has not changed changes no machine. The
//! identity follows from the settings: where they change, cloud-init begins anew. What a system makes
//! of its settings is left to cloud-init.

use crate::fat;
use crate::image::ImageFile;
use crate::input;
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use ssh_key::PublicKey;
use std::path::{Path, PathBuf};

/// The most bytes of a file: what is larger belongs into the system's image.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The label by which cloud-init knows it, padded as in a boot sector.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// How `user-data` begins, and what that is to cloud-init
/// (<https://docs.cloud-init.io/en/latest/explanation/format/index.html>).
const BEGINNINGS: [&[u8]; 9] = [
    b"#cloud-config",
    b"#cloud-boothook",
    b"#part-handler",
    b"#include",
    b"#!",
    b"## template: jinja",
    b"Content-Type:",
    b"MIME-Version:",
    // Compressed.
    b"\x1f\x8b",
];

/// How cloud-init sets a system up, as users write it.
#[derive(clap::Args, Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CloudInit {
    /// What cloud-init does at the system's first boot: a file that begins with #cloud-config, or a
    /// script.
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// How cloud-init sets up the system's network: a file of its version 1 or 2.
    #[arg(long, value_name = "FILE")]
    pub(crate) network_config: Option<PathBuf>,
    /// Public keys, as in authorized_keys, whose owners may log in as the system's default user.
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_key: Vec<PathBuf>,
}

/// What cloud-init knows of the machine itself. JSON, which is YAML too.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData<'a> {
    instance_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    local_hostname: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    public_keys: Vec<String>,
}

impl CloudInit {
    /// Options that were given, each with whether it was.
    pub(crate) fn given(&self) -> [(&'static str, bool); 3] {
        [
            ("user-data", self.user_data.is_some()),
            ("network-config", self.network_config.is_some()),
            ("ssh-key", !self.ssh_key.is_empty()),
        ]
    }

    /// The same with files that are beside a machine file.
    pub(crate) fn beside(self, folder: &Path) -> Self {
        let joined = |file: PathBuf| folder.join(file);
        CloudInit {
            user_data: self.user_data.map(joined),
            network_config: self.network_config.map(joined),
            ssh_key: self.ssh_key.into_iter().map(joined).collect(),
        }
    }

    /// The disk for a machine; `None` if there is nothing to set up. Without a name its system keeps its
    /// own. `network` is how its network is set up, if no file says it; `vendor_script` is what is done
    /// beside the user's settings.
    ///
    /// # Errors
    /// If a file cannot be read, or cloud-init would make nothing of it.
    pub(crate) fn disk(
        &self,
        name: Option<&str>,
        network: Option<Vec<u8>>,
        vendor_script: Option<&str>,
    ) -> Result<Option<ImageFile>> {
        let given = self.given();
        let is_given = given.iter().any(|(_, is_given)| *is_given);
        if network.is_none() && vendor_script.is_none() && !is_given {
            return Ok(None);
        }
        let user_data = self.user_data.as_deref().map(user_data).transpose()?;
        // It ignores a disk without the file.
        let user_data = user_data.unwrap_or_default();
        let network = match (&self.network_config, network) {
            (Some(file), None) => Some(read(file)?),
            (None, network) => network,
            (Some(file), Some(_)) => bail!(
                "{} and an interface with ip= both say how the network is set up: leave one of them out",
                file.display()
            ),
        };
        let mut keys = Vec::new();
        for file in &self.ssh_key {
            keys.extend(public_keys(file)?);
        }
        let mut identity = blake3::Hasher::new();
        let settings = (name, &keys, &user_data, &network);
        identity.update(&serde_json::to_vec(&settings)?);
        identity.update(vendor_script.unwrap_or_default().as_bytes());
        let meta_data = MetaData {
            instance_id: format!("iid-{}", &identity.finalize().to_hex()[..16]),
            local_hostname: name,
            public_keys: keys,
        };
        let mut files = vec![
            ("user-data", user_data),
            ("meta-data", serde_json::to_vec_pretty(&meta_data)?),
        ];
        files.extend(network.map(|text| ("network-config", text)));
        files.extend(vendor_script.map(|script| ("vendor-data", script.into())));
        let disk =
            fat::file_system(LABEL, &files).context("the disk for cloud-init cannot be made")?;
        Ok(Some(ImageFile::made("the disk for cloud-init", disk)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let of = || format!("cannot read {}", path.display());
    input::read(path, FILE_BYTES_MAX).with_context(of)
}

fn user_data(path: &Path) -> Result<Vec<u8>> {
    let text = read(path)?;
    ensure!(
        text.is_empty() || BEGINNINGS.iter().any(|it| text.starts_with(it)),
        "{}: cloud-init would ignore it: it begins with neither #cloud-config nor #! (a script)",
        path.display()
    );
    Ok(text)
}

/// The keys of a file.
fn public_keys(path: &Path) -> Result<Vec<String>> {
    let shown = path.display();
    let text = String::from_utf8(read(path)?).with_context(|| format!("{shown} is no text"))?;
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = PublicKey::from_openssh(line);
        key.map_err(|error| anyhow::anyhow!("{error}"))
            .with_context(|| {
                format!("{shown}, line {number}: that is no public key (TYPE KEY COMMENT)")
            })?;
        keys.push(line.to_owned());
    }
    ensure!(!keys.is_empty(), "{shown} has no public key");
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me";

    fn content(disk: &[u8], name: &str) -> String {
        let (label, content) = fat::tests::content(disk, name);
        assert_eq!(label, "CIDATA");
        String::from_utf8(content).unwrap()
    }

    #[test]
    fn equal_settings_make_an_equal_disk() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let mut settings = CloudInit {
            user_data: Some(at("user", b"#cloud-config\npackages: [nginx]\n")),
            network_config: Some(at("network", b"version: 2\n")),
            ssh_key: vec![at("keys", format!("# mine\n\n{KEY}\n").as_bytes())],
        };
        let disk = |settings: &CloudInit, name| {
            let made = settings.disk(name, None, None).unwrap().unwrap();
            made.bytes().to_vec()
        };
        let first = disk(&settings, Some("web"));
        assert_eq!(first, disk(&settings, Some("web")));
        assert_eq!(
            content(&first, "user-data"),
            "#cloud-config\npackages: [nginx]\n"
        );
        assert_eq!(content(&first, "network-config"), "version: 2\n");
        let meta_data = |disk: &[u8]| -> serde_json::Value {
            serde_json::from_str(&content(disk, "meta-data")).unwrap()
        };
        let known = meta_data(&first);
        assert_eq!(known["local-hostname"], "web");
        assert_eq!(known["public-keys"], serde_json::json!([KEY]));
        // Another name, or other settings, are another instance.
        let other = meta_data(&disk(&settings, Some("db")));
        assert_ne!(other["instance-id"], known["instance-id"]);
        settings.network_config = None;
        let other = disk(&settings, None);
        assert_ne!(meta_data(&other)["instance-id"], known["instance-id"]);
        assert_eq!(meta_data(&other)["local-hostname"], serde_json::Value::Null);
        // And with a network of its interfaces.
        let none = CloudInit::default();
        let network = || Some(b"{}".to_vec());
        let disk = none.disk(None, network(), None).unwrap().unwrap();
        assert_eq!(content(disk.bytes(), "network-config"), "{}");
        settings.network_config = Some(folder.path().join("network"));
        let twice = settings.disk(None, network(), None).map(drop);
        let said = twice.unwrap_err().to_string();
        assert!(said.contains("leave one of them out"), "{said}");
        // Also with a script, for which nothing else is needed.
        assert!(none.disk(Some("web"), None, None).unwrap().is_none());
        let disk = none.disk(None, None, Some("#!/bin/sh\n")).unwrap().unwrap();
        assert_eq!(content(disk.bytes(), "vendor-data"), "#!/bin/sh\n");
        assert_eq!(content(disk.bytes(), "user-data"), "");
        let other = none
            .disk(None, None, Some("#!/bin/sh\n:\n"))
            .unwrap()
            .unwrap();
        let [one, other] = [disk, other].map(|it| meta_data(it.bytes())["instance-id"].clone());
        assert_ne!(one, other);
    }

    #[test]
    fn what_cloud_init_would_make_nothing_of_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let said = |settings: &CloudInit| {
            let refused = settings.disk(None, None, None).map(drop);
            format!("{:#}", refused.unwrap_err())
        };
        let of_user = CloudInit {
            user_data: Some(file.clone()),
            ..CloudInit::default()
        };
        assert!(said(&of_user).contains("cannot read"));
        std::fs::write(&file, "packages: [nginx]").unwrap();
        assert!(said(&of_user).contains("would ignore it"));
        let large = vec![b'#'; FILE_BYTES_MAX as usize + 1];
        std::fs::write(&file, large).unwrap();
        assert!(said(&of_user).contains("longer than 1 MiB"));
        let of_keys = CloudInit {
            ssh_key: vec![file.clone()],
            ..CloudInit::default()
        };
        for (text, what) in [
            ("", "has no public key"),
            ("# none\n", "has no public key"),
            ("\nssh-ed25519 AAAA me", "line 2: that is no public key"),
            (
                "-----BEGIN OPENSSH PRIVATE KEY-----",
                "line 1: that is no public key",
            ),
        ] {
            std::fs::write(&file, text).unwrap();
            let said = said(&of_keys);
            assert!(said.contains(what), "{said}");
        }
    }
}
