//! What the processes of the simulation exchange: owns the messages (the wire protocol's, with typed ids), calls and values.
//!
//! Messages between raylets and the control plane are `ray_gcs`'s own; the others stand for the message of `ray_wire` that
//! their documentation names.

use std::rc::Rc;

use ray_gcs::{GcsMessage, NodeMessage};
use ray_ids::{ActorId, LeaseId, NodeId, ObjectId, TaskId, WorkerId};
use ray_raylet::types::RequestKey;
use ray_wire::{ActorCreated, ActorState, CreateActor, GcsCall, GcsReply, LeaseSpecification};

use crate::program::Script;

/// A reference as it travels: the object and its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    pub object: ObjectId,
    pub owner: WorkerId,
    /// Whether a program may wait for it. What came out of an actor's keeping may belong to a call that waits for the
    /// program itself, and a program that waits for itself is wrong in every runtime.
    pub waitable: bool,
}

/// Why a call has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    WorkerDied,
    ActorDied,
    ActorUnavailable,
    ArgumentFailed,
    OwnerDied,
    Freed,
    Lost,
    Unschedulable,
}

/// What is known of an object's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// It is here, and contains these references.
    Inline(Rc<[Reference]>),
    /// It lies in the stores of these nodes.
    Stored(Vec<NodeId>),
    Failed(Failure),
}

/// What kind of call it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallKind {
    Plain { cpus: u32 },
    Method { actor: ActorId, handle: Reference },
    Constructor { actor: ActorId, max_concurrency: usize },
}

/// A call, the same for each of its attempts.
#[derive(Debug)]
pub struct Call {
    pub task: TaskId,
    pub kind: CallKind,
    pub script: Rc<Script>,
    /// References inside the pickled arguments.
    pub by_value: Vec<Reference>,
    /// Top-level references: the worker reads their values.
    pub by_reference: Vec<Reference>,
    pub retries: i32,
    /// Whether the result goes to the node's store.
    pub stored: bool,
}

impl Call {
    /// Its one return.
    pub fn result(&self) -> ObjectId {
        ObjectId::of(self.task, 1)
    }

    /// Every reference that the caller counts while it runs.
    pub fn counted(&self) -> Vec<ObjectId> {
        let handle = match &self.kind {
            CallKind::Method { handle, .. } => Some(handle.object),
            _ => None,
        };
        self.by_value
            .iter()
            .chain(&self.by_reference)
            .map(|reference| reference.object)
            .chain(handle)
            .collect()
    }
}

/// `PUSH_TASK`.
#[derive(Debug, Clone)]
pub struct Push {
    pub call: Rc<Call>,
    pub caller: WorkerId,
    pub attempt: u32,
    pub lease: LeaseId,
    pub sequence: u64,
    pub incarnation: u64,
}

/// What a reply says.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Returned(Rc<[Reference]>),
    ReturnedStored(NodeId, Rc<[Reference]>),
    Failed(Failure),
    StaleLease,
    StaleIncarnation,
}

/// `TASK_REPLY`.
#[derive(Debug, Clone)]
pub struct Reply {
    pub task: TaskId,
    pub attempt: u32,
    pub lease: LeaseId,
    pub outcome: Outcome,
    pub retained: Vec<(ObjectId, WorkerId, u64)>,
    pub wants_acknowledgement: bool,
}

/// A message. Its kind on the wire stands before each.
#[derive(Debug, Clone)]
pub enum Message {
    // Process and process.
    Push(Push),
    Reply(Reply),
    RecallTasks {
        lease: LeaseId,
    },
    TasksRecalled {
        lease: LeaseId,
        tasks: Vec<(TaskId, u64)>,
    },
    AddBorrower {
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    },
    BorrowerAdded {
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    },
    RemoveBorrower {
        object: ObjectId,
        generation: u64,
    },
    ReturnsAcknowledged {
        task: TaskId,
    },
    GetObjectStatus {
        object: ObjectId,
    },
    ObjectStatus {
        object: ObjectId,
        value: Value,
    },
    AddLocation {
        object: ObjectId,
        node: NodeId,
    },
    ReportLost {
        object: ObjectId,
        nodes: Vec<NodeId>,
    },
    // Process to raylet.
    RequestLease {
        key: RequestKey,
        specification: LeaseSpecification,
        redirected: bool,
    },
    CancelRequest {
        key: RequestKey,
    },
    ReturnLease {
        lease: LeaseId,
        worker_exits: bool,
    },
    WorkerBlocked {
        lease: LeaseId,
    },
    WorkerUnblocked {
        lease: LeaseId,
    },
    WatchWorker {
        worker: WorkerId,
    },
    GcsCall {
        call: Box<GcsCall>,
    },
    ActorCreated(ActorCreated),
    FreeObjects {
        object: ObjectId,
    },
    FetchObject {
        object: ObjectId,
        locations: Vec<NodeId>,
    },
    // Raylet to process.
    LeaseGranted {
        correlation: u64,
        lease: LeaseId,
        worker: WorkerId,
        node: NodeId,
        first_sequence: u64,
    },
    LeaseRedirected {
        correlation: u64,
        node: NodeId,
    },
    LeaseRefused {
        correlation: u64,
    },
    LeaseQueued {
        correlation: u64,
    },
    RecallLease {
        lease: LeaseId,
    },
    LeaseBroken {
        lease: LeaseId,
        started: Option<u64>,
    },
    LeaseAssigned {
        lease: Option<LeaseId>,
    },
    WorkerDied {
        worker: WorkerId,
    },
    NodeDied {
        node: NodeId,
    },
    ExitProcess,
    CreateActor(Box<CreateActor>),
    Publication(Box<ActorState>),
    GcsAnswer {
        reply: Box<GcsReply>,
    },
    ObjectLocal {
        object: ObjectId,
    },
    FetchFailed {
        object: ObjectId,
        absent: Vec<NodeId>,
    },
    // Raylet and raylet.
    WatchElsewhere {
        worker: WorkerId,
    },
    DiedElsewhere {
        worker: WorkerId,
    },
    Pull {
        object: ObjectId,
    },
    Pulled {
        object: ObjectId,
        contents: Option<Rc<[Reference]>>,
    },
    // Raylet and control plane.
    ToGcs(Box<NodeMessage>),
    FromGcs(Box<GcsMessage>),
    GcsReply {
        correlation: u64,
        reply: Box<GcsReply>,
    },
}

/// A place that sends and receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    Process(WorkerId),
    Raylet(NodeId),
    Gcs,
}
