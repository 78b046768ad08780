//! Names of nodes and machines, checked once when they are made.
//!
//! A name is 1 to 63 characters of `a-z`, `0-9` and `-`, and neither begins
//! nor ends with `-`. So it is a DNS label, a path component and a part of a
//! store key without any escaping.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest node or machine name, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// Suffix of a node's DNS name in its certificate.
const NODE_DNS_SUFFIX: &str = ".node.keel";

/// A text that is not a valid node or machine name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{what} name {name:?} is not valid: use 1 to 63 of a-z, 0-9 and -, not beginning or ending with -"
)]
pub struct NameError {
    /// "node" or "machine".
    pub what: &'static str,
    /// The text that was refused, cut to 80 characters.
    pub name: String,
}

fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let edge_ok = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let valid = bytes.len() <= NAME_BYTES_MAX
        && edge_ok(bytes.first())
        && edge_ok(bytes.last())
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if valid {
        return Ok(());
    }
    Err(NameError {
        what,
        name: name.chars().take(80).collect(),
    })
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks `name`.
            ///
            /// # Errors
            /// [`NameError`] when it is not 1 to 63 of `a-z`, `0-9`, `-`, or
            /// has a `-` at an end.
            pub fn new(name: &str) -> Result<Self, NameError> {
                check($what, name)?;
                Ok(Self(name.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(&name)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0.as_ref().into()
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl PartialEq<str> for $type {
            fn eq(&self, other: &str) -> bool {
                &*self.0 == other
            }
        }

        impl PartialEq<&str> for $type {
            fn eq(&self, other: &&str) -> bool {
                &*self.0 == *other
            }
        }
    };
}

name_type! {
    /// The name of a node: one host's agent.
    NodeName, "node"
}
name_type! {
    /// The name of a machine.
    MachineName, "machine"
}

impl NodeName {
    /// The DNS name in the node's certificate: `NAME.node.keel`.
    pub fn dns(&self) -> String {
        format!("{self}{NODE_DNS_SUFFIX}")
    }

    /// The node named by a certificate's DNS name, if it is one.
    pub fn from_dns(dns: &str) -> Option<Self> {
        Self::new(dns.strip_suffix(NODE_DNS_SUFFIX)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let longest = "a".repeat(63);
        for good in ["a", "node-1", "0", "a--b", longest.as_str()] {
            assert_eq!(NodeName::new(good).map(String::from), Ok(good.to_owned()));
        }
        let too_long = "a".repeat(64);
        for bad in [
            "", "-a", "a-", "A", "a.b", "a/b", "ä", "a b", "..", "a\0", &too_long,
        ] {
            assert!(NodeName::new(bad).is_err(), "{bad:?}");
            assert!(MachineName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn dns_names_go_both_ways() -> Result<(), NameError> {
        let node = NodeName::new("web-3")?;
        assert_eq!(node.dns(), "web-3.node.keel");
        assert_eq!(NodeName::from_dns(&node.dns()), Some(node));
        assert_eq!(NodeName::from_dns("a.b.node.keel"), None);
        assert_eq!(NodeName::from_dns("a.node.keel.org"), None);
        Ok(())
    }

    #[test]
    fn a_name_off_the_wire_is_checked_too() {
        let bytes = postcard::to_stdvec("../../etc").unwrap_or_default();
        assert!(postcard::from_bytes::<NodeName>(&bytes).is_err());
    }
}
