//! The crate's errors: owns why the control plane cannot start, cannot store, or refuses a message.

use std::path::PathBuf;

/// Why the control plane failed.
#[derive(Debug, thiserror::Error)]
pub enum GcsError {
    /// Another control plane uses the data directory.
    #[error(
        "the data directory {path} is in use by another control plane (process {holder}): stop that one, or give this \
         one a data directory of its own"
    )]
    DataDirectoryLocked { path: PathBuf, holder: String },
    /// The data directory or something in it cannot be used.
    #[error("{action} {path} failed: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// The database refuses.
    #[error("the control plane's storage failed while {action}: {source}")]
    Storage {
        action: &'static str,
        source: rusqlite::Error,
    },
    /// The database was written by another version.
    #[error(
        "the control plane's storage {path} has schema version {found} and this build reads version {expected}: use the \
         version that wrote it, or give another data directory"
    )]
    Schema { path: PathBuf, found: i64, expected: i64 },
    /// A stored row cannot be read.
    #[error("a stored row of table {table} cannot be read: {reason}")]
    Row { table: &'static str, reason: String },
    /// The configuration cannot be used.
    #[error("the control plane's configuration is refused: {0}")]
    Config(String),
    /// A link or its reactor failed.
    #[error("the control plane's links failed: {0}")]
    Links(String),
    /// A message does not read.
    #[error(transparent)]
    Wire(#[from] ray_wire::WireError),
    /// A frame of a kind that nobody sends to the control plane.
    #[error("frame kind {kind} ({name}) is not for the control plane")]
    UnexpectedKind { kind: u16, name: &'static str },
    /// An invariant does not hold, which is a defect of this program.
    #[error("the control plane's tables are inconsistent: {0}")]
    Inconsistent(String),
}
