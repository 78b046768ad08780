//! The address and credentials of the target's worker, from which each connection of a move
//! begins. What is sent on a connection is left to its user.

use keel_machine::link::{Hello, Link, LinkError, Message, Purpose};
use keel_net::ClientTls;

/// Address and credentials of the target's worker.
pub(super) struct TargetEndpoint {
    pub(super) address: String,
    pub(super) tls: ClientTls,
    pub(super) hello: Hello,
}

impl TargetEndpoint {
    /// Connects and sends the purpose of the connection.
    pub(super) fn connect(&self, purpose: Purpose) -> Result<Link, LinkError> {
        let mut link = Link::connect(&self.address, &self.tls)?;
        let hello = Hello {
            purpose,
            ..self.hello.clone()
        };
        link.send(&Message::Hello(hello))?;
        link.flush()?;
        Ok(link)
    }
}
