//! A guest's display: its QEMU is a server of the remote framebuffer protocol (RFB, also "VNC"; RFC
//! 6143) that listens nowhere. Each viewer is a socket that is passed to it, as libvirt does. Who may
//! be one is left to the nodes.

use crate::qmp::{Qmp, QmpError};
use serde_json::json;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

/// A graphics card that all systems know.
pub(crate) const CARD: &str = "VGA";

/// The word by which a host tells that it can give systems a display.
pub(crate) const WORD: &str = "display";

/// The card, and a pointer that is where the viewer's is, which a PS/2
/// mouse cannot be. (The chipset has a keyboard.) The room for the card's program is fixed: it has to be
/// the same at the target of a move, whose QEMU may have a longer one.
pub(crate) const DEVICES: [&str; 3] = ["VGA,romsize=65536", "qemu-xhci", "usb-tablet"];

/// The display: it listens nowhere, and no viewer can shut the others out.
pub(crate) const SERVER: &str = "none,share=ignore";

/// QEMU's name for a socket until the display has it.
const NAME: &str = "viewer";

/// Connects viewers with a display, one after the other, as [`Qmp::execute_with_descriptor`] needs it.
#[derive(Debug, Default)]
pub(crate) struct Display(Mutex<()>);

impl Display {
    /// A new viewer's connection to the display. It needs no password: whoever has the socket may see it.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn connect(&self, qmp: &Qmp) -> Result<UnixStream, QmpError> {
        let _one = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = UnixStream::pair().map_err(|error| QmpError::Lost(error.to_string()));
        let (viewer, of_qemu) = pair?;
        let name = json!({ "fdname": NAME });
        qmp.execute_with_descriptor("getfd", name.clone(), of_qemu.as_fd())?;
        let client = json!({ "protocol": "vnc", "fdname": NAME, "skipauth": true });
        qmp.execute("add_client", client).inspect_err(|_| {
            // A later viewer's would replace it as well.
            let _ = qmp.execute("closefd", name);
        })?;
        Ok(viewer)
    }
}
