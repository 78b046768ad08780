//! Volumes as people write them: `tmp:1G:/scratch`, `/srv/data:/data:ro`.

use crate::output;
use keel_api::VolumeInfo;
use std::path::PathBuf;

/// A volume that a command names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VolumeArg {
    /// A directory of the host.
    Host {
        host: PathBuf,
        guest: String,
        read_only: bool,
    },
    /// The machine's own.
    Tmp { bytes: u64, guest: String },
}

/// Reads `tmp:SIZE:GUEST` or `HOST:GUEST[:ro]`.
///
/// # Errors
/// A sentence that names what was given and what is expected.
pub(crate) fn parse(text: &str) -> Result<VolumeArg, String> {
    let bad = |what: &str| {
        Err(format!(
            "{text:?}: {what} (examples: tmp:1G:/scratch, /srv/data:/data, /srv/data:/data:ro)"
        ))
    };
    let parts = text.split(':').collect::<Vec<_>>();
    let absolute = |guest: &str| guest.starts_with('/');
    match parts[..] {
        ["tmp", size, guest] if absolute(guest) => Ok(VolumeArg::Tmp {
            bytes: crate::size::parse(size)?,
            guest: guest.to_owned(),
        }),
        ["tmp", ..] => bad("a size and the program's name for it, an absolute path, are expected"),
        [host, guest] | [host, guest, "ro"] if absolute(host) && absolute(guest) => {
            Ok(VolumeArg::Host {
                host: host.into(),
                guest: guest.to_owned(),
                read_only: parts.len() == 3,
            })
        }
        _ => bad("this is no volume"),
    }
}

/// A machine's directory in one line.
pub(crate) fn line(volume: &VolumeInfo) -> String {
    let how = if volume.read_only {
        "read only"
    } else {
        "read and write"
    };
    let size = match (volume.bytes, volume.bytes_max) {
        (Some(bytes), Some(max)) => {
            format!(", {} of {}", output::bytes(bytes), output::bytes(max))
        }
        (None, Some(max)) => format!(", at most {}", output::bytes(max)),
        _ => String::new(),
    };
    format!("{} as {} ({how}){size}", volume.kind, volume.guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        let tmp = VolumeArg::Tmp {
            bytes: 1 << 30,
            guest: "/scratch".into(),
        };
        assert_eq!(parse("tmp:1G:/scratch"), Ok(tmp));
        for (text, read_only) in [("/a/b:/c", false), ("/a/b:/c:ro", true)] {
            let host = VolumeArg::Host {
                host: "/a/b".into(),
                guest: "/c".into(),
                read_only,
            };
            assert_eq!(parse(text), Ok(host), "{text}");
        }
        for bad in [
            "",
            "tmp",
            "tmp:1G",
            "tmp:1G:x",
            "tmp:x:/a",
            "tmp:1G:/a:ro",
            "a:/b",
            "/a",
            "/a:/b:rw",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
