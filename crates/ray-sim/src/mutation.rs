//! Planted faults of the shells between the shipping machines: owns their names. Each must be caught by some seed.
//!
//! A mutation changes what passes between the machines (a command that is not carried out, an event that is not told, a
//! message with a wrong number), never the machines.

macro_rules! mutations {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the shell does wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Mutation { $($(#[$doc])* $name,)* }

        impl Mutation {
            /// Every mutation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

mutations! {
    /// `ReturnsAcknowledged` is not sent.
    DropReturnsAcknowledged,
    /// A reply's arguments lose their counts before the borrows that it lists are noted.
    ReleaseBeforeRelay,
    /// The borrows that a reply lists are not noted at all.
    ForgetRetained,
    /// Every borrow message carries generation 1.
    IgnoreGeneration,
    /// The references inside a return are not held until the caller acknowledges.
    ForgetReturnHold,
    /// What a reference came out of is not held until the owner has acknowledged.
    FreeBeforeAcknowledge,
    /// `RemoveBorrower` is sometimes lost.
    LoseRemoveBorrower,
    /// `AddBorrower` is sometimes lost, and so is its answer.
    LoseAddBorrower,
    /// An object's contents are not counted.
    ForgetContained,
    /// A call's arguments are not counted while it runs.
    ForgetSubmitted,
    /// The arguments of a call that failed stay counted.
    KeepArgumentsOfFailedCall,
    /// A process does not tell its table that another one died.
    IgnoreWorkerDied,
    /// A process does not hear of dead nodes.
    IgnoreNodeDied,
    /// A raylet forgets whom its processes watch.
    ForgetWatch,
    /// A raylet that was cut off from the control plane does not ask again about those its processes watch.
    ForgetWatchAfterReconnection,
    /// A raylet does not tell the control plane of a death that happened while it was away.
    LoseDeathReport,
    /// A raylet drops what it has to answer while its registration is under way.
    ForgetHeldAnswers,
    /// A raylet grants one worker to two owners.
    DoubleGrant,
    /// A grant is sometimes lost.
    LoseGrant,
    /// A returned lease sometimes does not reach the raylet.
    LoseReturnLease,
    /// The raylet does not tell its scheduler that a worker died.
    ForgetResourcesOnDeath,
    /// The raylet does not tell its scheduler that an owner died.
    ForgetLeasesOfDeadOwner,
    /// A broken lease is not told to its owner.
    LoseLeaseBroken,
    /// What a dead worker had started is told as not started.
    WrongEvidence,
    /// A worker runs calls under whatever lease they come.
    AcceptStaleLease,
    /// A worker gives back calls that it goes on to run.
    RunRecalledCalls,
    /// A blocked task does not give its CPU back.
    ForgetBlocked,
    /// Frames that are sent again over a fresh link are taken as new.
    ResendWithoutDedupe,
    /// What was under way on a broken link is not sent again.
    ForgetResend,
    /// A failed attempt is not counted.
    RetryWithoutCounting,
    /// The copy that a worker sealed before it died is not freed with its attempt.
    ForgetCopyOfFailedAttempt,
    /// The reply of an earlier attempt counts as the present one's.
    AcceptStaleReply,
    /// A caller does not hear that an actor restarts: the next incarnation looks like the first.
    IgnoreIncarnation,
    /// An actor's waiting calls run again for each that is sent twice, whatever their sequence.
    ActorIgnoresOrder,
    /// An actor that is to leave is not killed.
    LoseKillActor,
    /// The owner does not tell that an actor's last handle is gone.
    LoseOutOfScope,
    /// The control plane sometimes does not make an actor durable.
    ForgetPersist,
    /// A request to the control plane is not repeated after a reconnection.
    ForgetGcsRequest,
    /// Nodes do not drop the copies of freed objects.
    ForgetFreeObjects,
    /// A lost copy is not reported to its owner.
    ForgetReportLost,
}
