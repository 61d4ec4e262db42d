//! `ObjectRef`: a counted reference as a Python object.
//!
//! Invariants:
//! 1. Each `ObjectRef` that was made by the runtime counts once; one made from bytes alone counts nothing.
//! 2. Pickling one within a value makes the value contain it; pickling it elsewhere pins its object until the job ends.

use std::hash::{Hash, Hasher};

use prost::Message;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple, PyType};
use pyo3::{intern, IntoPyObjectExt};
use ray_ids::ObjectId;
use ray_wire::Address;
use ray_worker::Reference;

use crate::conversion::id_error;
use crate::core::current_runtime;
use crate::error::worker_error;
use crate::serialize;

/// A reference to an object.
#[pyclass(module = "ray", subclass, frozen, weakref, generic)]
pub struct ObjectRef {
    pub id: ObjectId,
    pub counted: Option<Reference>,
}

impl ObjectRef {
    /// Wraps a counted reference.
    pub fn wrap(reference: Reference) -> Self {
        Self {
            id: reference.id(),
            counted: Some(reference),
        }
    }

    /// The counted reference. Raises ValueError for a reference that the runtime does not know.
    pub fn counted(&self) -> PyResult<&Reference> {
        self.counted.as_ref().ok_or_else(|| {
            PyValueError::new_err(format!(
                "ObjectRef({}) was made from its id alone, so nothing keeps its object: pass the original reference on instead",
                self.id
            ))
        })
    }
}

fn compat<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("ray._private.async_compat")?.getattr(name)
}

fn python_id<'py>(py: Python<'py>, class: &str, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    py.import("ray._private.ids")?
        .getattr(class)?
        .call1((PyBytes::new(py, bytes),))
}

#[pymethods]
impl ObjectRef {
    #[new]
    fn new(id: &[u8]) -> PyResult<Self> {
        Ok(Self {
            id: ObjectId::from_binary(id).map_err(id_error)?,
            counted: None,
        })
    }

    #[classmethod]
    fn from_binary(_class: &Bound<'_, PyType>, id_bytes: &[u8]) -> PyResult<Self> {
        Self::new(id_bytes)
    }

    #[classmethod]
    fn from_hex(_class: &Bound<'_, PyType>, hex_id: &str) -> PyResult<Self> {
        Ok(Self {
            id: ObjectId::from_hex(hex_id).map_err(id_error)?,
            counted: None,
        })
    }

    #[classmethod]
    fn from_random(_class: &Bound<'_, PyType>) -> Self {
        Self {
            id: ObjectId::from_random(),
            counted: None,
        }
    }

    #[classmethod]
    fn nil(_class: &Bound<'_, PyType>) -> Self {
        Self {
            id: ObjectId::NIL,
            counted: None,
        }
    }

    #[classmethod]
    fn size(_class: &Bound<'_, PyType>) -> usize {
        ObjectId::SIZE
    }

    fn binary<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.id.as_bytes())
    }

    fn hex(&self) -> String {
        self.id.hex()
    }

    fn is_nil(&self) -> bool {
        self.id.is_nil()
    }

    fn task_id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        python_id(py, "TaskID", self.id.task_id().as_bytes())
    }

    fn job_id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        python_id(py, "JobID", self.id.job_id().as_bytes())
    }

    fn owner_address<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let reference = self.counted()?;
        Ok(PyBytes::new(
            py,
            &reference.core().describe_reference(reference).owner.encode_to_vec(),
        ))
    }

    fn call_site(&self) -> &'static str {
        ""
    }

    fn tensor_transport(&self) -> Option<String> {
        None
    }

    fn redis_shard_hash(&self) -> u64 {
        let bytes = self.id.as_bytes();
        u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default())
    }

    fn future<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        compat(slf.py(), "future")?.call1((slf,))
    }

    #[pyo3(signature = (_internal = false))]
    fn as_future<'py>(slf: Bound<'py, Self>, _internal: bool) -> PyResult<Bound<'py, PyAny>> {
        compat(slf.py(), "as_future")?.call1((slf, _internal))
    }

    fn _on_completed<'py>(slf: Bound<'py, Self>, callback: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        compat(slf.py(), "on_completed")?.call1((slf, callback))
    }

    fn __await__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        compat(slf.py(), "await_reference")?.call1((slf,))
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = std::collections::hash_map::DefaultHasher::new();
        self.id.hash(&mut hasher);
        hasher.finish()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().id == self.id)
    }

    fn __repr__(&self) -> String {
        format!("ObjectRef({})", self.id)
    }

    fn __reduce__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let this = slf.get();
        let rebuild = py
            .import(intern!(py, "ray._raylet"))?
            .getattr(intern!(py, "rebuild_reference"))?;
        let owner = match &this.counted {
            Some(reference) => {
                let core = reference.core();
                let contained = core.describe_reference(reference);
                let owner = contained.owner.encode_to_vec();
                if !serialize::collect(contained) {
                    core.pin_for_job(&this.id);
                }
                owner
            }
            None => Vec::new(),
        };
        let arguments = (PyBytes::new(py, this.id.as_bytes()), PyBytes::new(py, &owner)).into_py_any(py)?;
        PyTuple::new(py, [rebuild.unbind(), arguments])
    }
}

/// What a call with `num_returns="dynamic"` returns: a reference that can be iterated, which waits for its value.
#[pyclass(module = "ray", name = "ObjectRef", extends = ObjectRef, frozen)]
pub struct DynamicObjectRef;

impl DynamicObjectRef {
    /// Wraps a counted reference.
    pub fn wrap(reference: Reference) -> PyClassInitializer<Self> {
        PyClassInitializer::from(ObjectRef::wrap(reference)).add_subclass(Self)
    }
}

#[pymethods]
impl DynamicObjectRef {
    fn __iter__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let items = py
            .import(intern!(py, "ray"))?
            .getattr(intern!(py, "get"))?
            .call1((slf,))?;
        Ok(items.try_iter()?.into_any())
    }
}

/// What a pickled reference becomes where it is read.
#[pyfunction]
pub fn rebuild_reference(py: Python<'_>, id: &[u8], owner: &[u8]) -> PyResult<ObjectRef> {
    let id = ObjectId::from_binary(id).map_err(id_error)?;
    if owner.is_empty() {
        return Ok(ObjectRef { id, counted: None });
    }
    let (runtime, task, outer) = match serialize::reading() {
        Some(reading) => (Some(reading.runtime), reading.task, reading.outer),
        None => (current_runtime(), None, None),
    };
    let Some(runtime) = runtime else {
        return Ok(ObjectRef { id, counted: None });
    };
    let owner =
        Address::decode(owner).map_err(|error| PyValueError::new_err(format!("a reference is malformed: {error}")))?;
    let reference = runtime
        .worker
        .receive_reference(id, &owner, task, outer)
        .map_err(|error| worker_error(py, error))?;
    Ok(ObjectRef::wrap(reference))
}
