//! The port of the system's virtio serial device by which its host is reached.

use crate::commands::Agent;
use crate::requests::Requests;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Its name, as hosts give it to the port of a guest agent.
const NAME: &str = "org.qemu.guest_agent.0";
/// Where the kernel lists all ports, with their names.
const PORTS: &str = "/sys/class/virtio-ports";
/// Bytes that are read at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pause before a port is looked for again that is not there, or that another program has.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Pause before it is read again while no host has its other end.
const HOST_PAUSE: Duration = Duration::from_millis(100);

/// Answers what comes from a port, or from the one of a guest agent, for ever.
///
/// # Errors
/// Never by itself: a port that is lost is opened again.
pub fn serve(port: Option<&Path>, agent: &mut Agent) -> Result<()> {
    let mut said = String::new();
    loop {
        let served = open(port).and_then(|port| Ok(converse(&port, agent)?));
        if let Err(error) = served {
            let text = format!("{error:#}");
            // Another agent may have the port for as long as the system runs.
            if text != said {
                eprintln!("keel-guest: {text}; trying again");
                said = text;
            }
        }
        std::thread::sleep(RETRY_PAUSE);
    }
}

fn open(port: Option<&Path>) -> Result<File> {
    let path = match port {
        Some(port) => port.to_owned(),
        None => find(Path::new(PORTS))?,
    };
    let opened = File::options().read(true).write(true).open(&path);
    opened.with_context(|| {
        format!(
            "cannot open {} (has another guest agent it?)",
            path.display()
        )
    })
}

/// The device of the port with the name.
fn find(ports: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(ports).with_context(|| {
        format!(
            "this system has no virtio serial device ({})",
            ports.display()
        )
    })?;
    let mut ports = entries.flatten().filter(|port| {
        let name = fs::read_to_string(port.path().join("name"));
        name.is_ok_and(|name| name.trim_end() == NAME)
    });
    let port = ports.next();
    let port = port.with_context(|| format!("its host has given this system no port {NAME}"))?;
    Ok(Path::new("/dev").join(port.file_name()))
}

/// Answers until the port is lost.
fn converse(mut port: &File, agent: &mut Agent) -> io::Result<()> {
    let mut requests = Requests::default();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = match port.read(&mut piece) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if count == 0 {
            std::thread::sleep(HOST_PAUSE);
            continue;
        }
        let mut answers = Vec::new();
        requests.read(&piece[..count], |line| {
            answers.extend(agent.answer(line).unwrap_or_default());
        });
        port.write_all(&answers)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let said = format!("{:#}", find(&folder.path().join("none")).unwrap_err());
        assert!(said.contains("no virtio serial device"), "{said}");
        for (port, name) in [("vport1p1", "com.example\n"), ("vport1p2", NAME)] {
            let said = format!("{:#}", find(folder.path()).unwrap_err());
            assert!(said.contains("no port org.qemu"), "{said}");
            fs::create_dir(folder.path().join(port)).unwrap();
            fs::write(folder.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find(folder.path()).unwrap(), Path::new("/dev/vport1p2"));
    }
}
