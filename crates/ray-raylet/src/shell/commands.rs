//! Carries out what the scheduler says, and reads what processes send.
//!
//! Invariant: 1. A worker hears of its lease before its owner does: the assignment is sent first.

use super::node::{LinkRole, Node};
use super::signals;
use crate::types::{Command, Event, RequestKey};
use bytes::Bytes;
use ray_ids::{ActorId, LeaseId, NodeId, WorkerId};
use ray_rpc::{Frame, Link};
use ray_wire::{
    kinds, ActorCreated, CancelLeaseRequest, ExitProcess, InterruptTask, LeaseAssigned, LeaseBroken, LeaseGranted,
    LeaseQueued, LeaseRedirected, LeaseRefused, NodeQuery, RecallLease, RegisterProcess, RequestLease, ReturnLease,
    WatchWorker, WorkerBlocked, WorkerDeathReport, WorkerExiting, WorkerUnblocked,
};
use std::sync::Arc;

fn decode<M: prost::Message + Default>(name: &'static str, header: Bytes) -> Result<M, String> {
    ray_wire::decode(name, header).map_err(|error| error.to_string())
}

fn lease_id(bytes: &Bytes) -> Result<LeaseId, String> {
    LeaseId::from_binary(bytes).map_err(|error| error.to_string())
}

impl Node {
    /// The link to a process, of this node or another.
    pub(super) fn link_to(&self, process: &WorkerId) -> Option<&Arc<Link>> {
        match self.processes.get(process) {
            Some(process) => process.link.as_ref(),
            None => self.remote_owners.get(process),
        }
    }

    pub(super) fn send_to(&self, process: &WorkerId, kind: u16, correlation: u64, header: Bytes) {
        if let Some(link) = self.link_to(process) {
            // A closed link is noticed by `on_closed`, which undoes what was meant for it.
            let _ = link.send(kind, correlation, header, &[]);
        }
    }

    pub(super) fn carry_out(&mut self, command: Command) {
        match command {
            Command::Grant {
                key,
                lease,
                worker,
                first_sequence,
            } => {
                let message = LeaseGranted {
                    lease_id: ray_wire::id_bytes(lease.as_bytes()),
                    worker: Some(self.address_of(worker)),
                    worker_pid: self.processes.get(&worker).map_or(0, |process| process.pid),
                    first_sequence,
                };
                self.send_to(
                    &key.process,
                    kinds::LEASE_GRANTED,
                    key.correlation,
                    ray_wire::encode(&message),
                );
            }
            Command::Redirect { key, node } => {
                let raylet = self.nodes.get(&node).and_then(|info| info.address.clone());
                let message = LeaseRedirected { raylet };
                self.send_to(
                    &key.process,
                    kinds::LEASE_REDIRECTED,
                    key.correlation,
                    ray_wire::encode(&message),
                );
            }
            Command::Refuse {
                key,
                error_kind,
                message,
            } => {
                let message = LeaseRefused { error_kind, message };
                self.send_to(
                    &key.process,
                    kinds::LEASE_REFUSED,
                    key.correlation,
                    ray_wire::encode(&message),
                );
            }
            Command::Queued {
                key,
                reason,
                infeasible,
            } => {
                let message = LeaseQueued { reason, infeasible };
                self.send_to(
                    &key.process,
                    kinds::LEASE_QUEUED,
                    key.correlation,
                    ray_wire::encode(&message),
                );
            }
            Command::Recall { owner, lease } => {
                let message = RecallLease {
                    lease_id: ray_wire::id_bytes(lease.as_bytes()),
                };
                self.send_to(&owner, kinds::RECALL_LEASE, 0, ray_wire::encode(&message));
            }
            Command::AssignLease {
                worker,
                lease,
                job,
                resources,
                strategy,
                instances_json,
                runtime_env_json,
                first_sequence,
                first_of_job,
            } => {
                let config = self.jobs().configs.get(&job).filter(|_| first_of_job);
                let message = LeaseAssigned {
                    lease_id: ray_wire::id_bytes(lease.as_bytes()),
                    job_id: ray_wire::id_bytes(job.as_bytes()),
                    resource_instances_json: instances_json,
                    job_config_json: config.cloned().unwrap_or_default(),
                    first_sequence,
                    resources,
                    strategy,
                    runtime_env_json,
                };
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.job = Some(job);
                }
                self.send_to(&worker, kinds::LEASE_ASSIGNED, 0, ray_wire::encode(&message));
            }
            Command::UnassignLease { worker } => {
                self.send_to(
                    &worker,
                    kinds::LEASE_ASSIGNED,
                    0,
                    ray_wire::encode(&LeaseAssigned::default()),
                );
            }
            Command::StartWorker {
                worker,
                runtime_env_json,
                job,
            } => self.start_worker(worker, runtime_env_json, job),
            Command::AskToExit { worker, reason } => {
                let message = ExitProcess { reason, force: false };
                self.send_to(&worker, kinds::EXIT_PROCESS, 0, ray_wire::encode(&message));
            }
            Command::KillWorker { worker, cause } => {
                let Some(process) = self.processes.get_mut(&worker) else {
                    return;
                };
                process.kill_cause.get_or_insert(cause);
                if process.pid != 0 && process.exit.is_none() {
                    signals::kill_group(process.pid);
                }
            }
            Command::LeaseBroken {
                owner,
                lease,
                cause,
                started_sequence,
            } => {
                let message = LeaseBroken {
                    lease_id: ray_wire::id_bytes(lease.as_bytes()),
                    cause: Some(cause),
                    started_sequence,
                };
                self.send_to(&owner, kinds::LEASE_BROKEN, 0, ray_wire::encode(&message));
            }
            Command::CreateActor { worker, message } => {
                self.send_to(&worker, kinds::CREATE_ACTOR, 0, ray_wire::encode(&*message));
            }
            Command::AnswerActor(message) => self.answer_actor(*message),
            Command::ReportDeath { worker, cause, actor } => {
                let (actor_id, incarnation) = match actor {
                    Some((actor, incarnation)) => (ray_wire::id_bytes(actor.as_bytes()), incarnation),
                    None => (Bytes::new(), 0),
                };
                let worker = Some(self.address_of(worker));
                let report = WorkerDeathReport {
                    worker,
                    cause: Some(cause),
                    actor_id,
                    incarnation,
                    ..Default::default()
                };
                self.report_death(report);
            }
            Command::AnswerBundlesPrepared {
                group,
                attempt,
                success,
            } => self.answer_prepared(group, attempt, success),
            Command::AnswerBundlesCommitted { group, attempt } => self.answer_committed(group, attempt),
            Command::AskPlacementGroup { group } => self.ask_placement_group(group),
        }
    }

    /// A frame of a process, of this node or another, or of a raylet. An error closes its link.
    pub(super) fn on_process_frame(&mut self, link: &Arc<Link>, role: LinkRole, frame: Frame) -> Result<(), String> {
        let (correlation, header) = (frame.correlation, frame.header.clone());
        if frame.kind == kinds::REGISTER_PROCESS {
            if role != LinkRole::Unknown {
                return Err("it registered twice".into());
            }
            return self.register_process(link, correlation, decode::<RegisterProcess>("RegisterProcess", header)?);
        }
        let worker = match role {
            LinkRole::Process(worker) | LinkRole::Remote(worker) => worker,
            _ => WorkerId::NIL,
        };
        match frame.kind {
            kinds::REQUEST_LEASE => {
                let message: RequestLease = decode("RequestLease", header)?;
                let worker = self.identify(link, role, worker, message.owner.as_ref())?;
                let specification = message.specification.ok_or("a RequestLease lacks its specification")?;
                let key = RequestKey {
                    process: worker,
                    correlation,
                };
                let preferred = NodeId::from_binary(&message.preferred_node).ok();
                self.step(Event::RequestLease {
                    key,
                    specification,
                    preferred,
                    redirected: message.redirected,
                });
            }
            kinds::CANCEL_LEASE_REQUEST => {
                let message: CancelLeaseRequest = decode("CancelLeaseRequest", header)?;
                self.step(Event::CancelRequest {
                    key: RequestKey {
                        process: worker,
                        correlation: message.request,
                    },
                });
            }
            kinds::RETURN_LEASE => {
                let message: ReturnLease = decode("ReturnLease", header)?;
                let lease = lease_id(&message.lease_id)?;
                self.step(Event::ReturnLease {
                    owner: worker,
                    lease,
                    worker_exits: message.worker_exits,
                });
            }
            kinds::WORKER_BLOCKED => {
                let message: WorkerBlocked = decode("WorkerBlocked", header)?;
                // A driver or an actor has no lease to give back.
                if let Ok(lease) = lease_id(&message.lease_id) {
                    self.step(Event::Blocked {
                        worker,
                        lease,
                        reason: message.reason,
                    });
                }
            }
            kinds::WORKER_UNBLOCKED => {
                let message: WorkerUnblocked = decode("WorkerUnblocked", header)?;
                if let Ok(lease) = lease_id(&message.lease_id) {
                    self.step(Event::Unblocked { worker, lease });
                }
            }
            // A worker is ready once others can connect to it: it listens after it was welcomed.
            kinds::WORKER_LISTENING if matches!(role, LinkRole::Process(_)) => self.step(Event::WorkerReady { worker }),
            kinds::WORKER_EXITING => {
                let message: WorkerExiting = decode("WorkerExiting", header)?;
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.exit_cause = message.cause.clone();
                }
                self.step(Event::WorkerExiting {
                    worker,
                    cause: message.cause,
                });
            }
            kinds::WATCH_WORKER => {
                let message: WatchWorker = decode("WatchWorker", header)?;
                self.watch_worker(link, correlation, &message)?;
            }
            kinds::WORKER_DIED => self.died_elsewhere(role, decode("WorkerDied", header)?)?,
            kinds::ADD_LOCATION => self.pass_location(link, role, &decode("AddLocation", header)?)?,
            kinds::ACTOR_CREATED => {
                let mut message: ActorCreated = decode("ActorCreated", header)?;
                ActorId::from_binary(&message.actor_id).map_err(|error| error.to_string())?;
                if message.failure.is_none() && !message.rejected {
                    message.worker = Some(self.address_of(worker));
                    message.pid = self.processes.get(&worker).map_or(message.pid, |process| process.pid);
                }
                self.step(Event::ActorAnswered { worker, message });
            }
            kinds::INTERRUPT_TASK => {
                let message: InterruptTask = decode("InterruptTask", frame.header.clone())?;
                self.interrupt(&message, frame.header);
            }
            kinds::GCS_REQUEST => {
                if worker.is_nil() && role != LinkRole::Tool {
                    return Err("it asked the control plane before it registered".into());
                }
                self.relay_gcs_request(link, worker, correlation, header, frame.payload)?;
            }
            kinds::NODE_QUERY => {
                let message: NodeQuery = decode("NodeQuery", header)?;
                self.answer_query(link, correlation, &message.query_json);
            }
            kinds::PING => {
                let _ = link.send(kinds::PONG, correlation, Bytes::new(), &[]);
            }
            _ => return self.on_object_frame(link, role, worker, frame),
        }
        Ok(())
    }

    /// Who asks for a lease: the process of the link, or, over a link from elsewhere, who it says it is.
    fn identify(
        &mut self,
        link: &Arc<Link>,
        role: LinkRole,
        worker: WorkerId,
        owner: Option<&ray_wire::Address>,
    ) -> Result<WorkerId, String> {
        if !worker.is_nil() {
            return Ok(worker);
        }
        let said = owner
            .and_then(|owner| owner.worker().ok())
            .filter(|worker| !worker.is_nil());
        match (role, said) {
            (LinkRole::Unknown, Some(worker)) if matches!(link.peer(), ray_rpc::Peer::Tcp { .. }) => {
                self.links.insert(link.id(), (link.clone(), LinkRole::Remote(worker)));
                self.remote_owners.insert(worker, link.clone());
                Ok(worker)
            }
            _ => Err("it asked for a lease before it registered".into()),
        }
    }

    fn watch_worker(&mut self, link: &Arc<Link>, correlation: u64, message: &WatchWorker) -> Result<(), String> {
        let address = message.worker.as_ref().ok_or("a WatchWorker names nobody")?;
        let worker = address.worker().map_err(|error| error.to_string())?;
        let node = address.node().map_err(|error| error.to_string())?;
        let dead = self.watchers.watch(worker, link, correlation).or_else(|| {
            let unknown = node == self.node_id && !self.processes.contains_key(&worker);
            unknown.then(|| ray_wire::WorkerDied {
                worker: message.worker.clone(),
                cause: Some(crate::types::death(
                    ray_wire::DEATH_UNKNOWN,
                    format!("process {worker} is not on node {node} any more, or never was"),
                )),
            })
        });
        if let Some(died) = dead {
            let _ = link.send(kinds::WORKER_DIED, correlation, ray_wire::encode(&died), &[]);
            self.watchers.forget(&worker, link.id(), correlation);
        } else {
            self.watch_elsewhere(worker, node);
        }
        Ok(())
    }

    /// Interrupts what a worker runs, or kills the worker.
    fn interrupt(&mut self, message: &InterruptTask, header: Bytes) {
        let Some(worker) = message.worker.as_ref().and_then(|address| address.worker().ok()) else {
            return;
        };
        if message.force {
            let cause = crate::types::death(ray_wire::DEATH_KILLED, "its task was cancelled by force");
            self.carry_out(Command::KillWorker { worker, cause });
        } else {
            self.send_to(&worker, kinds::INTERRUPT_TASK, 0, header);
        }
    }
}
