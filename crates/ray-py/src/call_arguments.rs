//! The arguments of a call that runs here, as Python values.
//!
//! Invariant: 1. An argument that is a failure fails the call with that failure, without running it.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use ray_worker::Incoming;

use crate::core::Runtime;
use crate::error::get_failure;
use crate::serialize::{self, Reading};

/// Positional and keyword arguments. Waits for those that are not on this node, with the interpreter's lock given away.
#[allow(clippy::type_complexity)]
pub fn call_arguments<'py>(
    py: Python<'py>,
    runtime: &Runtime,
    incoming: &Arc<Incoming>,
) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyDict>)> {
    let reading = Reading {
        runtime: runtime.clone(),
        task: Some(incoming.task_id),
        outer: None,
    };
    let worker = &runtime.worker;
    let pair = match (&incoming.values, &incoming.values_reference) {
        (Some(values), _) => Some(serialize::deserialize_inline(py, reading.clone(), values)?),
        (None, Some(argument)) => {
            let (value, _keep) = py
                .detach(|| worker.resolve_argument(incoming, argument))
                .map_err(|failure| get_failure(py, failure, None))?;
            Some(serialize::deserialize(py, reading.clone(), &value)?)
        }
        (None, None) => None,
    };
    let (positional, keywords) = match pair {
        Some(pair) => {
            let (positional, keywords): (Bound<'py, PyAny>, Bound<'py, PyAny>) = pair.extract()?;
            (positional.cast_into::<PyList>()?, keywords.cast_into::<PyDict>()?)
        }
        None => (PyList::empty(py), PyDict::new(py)),
    };
    for argument in &incoming.references {
        let (value, keep) = py
            .detach(|| worker.resolve_argument(incoming, argument))
            .map_err(|failure| get_failure(py, failure, None))?;
        let within = Reading {
            outer: keep.as_ref().map(|reference| reference.id()),
            ..reading.clone()
        };
        let value = serialize::deserialize(py, within, &value)?;
        if !argument.keyword.is_empty() {
            keywords.set_item(&argument.keyword, value)?;
        } else {
            // Without by-value arguments the list has no places yet.
            while positional.len() <= argument.index as usize {
                positional.append(py.None())?;
            }
            positional.set_item(argument.index as usize, value)?;
        }
    }
    Ok((positional, keywords))
}
