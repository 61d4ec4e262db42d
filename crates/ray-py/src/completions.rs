//! Completions for event loops and threads.

use std::time::Duration;

use pyo3::prelude::*;
use ray_worker::Completions;

use crate::core::{CoreWorker, Runtime};
use crate::error::worker_error;
use crate::reference::ObjectRef;

/// Tokens of what is done, with a descriptor to sleep on.
#[pyclass(module = "ray._raylet", frozen, weakref)]
pub struct CompletionQueue {
    runtime: Runtime,
    pub queue: Completions,
}

#[pymethods]
impl CompletionQueue {
    #[new]
    fn new(py: Python<'_>, core: &CoreWorker) -> PyResult<Self> {
        let queue = Completions::new().map_err(|error| worker_error(py, error))?;
        Ok(Self {
            runtime: core.runtime.clone(),
            queue,
        })
    }

    fn fileno(&self) -> i32 {
        self.queue.descriptor()
    }

    fn watch(&self, py: Python<'_>, reference: &ObjectRef, token: u64) -> PyResult<()> {
        self.runtime
            .worker
            .watch(reference.counted()?, &self.queue, token)
            .map_err(|error| worker_error(py, error))
    }

    fn drain(&self) -> Vec<u64> {
        self.queue.drain()
    }

    fn wait(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let limit = Duration::try_from_secs_f64(timeout_s.max(0.0)).unwrap_or(Duration::MAX);
        py.detach(|| self.queue.wait(limit))
            .map_err(|error| worker_error(py, error))
    }
}
