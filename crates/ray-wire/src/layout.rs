//! How a value lies in the object store: owns the header's bytes and the offsets of each part.
//!
//! It refuses (`None`) bytes that are not such an object: wrong magic, lengths beyond the object.
//!
//! Invariants:
//! 1. An object starts on a multiple of 64 bytes; each out-of-band buffer starts on a multiple of 64 from there.
//! 2. The header names the owner, so that a raylet can free what a dead owner leaves behind.

use bytes::Bytes;
use prost::Message;
use ray_ids::WorkerId;

use crate::common::{DeathCause, ReferenceInfo};
use crate::object::ReferenceList;

/// The bytes themselves (`bytes`).
pub const FORMAT_BYTES: u32 = 1;
/// Pickle protocol 5 with out-of-band buffers.
pub const FORMAT_PICKLE: u32 = 2;
/// A pickled exception that `get` raises.
pub const FORMAT_EXCEPTION: u32 = 3;
/// An `ErrorValue`: the runtime's own failure, which `get` raises.
pub const FORMAT_ERROR: u32 = 4;
/// MessagePack, readable from every language.
pub const FORMAT_CROSS_LANGUAGE: u32 = 5;
/// Python's `None`, with no bytes.
pub const FORMAT_NONE: u32 = 6;

/// Alignment of objects and their buffers, in bytes.
pub const ALIGNMENT: usize = 64;
/// Length of the fixed part of the header, in bytes.
pub const HEADER_BYTES: usize = 64;
const MAGIC: u32 = 0x4a42_4f48;

/// A failure of the runtime as a value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ErrorValue {
    /// See the `ERROR_*` constants.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    #[prost(string, tag = "2")]
    pub message: String,
    #[prost(message, optional, tag = "3")]
    pub death: Option<DeathCause>,
    #[prost(bytes = "bytes", tag = "4")]
    pub actor_id: Bytes,
    #[prost(bytes = "bytes", tag = "5")]
    pub task_id: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    pub object_id: Bytes,
    #[prost(string, tag = "7")]
    pub name: String,
}

/// `WorkerCrashedError`.
pub const ERROR_WORKER_CRASHED: u32 = 1;
/// `ActorDiedError`.
pub const ERROR_ACTOR_DIED: u32 = 2;
/// `ActorUnavailableError`.
pub const ERROR_ACTOR_UNAVAILABLE: u32 = 3;
/// `ObjectLostError`.
pub const ERROR_OBJECT_LOST: u32 = 4;
/// `OwnerDiedError`.
pub const ERROR_OWNER_DIED: u32 = 5;
/// `TaskCancelledError`.
pub const ERROR_TASK_CANCELLED: u32 = 6;
/// `ObjectReconstructionFailedError`.
pub const ERROR_RECONSTRUCTION_FAILED: u32 = 7;
/// `NodeDiedError`.
pub const ERROR_NODE_DIED: u32 = 8;
/// `RuntimeEnvSetupError`.
pub const ERROR_RUNTIME_ENV: u32 = 9;
/// `OutOfMemoryError`.
pub const ERROR_OUT_OF_MEMORY: u32 = 10;
/// `TaskUnschedulableError`.
pub const ERROR_TASK_UNSCHEDULABLE: u32 = 11;
/// `ActorUnschedulableError`.
pub const ERROR_ACTOR_UNSCHEDULABLE: u32 = 12;
/// `ObjectFreedError`.
pub const ERROR_OBJECT_FREED: u32 = 13;
/// `ObjectStoreFullError`.
pub const ERROR_STORE_FULL: u32 = 14;
/// `OutOfDiskError`.
pub const ERROR_OUT_OF_DISK: u32 = 15;
/// `TaskPlacementGroupRemoved` or `ActorPlacementGroupRemoved`.
pub const ERROR_PLACEMENT_GROUP_REMOVED: u32 = 16;
/// `StreamingGeneratorReplayInconsistentError`.
pub const ERROR_GENERATOR_REPLAY: u32 = 17;
/// `RaySystemError`.
pub const ERROR_SYSTEM: u32 = 18;
/// End of a stream of items.
pub const ERROR_END_OF_STREAM: u32 = 19;

/// Where the parts of a stored object are, relative to its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLayout {
    pub format: u32,
    pub owner: WorkerId,
    /// Start and length of the in-band bytes.
    pub inband: (usize, usize),
    /// Start and length of each buffer.
    pub buffers: Vec<(usize, usize)>,
    /// Start and length of the encoded `ReferenceList`.
    contained: (usize, usize),
    /// Length of the whole object.
    pub total_bytes: usize,
}

fn align(offset: usize) -> usize {
    offset.div_ceil(ALIGNMENT) * ALIGNMENT
}

impl StoredLayout {
    /// The layout of an object to be written.
    pub fn plan(
        format: u32,
        owner: WorkerId,
        inband_length: usize,
        buffer_lengths: &[usize],
        contained_bytes: usize,
    ) -> StoredLayout {
        let contained_start = HEADER_BYTES + 8 * buffer_lengths.len();
        let inband_start = contained_start + contained_bytes;
        let mut end = inband_start + inband_length;
        let mut buffers = Vec::with_capacity(buffer_lengths.len());
        for &length in buffer_lengths {
            let start = align(end);
            buffers.push((start, length));
            end = start + length;
        }
        StoredLayout {
            format,
            owner,
            inband: (inband_start, inband_length),
            buffers,
            contained: (contained_start, contained_bytes),
            total_bytes: end,
        }
    }

    /// Writes the header, the table of buffers and the contained references; the caller copies the rest.
    pub fn write_header(&self, target: &mut [u8], contained: &[u8]) {
        target[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        target[4..8].copy_from_slice(&self.format.to_le_bytes());
        target[8..16].copy_from_slice(&(self.inband.1 as u64).to_le_bytes());
        target[16..20].copy_from_slice(&(self.buffers.len() as u32).to_le_bytes());
        target[20..24].copy_from_slice(&(self.contained.1 as u32).to_le_bytes());
        target[24..52].copy_from_slice(self.owner.as_bytes());
        target[52..HEADER_BYTES].fill(0);
        for (i, (_, length)) in self.buffers.iter().enumerate() {
            let at = HEADER_BYTES + 8 * i;
            target[at..at + 8].copy_from_slice(&(*length as u64).to_le_bytes());
        }
        target[self.contained.0..self.contained.0 + self.contained.1].copy_from_slice(contained);
    }

    /// Reads the layout of a stored object.
    pub fn read(object: &[u8]) -> Option<StoredLayout> {
        let u32_at = |at: usize| {
            object
                .get(at..at + 4)
                .map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        let u64_at = |at: usize| {
            object
                .get(at..at + 8)
                .map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        if u32_at(0)? != MAGIC {
            return None;
        }
        let count = u32_at(16)? as usize;
        if count > object.len() / 8 {
            return None;
        }
        let mut lengths = Vec::with_capacity(count);
        for i in 0..count {
            let length = u64_at(HEADER_BYTES + 8 * i)? as usize;
            if length > object.len() {
                return None;
            }
            lengths.push(length);
        }
        let inband_length = u64_at(8)? as usize;
        if inband_length > object.len() {
            return None;
        }
        let owner = WorkerId::from_binary(object.get(24..52)?).ok()?;
        let layout = Self::plan(u32_at(4)?, owner, inband_length, &lengths, u32_at(20)? as usize);
        (layout.total_bytes <= object.len()).then_some(layout)
    }

    /// The references inside a stored object.
    pub fn contained(&self, object: &[u8]) -> Vec<ReferenceInfo> {
        object
            .get(self.contained.0..self.contained.0 + self.contained.1)
            .and_then(|bytes| ReferenceList::decode(bytes).ok())
            .map(|list| list.references)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_planned_is_read_back() {
        let owner = WorkerId::from_random();
        let contained = ReferenceList {
            references: vec![ReferenceInfo {
                object_id: Bytes::from_static(b"x"),
                owner: None,
            }],
        };
        let encoded = contained.encode_to_vec();
        let layout = StoredLayout::plan(FORMAT_PICKLE, owner, 10, &[100, 0, 7], encoded.len());
        let mut object = vec![0; layout.total_bytes];
        layout.write_header(&mut object, &encoded);
        let read = StoredLayout::read(&object).unwrap();
        assert_eq!(read, layout);
        assert_eq!(read.contained(&object), contained.references);
        assert!(layout.buffers.iter().all(|(start, _)| start % ALIGNMENT == 0));
    }

    #[test]
    fn garbage_and_truncation_are_refused() {
        assert_eq!(StoredLayout::read(&[1; 200]), None);
        let layout = StoredLayout::plan(FORMAT_BYTES, WorkerId::NIL, 500, &[], 0);
        let mut object = vec![0; layout.total_bytes];
        layout.write_header(&mut object, &[]);
        assert_eq!(StoredLayout::read(&object[..300]), None);
        object[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(StoredLayout::read(&object), None);
    }
}
