//! The core worker: the runtime inside a driver or worker process. It carries out what `ray-ownership` decides: submits
//! calls, executes those pushed here, gets, puts and waits for objects, keeps counts with other processes.
//!
//! It knows no Python: values are bytes (`Serialized`, `Value`), the language is in `ray-py`. It refuses to block in a
//! handler; only the calls that say so wait, each with a deadline or until what they wait for is known.
//!
//! Invariants:
//! 1. `State` is locked before a `Slot`, and neither is held while the language runs.
//! 2. A slot becomes ready once with each value; who waits on it is woken in the same step.
//! 3. Every request that is sent has an entry in `pending`, which ends with its answer, its link or its deadline.

mod actor_entry;
mod actors;
mod answer;
mod borrowing;
mod cancel;
mod connect;
mod error;
mod evidence;
mod execute;
mod failures;
mod fetching;
mod gcs;
mod generators;
mod inner;
mod links;
mod logs;
mod main_thread;
mod objects;
mod replies;
mod room;
mod sending;
mod service;
mod session;
mod slot;
mod submit;
mod template;
mod value;

pub use actors::{ActorOptions, ActorView};
pub use connect::{ConnectConfig, Role};
pub use error::WorkerError;
pub use execute::{ArgumentReference, Incoming, Outcome, Work};
pub use gcs::set_interrupt_check;
pub use generators::{NextItem, Stream};
pub use inner::{CoreWorker, Reference};
pub use logs::LogEntry;
pub use objects::{GetFailure, WaitResult};
pub use slot::{next_scan, Completions, Slot};
pub use submit::{Arguments, PassedReference, Submitted};
pub use template::{Template, TemplateOptions};
pub use value::{error_value, Contained, InlineValue, Serialized, StoredValue, Value};
