//! Values between Python and bytes.
//!
//! Exact builtin types and arrays take the C pickler; anything else the Python hook (cloudpickle). Buffers travel out of
//! band and are never copied on the way to the object store.
//!
//! Invariants:
//! 1. References pickled while a value is serialized are collected for that value; pickled outside, they pin their
//!    object until the job ends.
//! 2. A view on a stored object keeps it pinned, read-only, for as long as the view lives.

use std::cell::RefCell;
use std::os::raw::c_int;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use prost::Message;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use pyo3::{ffi, intern};
use ray_ids::{ObjectId, TaskId};
use ray_wire::layout::{self, ErrorValue};
use ray_wire::Address;
use ray_worker::{Contained, InlineValue, Serialized, StoredValue, Value};

use crate::arrays::PlainArray;
use crate::core::Runtime;
use crate::reference::{ObjectRef, ReferenceBatch};

/// How deep the look for exact builtin types goes before the general pickler takes over.
const MAX_DEPTH: u32 = 4;
/// How many elements of containers are looked at.
const MAX_LOOKED_AT: u32 = 64;
/// Bytes below which in-band data is copied into a `bytes` for the unpickler.
const COPY_BELOW_BYTES: usize = 64 << 10;

/// Alignment that any element type is content with, and that the allocator gives.
const BUFFER_ALIGNMENT_BYTES: usize = 16;
/// Buffers of a small value from this size on are used where they lie.
const VIEW_FROM_BYTES: usize = 4 << 10;

/// What a value is read within: which runtime counts the references in it, and what stands in for them meanwhile.
#[derive(Clone)]
pub struct Reading {
    pub runtime: Runtime,
    pub task: Option<TaskId>,
    pub outer: Option<ObjectId>,
}

thread_local! {
    /// References found in the value being serialized on this thread, one list per nested serialization.
    static COLLECTING: RefCell<Vec<Vec<Contained>>> = const { RefCell::new(Vec::new()) };
    static READING: RefCell<Vec<(Reading, Owners)>> = const { RefCell::new(Vec::new()) };
}

/// The owner that the last reference of a value had, decoded: most references of a value have the same.
#[derive(Default)]
pub struct Owners {
    bytes: Vec<u8>,
    address: Address,
}

impl Owners {
    /// The address that these bytes are.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<&Address, prost::DecodeError> {
        if self.bytes != bytes {
            self.address = Address::decode(bytes)?;
            self.bytes = bytes.to_vec();
        }
        Ok(&self.address)
    }
}

/// Calls `act` with what the value being read on this thread is read within. `None`: no value is being read. `act` must
/// not run Python code that reads values.
pub fn with_reading<T>(act: impl FnOnce(&Reading, &mut Owners) -> T) -> Option<T> {
    READING.with(|stack| {
        stack
            .borrow_mut()
            .last_mut()
            .map(|(reading, owners)| act(reading, owners))
    })
}

/// An owner's bytes as an object that references pickled one after the other share, so that the pickle has them once.
pub fn owner_bytes(py: Python<'_>, owner: Vec<u8>) -> Bound<'_, PyBytes> {
    static LAST: Mutex<Option<Py<PyBytes>>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    match &*last {
        Some(bytes) if bytes.as_bytes(py) == owner => bytes.bind(py).clone(),
        _ => {
            let bytes = PyBytes::new(py, &owner);
            *last = Some(bytes.clone().unbind());
            bytes
        }
    }
}

/// Notes a reference in the value being serialized. False: no value is being serialized on this thread.
pub fn collect(contained: Contained) -> bool {
    COLLECTING.with(|stack| match stack.borrow_mut().last_mut() {
        Some(list) => {
            list.push(contained);
            true
        }
        None => false,
    })
}

/// What the value being read on this thread is read within.
pub fn reading() -> Option<Reading> {
    READING.with(|stack| stack.borrow().last().map(|(reading, _)| reading.clone()))
}

/// A function of the C pickler's module, looked up once.
pub fn pickle_function<'py>(
    py: Python<'py>,
    cell: &'static PyOnceLock<Py<PyAny>>,
    name: &str,
) -> PyResult<&'py Bound<'py, PyAny>> {
    Ok(cell
        .get_or_try_init(py, || Ok::<_, PyErr>(py.import("_pickle")?.getattr(name)?.unbind()))?
        .bind(py))
}

/// The class of plain arrays, where numpy is loaded.
pub fn ndarray_type(py: Python<'_>) -> Option<Bound<'_, PyAny>> {
    static NDARRAY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Some(class) = NDARRAY.get(py) {
        return Some(class.bind(py).clone());
    }
    // Who has an array has imported numpy; nobody else shall pay for it.
    let modules = py.import("sys").ok()?.getattr("modules").ok()?;
    let numpy = modules.cast::<PyDict>().ok()?.get_item("numpy").ok()??;
    let class = numpy.getattr("ndarray").ok()?;
    let _ = NDARRAY.set(py, class.clone().unbind());
    Some(class)
}

/// Whether the C pickler does: exact builtin types, plain arrays and references, not too deep.
fn is_plain(value: &Bound<'_, PyAny>, depth: u32, budget: &mut u32) -> bool {
    if *budget == 0 {
        return false;
    }
    *budget -= 1;
    if value.is_none()
        || value.is_exact_instance_of::<PyInt>()
        || value.is_exact_instance_of::<PyString>()
        || value.is_exact_instance_of::<PyBytes>()
        || value.is_exact_instance_of::<PyFloat>()
        || value.is_exact_instance_of::<PyBool>()
    {
        return true;
    }
    if depth == 0 {
        return false;
    }
    if let Ok(list) = value.cast_exact::<PyList>() {
        // Long lists are mostly of one kind; those of references are worth the look.
        if list.len() > MAX_LOOKED_AT as usize {
            return list.iter().all(|item| item.is_exact_instance_of::<ObjectRef>());
        }
        return list.iter().all(|item| is_plain(&item, depth - 1, budget));
    }
    if let Ok(tuple) = value.cast_exact::<PyTuple>() {
        return tuple.len() <= MAX_LOOKED_AT as usize && tuple.iter().all(|item| is_plain(&item, depth - 1, budget));
    }
    if let Ok(dict) = value.cast_exact::<PyDict>() {
        return dict.len() <= MAX_LOOKED_AT as usize
            && dict
                .iter()
                .all(|(key, item)| is_plain(&key, 0, budget) && is_plain(&item, depth - 1, budget));
    }
    if value.is_exact_instance_of::<ObjectRef>()
        || value.is_exact_instance_of::<ReferenceBatch>()
        || value.is_exact_instance_of::<PlainArray>()
    {
        return true;
    }
    let py = value.py();
    ndarray_type(py).is_some_and(|class| {
        value.get_type().is(&class)
            && value
                .getattr(intern!(py, "dtype"))
                .and_then(|dtype| dtype.getattr(intern!(py, "hasobject")))
                .and_then(|flag| flag.extract::<bool>())
                .is_ok_and(|has_objects| !has_objects)
    })
}

/// The bytes of a Python buffer, which stays locked while they live.
struct Buffer(PyBuffer<u8>);

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        if self.0.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: the buffer is contiguous (checked when it was taken) and stays exported while `self` lives. Python code
        // that changes it meanwhile is a race that the program has with itself, as in any copy without the lock.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast::<u8>(), self.0.len_bytes()) }
    }
}

// SAFETY: the pointer is only read; the export is released with the interpreter's lock by `PyBuffer`.
unsafe impl Send for Buffer {}

fn buffer_bytes(pickle_buffer: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let raw = pickle_buffer.call_method0(intern!(pickle_buffer.py(), "raw"))?;
    let buffer = PyBuffer::<u8>::get(&raw)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("a buffer of the value is not contiguous"));
    }
    Ok(Bytes::from_owner(Buffer(buffer)))
}

/// Serializes a value. Raises what the hook raises for what cannot be pickled.
pub fn serialize(runtime: &Runtime, value: &Bound<'_, PyAny>) -> PyResult<Serialized> {
    let py = value.py();
    if value.is_none() {
        return Ok(Serialized {
            format: layout::FORMAT_NONE,
            inband: Bytes::new(),
            buffers: Vec::new(),
            contained: Vec::new(),
        });
    }
    if let Ok(bytes) = value.cast_exact::<PyBytes>() {
        return Ok(Serialized {
            format: layout::FORMAT_BYTES,
            inband: python_bytes(bytes),
            buffers: Vec::new(),
            contained: Vec::new(),
        });
    }
    let batch = ReferenceBatch::instead_of(value)?;
    let value = batch.as_ref().map_or(value, |batch| batch.as_any());
    let buffers = PyList::empty(py);
    let append = buffers.getattr(intern!(py, "append"))?;
    COLLECTING.with(|stack| stack.borrow_mut().push(Vec::new()));
    let pickled = if is_plain(value, MAX_DEPTH, &mut { MAX_LOOKED_AT }) {
        static DUMPS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        pickle_function(py, &DUMPS, "dumps").and_then(|dumps| {
            let options = PyDict::new(py);
            options.set_item(intern!(py, "protocol"), 5)?;
            options.set_item(intern!(py, "buffer_callback"), &append)?;
            dumps.call((value,), Some(&options))
        })
    } else {
        runtime
            .hooks
            .bind(py)
            .call_method1(intern!(py, "serialize"), (value, append))
    };
    let contained = COLLECTING.with(|stack| stack.borrow_mut().pop()).unwrap_or_default();
    let pickled = match pickled?.cast_into::<PyBytes>() {
        Ok(pickled) => pickled,
        // A failure that takes a value's place: whoever gets it sees it raised.
        Err(other) => {
            let (exception,): (Bound<'_, PyBytes>,) = other.into_inner().extract()?;
            return Ok(Serialized {
                format: layout::FORMAT_EXCEPTION,
                inband: python_bytes(&exception),
                buffers: Vec::new(),
                contained,
            });
        }
    };
    let buffers = buffers
        .iter()
        .map(|buffer| buffer_bytes(&buffer))
        .collect::<PyResult<Vec<_>>>()?;
    let inband = match buffers.is_empty() {
        true => python_bytes(&pickled),
        false => padded(pickled.as_bytes()),
    };
    Ok(Serialized {
        format: layout::FORMAT_PICKLE,
        inband,
        buffers,
        contained,
    })
}

/// A pickle with zeros behind its end, which the unpickler does not look at, so that the buffer that follows it in a frame
/// is aligned there and can be used where it lies.
fn padded(pickle: &[u8]) -> Bytes {
    let length = pickle.len().next_multiple_of(BUFFER_ALIGNMENT_BYTES);
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(pickle);
    bytes.resize(length, 0);
    bytes.into()
}

/// Bytes of a Python `bytes`: copied where they will be kept inline, shared where they go to the object store.
fn python_bytes(bytes: &Bound<'_, PyBytes>) -> Bytes {
    if bytes.as_bytes().len() <= ray_wire::INLINE_LIMIT_BYTES {
        Bytes::copy_from_slice(bytes.as_bytes())
    } else {
        Bytes::from_owner(PyBackedBytes::from(bytes.clone()))
    }
}

/// Read-only bytes of a value, which stay where they are while this lives.
#[pyclass(module = "ray._raylet", frozen)]
pub struct ObjectBuffer(BufferOwner);

enum BufferOwner {
    Stored {
        value: StoredValue,
        start: usize,
        length: usize,
    },
    Inline(Bytes),
}

impl ObjectBuffer {
    fn bytes(&self) -> &[u8] {
        match &self.0 {
            BufferOwner::Stored { value, start, length } => &value.pinned[*start..*start + *length],
            BufferOwner::Inline(bytes) => bytes,
        }
    }
}

#[pymethods]
impl ObjectBuffer {
    fn __len__(&self) -> usize {
        self.bytes().len()
    }

    // SAFETY: the contract of the buffer protocol: `view` is the caller's, and the bytes live as long as `slf`, which the
    // view holds.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let bytes = slf.get().bytes();
        // SAFETY: as above; read-only, so that a request for a writable buffer is refused by the interpreter.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                bytes.as_ptr() as *mut _,
                bytes.len() as ffi::Py_ssize_t,
                1,
                flags,
            )
        };
        if filled == -1 {
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }
}

fn unpickle<'py>(
    py: Python<'py>,
    inband: &Bound<'py, PyAny>,
    buffers: Vec<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    static LOADS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let loads = pickle_function(py, &LOADS, "loads")?;
    if buffers.is_empty() {
        return loads.call1((inband,));
    }
    let options = PyDict::new(py);
    options.set_item(intern!(py, "buffers"), buffers)?;
    loads.call((inband,), Some(&options))
}

struct Scope;

impl Scope {
    fn enter(reading: Reading) -> Self {
        READING.with(|stack| stack.borrow_mut().push((reading, Owners::default())));
        Self
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        READING.with(|stack| stack.borrow_mut().pop());
    }
}

/// Makes the Python value. `Err` is a failure that the value is.
pub fn deserialize<'py>(py: Python<'py>, reading: Reading, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::Inline(value) => deserialize_inline(py, reading, value),
        Value::Stored(value) => {
            let (start, length) = value.layout.inband;
            let inband = &value.pinned[start..start + length];
            match value.layout.format {
                layout::FORMAT_PICKLE => {
                    let inband = if length < COPY_BELOW_BYTES {
                        PyBytes::new(py, inband).into_any()
                    } else {
                        view(py, value, start, length)?
                    };
                    let mut buffers = Vec::with_capacity(value.layout.buffers.len());
                    for (start, length) in &value.layout.buffers {
                        buffers.push(view(py, value, *start, *length)?);
                    }
                    let _scope = Scope::enter(reading);
                    unpickle(py, &inband, buffers)
                }
                format => deserialize_other(py, &reading, format, inband),
            }
        }
    }
}

fn view<'py>(py: Python<'py>, value: &StoredValue, start: usize, length: usize) -> PyResult<Bound<'py, PyAny>> {
    let value = value.clone();
    Ok(Bound::new(py, ObjectBuffer(BufferOwner::Stored { value, start, length }))?.into_any())
}

/// Makes the Python value of an inline one.
pub fn deserialize_inline<'py>(py: Python<'py>, reading: Reading, value: &InlineValue) -> PyResult<Bound<'py, PyAny>> {
    if value.format != layout::FORMAT_PICKLE {
        return deserialize_other(py, &reading, value.format, &value.inband);
    }
    let inband = PyBytes::new(py, &value.inband).into_any();
    let buffers = value
        .buffers
        .iter()
        .map(|buffer| inline_buffer(py, buffer))
        .collect::<PyResult<Vec<_>>>()?;
    let _scope = Scope::enter(reading);
    unpickle(py, &inband, buffers)
}

/// A buffer of a small value: where it lies, if an array over it is aligned there, or else a copy.
fn inline_buffer<'py>(py: Python<'py>, buffer: &Bytes) -> PyResult<Bound<'py, PyAny>> {
    if buffer.len() < VIEW_FROM_BYTES || buffer.as_ptr().addr() % BUFFER_ALIGNMENT_BYTES != 0 {
        return Ok(PyBytes::new(py, buffer).into_any());
    }
    Ok(Bound::new(py, ObjectBuffer(BufferOwner::Inline(buffer.clone())))?.into_any())
}

fn deserialize_other<'py>(
    py: Python<'py>,
    reading: &Reading,
    format: u32,
    inband: &[u8],
) -> PyResult<Bound<'py, PyAny>> {
    let hooks = reading.runtime.hooks.bind(py);
    match format {
        layout::FORMAT_NONE => Ok(py.None().into_bound(py)),
        layout::FORMAT_BYTES => Ok(PyBytes::new(py, inband).into_any()),
        layout::FORMAT_EXCEPTION => {
            let _scope = Scope::enter(reading.clone());
            let exception = hooks.call_method1(intern!(py, "deserialize_exception"), (PyBytes::new(py, inband),))?;
            Err(PyErr::from_value(exception))
        }
        layout::FORMAT_ERROR => {
            let error = ErrorValue::decode(inband).unwrap_or_else(|error| ErrorValue {
                kind: layout::ERROR_SYSTEM,
                message: format!("an error value is malformed: {error}"),
                ..ErrorValue::default()
            });
            Err(PyErr::from_value(hooks.call_method1(
                intern!(py, "error_from_value"),
                (error_dict(py, &error)?,),
            )?))
        }
        layout::FORMAT_CROSS_LANGUAGE => {
            hooks.call_method1(intern!(py, "cross_language_loads"), (PyBytes::new(py, inband),))
        }
        other => Err(crate::error::RayletError::new_err(format!(
            "a value has the unknown format {other}"
        ))),
    }
}

/// A death as a dictionary.
pub fn death_dict<'py>(py: Python<'py>, death: &ray_wire::DeathCause) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("kind", death.kind)?;
    dict.set_item("message", &death.message)?;
    dict.set_item("exit_code", death.exit_code)?;
    dict.set_item("signal", death.signal)?;
    dict.set_item("pid", death.pid)?;
    dict.set_item("log_tail", &death.log_tail)?;
    dict.set_item("exception", PyBytes::new(py, &death.exception))?;
    Ok(dict)
}

fn error_dict<'py>(py: Python<'py>, error: &ErrorValue) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("kind", error.kind)?;
    dict.set_item("message", &error.message)?;
    dict.set_item(
        "death",
        error.death.as_ref().map(|death| death_dict(py, death)).transpose()?,
    )?;
    dict.set_item("actor_id", PyBytes::new(py, &error.actor_id))?;
    dict.set_item("task_id", PyBytes::new(py, &error.task_id))?;
    dict.set_item("object_id", PyBytes::new(py, &error.object_id))?;
    dict.set_item("name", &error.name)?;
    Ok(dict)
}
