//! The kinds of frames: owns their numbers; each constant names the message its header holds and who sends it to whom.
//!
//! Letters: D driver or worker process ("core worker"), R raylet, G GCS. `→` one way; a reply has its own kind and the
//! request's correlation.
//!
//! Invariant: 1. A number is never reused; 0 is the link layer's.

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        $($(#[$doc])* pub const $name: u16 = $number;)*
        /// The name of a kind, for logs and errors.
        pub fn name(kind: u16) -> &'static str {
            match kind {
                $($number => stringify!($name),)*
                _ => "UNKNOWN",
            }
        }
    };
}

kinds! {
    // --- a process and its raylet ---
    /// D→R first frame: `RegisterProcess`. Answered by `WELCOME` or a closed link.
    REGISTER_PROCESS = 1;
    /// R→D: `Welcome`.
    WELCOME = 2;
    /// D→R: `RequestLease`.
    REQUEST_LEASE = 10;
    /// R→D: `LeaseGranted`.
    LEASE_GRANTED = 11;
    /// R→D: `LeaseRedirected`: ask that raylet instead.
    LEASE_REDIRECTED = 12;
    /// R→D: `LeaseRefused`.
    LEASE_REFUSED = 13;
    /// R→D: `LeaseQueued`: no lease is to be had now; the owner may pipeline on those it has.
    LEASE_QUEUED = 14;
    /// D→R: `CancelLeaseRequest`.
    CANCEL_LEASE_REQUEST = 15;
    /// D→R: `ReturnLease`.
    RETURN_LEASE = 16;
    /// R→D: `RecallLease`: give it back as soon as nothing runs on it.
    RECALL_LEASE = 17;
    /// R→D: `LeaseBroken`: the leased worker died or was fenced.
    LEASE_BROKEN = 18;
    /// R→worker: `LeaseAssigned`: whose calls the worker accepts from now on, and with which devices.
    LEASE_ASSIGNED = 19;
    /// D→R: `WorkerBlocked`: a plain task waits in get or wait; its CPU is free.
    WORKER_BLOCKED = 20;
    /// D→R: `WorkerUnblocked`.
    WORKER_UNBLOCKED = 21;
    /// D→R: `WorkerExiting`: the worker leaves of itself.
    WORKER_EXITING = 22;
    /// R→D: `ExitProcess`.
    EXIT_PROCESS = 23;
    /// D→R or R→R: `WatchWorker`: tell me when that process is dead (answered by `WORKER_DIED`, at once if it is already).
    /// A raylet asks the raylet of the process, because the control plane's notice may be lost with a link.
    WATCH_WORKER = 24;
    /// R→D or R→R: `WorkerDied`.
    WORKER_DIED = 25;
    /// G→R→D: `NodeDied`, to every raylet, and from there to every process of every node.
    NODE_DIED = 26;
    /// R→driver: `LogLines`.
    LOG_LINES = 27;
    /// R→driver: `DriverMessage`: a warning or error of the runtime for the driver's standard error.
    DRIVER_MESSAGE = 28;
    /// R→worker: `CreateActor`, answered by the worker with `ACTOR_CREATED`.
    CREATE_ACTOR = 29;
    /// worker→R and R→G: `ActorCreated`.
    ACTOR_CREATED = 30;
    /// D→R: `NodeQuery` (JSON), answered by `NODE_ANSWER`: what this raylet knows (state API, why, memory).
    NODE_QUERY = 31;
    /// R→D: `NodeAnswer` (JSON).
    NODE_ANSWER = 32;
    /// R→D: `KillTask`-like request to interrupt what runs: `InterruptTask`.
    INTERRUPT_TASK = 33;
    /// worker→R: empty: others can connect to me, so I may be given out.
    WORKER_LISTENING = 34;

    // --- object store of the node ---
    /// D→R: `RequestExtent`, answered by `EXTENT_LENT`.
    REQUEST_EXTENT = 40;
    /// R→D: `ExtentLent`.
    EXTENT_LENT = 41;
    /// D→R: `ReturnExtents`.
    RETURN_EXTENTS = 42;
    /// R→D: empty: give back unused extents.
    RECALL_EXTENTS = 43;
    /// D→R: empty: my ring has news (sent when full, or to let others see a sealed object early).
    RING_DOORBELL = 44;
    /// D→R: `FreeObjects`: the owner lets go; from an owner elsewhere it arrives over its own link.
    FREE_OBJECTS = 45;
    /// D→R: `FetchObject`, answered by `OBJECT_LOCAL` or `FETCH_FAILED`.
    FETCH_OBJECT = 46;
    /// R→D: `ObjectLocal`.
    OBJECT_LOCAL = 47;
    /// R→D: `FetchFailed`.
    FETCH_FAILED = 48;
    /// D→R: `CancelFetch`.
    CANCEL_FETCH = 49;

    // --- raylet and raylet ---
    /// R→R: `PullChunk`, answered by `OBJECT_CHUNK`.
    PULL_CHUNK = 60;
    /// R→R: `ObjectChunk`; the payload is the bytes.
    OBJECT_CHUNK = 61;

    // --- process and process ---
    /// D→worker: `PushTask`, answered by `TASK_REPLY`.
    PUSH_TASK = 80;
    /// worker→D: `TaskReply`.
    TASK_REPLY = 81;
    /// D→worker: `CancelTask`.
    CANCEL_TASK = 82;
    /// D→worker: `RecallTasks`: give back what has not started, answered by `TASKS_RECALLED`.
    RECALL_TASKS = 83;
    /// worker→D: `TasksRecalled`.
    TASKS_RECALLED = 84;
    /// worker→D: `GeneratorItem`.
    GENERATOR_ITEM = 85;
    /// D→worker: `GeneratorConsumed`.
    GENERATOR_CONSUMED = 86;
    /// D→owner: `GetObjectStatus`, answered once known by `OBJECT_STATUS`.
    GET_OBJECT_STATUS = 87;
    /// owner→D: `ObjectStatus`.
    OBJECT_STATUS = 88;
    /// D→owner: `AddBorrower`, answered by `BORROWER_ADDED`.
    ADD_BORROWER = 89;
    /// owner→D: `BorrowerAdded`.
    BORROWER_ADDED = 90;
    /// D→owner: `RemoveBorrower`.
    REMOVE_BORROWER = 91;
    /// D→worker: `ReturnsAcknowledged`: the caller holds what the returns contain.
    RETURNS_ACKNOWLEDGED = 92;
    /// R→R→owner: `AddLocation`: a node has a copy. The raylet that received the copy tells the owner's, which passes it on.
    ADD_LOCATION = 93;
    /// D→owner: `ReportLost`: these nodes do not have the copy they should.
    REPORT_LOST = 94;
    /// D→actor: `CallerHello`: the caller's incarnation and the sequence it resumes at.
    CALLER_HELLO = 95;
    /// D↔D of another node: `SessionResume`, the first frame each way on a link of theirs.
    SESSION_RESUME = 96;
    /// D↔D of another node: `SessionAcknowledge`, now and then.
    SESSION_ACKNOWLEDGE = 97;

    // --- control plane ---
    /// R→G first frame: `RegisterNode`, answered by `NODE_REGISTERED`.
    REGISTER_NODE = 110;
    /// G→R: `NodeRegistered`.
    NODE_REGISTERED = 111;
    /// R→G: `ResourceReport`.
    RESOURCE_REPORT = 112;
    /// G→R: `ClusterUpdate`.
    CLUSTER_UPDATE = 113;
    /// D→R→G: `GcsRequest`, answered by `GCS_REPLY`. The raylet relays it under a correlation of its own.
    GCS_REQUEST = 114;
    /// G→R→D: `GcsReply`.
    GCS_REPLY = 115;
    /// G→R→D: `Publication`.
    PUBLICATION = 116;
    /// G→R: `CreateActor` (as R→worker), answered by `ACTOR_CREATED`.
    PLACE_ACTOR = 117;
    /// G→R: `KillActorWorker`.
    KILL_ACTOR_WORKER = 118;
    /// R→G: `WorkerDeathReport`, acknowledged by `GCS_REPLY`; until then it is told again with each registration.
    WORKER_DEATH_REPORT = 119;
    /// G→R: `WorkerDied`, to every raylet.
    WORKER_DEATH_NOTICE = 120;
    /// G→R: `JobFinished`.
    JOB_FINISHED = 121;
    /// G→R: `PrepareBundles`, answered by `BUNDLES_PREPARED`.
    PREPARE_BUNDLES = 122;
    /// R→G: `BundlesPrepared`.
    BUNDLES_PREPARED = 123;
    /// G→R: `CommitBundles`, answered by `BUNDLES_COMMITTED`.
    COMMIT_BUNDLES = 124;
    /// R→G: `BundlesCommitted`.
    BUNDLES_COMMITTED = 125;
    /// G→R: `ReturnBundles`: give up prepared or committed bundles; work in them is killed.
    RETURN_BUNDLES = 126;
    /// G↔R: empty: are you there?
    PING = 127;
    /// G↔R: empty: the answer to `PING`.
    PONG = 128;
    /// G→R: `DrainNode`.
    DRAIN_NODE = 129;
    /// G→R: `LeavesCluster`: the node was declared dead; a raylet that reads it exits.
    DECLARED_DEAD = 130;
    /// R→G or R→D: `HandOver`: the socket that travels with this frame was authenticated and wants the receiver.
    HAND_OVER = 131;
}
