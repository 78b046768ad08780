//! The address and credentials of the target's worker, from which each connection of a move
//! begins. What is sent on a connection is left to its user.

use super::{Hello, Link, LinkError, Message, Purpose};
use keel_net::{ClientTls, Fingerprint, PinnedIdentity, TlsError};

/// Address and credentials of the target's worker.
pub struct TargetEndpoint {
    address: String,
    tls: ClientTls,
    hello: Hello,
}

impl TargetEndpoint {
    /// The worker of this certificate that listens at `address`. Each connection begins with
    /// `hello`, less its purpose.
    ///
    /// # Errors
    /// If the identity cannot be used.
    pub fn new(
        address: String,
        certificate: Fingerprint,
        identity: &PinnedIdentity,
        hello: Hello,
    ) -> Result<Self, TlsError> {
        Ok(TargetEndpoint {
            address,
            tls: ClientTls::pinned(identity, certificate)?,
            hello,
        })
    }

    /// How its connections begin.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Connects and sends the purpose of the connection.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn connect(&self, purpose: Purpose) -> Result<Link, LinkError> {
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
