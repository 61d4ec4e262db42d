//! Typed identifiers: owns their sizes, how one is made from another, and how they print.
//!
//! It refuses to mix kinds (each is a type of its own) and to accept a wrong length.
//!
//! Invariants:
//! 1. A job is 4 bytes, an actor 16, a task 24, an object 28; unique ids are 28; a placement group is 18.
//! 2. An actor id ends in its job's id; a task id ends in its actor's id (twelve `ff` bytes and the job where there
//!    is none); an object id is its task's id and a little-endian index of 4 bytes, so each id names its ancestors.
//! 3. The nil id of every kind is all `ff`.

use std::fmt;

/// Why bytes or text are not an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdError {
    /// What kind of id was wanted.
    pub kind: &'static str,
    /// How many bytes that kind has.
    pub expected_bytes: usize,
    /// What was given instead.
    pub found: String,
}

impl fmt::Display for IdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} needs {} bytes, got {}",
            self.kind, self.expected_bytes, self.found
        )
    }
}

impl std::error::Error for IdError {}

fn random_fill(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the operating system's random source answers");
}

/// Lower-case hexadecimal of `bytes`.
pub fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[(byte >> 4) as usize] as char);
        text.push(DIGITS[(byte & 15) as usize] as char);
    }
    text
}

/// Bytes of hexadecimal text, or `None` where it is not that.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if text.len() % 2 != 0 || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
        .collect()
}

macro_rules! define_id {
    ($(#[$doc:meta])* $name:ident, $size:expr, $kind:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; $size]);

        impl $name {
            /// Length in bytes.
            pub const SIZE: usize = $size;

            /// The id that means "none".
            pub const NIL: Self = Self([0xff; $size]);

            /// An id from exactly `SIZE` bytes.
            pub fn from_binary(bytes: &[u8]) -> Result<Self, IdError> {
                let fixed: [u8; $size] = bytes.try_into().map_err(|_| IdError {
                    kind: $kind,
                    expected_bytes: $size,
                    found: format!("{} bytes", bytes.len()),
                })?;
                Ok(Self(fixed))
            }

            /// An id from hexadecimal text of `2 * SIZE` digits.
            pub fn from_hex(text: &str) -> Result<Self, IdError> {
                let bytes = from_hex(text).ok_or_else(|| IdError {
                    kind: $kind,
                    expected_bytes: $size,
                    found: format!("{text:?}, which is not hexadecimal"),
                })?;
                Self::from_binary(&bytes)
            }

            /// An id from an array of the right size.
            pub const fn from_array(bytes: [u8; $size]) -> Self {
                Self(bytes)
            }

            /// The bytes.
            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }

            /// The bytes, owned.
            pub fn to_vec(&self) -> Vec<u8> {
                self.0.to_vec()
            }

            /// Lower-case hexadecimal.
            pub fn hex(&self) -> String {
                to_hex(&self.0)
            }

            /// Whether this id means "none".
            pub fn is_nil(&self) -> bool {
                *self == Self::NIL
            }

            /// A fresh id from the operating system's random source, which a forked child does not share.
            pub fn from_random() -> Self {
                let mut bytes = [0; $size];
                random_fill(&mut bytes);
                Self(bytes)
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::NIL
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", $kind, self.hex())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.hex())
            }
        }
    };
}

define_id!(/// A job: one driver's program, or one submitted entrypoint.
    JobId, 4, "JobID");
define_id!(/// An actor.
    ActorId, 16, "ActorID");
define_id!(/// A task, an actor's creation or a call of an actor's method.
    TaskId, 24, "TaskID");
define_id!(/// An object: one return of a task, or one put.
    ObjectId, 28, "ObjectRef");
define_id!(/// A node, that is one raylet's life.
    NodeId, 28, "NodeID");
define_id!(/// A worker or driver process.
    WorkerId, 28, "WorkerID");
define_id!(/// An exported function.
    FunctionId, 28, "FunctionID");
define_id!(/// An exported actor class.
    ActorClassId, 28, "ActorClassID");
define_id!(/// A cluster, that is one control plane's data directory.
    ClusterId, 28, "ClusterID");
define_id!(/// Any other unique thing.
    UniqueId, 28, "UniqueID");
define_id!(/// A placement group.
    PlacementGroupId, 18, "PlacementGroupID");
define_id!(/// A lease on a worker, granted by a raylet.
    LeaseId, 16, "LeaseID");

impl JobId {
    /// The job of this number, little-endian in its bytes as hexadecimal reads it (job 1 is `01000000`).
    pub const fn from_int(value: u32) -> Self {
        Self(value.to_le_bytes())
    }

    /// The job's number.
    pub const fn int(&self) -> u32 {
        u32::from_le_bytes(self.0)
    }
}

impl ActorId {
    /// The actor of these 12 unique bytes in `job`.
    pub fn of(job: JobId, unique: [u8; 12]) -> Self {
        let mut bytes = [0; Self::SIZE];
        bytes[..12].copy_from_slice(&unique);
        bytes[12..].copy_from_slice(job.as_bytes());
        Self(bytes)
    }

    /// A fresh actor id in `job`.
    pub fn random_in(job: JobId) -> Self {
        let mut unique = [0; 12];
        random_fill(&mut unique);
        Self::of(job, unique)
    }

    /// The id that stands in a task's id where the task has no actor.
    pub fn nil_in(job: JobId) -> Self {
        Self::of(job, [0xff; 12])
    }

    /// The job this actor belongs to.
    pub fn job_id(&self) -> JobId {
        JobId(self.0[12..].try_into().expect("an actor id has 4 bytes of job"))
    }
}

impl TaskId {
    /// The task of these 8 unique bytes, of `actor` or of none (`ActorId::nil_in`).
    pub fn of(actor: ActorId, unique: [u8; 8]) -> Self {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&unique);
        bytes[8..].copy_from_slice(actor.as_bytes());
        Self(bytes)
    }

    /// A fresh task id of `actor`.
    pub fn random_in(actor: ActorId) -> Self {
        let mut unique = [0; 8];
        random_fill(&mut unique);
        Self::of(actor, unique)
    }

    /// The task that creates `actor`.
    pub fn for_actor_creation(actor: ActorId) -> Self {
        Self::of(actor, [0xff; 8])
    }

    /// The root task of a driver's program in `job`.
    pub fn for_driver(job: JobId) -> Self {
        Self::of(ActorId::nil_in(job), [0xff; 8])
    }

    /// The actor this task belongs to; its unique part is all `ff` where there is none.
    pub fn actor_id(&self) -> ActorId {
        ActorId(self.0[8..].try_into().expect("a task id has 16 bytes of actor"))
    }

    /// Whether the task belongs to an actor.
    pub fn has_actor(&self) -> bool {
        self.0[8..20] != [0xff; 12]
    }

    /// The job this task belongs to.
    pub fn job_id(&self) -> JobId {
        self.actor_id().job_id()
    }
}

impl ObjectId {
    /// Puts count their indices from here, so that they never meet a return of the same task.
    pub const FIRST_PUT_INDEX: u32 = 1 << 31;

    /// The object of this index (returns from 1, puts from `FIRST_PUT_INDEX`) of `task`.
    pub fn of(task: TaskId, index: u32) -> Self {
        let mut bytes = [0; Self::SIZE];
        bytes[..24].copy_from_slice(task.as_bytes());
        bytes[24..].copy_from_slice(&index.to_le_bytes());
        Self(bytes)
    }

    /// The task that made this object.
    pub fn task_id(&self) -> TaskId {
        TaskId(self.0[..24].try_into().expect("an object id has 24 bytes of task"))
    }

    /// The index of this object among its task's.
    pub fn index(&self) -> u32 {
        u32::from_le_bytes(self.0[24..].try_into().expect("an object id has 4 bytes of index"))
    }

    /// The job this object belongs to.
    pub fn job_id(&self) -> JobId {
        self.task_id().job_id()
    }
}

impl PlacementGroupId {
    /// A fresh placement group id in `job`.
    pub fn random_in(job: JobId) -> Self {
        let mut bytes = [0; Self::SIZE];
        random_fill(&mut bytes[..14]);
        bytes[14..].copy_from_slice(job.as_bytes());
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_names_its_ancestors() {
        let job = JobId::from_int(7);
        let actor = ActorId::random_in(job);
        let task = TaskId::random_in(actor);
        let object = ObjectId::of(task, 3);
        assert_eq!(object.task_id(), task);
        assert_eq!(object.index(), 3);
        assert_eq!(task.actor_id(), actor);
        assert!(task.has_actor());
        assert_eq!(object.job_id(), job);
        assert_eq!(job.int(), 7);
        assert!(object.hex().ends_with("03000000"));
    }

    #[test]
    fn a_plain_task_has_no_actor() {
        let task = TaskId::random_in(ActorId::nil_in(JobId::from_int(1)));
        assert!(!task.has_actor());
        assert!(task.hex().ends_with("ffffffffffffffffffffffff01000000"));
    }

    #[test]
    fn wrong_lengths_and_bad_text_are_refused_by_name() {
        let error = TaskId::from_binary(&[1, 2]).unwrap_err();
        assert_eq!(error.to_string(), "TaskID needs 24 bytes, got 2 bytes");
        assert!(JobId::from_hex("zz")
            .unwrap_err()
            .to_string()
            .contains("not hexadecimal"));
        assert_eq!(JobId::from_hex("01000000").unwrap(), JobId::from_int(1));
        assert!(NodeId::NIL.is_nil());
        assert_eq!(NodeId::NIL.hex(), "ff".repeat(28));
    }
}
