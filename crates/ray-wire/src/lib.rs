//! Every serialized message of the runtime: owns the kinds of frames, their headers' numbered fields, and the layout
//! of a value, in a frame and in the object store.
//!
//! It refuses headers that do not decode (`WireError`), and does no input or output.
//!
//! Invariants:
//! 1. A field keeps its number for ever; a reader skips numbers it does not know, so a later version can join.
//! 2. A frame's payload is the concatenation of the segments that its header's `ValueLayout`s describe, in order.
//! 3. A kind's number is never reused (`kinds`).

pub mod common;
pub mod gcs;
pub mod kinds;
pub mod layout;
pub mod lease;
pub mod object;
pub mod task;

pub use common::*;
pub use gcs::*;
pub use lease::*;
pub use object::*;
pub use task::*;

use bytes::Bytes;
use prost::Message;

/// The protocol's versions this build speaks: lowest and highest.
pub const PROTOCOL_VERSIONS: (u16, u16) = (1, 1);

/// Values up to this many bytes travel inline in calls and replies; larger ones go to the object store.
pub const INLINE_LIMIT_BYTES: usize = 100 * 1024;

/// Why a message could not be read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The header's bytes are not a message of its kind.
    #[error("a {message} header did not decode: {source}")]
    Header {
        message: &'static str,
        source: prost::DecodeError,
    },
    /// An id in a message has the wrong length.
    #[error("a message holds a bad id: {0}")]
    Id(#[from] ray_ids::IdError),
    /// A layout speaks of more bytes than the payload has.
    #[error("a value's layout wants {wanted} bytes of payload and {available} are left")]
    Payload { wanted: u64, available: u64 },
    /// A field that must be there is missing.
    #[error("a {message} lacks its field {field}")]
    Missing { message: &'static str, field: &'static str },
}

/// Encodes a header.
pub fn encode<M: Message>(message: &M) -> Bytes {
    let mut buffer = Vec::with_capacity(message.encoded_len());
    message.encode_raw(&mut buffer);
    buffer.into()
}

/// Decodes a header; byte fields share memory with `header`.
pub fn decode<M: Message + Default>(message: &'static str, header: Bytes) -> Result<M, WireError> {
    M::decode(header).map_err(|source| WireError::Header { message, source })
}

/// An id as a message's byte field.
pub fn id_bytes(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
