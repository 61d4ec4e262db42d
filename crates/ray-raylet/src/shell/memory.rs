//! The object store's frames.
//!
//! Invariant: 1. Every request for room or for an object is answered.

use super::node::{LinkRole, Node};
use bytes::Bytes;
use ray_ids::{NodeId, ObjectId, WorkerId};
use ray_rpc::{Frame, Link};
use ray_store::{ClientSlot, Extent};
use ray_wire::{kinds, ExtentInfo, ExtentLent, FetchFailed, FetchObject, FreeObjects, ObjectLocal, RequestExtent, ReturnExtents};
use serde_json::{json, Value};
use std::sync::Arc;

impl Node {
    pub(super) fn on_object_frame(&mut self, link: &Arc<Link>, _role: LinkRole, worker: WorkerId, frame: Frame) -> Result<(), String> {
        let correlation = frame.correlation;
        let error = |error: ray_wire::WireError| error.to_string();
        match frame.kind {
            kinds::REQUEST_EXTENT => {
                let message: RequestExtent = ray_wire::decode("RequestExtent", frame.header).map_err(error)?;
                let slot = self.processes.get(&worker).and_then(|process| process.slot).ok_or("it has no store")?;
                let answer = match self.store.lend_extent(slot, message.minimum_bytes) {
                    Ok(extent) => ExtentLent {
                        extent: Some(ExtentInfo { offset: extent.offset, length: extent.len, reserved: extent.reserved }),
                        error: String::new(),
                    },
                    Err(error) => ExtentLent { extent: None, error: error.to_string() },
                };
                let _ = link.send(kinds::EXTENT_LENT, correlation, ray_wire::encode(&answer), &[]);
            }
            kinds::RETURN_EXTENTS => {
                let message: ReturnExtents = ray_wire::decode("ReturnExtents", frame.header).map_err(error)?;
                let slot = self.processes.get(&worker).and_then(|process| process.slot).ok_or("it has no store")?;
                for extent in message.extents {
                    let extent = Extent { offset: extent.offset, len: extent.length, reserved: extent.reserved };
                    self.store.give_back(slot, extent).map_err(|error| error.to_string())?;
                }
            }
            kinds::RING_DOORBELL => drop(self.store.drain_rings()),
            kinds::FREE_OBJECTS => {
                let message: FreeObjects = ray_wire::decode("FreeObjects", frame.header).map_err(error)?;
                let ids: Vec<ObjectId> =
                    message.object_ids.chunks(ObjectId::SIZE).filter_map(|id| ObjectId::from_binary(id).ok()).collect();
                self.store.delete_many(&ids);
            }
            kinds::FETCH_OBJECT => {
                let message: FetchObject = ray_wire::decode("FetchObject", frame.header).map_err(error)?;
                let object = ObjectId::from_binary(&message.object_id).map_err(|error| error.to_string())?;
                if self.store.contains(&object) {
                    let local = ObjectLocal { object_id: message.object_id, transferred: false };
                    let _ = link.send(kinds::OBJECT_LOCAL, correlation, ray_wire::encode(&local), &[]);
                } else {
                    let failed = FetchFailed { object_id: message.object_id, reason: "it is not here".into(), ..Default::default() };
                    let _ = link.send(kinds::FETCH_FAILED, correlation, ray_wire::encode(&failed), &[]);
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn forget_store_client(&mut self, _worker: WorkerId, slot: ClientSlot) {
        let _ = self.store.forget_client(slot);
    }

    pub(super) fn objects_node_died(&mut self, _node: NodeId) {}

    pub(super) fn owner_of_objects_died(&mut self, _worker: WorkerId) {}

    pub(super) fn describe_objects(&mut self) -> Value {
        json!([])
    }

    pub(super) fn describe_memory(&mut self) -> Value {
        json!({ "ledger": format!("{:?}", self.store.ledger()) })
    }

    pub(super) fn describe_object_waits(&self) -> Value {
        json!([])
    }

    pub(super) fn read_logs(&mut self) {
        let (all, more) = self.logs.read(self.limits.log_batch_bytes);
        for new in all {
            let Some(job) = self.processes.get(&new.worker).and_then(|process| process.job) else { continue };
            let message = ray_wire::LogLines {
                pid: new.pid,
                name: new.name,
                host: self.config.host.clone(),
                is_error: new.is_error,
                lines: new.lines,
                job_id: ray_wire::id_bytes(job.as_bytes()),
            };
            match self.jobs.drivers.get(&job) {
                Some(driver) => self.send_to(driver, kinds::LOG_LINES, 0, ray_wire::encode(&message)),
                None => self.publish_logs(&message),
            }
        }
        if more {
            self.at(self.limits.log_interval_ms, super::node::Timer::ReadLogs);
        }
    }

    fn publish_logs(&mut self, _message: &ray_wire::LogLines) {}
}

#[allow(unused)]
fn unused(_: Bytes) {}
