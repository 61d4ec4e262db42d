//! Opaque Python objects around the core worker's: templates, actors, streams.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use ray_ids::ActorId;
use ray_worker::{NextItem, Reference, Stream, Template};

use crate::completions::CompletionQueue;
use crate::core::Runtime;
use crate::error::{ray_exception, worker_error};
use crate::reference::ObjectRef;
use crate::serialize::death_dict;

/// What is the same for every call of one function with one set of options.
#[pyclass(module = "ray._raylet", frozen)]
pub struct TaskTemplate {
    pub template: Arc<Template>,
}

#[pymethods]
impl TaskTemplate {
    fn __repr__(&self) -> String {
        format!(
            "TaskTemplate({}, num_returns={})",
            self.template.function_name(),
            self.template.num_returns()
        )
    }
}

/// This process's handle to an actor.
#[pyclass(module = "ray._raylet", frozen, weakref)]
pub struct ActorCore {
    pub runtime: Runtime,
    pub actor: ActorId,
    /// `None` for a weak handle.
    pub reference: Option<Reference>,
}

/// The name of an actor's state.
pub fn state_name(state: u32) -> &'static str {
    match state {
        ray_wire::ACTOR_DEPENDENCIES_UNREADY => "DEPENDENCIES_UNREADY",
        ray_wire::ACTOR_PENDING_CREATION => "PENDING_CREATION",
        ray_wire::ACTOR_ALIVE => "ALIVE",
        ray_wire::ACTOR_RESTARTING => "RESTARTING",
        _ => "DEAD",
    }
}

#[pymethods]
impl ActorCore {
    fn actor_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.actor.as_bytes())
    }

    fn reference(&self) -> Option<ObjectRef> {
        self.reference.clone().map(ObjectRef::wrap)
    }

    fn is_weak(&self) -> bool {
        self.reference.is_none()
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (state, incarnation, death, description) = self
            .runtime
            .worker
            .actor_state(self.actor)
            .map_err(|error| worker_error(py, error))?;
        let dict = PyDict::new(py);
        dict.set_item("state", state_name(state))?;
        dict.set_item("incarnation", incarnation)?;
        dict.set_item("death", death.map(|death| death_dict(py, &death)).transpose()?)?;
        dict.set_item("description", description)?;
        Ok(dict)
    }
}

/// The consumer's end of a generator.
#[pyclass(module = "ray._raylet", frozen, weakref)]
pub struct StreamCore {
    pub stream: Arc<Stream>,
}

/// A time limit as a deadline; none where it is `None` or negative.
pub fn deadline(timeout_s: Option<f64>) -> Option<Instant> {
    let seconds = timeout_s.filter(|seconds| *seconds >= 0.0)?;
    // What does not fit is a century away and as good as none.
    Duration::try_from_secs_f64(seconds)
        .ok()
        .and_then(|limit| Instant::now().checked_add(limit))
}

#[pymethods]
impl StreamCore {
    #[pyo3(signature = (timeout_s = None))]
    fn next(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<Option<ObjectRef>> {
        let deadline = deadline(timeout_s);
        match py.detach(|| self.stream.next(deadline)) {
            Ok(reference) => Ok(reference.map(ObjectRef::wrap)),
            Err(ray_worker::WorkerError::Timeout { .. }) => Err(ray_exception(
                py,
                "GetTimeoutError",
                format!(
                    "the generator yielded no further item within {} s",
                    timeout_s.unwrap_or_default()
                ),
            )),
            Err(error) => Err(worker_error(py, error)),
        }
    }

    fn try_next(&self) -> (bool, Option<ObjectRef>) {
        match self.stream.try_next() {
            NextItem::Item(reference) => (true, Some(ObjectRef::wrap(reference))),
            NextItem::End => (true, None),
            NextItem::Unknown => (false, None),
        }
    }

    fn completed_reference(&self) -> PyResult<ObjectRef> {
        let completed = self.stream.completed().cloned();
        completed
            .map(ObjectRef::wrap)
            .ok_or_else(|| crate::error::RayletError::new_err("the stream has no end to wait for"))
    }

    fn is_finished(&self) -> bool {
        self.stream.is_finished()
    }

    fn task_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.stream.task_id().as_bytes())
    }

    fn watch_next(&self, queue: &CompletionQueue, token: u64) {
        self.stream.watch_next(&queue.queue, token);
    }

    fn abandon(&self) {
        self.stream.abandon();
    }
}

impl Drop for StreamCore {
    fn drop(&mut self) {
        // Nobody can ask for further items.
        self.stream.abandon();
    }
}
