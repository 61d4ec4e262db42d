//! `ObjectRef`: a counted reference as a Python object.
//!
//! Invariants:
//! 1. Each `ObjectRef` that was made by the runtime counts once; one made from bytes alone counts nothing.
//! 2. Pickling one within a value makes the value contain it; pickling it elsewhere pins its object until the job ends.

use std::hash::{Hash, Hasher};

use prost::Message;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyList, PyTuple, PyType};
use pyo3::{intern, IntoPyObjectExt};
use ray_ids::ObjectId;
use ray_wire::Address;
use ray_worker::{Contained, Reference};

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
        match &self.counted {
            Some(reference) if !reference.is_of_the_past() => Ok(reference),
            Some(_) => Err(PyValueError::new_err(format!(
                "ObjectRef({}) is of a session that was shut down: its object went with it. References do not outlive \
                 ray.shutdown()",
                self.id
            ))),
            None => Err(PyValueError::new_err(format!(
                "ObjectRef({}) was made from its id alone, so nothing keeps its object: pass the original reference on instead",
                self.id
            ))),
        }
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
        let rebuild = rebuild_function(py, &REBUILD_ONE, "rebuild_reference")?;
        let owner = match &this.counted {
            Some(_) => {
                let reference = this.counted()?;
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
        let arguments = (PyBytes::new(py, this.id.as_bytes()), serialize::owner_bytes(py, owner)).into_py_any(py)?;
        PyTuple::new(py, [rebuild, arguments])
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

static REBUILD_ONE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
static REBUILD_MANY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

fn rebuild_function(py: Python<'_>, cell: &'static PyOnceLock<Py<PyAny>>, name: &str) -> PyResult<Py<PyAny>> {
    Ok(cell
        .get_or_try_init(py, || {
            Ok::<_, PyErr>(py.import(intern!(py, "ray._raylet"))?.getattr(name)?.unbind())
        })?
        .clone_ref(py))
}

/// Lists of at least so many references are pickled as one.
const BATCH_FROM: usize = 16;

/// A list of references on its way into a value, which holds their ids as one run of bytes and each owner once.
#[pyclass(module = "ray._raylet", frozen)]
pub struct ReferenceBatch {
    ids: Vec<(ObjectId, usize)>,
    owners: Vec<Address>,
}

impl ReferenceBatch {
    /// What to pickle instead of the value: only for a long list of nothing but counted references, each there once (a
    /// list that holds an item twice holds it twice where it is read, too, and only the pickler sees to that).
    pub fn instead_of<'py>(value: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, Self>>> {
        let Ok(list) = value.cast_exact::<PyList>() else {
            return Ok(None);
        };
        if list.len() < BATCH_FROM {
            return Ok(None);
        }
        let scan = ray_worker::next_scan();
        let mut objects = Vec::with_capacity(list.len());
        for item in list.iter() {
            if !item.is_exact_instance_of::<ObjectRef>() {
                return Ok(None);
            }
            let object = item.cast_into::<ObjectRef>()?;
            match &object.get().counted {
                Some(reference) if !reference.is_of_the_past() && reference.slot().is_first_in(scan) => {
                    objects.push(object);
                }
                _ => return Ok(None),
            }
        }
        let references: Vec<&Reference> = objects
            .iter()
            .filter_map(|object| object.get().counted.as_ref())
            .collect();
        let Some(first) = references.first() else {
            return Ok(None);
        };
        let (ids, owners) = first.core().describe_references(&references);
        Bound::new(value.py(), Self { ids, owners }).map(Some)
    }
}

#[pymethods]
impl ReferenceBatch {
    fn __reduce__(&self, py: Python<'_>) -> PyResult<(Py<PyAny>, Py<PyAny>)> {
        let mut ids = Vec::with_capacity(self.ids.len() * ObjectId::SIZE);
        let mut places = Vec::new();
        for (object, place) in &self.ids {
            let owner = self.owners.get(*place).cloned().unwrap_or_default();
            serialize::collect(Contained { object: *object, owner });
            ids.extend_from_slice(object.as_bytes());
            if self.owners.len() > 1 {
                places.extend_from_slice(&(*place as u32).to_le_bytes());
            }
        }
        let owners: Vec<_> = self
            .owners
            .iter()
            .map(|owner| PyBytes::new(py, &owner.encode_to_vec()))
            .collect();
        let arguments = (
            PyBytes::new(py, &ids),
            PyTuple::new(py, owners)?,
            PyBytes::new(py, &places),
        );
        Ok((
            rebuild_function(py, &REBUILD_MANY, "rebuild_references")?,
            arguments.into_py_any(py)?,
        ))
    }
}

fn malformed(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("a reference is malformed: {error}"))
}

/// What a pickled reference becomes where it is read.
#[pyfunction]
pub fn rebuild_reference(py: Python<'_>, id: &[u8], owner: &[u8]) -> PyResult<ObjectRef> {
    let id = ObjectId::from_binary(id).map_err(id_error)?;
    if owner.is_empty() {
        return Ok(ObjectRef { id, counted: None });
    }
    // Exceptions are made outside: that runs Python code, which may read values.
    let received = serialize::with_reading(|reading, owners| {
        let owner = owners.decode(owner).map_err(|error| error.to_string())?;
        Ok::<_, String>(
            reading
                .runtime
                .worker
                .receive_reference(id, owner, reading.task, reading.outer),
        )
    });
    let received = match received {
        Some(received) => received.map_err(malformed)?,
        None => match current_runtime() {
            Some(runtime) => {
                let owner = Address::decode(owner).map_err(malformed)?;
                runtime.worker.receive_reference(id, &owner, None, None)
            }
            None => return Ok(ObjectRef { id, counted: None }),
        },
    };
    received.map(ObjectRef::wrap).map_err(|error| worker_error(py, error))
}

/// What a pickled list of references becomes where it is read: the ids, each owner, and which owner each id has.
#[pyfunction]
pub fn rebuild_references<'py>(
    py: Python<'py>,
    ids: &[u8],
    owners: Vec<Bound<'py, PyBytes>>,
    places: &[u8],
) -> PyResult<Bound<'py, PyList>> {
    let mut places = places
        .chunks_exact(4)
        .map(|place| place.try_into().map(u32::from_le_bytes).unwrap_or_default() as usize);
    let objects = ids
        .chunks(ObjectId::SIZE)
        .map(|id| Ok((ObjectId::from_binary(id).map_err(id_error)?, places.next().unwrap_or(0))))
        .collect::<PyResult<Vec<_>>>()?;
    let owners = owners
        .iter()
        .map(|owner| Address::decode(owner.as_bytes()).map_err(malformed))
        .collect::<PyResult<Vec<_>>>()?;
    let (runtime, task, outer) = match serialize::reading() {
        Some(reading) => (Some(reading.runtime), reading.task, reading.outer),
        None => (current_runtime(), None, None),
    };
    let references: Vec<ObjectRef> = match runtime {
        Some(runtime) => runtime
            .worker
            .receive_references(&objects, &owners, task, outer)
            .map_err(|error| worker_error(py, error))?
            .into_iter()
            .map(ObjectRef::wrap)
            .collect(),
        None => objects
            .into_iter()
            .map(|(id, _)| ObjectRef { id, counted: None })
            .collect(),
    };
    PyList::new(py, references)
}
