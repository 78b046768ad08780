//! Join tokens and users' tokens: printable secrets; the store has only their hashes.
//!
//! ```text
//! keel1-…   id 8 B │ secret 16 B │ fingerprint of the CA 32 B │ check 4 B   base32
//! keelu1-…  id 8 B │ secret 16 B │ check 4 B                               base32
//! ```
//!
//! The check detects typing errors; it has no security function. Secrets are compared by their
//! hashes, in constant time. A join token admits one node; repeating the request with the same
//! token *and* the same key yields the same answer, so that a lost answer does not consume a token.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use keel_net::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use keel_store::decoders::Decoder;
use keel_store::encoding::{self, WireError};
use keel_store::keys::{Key, TOKENS, TokenId, USER_TOKENS};
use keel_store::{Compare, Revision, Store, StoreError, Txn, TxnOutcome};

const JOIN_PREFIX: &str = "keel1-";
const USER_PREFIX: &str = "keelu1-";
const SECRET_BYTES: usize = 16;
const CHECK_BYTES: usize = 4;

/// Longest time a join token may live, in milliseconds: 30 days.
pub const JOIN_TOKEN_TTL_MS_MAX: u64 = 30 * 24 * 3600 * 1000;
/// Longest name of a user's token, in bytes.
pub const USER_NAME_BYTES_MAX: usize = 128;

/// Why a token was not created or not accepted.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The text is not a token.
    #[error("this is not a {what} token: {reason}")]
    Malformed {
        /// "join" or "user".
        what: &'static str,
        reason: &'static str,
    },
    /// No such token, or a wrong secret: the error does not reveal which.
    #[error("the token is not valid here; get one with `keel token`")]
    NotValid,
    #[error("the token has expired; get a new one with `keel token`")]
    Expired,
    #[error("the token was used by node {0} already; get a new one with `keel token`")]
    Used(NodeName),
    /// A parameter is out of its range.
    #[error("{0}")]
    Parameter(String),
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The record in the store cannot be read.
    #[error(transparent)]
    Record(#[from] WireError),
}

/// The secret of a token. Never printed except in the token.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret([u8; SECRET_BYTES]);

impl Secret {
    fn random() -> Self {
        Self(rand::random())
    }

    /// The secret has 128 random bits: a plain hash is enough.
    fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.0).as_bytes()
    }

    /// In constant time.
    fn matches(&self, hash: [u8; 32]) -> bool {
        blake3::hash(&self.0) == blake3::Hash::from_bytes(hash)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A join token, as the joining node has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: TokenId,
    pub secret: Secret,
    /// The fingerprint of the cluster's CA: whom to trust.
    pub authority: Fingerprint,
}

/// Stored record of a join token.
#[derive(Serialize, Deserialize)]
struct JoinRecord {
    secret_hash: [u8; 32],
    expires_unix_ms: u64,
    used: Option<Used>,
}

/// The node that used a join token, with its signing request.
#[derive(Debug, Serialize, Deserialize)]
struct Used {
    node: NodeName,
    csr_hash: [u8; 32],
}

/// Decoders of the records here, for fuzzing.
pub(crate) fn decoders() -> Vec<Decoder> {
    vec![Decoder::of::<JoinRecord>(), Decoder::of::<UserRecord>()]
}

/// Creates a join token that is valid for `ttl_ms` (up to [`JOIN_TOKEN_TTL_MS_MAX`]), and removes
/// expired ones. `now_unix_ms` is the wall-clock time.
///
/// # Errors
/// [`TokenError::Parameter`], [`TokenError::Store`].
pub async fn create_join_token(
    store: &dyn Store,
    authority: Fingerprint,
    ttl_ms: u64,
    now_unix_ms: u64,
) -> Result<JoinToken, TokenError> {
    if ttl_ms == 0 || ttl_ms > JOIN_TOKEN_TTL_MS_MAX {
        return Err(TokenError::Parameter(format!(
            "a join token lives 1 to {JOIN_TOKEN_TTL_MS_MAX} ms, not {ttl_ms}"
        )));
    }
    remove_expired(store, now_unix_ms).await?;
    let token = JoinToken {
        id: TokenId(rand::random()),
        secret: Secret::random(),
        authority,
    };
    let record = JoinRecord {
        secret_hash: token.secret.hash(),
        expires_unix_ms: now_unix_ms.saturating_add(ttl_ms),
        used: None,
    };
    put_new(store, Key::Token(token.id), &record).await?;
    Ok(token)
}

async fn put_new<T: Serialize>(store: &dyn Store, key: Key, record: &T) -> Result<(), TokenError> {
    let txn = Txn::new()
        .when_absent(key.clone())
        .put(key, encoding::encode("a token's record", record)?);
    match store.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Refused { .. } => Err(TokenError::Parameter(
            "the new token's number is taken; try again".into(),
        )),
    }
}

async fn remove_expired(store: &dyn Store, now_unix_ms: u64) -> Result<(), TokenError> {
    for entry in store.list(TOKENS).await?.entries {
        let record = encoding::decode::<JoinRecord>("a join token's record", &entry.value);
        if record.is_ok_and(|record| record.expires_unix_ms <= now_unix_ms) {
            let txn = Txn::new()
                .when_modified_at(entry.key.clone(), entry.modified)
                .delete(entry.key);
            store.txn(txn).await?;
        }
    }
    Ok(())
}

/// A valid join token, and the changes that mark it as used.
pub(crate) struct Redemption {
    /// `Some` if the transaction that admits the node must mark the token; `None` if the same node
    /// used it with the same key already.
    pub(crate) token_use: Option<TokenUse>,
}

/// The write that marks a token as used, and the revision that it compares.
pub(crate) struct TokenUse {
    pub(crate) key: Key,
    pub(crate) modified: Revision,
    pub(crate) record: Vec<u8>,
}

/// Checks a join token for `node`, which sent the signing request `csr_pem`.
pub(crate) async fn redeem(
    store: &dyn Store,
    id: TokenId,
    secret: Secret,
    node: &NodeName,
    csr_pem: &str,
    now_unix_ms: u64,
) -> Result<Redemption, TokenError> {
    let key = Key::Token(id);
    let entry = store.get(&key.to_string()).await?;
    let entry = entry.ok_or(TokenError::NotValid)?;
    let mut record: JoinRecord = encoding::decode("a join token's record", &entry.value)?;
    if !secret.matches(record.secret_hash) {
        return Err(TokenError::NotValid);
    }
    if record.expires_unix_ms <= now_unix_ms {
        return Err(TokenError::Expired);
    }
    let csr_hash = *blake3::hash(csr_pem.as_bytes()).as_bytes();
    if let Some(used) = record.used {
        return match used.node == *node && used.csr_hash == csr_hash {
            true => Ok(Redemption { token_use: None }),
            false => Err(TokenError::Used(used.node)),
        };
    }
    record.used = Some(Used {
        node: node.clone(),
        csr_hash,
    });
    Ok(Redemption {
        token_use: Some(TokenUse {
            key,
            modified: entry.modified,
            record: encoding::encode("a join token's record", &record)?,
        }),
    })
}

/// Permissions of a user; each role includes the previous ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Look at everything but secrets.
    Viewer,
    /// Run, move and stop machines.
    Operator,
    /// Change the cluster: nodes, tokens, policy.
    Admin,
}

impl Role {
    /// Whether it includes `needed`.
    pub fn includes(self, needed: Role) -> bool {
        self >= needed
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        match text {
            "viewer" => Ok(Role::Viewer),
            "operator" => Ok(Role::Operator),
            "admin" => Ok(Role::Admin),
            other => Err(TokenError::Parameter(format!(
                "{other:?} is not a role: use viewer, operator or admin"
            ))),
        }
    }
}

/// A user's token, as the user has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserToken {
    pub id: TokenId,
    pub secret: Secret,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The token's name in the store.
    pub id: TokenId,
    /// The name given at its making.
    pub name: String,
    pub role: Role,
}

/// Stored record of a user's token.
#[derive(Serialize, Deserialize)]
struct UserRecord {
    secret_hash: [u8; 32],
    name: String,
    role: Role,
    expires_unix_ms: Option<u64>,
}

/// Creates a user's token; without `expires_unix_ms` it is valid until removed.
///
/// # Errors
/// [`TokenError::Parameter`] for a name that is empty or too long,
/// [`TokenError::Store`].
pub async fn create_user_token(
    store: &dyn Store,
    name: &str,
    role: Role,
    expires_unix_ms: Option<u64>,
) -> Result<UserToken, TokenError> {
    if name.is_empty() || name.len() > USER_NAME_BYTES_MAX {
        return Err(TokenError::Parameter(format!(
            "a user's name has 1 to {USER_NAME_BYTES_MAX} bytes"
        )));
    }
    let token = UserToken {
        id: TokenId(rand::random()),
        secret: Secret::random(),
    };
    let record = UserRecord {
        secret_hash: token.secret.hash(),
        name: name.into(),
        role,
        expires_unix_ms,
    };
    put_new(store, Key::UserToken(token.id), &record).await?;
    Ok(token)
}

/// The user who presents the token `text`, if it is valid.
///
/// # Errors
/// [`TokenError::Malformed`], [`TokenError::NotValid`], [`TokenError::Expired`],
/// [`TokenError::Store`].
pub async fn verify_user_token(
    store: &dyn Store,
    text: &str,
    now_unix_ms: u64,
) -> Result<User, TokenError> {
    let token: UserToken = text.parse()?;
    let entry = store.get(&Key::UserToken(token.id).to_string()).await?;
    let entry = entry.ok_or(TokenError::NotValid)?;
    let record: UserRecord = encoding::decode("a user token's record", &entry.value)?;
    if !token.secret.matches(record.secret_hash) {
        return Err(TokenError::NotValid);
    }
    if record.expires_unix_ms.is_some_and(|end| end <= now_unix_ms) {
        return Err(TokenError::Expired);
    }
    Ok(User {
        id: token.id,
        name: record.name,
        role: record.role,
    })
}

/// A token as others than its holder see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedToken {
    pub id: TokenId,
    pub of: TokenHolder,
    pub expires_unix_ms: Option<u64>,
}

/// Whose a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenHolder {
    /// A node's that is to join, and which one used it.
    Node {
        used_by: Option<NodeName>,
    },
    User {
        name: String,
        role: Role,
    },
}

/// All tokens, without their secrets.
///
/// # Errors
/// [`TokenError::Store`], [`TokenError::Record`].
pub async fn list_tokens(store: &dyn Store) -> Result<Vec<ListedToken>, TokenError> {
    let mut tokens = Vec::new();
    for prefix in [USER_TOKENS, TOKENS] {
        for entry in store.list(prefix).await?.entries {
            tokens.push(match entry.key.parse() {
                Ok(Key::UserToken(id)) => {
                    let record: UserRecord =
                        encoding::decode("a user token's record", &entry.value)?;
                    ListedToken {
                        id,
                        of: TokenHolder::User {
                            name: record.name,
                            role: record.role,
                        },
                        expires_unix_ms: record.expires_unix_ms,
                    }
                }
                Ok(Key::Token(id)) => {
                    let record: JoinRecord =
                        encoding::decode("a join token's record", &entry.value)?;
                    ListedToken {
                        id,
                        of: TokenHolder::Node {
                            used_by: record.used.map(|used| used.node),
                        },
                        expires_unix_ms: Some(record.expires_unix_ms),
                    }
                }
                _ => continue,
            });
        }
    }
    Ok(tokens)
}

/// Removes a token: its holder is refused from now on. Whether there was one.
///
/// # Errors
/// [`TokenError::Store`].
pub async fn remove_token(store: &dyn Store, id: TokenId) -> Result<bool, TokenError> {
    for key in [Key::UserToken(id), Key::Token(id)] {
        let exists = Compare::Exists {
            key: key.to_string(),
        };
        let txn = Txn::new().when(exists).delete(key);
        if store.txn(txn).await?.is_committed() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn write(f: &mut fmt::Formatter<'_>, prefix: &str, parts: &[&[u8]]) -> fmt::Result {
    let mut bytes = parts.concat();
    let check = blake3::hash(&bytes);
    bytes.extend_from_slice(&check.as_bytes()[..CHECK_BYTES]);
    let text = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
    write!(f, "{prefix}{text}")
}

/// The bytes of a token of `LENGTH` bytes, after its prefix and check are verified.
fn read<const LENGTH: usize>(
    what: &'static str,
    prefix: &str,
    text: &str,
) -> Result<[u8; LENGTH], TokenError> {
    let malformed = |reason| TokenError::Malformed { what, reason };
    let text = text
        .trim()
        .strip_prefix(prefix)
        .ok_or_else(|| malformed("it begins differently"))?;
    if text.len() > 256 {
        return Err(malformed("it is too long"));
    }
    let bytes = BASE32_NOPAD
        .decode(text.to_ascii_uppercase().as_bytes())
        .map_err(|_| malformed("it has wrong characters, or its end is missing"))?;
    let (bytes, check) = bytes
        .split_at_checked(LENGTH)
        .ok_or_else(|| malformed("its end is missing"))?;
    if check != &blake3::hash(bytes).as_bytes()[..CHECK_BYTES] {
        return Err(malformed("it is copied wrongly: its check does not fit"));
    }
    bytes
        .try_into()
        .map_err(|_| malformed("its length is wrong"))
}

/// `N` bytes from `at` on.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0))
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.id.0.to_be_bytes();
        write(f, JOIN_PREFIX, &[&id, &self.secret.0, &self.authority.0])
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let bytes = read::<56>("join", JOIN_PREFIX, text)?;
        Ok(Self {
            id: TokenId(u64::from_be_bytes(part(&bytes, 0))),
            secret: Secret(part(&bytes, 8)),
            authority: Fingerprint(part(&bytes, 24)),
        })
    }
}

impl fmt::Display for UserToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.id.0.to_be_bytes();
        write(f, USER_PREFIX, &[&id, &self.secret.0])
    }
}

impl FromStr for UserToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let bytes = read::<24>("user", USER_PREFIX, text)?;
        Ok(Self {
            id: TokenId(u64::from_be_bytes(part(&bytes, 0))),
            secret: Secret(part(&bytes, 8)),
        })
    }
}
