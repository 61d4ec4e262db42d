//! Failures of the runtime as Python exceptions: the one place where they are mapped.
//!
//! Invariant: 1. An exception that a signal's handler raised during a wait is the one that the caller sees.

use std::cell::RefCell;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use ray_worker::{GetFailure, WorkerError};

pyo3::create_exception!(
    ray._raylet,
    RayletError,
    pyo3::exceptions::PyException,
    "A failure of the runtime."
);

thread_local! {
    /// What a signal's handler raised on this thread while it waited.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Lets waiting threads look at Python's signals.
pub fn install() {
    ray_worker::set_interrupt_check(|| {
        Python::attach(|py| match py.check_signals() {
            Ok(()) => false,
            Err(error) => {
                RAISED.with(|raised| *raised.borrow_mut() = Some(error));
                true
            }
        })
    });
}

/// What a signal's handler raised, if it did.
pub fn take_raised() -> Option<PyErr> {
    RAISED.with(|raised| raised.borrow_mut().take())
}

/// An exception of `ray.exceptions`.
pub fn ray_exception(py: Python<'_>, name: &str, message: String) -> PyErr {
    let made = py
        .import("ray.exceptions")
        .and_then(|module| module.getattr(name))
        .and_then(|class| class.call1((message.clone(),)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        // The daemons and a broken installation have no `ray.exceptions`.
        Err(_) => RayletError::new_err(message),
    }
}

/// A failure of the core worker.
pub fn worker_error(py: Python<'_>, error: WorkerError) -> PyErr {
    let message = error.to_string();
    match error {
        WorkerError::Interrupted => take_raised().unwrap_or_else(|| PyRuntimeError::new_err(message)),
        WorkerError::StoreFull(_) => ray_exception(py, "ObjectStoreFullError", message),
        WorkerError::PendingCallsLimit { .. } => ray_exception(py, "PendingCallsLimitExceeded", message),
        WorkerError::RayletGone(_) => ray_exception(py, "LocalRayletDiedError", message),
        WorkerError::Gcs {
            kind: ray_wire::GCS_ERROR_NAME_TAKEN | ray_wire::GCS_ERROR_NOT_FOUND | ray_wire::GCS_ERROR_INVALID,
            ..
        } => PyValueError::new_err(message),
        WorkerError::Connect { .. } => RayletError::new_err(message),
        _ => ray_exception(py, "RaySystemError", message),
    }
}

/// Why `get` gave nothing.
pub fn get_failure(py: Python<'_>, failure: GetFailure, timeout_s: Option<f64>) -> PyErr {
    match failure {
        GetFailure::Worker(error) => worker_error(py, error),
        GetFailure::TimedOut { missing } => ray_exception(
            py,
            "GetTimeoutError",
            format!(
                "Get timed out: some object(s) not ready. {missing} of them are missing after {} s; `ray status` tells what \
                 waits.",
                timeout_s.unwrap_or_default()
            ),
        ),
    }
}
