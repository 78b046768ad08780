//! Messages and records as an earlier version wrote them, read by the code of this one: the proof
//! that nodes of two versions understand each other.
//!
//! Nothing happens here unless a process was started with [`FOLDER`]. Then it writes to a file of
//! its own in that folder:
//!
//! - Without [`FILE`], one message for each shape of each type that it reads. That is how the file
//!   of frozen messages is made, by a cluster of tests.
//! - With [`FILE`], the name of such a file: when it reads a message of a type for the first time,
//!   it also reads the frozen ones of that type, and writes the result. A field that this version
//!   does not read is a failure, too: it would be lost.
//!
//! What is written has no keys, certificates or paths in it (`anonymous`). `cli/frozen_messages.rs`
//! does both.

use ciborium::Value;
use serde::de::{Deserialize, DeserializeOwned, Deserializer};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Environment: the folder to which processes write what they read.
pub const FOLDER: &str = "KEEL_FROZEN_MESSAGES_FOLDER";
/// Environment: the file of frozen messages, lines of a type and a message in hexadecimal.
pub const FILE: &str = "KEEL_FROZEN_MESSAGES";

/// Maximum number of frozen messages of one type.
pub const SHAPES_MAX: usize = 6;
/// Maximum length of a frozen message, in bytes.
const BYTES_MAX: usize = 2048;
/// Byte strings from this length on may be keys.
const SECRET_BYTES_MIN: usize = 16;

/// Result of reading the frozen messages of a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// All were read.
    Read { messages: usize },
    /// One was not, or not all of it.
    Refused { message: String, reason: String },
}

/// What a process writes down.
struct Observer {
    /// Frozen messages by type; `None` if messages are recorded.
    frozen: Option<BTreeMap<String, Vec<Vec<u8>>>>,
    found: Mutex<Found>,
}

struct Found {
    file: File,
    /// Types, or shapes of types, that were met before.
    met: BTreeSet<(String, String)>,
}

static OBSERVER: OnceLock<Option<Observer>> = OnceLock::new();

/// Takes note of a message that is about to be read as a `T`.
pub(crate) fn observe<T: DeserializeOwned>(message: &[u8]) {
    if let Some(observer) = OBSERVER.get_or_init(Observer::from_environment) {
        observer.observe::<T>(message);
    }
}

/// Reads the frozen messages of a type as a `T`.
pub fn read<T: DeserializeOwned>(messages: &[Vec<u8>]) -> Finding {
    for message in messages {
        let reason = match ciborium::from_reader::<WithIgnored<T>, _>(message.as_slice()) {
            Ok(read) if read.ignored.is_empty() => continue,
            Ok(read) => format!("{} is not read", read.ignored.join(", ")),
            Err(error) => error.to_string(),
        };
        return Finding::Refused {
            message: hex::encode(message),
            reason,
        };
    }
    Finding::Read {
        messages: messages.len(),
    }
}

/// Reads a file of frozen messages: by type, in its order. Lines that begin with `#` are comments.
///
/// # Errors
/// The line that is none.
pub fn parse(text: &str) -> Result<BTreeMap<String, Vec<Vec<u8>>>, String> {
    let mut frozen: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let parsed = line.rsplit_once(' ').and_then(|(name, message)| {
            let message = hex::decode(message).ok()?;
            Some((name.to_owned(), message))
        });
        let (name, message) = parsed.ok_or_else(|| format!("not a frozen message: {line}"))?;
        frozen.entry(name).or_default().push(message);
    }
    Ok(frozen)
}

/// Name of a type in a file of frozen messages, with the innermost module that it is in: several
/// types are named `Report`.
pub fn name_of<T>() -> String {
    let full = std::any::type_name::<T>();
    let mut name = String::new();
    for part in full.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_' && c != ':') {
        let (path, end) = match part.char_indices().next_back() {
            Some((at, last)) if !last.is_alphanumeric() && last != '_' => part.split_at(at),
            _ => (part, ""),
        };
        let innermost = path.rmatch_indices("::").nth(1);
        name.push_str(innermost.map_or(path, |(at, colons)| &path[at + colons.len()..]));
        name.push_str(end);
    }
    name
}

impl Observer {
    fn from_environment() -> Option<Self> {
        let folder = std::env::var_os(FOLDER)?;
        let frozen = match std::env::var_os(FILE) {
            Some(file) => {
                let text = std::fs::read_to_string(file).ok()?;
                Some(parse(&text).ok()?)
            }
            None => None,
        };
        let file = Path::new(&folder).join(std::process::id().to_string());
        let file = File::options().create(true).append(true).open(file).ok()?;
        let found = Mutex::new(Found {
            file,
            met: BTreeSet::new(),
        });
        Some(Observer { frozen, found })
    }

    fn observe<T: DeserializeOwned>(&self, message: &[u8]) {
        let name = name_of::<T>();
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match &self.frozen {
            None => {
                let Some((shape, message)) = to_freeze::<T>(message) else {
                    return;
                };
                let of_type = found.met.iter().filter(|(other, _)| *other == name).count();
                if of_type >= SHAPES_MAX || !found.met.insert((name.clone(), shape)) {
                    return;
                }
                format!("{name} {}\n", hex::encode(&message))
            }
            Some(frozen) => {
                let Some(messages) = frozen.get(&name) else {
                    return;
                };
                if !found.met.insert((name.clone(), String::new())) {
                    return;
                }
                match read::<T>(messages) {
                    Finding::Read { messages } => format!("read {messages} {name}\n"),
                    Finding::Refused { message, reason } => {
                        format!("refused {name}: {reason}: {message}\n")
                    }
                }
            }
        };
        // (A test that finds nothing in the folder fails.)
        if let Err(error) = found.file.write_all(line.as_bytes()) {
            tracing::warn!(%error, "a result about frozen messages cannot be written");
        }
    }
}

/// The shape of a message, and the message as it can be kept; `None` if it is too long.
fn to_freeze<T: DeserializeOwned>(message: &[u8]) -> Option<(String, Vec<u8>)> {
    let value: Value = ciborium::from_reader(message).ok()?;
    let value = anonymous(value);
    let mut frozen = Vec::new();
    ciborium::into_writer(&value, &mut frozen).ok()?;
    let is_one = frozen.len() <= BYTES_MAX
        && matches!(
            read::<T>(std::slice::from_ref(&frozen)),
            Finding::Read { .. }
        );
    let mut shape = String::new();
    describe(&value, &mut shape);
    is_one.then_some((shape, frozen))
}

/// The same message without what may be secret, or the host's own: longer byte strings become
/// zeros, keys and certificates as text, and paths, a word.
fn anonymous(value: Value) -> Value {
    let all = |items: Vec<Value>| items.into_iter().map(anonymous).collect();
    match value {
        Value::Bytes(bytes) if bytes.len() >= SECRET_BYTES_MIN => {
            Value::Bytes(vec![0; bytes.len().min(SECRET_BYTES_MIN * 2)])
        }
        Value::Array(items)
            if items.len() >= SECRET_BYTES_MIN && items.iter().all(Value::is_integer) =>
        {
            Value::Array(vec![Value::from(0); items.len().min(SECRET_BYTES_MIN * 2)])
        }
        Value::Array(items) => Value::Array(all(items)),
        Value::Map(entries) => {
            let entries = entries.into_iter();
            Value::Map(
                entries
                    .map(|(key, value)| (key, anonymous(value)))
                    .collect(),
            )
        }
        Value::Tag(tag, inner) => Value::Tag(tag, Box::new(anonymous(*inner))),
        Value::Text(text) if text.starts_with("-----") => Value::Text("PEM".into()),
        Value::Text(text) if text.starts_with('/') => Value::Text("/folder".into()),
        other => other,
    }
}

/// Appends the shape of a value: its structure and the names of its fields, without numbers and
/// texts, and of several equal elements one.
fn describe(value: &Value, shape: &mut String) {
    match value {
        Value::Array(items) => {
            let mut shapes: Vec<String> = Vec::new();
            for item in items {
                let mut shape = String::new();
                describe(item, &mut shape);
                shapes.push(shape);
            }
            shapes.dedup();
            let _ = write!(shape, "[{}]", shapes.join(","));
        }
        Value::Map(entries) => {
            shape.push('{');
            for (key, value) in entries {
                let _ = write!(shape, "{}:", key.as_text().unwrap_or("key"));
                describe(value, shape);
                shape.push(',');
            }
            shape.push('}');
        }
        Value::Tag(tag, inner) => {
            let _ = write!(shape, "{tag} ");
            describe(inner, shape);
        }
        Value::Integer(_) => shape.push('i'),
        Value::Bytes(_) => shape.push('b'),
        Value::Float(_) => shape.push('f'),
        Value::Text(_) => shape.push('t'),
        Value::Bool(_) => shape.push('?'),
        Value::Null => shape.push('0'),
        _ => shape.push('x'),
    }
}

/// A value, and the paths of the fields in the message that its type does not have.
struct WithIgnored<T> {
    ignored: Vec<String>,
    _value: T,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for WithIgnored<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut ignored = Vec::new();
        let value =
            serde_ignored::deserialize(deserializer, |path| ignored.push(path.to_string()))?;
        Ok(WithIgnored {
            ignored,
            _value: value,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::to_cbor;
    use serde::Serialize;

    #[derive(Serialize, serde::Deserialize)]
    struct Earlier {
        node: String,
        epoch: u64,
    }

    /// A field was renamed, and has a default: an earlier message is read, but its value lost.
    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "it is only read")]
    struct Renamed {
        node: String,
        #[serde(default)]
        life: u64,
    }

    /// A field was added without a default.
    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "it is only read")]
    struct Stricter {
        node: String,
        epoch: u64,
        zone: String,
    }

    /// A field was added with one.
    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "it is only read")]
    struct Later {
        node: String,
        epoch: u64,
        #[serde(default)]
        zone: String,
    }

    #[test]
    fn a_field_that_is_lost_or_required_is_found() -> Result<(), String> {
        let earlier = Earlier {
            node: "a".into(),
            epoch: 7,
        };
        let frozen = [to_cbor(&earlier, Vec::new())?];
        let refused = |finding: Finding| match finding {
            Finding::Refused { reason, .. } => reason,
            Finding::Read { .. } => String::new(),
        };
        assert_eq!(read::<Earlier>(&frozen), Finding::Read { messages: 1 });
        assert_eq!(read::<Later>(&frozen), Finding::Read { messages: 1 });
        assert_eq!(refused(read::<Renamed>(&frozen)), "epoch is not read");
        assert!(refused(read::<Stricter>(&frozen)).contains("zone"));
        Ok(())
    }

    #[test]
    fn what_is_frozen_has_no_secrets_and_is_found_again() -> Result<(), String> {
        let key = serde_bytes_of(32);
        let message = to_cbor(
            &(key, "/home/of/somebody", "-----BEGIN KEY-----", 7),
            Vec::new(),
        )?;
        type Message = (Value, String, String, u64);
        let (shape, frozen) = to_freeze::<Message>(&message).ok_or("it is short")?;
        assert_eq!(shape, "[b,t,i]");
        let line = format!(
            "# made by a test\n{} {}",
            name_of::<Message>(),
            hex::encode(&frozen)
        );
        let parsed = parse(&line)?;
        let (name, messages) = parsed.iter().next().ok_or("a line")?;
        assert_eq!(name, "(value::Value, string::String, string::String, u64)");
        let read: Message = crate::encoding::from_cbor(&messages[0])?;
        assert_eq!(read.0, Value::Bytes(vec![0; 32]));
        assert_eq!((read.1.as_str(), read.2.as_str()), ("/folder", "PEM"));
        assert!(parse("Type abc").is_err());
        assert!(parse("Type").is_err());
        Ok(())
    }

    fn serde_bytes_of(length: usize) -> Value {
        Value::Bytes(vec![9; length])
    }
}
