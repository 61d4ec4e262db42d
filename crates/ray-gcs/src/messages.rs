//! The frames between a raylet and the control plane as values: owns which kind is which message, each way.
//!
//! It refuses kinds that the other side does not send.

use bytes::Bytes;
use ray_wire::{
    decode, encode, kinds, ActorCreated, BundlesCommitted, BundlesPrepared, ClusterUpdate, CommitBundles, CreateActor,
    DrainNode, GcsReply, GcsRequest, JobFinished, KillActorWorker, LeavesCluster, NodeDied, NodeRegistered,
    PrepareBundles, Publication, RegisterNode, ResourceReport, ReturnBundles, WorkerDeathReport, WorkerDied,
};

use crate::error::GcsError;

/// What a raylet says.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeMessage {
    /// It joins, or joins again.
    Register {
        correlation: u64,
        message: Box<RegisterNode>,
    },
    /// What it has free.
    ResourceReport(ResourceReport),
    /// A question or order, its own or relayed.
    Request { correlation: u64, request: Box<GcsRequest> },
    /// How a placed actor's creation ended.
    ActorCreated(ActorCreated),
    /// A process of it is dead. Acknowledged under the correlation, if that is not 0.
    WorkerDeath {
        correlation: u64,
        report: WorkerDeathReport,
    },
    /// The answer to `PrepareBundles`.
    BundlesPrepared(BundlesPrepared),
    /// The answer to `CommitBundles`.
    BundlesCommitted(BundlesCommitted),
    /// Are you there?
    Ping { correlation: u64 },
    /// It is there.
    Pong,
}

/// What the control plane says.
#[derive(Debug, Clone, PartialEq)]
pub enum GcsMessage {
    /// The answer to `RegisterNode`.
    NodeRegistered {
        correlation: u64,
        message: Box<NodeRegistered>,
    },
    /// Nodes that changed.
    ClusterUpdate(ClusterUpdate),
    /// A node is dead.
    NodeDied(NodeDied),
    /// News for processes of that node.
    Publication(Box<Publication>),
    /// Create this actor.
    PlaceActor(Box<CreateActor>),
    /// End that actor's worker.
    KillActorWorker(KillActorWorker),
    /// A process elsewhere is dead.
    WorkerDied(WorkerDied),
    /// A job is over.
    JobFinished(JobFinished),
    /// Reserve bundles.
    PrepareBundles(PrepareBundles),
    /// Make them usable.
    CommitBundles(CommitBundles),
    /// Give them up.
    ReturnBundles(ReturnBundles),
    /// Take no new work.
    DrainNode(DrainNode),
    /// You were declared dead.
    DeclaredDead(LeavesCluster),
    /// Are you there?
    Ping,
    /// The control plane is there.
    Pong { correlation: u64 },
}

impl NodeMessage {
    /// Reads a frame.
    pub fn decode(kind: u16, correlation: u64, header: Bytes) -> Result<Self, GcsError> {
        Ok(match kind {
            kinds::REGISTER_NODE => Self::Register {
                correlation,
                message: Box::new(decode("RegisterNode", header)?),
            },
            kinds::RESOURCE_REPORT => Self::ResourceReport(decode("ResourceReport", header)?),
            kinds::GCS_REQUEST => Self::Request {
                correlation,
                request: Box::new(decode("GcsRequest", header)?),
            },
            kinds::ACTOR_CREATED => Self::ActorCreated(decode("ActorCreated", header)?),
            kinds::WORKER_DEATH_REPORT => Self::WorkerDeath {
                correlation,
                report: decode("WorkerDeathReport", header)?,
            },
            kinds::BUNDLES_PREPARED => Self::BundlesPrepared(decode("BundlesPrepared", header)?),
            kinds::BUNDLES_COMMITTED => Self::BundlesCommitted(decode("BundlesCommitted", header)?),
            kinds::PING => Self::Ping { correlation },
            kinds::PONG => Self::Pong,
            _ => {
                return Err(GcsError::UnexpectedKind {
                    kind,
                    name: kinds::name(kind),
                })
            }
        })
    }

    /// The frame's kind, correlation and header.
    pub fn encode(&self) -> (u16, u64, Bytes) {
        match self {
            Self::Register { correlation, message } => (kinds::REGISTER_NODE, *correlation, encode(message.as_ref())),
            Self::ResourceReport(message) => (kinds::RESOURCE_REPORT, 0, encode(message)),
            Self::Request { correlation, request } => (kinds::GCS_REQUEST, *correlation, encode(request.as_ref())),
            Self::ActorCreated(message) => (kinds::ACTOR_CREATED, 0, encode(message)),
            Self::WorkerDeath { correlation, report } => (kinds::WORKER_DEATH_REPORT, *correlation, encode(report)),
            Self::BundlesPrepared(message) => (kinds::BUNDLES_PREPARED, 0, encode(message)),
            Self::BundlesCommitted(message) => (kinds::BUNDLES_COMMITTED, 0, encode(message)),
            Self::Ping { correlation } => (kinds::PING, *correlation, Bytes::new()),
            Self::Pong => (kinds::PONG, 0, Bytes::new()),
        }
    }
}

impl GcsMessage {
    /// The frame's kind, correlation and header.
    pub fn encode(&self) -> (u16, u64, Bytes) {
        match self {
            Self::NodeRegistered { correlation, message } => {
                (kinds::NODE_REGISTERED, *correlation, encode(message.as_ref()))
            }
            Self::ClusterUpdate(message) => (kinds::CLUSTER_UPDATE, 0, encode(message)),
            Self::NodeDied(message) => (kinds::NODE_DIED, 0, encode(message)),
            Self::Publication(message) => (kinds::PUBLICATION, 0, encode(message.as_ref())),
            Self::PlaceActor(message) => (kinds::PLACE_ACTOR, 0, encode(message.as_ref())),
            Self::KillActorWorker(message) => (kinds::KILL_ACTOR_WORKER, 0, encode(message)),
            Self::WorkerDied(message) => (kinds::WORKER_DEATH_NOTICE, 0, encode(message)),
            Self::JobFinished(message) => (kinds::JOB_FINISHED, 0, encode(message)),
            Self::PrepareBundles(message) => (kinds::PREPARE_BUNDLES, 0, encode(message)),
            Self::CommitBundles(message) => (kinds::COMMIT_BUNDLES, 0, encode(message)),
            Self::ReturnBundles(message) => (kinds::RETURN_BUNDLES, 0, encode(message)),
            Self::DrainNode(message) => (kinds::DRAIN_NODE, 0, encode(message)),
            Self::DeclaredDead(message) => (kinds::DECLARED_DEAD, 0, encode(message)),
            Self::Ping => (kinds::PING, 0, Bytes::new()),
            Self::Pong { correlation } => (kinds::PONG, *correlation, Bytes::new()),
        }
    }

    /// Reads a frame, as a raylet does.
    pub fn decode(kind: u16, correlation: u64, header: Bytes) -> Result<Self, GcsError> {
        Ok(match kind {
            kinds::NODE_REGISTERED => Self::NodeRegistered {
                correlation,
                message: Box::new(decode("NodeRegistered", header)?),
            },
            kinds::CLUSTER_UPDATE => Self::ClusterUpdate(decode("ClusterUpdate", header)?),
            kinds::NODE_DIED => Self::NodeDied(decode("NodeDied", header)?),
            kinds::PUBLICATION => Self::Publication(Box::new(decode("Publication", header)?)),
            kinds::PLACE_ACTOR => Self::PlaceActor(Box::new(decode("CreateActor", header)?)),
            kinds::KILL_ACTOR_WORKER => Self::KillActorWorker(decode("KillActorWorker", header)?),
            kinds::WORKER_DEATH_NOTICE => Self::WorkerDied(decode("WorkerDied", header)?),
            kinds::JOB_FINISHED => Self::JobFinished(decode("JobFinished", header)?),
            kinds::PREPARE_BUNDLES => Self::PrepareBundles(decode("PrepareBundles", header)?),
            kinds::COMMIT_BUNDLES => Self::CommitBundles(decode("CommitBundles", header)?),
            kinds::RETURN_BUNDLES => Self::ReturnBundles(decode("ReturnBundles", header)?),
            kinds::DRAIN_NODE => Self::DrainNode(decode("DrainNode", header)?),
            kinds::DECLARED_DEAD => Self::DeclaredDead(decode("LeavesCluster", header)?),
            kinds::PING => Self::Ping,
            kinds::PONG => Self::Pong { correlation },
            _ => {
                return Err(GcsError::UnexpectedKind {
                    kind,
                    name: kinds::name(kind),
                })
            }
        })
    }
}

/// The frame of a reply.
pub fn encode_reply(correlation: u64, reply: &GcsReply) -> (u16, u64, Bytes) {
    (kinds::GCS_REPLY, correlation, encode(reply))
}
