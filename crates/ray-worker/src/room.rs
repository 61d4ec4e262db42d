//! Room in the node's object store: writing a value into it, and asking the raylet for memory to write to.
//!
//! Invariant: 1. Memory that was lent and cannot be used goes back at once.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_ids::{ObjectId, WorkerId};
use ray_rpc::Waiter;
use ray_store::{Extent, StoreError};
use ray_wire::{id_bytes, kinds, ExtentInfo, ExtentLent, RequestExtent, ReturnExtents};

use crate::inner::{Inner, Pending, PendingEntry};
use crate::slot::lock;
use crate::value::Serialized;
use crate::WorkerError;

/// How long the raylet may take to find room before the caller is told that it did not answer.
const EXTENT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the raylet may take to read this client's ring.
const RING_TIMEOUT: Duration = Duration::from_secs(30);

/// A thread that waits for room in the object store.
#[derive(Debug, Default)]
pub(crate) struct ExtentWait {
    pub reply: Mutex<Option<Result<ExtentLent, String>>>,
    pub waiter: Waiter,
}

impl Inner {
    /// Writes a value into this node's store, waiting for room. Returns its size.
    pub fn write_to_store(&self, object: ObjectId, value: &Serialized, owner: WorkerId) -> Result<u64, WorkerError> {
        self.check()?;
        let (layout, contained) = value.plan(owner);
        let size = layout.total_bytes as u64;
        let mut writer = loop {
            match self.store()?.create(object, size) {
                Ok(writer) => break writer,
                Err(StoreError::NeedExtent { bytes }) => self.request_extent(bytes, object)?,
                Err(error) => return Err(error.into()),
            }
        };
        value.write(&layout, &contained, writer.as_mut_slice());
        let deadline = Instant::now() + RING_TIMEOUT;
        while let Err(unsealed) = writer.seal(layout.format) {
            if !matches!(unsealed.reason, StoreError::RingFull) {
                return Err(unsealed.reason.into());
            }
            if Instant::now() >= deadline {
                return Err(WorkerError::Timeout {
                    what: "the raylet".into(),
                    limit_s: RING_TIMEOUT.as_secs_f64(),
                });
            }
            self.tell_raylet(kinds::RING_DOORBELL, 0, Bytes::new())?;
            // The raylet's answer is that the ring has room; there is no frame to wait for.
            std::thread::sleep(Duration::from_micros(100));
            writer = unsealed.writer;
        }
        Ok(size)
    }

    fn request_extent(&self, bytes: u64, object: ObjectId) -> Result<(), WorkerError> {
        let wait = Arc::new(ExtentWait::default());
        {
            let mut state = self.enter()?;
            self.flush_frees(&mut state);
            let correlation = self.correlation();
            state.pending.insert(
                correlation,
                PendingEntry {
                    what: Pending::Extent(wait.clone()),
                    link: self.raylet.id(),
                },
            );
            let message = RequestExtent {
                minimum_bytes: bytes,
                object_id: id_bytes(object.as_bytes()),
            };
            self.tell_raylet(kinds::REQUEST_EXTENT, correlation, ray_wire::encode(&message))?;
        }
        let deadline = Instant::now() + EXTENT_TIMEOUT;
        let lent = self
            .wait_for(&wait.waiter, Some(deadline), "the raylet's object store", || {
                lock(&wait.reply).take()
            })?
            .map_err(WorkerError::RayletGone)?;
        if !lent.error.is_empty() {
            return Err(WorkerError::StoreFull(lent.error));
        }
        self.take_extent(&lent.extent.unwrap_or_default())
    }

    /// Takes room that the raylet lent. Where its pages cannot be had it goes back at once.
    pub fn take_extent(&self, lent: &ExtentInfo) -> Result<(), WorkerError> {
        let extent = Extent {
            offset: lent.offset,
            len: lent.length,
            reserved: lent.reserved,
        };
        let Err(error) = self.store()?.add_extent(extent) else {
            return Ok(());
        };
        let message = ReturnExtents { extents: vec![*lent] };
        self.tell_raylet(kinds::RETURN_EXTENTS, 0, ray_wire::encode(&message))?;
        Err(WorkerError::StoreFull(error.to_string()))
    }
}
