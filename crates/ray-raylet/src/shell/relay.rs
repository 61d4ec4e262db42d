//! What is asked of the control plane and what it answers: owns the relay between the node's processes and the control
//! plane, the raylet's own questions, and publications on their way to whoever watches.
//!
//! Invariants: those of `gcs`.

use super::gcs::{random_request_id, Asker, Pending, Watches};
use super::node::Node;
use crate::types::Event;
use bytes::Bytes;
use ray_ids::{JobId, PlacementGroupId, WorkerId};
use ray_rpc::{Link, RpcError};
use ray_wire::{kinds, AddJob, GcsCall, GcsReply, GcsRequest, JobKey, JsonQuery, Publication, GCS_ERROR_NOT_FOUND};
use serde_json::Value;
use std::sync::Arc;

impl Node {
    /// Asks the control plane; what cannot be sent now is sent once it is there.
    pub(super) fn ask_gcs(&mut self, asker: Asker, request: &GcsRequest, payload: Bytes) {
        self.gcs.next_correlation += 1;
        let correlation = self.gcs.next_correlation;
        let header = ray_wire::encode(request);
        self.gcs.pending.insert(
            correlation,
            Pending {
                asker,
                header: header.clone(),
                payload: payload.clone(),
            },
        );
        self.send_request(correlation, header, payload);
    }

    pub(super) fn send_request(&mut self, correlation: u64, header: Bytes, payload: Bytes) {
        let Some(link) = self.gcs.link.clone().filter(|_| self.gcs.registered) else {
            return;
        };
        let payload = if payload.is_empty() { vec![] } else { vec![payload] };
        if let Err(error @ RpcError::FrameTooLarge { .. }) =
            link.send(kinds::GCS_REQUEST, correlation, header, &payload)
        {
            if let Some(pending) = self.gcs.pending.remove(&correlation) {
                let reply = GcsReply {
                    error: error.to_string(),
                    error_kind: ray_wire::GCS_ERROR_INVALID,
                    ..Default::default()
                };
                self.answer(pending.asker, ray_wire::encode(&reply), Bytes::new());
            }
        }
    }

    /// A process asks the control plane through this raylet.
    pub(super) fn relay_gcs_request(
        &mut self,
        link: &Arc<Link>,
        worker: WorkerId,
        correlation: u64,
        header: Bytes,
        payload: Bytes,
    ) -> Result<(), String> {
        let mut request: GcsRequest = ray_wire::decode("GcsRequest", header).map_err(|error| error.to_string())?;
        request.sender = Some(self.address_of(worker));
        match &request.call {
            Some(GcsCall::WatchActor(key)) => {
                self.gcs
                    .watches
                    .entry(worker)
                    .or_default()
                    .actors
                    .insert(key.actor_id.clone());
            }
            Some(GcsCall::UnwatchActor(key)) => {
                if let Some(watches) = self.gcs.watches.get_mut(&worker) {
                    watches.actors.remove(&key.actor_id);
                }
            }
            Some(GcsCall::Subscribe(subscribe)) => {
                self.gcs
                    .watches
                    .entry(worker)
                    .or_default()
                    .channels
                    .insert(subscribe.channel.clone());
            }
            _ => {}
        }
        let asker = Asker::Link {
            link: link.clone(),
            correlation,
        };
        self.ask_gcs(asker, &request, payload);
        Ok(())
    }

    pub(super) fn gcs_reply(
        &mut self,
        correlation: u64,
        header: Bytes,
        payload: Bytes,
    ) -> Result<(), ray_wire::WireError> {
        if let Some(pending) = self.gcs.pending.remove(&correlation) {
            self.answer(pending.asker, header, payload);
        } else {
            // The acknowledgement of a death.
            self.gcs.deaths.remove(&correlation);
        }
        Ok(())
    }

    pub(super) fn answer(&mut self, asker: Asker, header: Bytes, payload: Bytes) {
        match asker {
            Asker::Link { link, correlation } => {
                let payload = if payload.is_empty() { vec![] } else { vec![payload] };
                // A link that closed has nobody behind it who waits.
                let _ = link.send(kinds::GCS_REPLY, correlation, header, &payload);
            }
            Asker::AddJob {
                worker,
                correlation,
                config_json,
            } => {
                let number = match ray_wire::decode::<GcsReply>("GcsReply", header) {
                    Ok(reply) if reply.error.is_empty() => {
                        u32::try_from(reply.number).map_err(|_| format!("job number {} is too large", reply.number))
                    }
                    Ok(reply) => Err(reply.error),
                    Err(error) => Err(error.to_string()),
                };
                self.job_added(worker, correlation, config_json, number);
            }
            Asker::Group(group) => {
                let Ok(reply) = ray_wire::decode::<GcsReply>("GcsReply", header) else {
                    return;
                };
                let answer: Value = serde_json::from_str(&reply.json).unwrap_or_default();
                let state = answer.get("state").and_then(Value::as_str).unwrap_or_default();
                if state == "REMOVED" || reply.error_kind == GCS_ERROR_NOT_FOUND {
                    self.step(Event::PlacementGroupRemoved { group });
                }
            }
            Asker::FinishJob | Asker::Nobody => {}
        }
    }

    /// A driver registered here: its job begins.
    pub(super) fn add_job(&mut self, worker: WorkerId, correlation: u64, pid: u32, config_json: String) {
        let add = AddJob {
            driver: Some(self.address_of(worker)),
            pid,
            config_json: config_json.clone(),
            job_number: 0,
        };
        let request = self.own_request(GcsCall::AddJob(add));
        if self
            .gcs
            .watches
            .entry(WorkerId::NIL)
            .or_default()
            .channels
            .insert("logs".into())
        {
            // What this job's workers print on other nodes comes here.
            let subscribe = self.own_request(GcsCall::Subscribe(ray_wire::Subscribe { channel: "logs".into() }));
            self.ask_gcs(Asker::Nobody, &subscribe, Bytes::new());
        }
        self.ask_gcs(
            Asker::AddJob {
                worker,
                correlation,
                config_json,
            },
            &request,
            Bytes::new(),
        );
    }

    /// A driver left.
    pub(super) fn finish_job(&mut self, job: JobId) {
        let request = self.own_request(GcsCall::FinishJob(JobKey {
            job_id: ray_wire::id_bytes(job.as_bytes()),
        }));
        self.ask_gcs(Asker::FinishJob, &request, Bytes::new());
    }

    /// Asks whether a placement group exists still.
    pub(super) fn ask_placement_group(&mut self, group: PlacementGroupId) {
        let query = serde_json::json!({ "method": "placement_group", "placement_group_id": group.to_string() });
        let mut request = self.own_request(GcsCall::Query(JsonQuery {
            query_json: query.to_string(),
        }));
        request.request_id = 0;
        self.ask_gcs(Asker::Group(group), &request, Bytes::new());
    }

    /// Something for the subscribers of a channel.
    pub(super) fn publish_on(&mut self, channel: &str, json: String) {
        let publish = ray_wire::Publish {
            channel: channel.into(),
            json,
        };
        let request = self.own_request(GcsCall::Publish(publish));
        self.ask_gcs(Asker::Nobody, &request, Bytes::new());
    }

    pub(super) fn own_request(&self, call: GcsCall) -> GcsRequest {
        GcsRequest {
            request_id: random_request_id(),
            sender: Some(self.address.clone()),
            call: Some(call),
        }
    }

    pub(super) fn publish(&mut self, header: Bytes, payload: Bytes) -> Result<(), ray_wire::WireError> {
        let publication: Publication = ray_wire::decode("Publication", header.clone())?;
        self.gcs.epoch = publication.epoch;
        self.gcs.sequence = self.gcs.sequence.max(publication.sequence);
        let wants = |watches: &Watches| match &publication.actor {
            Some(actor) => watches.actors.contains(&actor.actor_id),
            None => watches.channels.contains(&publication.channel),
        };
        let subscribers: Vec<WorkerId> = if publication.subscribers.is_empty() {
            self.gcs
                .watches
                .iter()
                .filter(|(_, watches)| wants(watches))
                .map(|(worker, _)| *worker)
                .collect()
        } else {
            publication
                .subscribers
                .iter()
                .filter_map(|id| WorkerId::from_binary(id).ok())
                .collect()
        };
        let payload = if payload.is_empty() { vec![] } else { vec![payload] };
        for worker in subscribers {
            if worker.is_nil() {
                self.logs_from_elsewhere(&publication.json);
            } else if let Some(link) = self.processes.get(&worker).and_then(|process| process.link.as_ref()) {
                let _ = link.send(kinds::PUBLICATION, 0, header.clone(), &payload);
            }
        }
        Ok(())
    }
}
