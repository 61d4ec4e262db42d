//! Values as bytes: owns the forms a value takes on its way, and what copying between them costs.
//!
//! Invariants:
//! 1. An `InlineValue` shares no memory with the language: what a program changes after a call does not reach it.
//! 2. A small inline value never keeps a large read buffer alive: it is copied out.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use ray_ids::{ObjectId, WorkerId};
use ray_store::PinnedObject;
use ray_wire::layout::{ErrorValue, StoredLayout, FORMAT_ERROR};
use ray_wire::{id_bytes, Address, ReferenceInfo, ReferenceList, ValueLayout, WireError};

/// Slices below this are copied out of the frame that they came in.
const COPY_BELOW_BYTES: usize = 8 << 10;
/// Values up to this size are compared with the one that came before (see `InlineValue::is_next`).
const SHARE_UP_TO_BYTES: usize = 64;

/// A reference found inside a value while it was serialized.
#[derive(Debug, Clone)]
pub struct Contained {
    pub object: ObjectId,
    pub owner: Address,
}

impl Contained {
    /// As a message says it.
    pub fn info(&self) -> ReferenceInfo {
        ReferenceInfo {
            object_id: id_bytes(self.object.as_bytes()),
            owner: Some(self.owner.clone()),
        }
    }

    /// From a message.
    pub fn from_info(info: &ReferenceInfo) -> Result<Self, WireError> {
        let owner = info.owner.clone().ok_or(WireError::Missing {
            message: "ReferenceInfo",
            field: "owner",
        })?;
        Ok(Self {
            object: ObjectId::from_binary(&info.object_id)?,
            owner,
        })
    }
}

/// A value that the language has just serialized. Its buffers may still be the language's own memory.
#[derive(Debug, Clone)]
pub struct Serialized {
    pub format: u32,
    pub inband: Bytes,
    pub buffers: Vec<Bytes>,
    pub contained: Vec<Contained>,
}

impl Serialized {
    /// Bytes of the value itself.
    pub fn size(&self) -> usize {
        self.inband.len() + self.buffers.iter().map(Bytes::len).sum::<usize>()
    }

    /// A copy that the language cannot change. The in-band bytes are a fresh object of their own already.
    pub fn into_inline(self) -> InlineValue {
        InlineValue {
            format: self.format,
            inband: self.inband,
            buffers: self
                .buffers
                .iter()
                .map(|buffer| Bytes::copy_from_slice(buffer))
                .collect(),
            contained: self.contained.iter().map(Contained::info).collect(),
        }
    }

    /// How it will lie in the object store, and the encoded references.
    pub fn plan(&self, owner: WorkerId) -> (StoredLayout, Vec<u8>) {
        let contained = if self.contained.is_empty() {
            Vec::new()
        } else {
            ReferenceList {
                references: self.contained.iter().map(Contained::info).collect(),
            }
            .encode_to_vec()
        };
        let lengths: Vec<usize> = self.buffers.iter().map(Bytes::len).collect();
        (
            StoredLayout::plan(self.format, owner, self.inband.len(), &lengths, contained.len()),
            contained,
        )
    }

    /// Copies it into its place in the object store.
    pub fn write(&self, layout: &StoredLayout, contained: &[u8], target: &mut [u8]) {
        layout.write_header(target, contained);
        let (start, length) = layout.inband;
        target[start..start + length].copy_from_slice(&self.inband);
        for ((start, length), buffer) in layout.buffers.iter().zip(&self.buffers) {
            ray_store::copy_into(&mut target[*start..start + length], buffer);
        }
    }
}

/// A small value in this process's memory.
#[derive(Debug, Clone)]
pub struct InlineValue {
    pub format: u32,
    pub inband: Bytes,
    pub buffers: Box<[Bytes]>,
    pub contained: Box<[ReferenceInfo]>,
}

fn take(payload: &mut Bytes, length: u64) -> Result<Bytes, WireError> {
    if length > payload.len() as u64 {
        return Err(WireError::Payload {
            wanted: length,
            available: payload.len() as u64,
        });
    }
    Ok(payload.split_to(length as usize))
}

fn keep(slice: Bytes, copy: bool) -> Bytes {
    if copy && slice.len() < COPY_BELOW_BYTES {
        Bytes::copy_from_slice(&slice)
    } else {
        slice
    }
}

impl InlineValue {
    /// How it lies in a payload.
    pub fn layout(&self) -> ValueLayout {
        ValueLayout {
            format: self.format,
            inband_length: self.inband.len() as u64,
            buffer_lengths: self.buffers.iter().map(|buffer| buffer.len() as u64).collect(),
            contained: self.contained.to_vec(),
        }
    }

    /// Appends its segments to a payload.
    pub fn append(&self, payload: &mut Vec<Bytes>) {
        if !self.inband.is_empty() {
            payload.push(self.inband.clone());
        }
        payload.extend(self.buffers.iter().filter(|buffer| !buffer.is_empty()).cloned());
    }

    /// Takes a value off the front of a payload. `copy`: it is kept for long, so it does not share a small part of a
    /// large frame.
    pub fn take(layout: &ValueLayout, payload: &mut Bytes, copy: bool) -> Result<Self, WireError> {
        let inband = keep(take(payload, layout.inband_length)?, copy);
        let mut buffers = Vec::with_capacity(layout.buffer_lengths.len());
        for length in &layout.buffer_lengths {
            buffers.push(keep(take(payload, *length)?, copy));
        }
        Ok(Self {
            format: layout.format,
            inband,
            buffers: buffers.into_boxed_slice(),
            contained: layout.contained.clone().into_boxed_slice(),
        })
    }

    /// Bytes of the value itself.
    pub fn size(&self) -> usize {
        self.inband.len() + self.buffers.iter().map(Bytes::len).sum::<usize>()
    }

    /// Whether it is nothing but a few in-band bytes.
    pub fn is_shareable(&self) -> bool {
        self.inband.len() <= SHARE_UP_TO_BYTES && self.buffers.is_empty() && self.contained.is_empty()
    }

    /// Whether the front of a payload is this very value, so that it need not be kept once more. It is taken
    /// off the payload if so.
    pub fn is_next(&self, layout: &ValueLayout, payload: &mut Bytes) -> bool {
        let same = self.is_shareable()
            && layout.inband_length == self.inband.len() as u64
            && layout.format == self.format
            && layout.buffer_lengths.is_empty()
            && layout.contained.is_empty()
            && payload.starts_with(&self.inband);
        if same {
            bytes::Buf::advance(payload, self.inband.len());
        }
        same
    }

    /// Whether getting it raises.
    pub fn is_failure(&self) -> bool {
        matches!(self.format, ray_wire::layout::FORMAT_EXCEPTION | FORMAT_ERROR)
    }
}

/// A failure of the runtime as a value.
pub fn error_value(error: &ErrorValue) -> InlineValue {
    InlineValue {
        format: FORMAT_ERROR,
        inband: error.encode_to_vec().into(),
        buffers: Box::default(),
        contained: Box::default(),
    }
}

/// A value in the object store, pinned while this lives.
#[derive(Debug, Clone)]
pub struct StoredValue {
    pub pinned: PinnedObject,
    pub layout: StoredLayout,
}

/// A value that can be read.
#[derive(Debug, Clone)]
pub enum Value {
    Inline(Arc<InlineValue>),
    Stored(StoredValue),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(bytes: &'static [u8]) -> InlineValue {
        InlineValue {
            format: 1,
            inband: Bytes::from_static(bytes),
            buffers: Box::default(),
            contained: Box::default(),
        }
    }

    #[test]
    fn only_the_very_same_value_is_shared() {
        let value = small(b"none");
        let mut payload = Bytes::from_static(b"nonerest");
        assert!(value.is_next(&value.layout(), &mut payload));
        assert_eq!(payload, "rest");
        let other_format = ValueLayout {
            format: 2,
            ..value.layout()
        };
        assert!(!value.is_next(&other_format, &mut Bytes::from_static(b"none")));
        assert!(!value.is_next(&value.layout(), &mut Bytes::from_static(b"nine")));
        assert!(!value.is_next(&value.layout(), &mut Bytes::from_static(b"no")));
        let longer = small(b"none!").layout();
        assert!(!value.is_next(&longer, &mut Bytes::from_static(b"none!")));
        let with_reference = ValueLayout {
            contained: vec![ReferenceInfo::default()],
            ..value.layout()
        };
        assert!(!value.is_next(&with_reference, &mut Bytes::from_static(b"none")));
        assert!(!small(&[0; 65]).is_shareable());
    }
}
