//! `CoreWorker`: putting, getting, waiting for and freeing objects.
//!
//! Invariant: 1. Whatever may wait releases the interpreter's lock first; small puts do not wait.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use ray_worker::Reference;

use crate::core::CoreWorker;
use crate::error::{get_failure, worker_error, RayletError};
use crate::handles::deadline;
use crate::reference::ObjectRef;
use crate::serialize;

fn counted(references: &[Bound<'_, ObjectRef>]) -> PyResult<Vec<Reference>> {
    references
        .iter()
        .map(|reference| reference.get().counted().cloned())
        .collect()
}

fn list_of_references<'py>(references: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, ObjectRef>>> {
    references
        .try_iter()?
        .map(|item| {
            let item = item?;
            item.cast_into::<ObjectRef>().map_err(|error| {
                PyTypeError::new_err(format!(
                    "expected a list of ObjectRef, found {}",
                    error.into_inner().get_type()
                ))
            })
        })
        .collect()
}

#[pymethods]
impl CoreWorker {
    fn put(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<ObjectRef> {
        let serialized = serialize::serialize(&self.runtime, value)?;
        let task = self.runtime.current_task_id(py);
        let worker = &self.runtime.worker;
        let reference = if serialized.size() > ray_wire::INLINE_LIMIT_BYTES {
            py.detach(|| worker.put_serialized(serialized, task))
        } else {
            worker.put_serialized(serialized, task)
        };
        reference.map(ObjectRef::wrap).map_err(|error| worker_error(py, error))
    }

    #[pyo3(signature = (references, timeout_s = None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        references: &Bound<'py, PyAny>,
        timeout_s: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let objects = list_of_references(references)?;
        let counted = objects
            .iter()
            .map(|object| object.get().counted())
            .collect::<PyResult<Vec<_>>>()?;
        let deadline = deadline(timeout_s);
        let worker = &self.runtime.worker;
        let values = py
            .detach(|| worker.get(&counted, deadline))
            .map_err(|failure| get_failure(py, failure, timeout_s))?;
        let list = PyList::empty(py);
        for (reference, value) in counted.iter().zip(&values) {
            list.append(serialize::deserialize(py, self.runtime.reading(reference), value)?)?;
        }
        Ok(list)
    }

    #[pyo3(signature = (reference, timeout_s = None))]
    fn get_one<'py>(
        &self,
        py: Python<'py>,
        reference: &Bound<'py, ObjectRef>,
        timeout_s: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let counted = reference.get().counted()?;
        let worker = &self.runtime.worker;
        let deadline = deadline(timeout_s);
        let values = py
            .detach(|| worker.get(&[counted], deadline))
            .map_err(|failure| get_failure(py, failure, timeout_s))?;
        match values.first() {
            Some(value) => serialize::deserialize(py, self.runtime.reading(counted), value),
            None => Err(RayletError::new_err("get gave no value")),
        }
    }

    /// `None`: not every item is a reference, or one is there twice.
    #[pyo3(signature = (references, num_returns, timeout_s, fetch_local))]
    #[allow(clippy::type_complexity)]
    fn wait<'py>(
        &self,
        py: Python<'py>,
        references: &Bound<'py, PyList>,
        num_returns: usize,
        timeout_s: Option<f64>,
        fetch_local: bool,
    ) -> PyResult<Option<(Bound<'py, PyList>, Bound<'py, PyList>)>> {
        let scan = ray_worker::next_scan();
        let mut objects = Vec::with_capacity(references.len());
        for item in references.iter() {
            let Ok(object) = item.cast_into::<ObjectRef>() else {
                return Ok(None);
            };
            if !object.get().counted()?.slot().is_first_in(scan) {
                return Ok(None);
            }
            objects.push(object);
        }
        let counted: Vec<&Reference> = objects
            .iter()
            .filter_map(|object| object.get().counted.as_ref())
            .collect();
        let deadline = deadline(timeout_s);
        let worker = &self.runtime.worker;
        let result = py
            .detach(|| worker.wait(&counted, num_returns, deadline, fetch_local))
            .map_err(|error| worker_error(py, error))?;
        let ready = PyList::new(py, result.ready.iter().map(|index| &objects[*index]))?;
        let mut chosen = result.ready.iter().copied().peekable();
        let mut index = 0;
        objects.retain(|_| {
            let left = chosen.next_if_eq(&index).is_none();
            index += 1;
            left
        });
        Ok(Some((ready, PyList::new(py, objects)?)))
    }

    fn free(&self, py: Python<'_>, references: &Bound<'_, PyAny>, local_only: bool) -> PyResult<()> {
        let counted = counted(&list_of_references(references)?)?;
        self.runtime
            .worker
            .free(&counted, local_only)
            .map_err(|error| worker_error(py, error))
    }

    fn reference_counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        for (id, (local, submitted, contained, holds, borrowers), owned, ready) in self
            .runtime
            .worker
            .reference_counts()
            .map_err(|error| worker_error(py, error))?
        {
            let counts = PyDict::new(py);
            counts.set_item("local", local)?;
            counts.set_item("submitted", submitted)?;
            counts.set_item("contained", contained)?;
            counts.set_item("holds", holds)?;
            counts.set_item("borrowers", borrowers)?;
            counts.set_item("owned", owned)?;
            counts.set_item("ready", ready)?;
            all.set_item(id.hex(), counts)?;
        }
        Ok(all)
    }

    fn object_locations<'py>(
        &self,
        py: Python<'py>,
        references: &Bound<'py, PyAny>,
    ) -> PyResult<Vec<Bound<'py, PyDict>>> {
        list_of_references(references)?
            .iter()
            .map(|object| {
                let (nodes, bytes) = self.runtime.worker.locations(&object.get().id);
                let dict = PyDict::new(py);
                let nodes: Vec<String> = nodes.iter().map(ray_ids::NodeId::hex).collect();
                dict.set_item("node_ids", nodes)?;
                dict.set_item("object_size", bytes)?;
                Ok(dict)
            })
            .collect()
    }

    fn why<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.runtime
            .worker
            .why()
            .map_err(|error| worker_error(py, error))?
            .into_iter()
            .map(|reason| {
                let dict = PyDict::new(py);
                dict.set_item("reason", reason)?;
                Ok(dict)
            })
            .collect()
    }
}
