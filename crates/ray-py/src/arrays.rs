//! Plain arrays among the arguments of a call, pickled by this module: numpy's own way looks up modules, reduces the
//! element type and calls Python code, which costs more than copying 50 KB.
//!
//! Invariants:
//! 1. What arrives equals what numpy's own pickle would give: same element type, shape and bytes, read-only.
//! 2. Arguments that share an array, or might, are left to the general pickler, which keeps them the same object.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyFloat, PyInt, PyString, PyTuple};
use pyo3::{ffi, intern};

use crate::reference::ObjectRef;
use crate::serialize::{ndarray_type, pickle_function};

/// Codes of the element types that are plain memory.
const CODES: [&str; 17] = [
    "?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g", "F", "D",
];

struct ElementTypes {
    /// The one object that numpy has for each of `CODES`.
    types: Vec<Py<PyAny>>,
    array: Py<PyAny>,
}

fn element_types(py: Python<'_>) -> PyResult<&ElementTypes> {
    static TYPES: PyOnceLock<ElementTypes> = PyOnceLock::new();
    TYPES.get_or_try_init(py, || {
        let numpy = py.import("numpy")?;
        let dtype = numpy.getattr("dtype")?;
        let types = CODES
            .iter()
            .map(|code| Ok(dtype.call1((*code,))?.unbind()))
            .collect::<PyResult<_>>()?;
        let array = numpy.getattr("ndarray")?.unbind();
        Ok(ElementTypes { types, array })
    })
}

fn is_atom(value: &Bound<'_, PyAny>) -> bool {
    value.is_none()
        || value.is_exact_instance_of::<PyInt>()
        || value.is_exact_instance_of::<PyString>()
        || value.is_exact_instance_of::<PyBytes>()
        || value.is_exact_instance_of::<PyFloat>()
        || value.is_exact_instance_of::<PyBool>()
        || value.is_exact_instance_of::<ObjectRef>()
}

/// Whether there are arrays among the values and nothing that could hold one of them a second time.
pub fn are_alone<'py>(values: impl Iterator<Item = Bound<'py, PyAny>>) -> bool {
    let mut arrays: Vec<*mut ffi::PyObject> = Vec::new();
    for value in values {
        if is_atom(&value) {
            continue;
        }
        let is_array = ndarray_type(value.py()).is_some_and(|class| value.get_type().is(&class));
        if !is_array || arrays.contains(&value.as_ptr()) {
            return false;
        }
        arrays.push(value.as_ptr());
    }
    !arrays.is_empty()
}

/// What is pickled for an argument: a stand-in for an array, where arrays are replaced, and otherwise the value itself.
pub fn replaced(value: Bound<'_, PyAny>, replaces: bool) -> PyResult<Bound<'_, PyAny>> {
    match replaces {
        true => PlainArray::instead_of(value),
        false => Ok(value),
    }
}

/// Stands for an array while arguments are pickled.
#[pyclass(module = "ray._raylet", frozen)]
pub struct PlainArray {
    code: &'static str,
    array: Py<PyAny>,
}

impl PlainArray {
    /// What is pickled in place of the array, where it is plain memory in C order; otherwise the value itself.
    fn instead_of(value: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
        let py = value.py();
        if !ndarray_type(py).is_some_and(|class| value.get_type().is(&class)) {
            return Ok(value);
        }
        let element = value.getattr(intern!(py, "dtype"))?;
        let known = element_types(py)?.types.iter().position(|known| known.is(&element));
        let Some(code) = known.map(|index| CODES[index]) else {
            return Ok(value);
        };
        let flags = value.getattr(intern!(py, "flags"))?;
        if !flags.getattr(intern!(py, "c_contiguous"))?.extract::<bool>()? {
            return Ok(value);
        }
        let array = value.unbind();
        Ok(Bound::new(py, Self { code, array })?.into_any())
    }
}

#[pymethods]
impl PlainArray {
    fn __reduce_ex__<'py>(&self, py: Python<'py>, _protocol: u32) -> PyResult<Bound<'py, PyAny>> {
        static REBUILD: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        static BUFFER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let rebuild = REBUILD.get_or_try_init(py, || {
            Ok::<_, PyErr>(py.import("ray._raylet")?.getattr("rebuild_array")?.unbind())
        })?;
        let array = self.array.bind(py);
        let buffer = pickle_function(py, &BUFFER, "PickleBuffer")?.call1((array,))?;
        let shape = array.getattr(intern!(py, "shape"))?;
        let state = (self.code, shape, buffer);
        Ok((rebuild.bind(py), state).into_pyobject(py)?.into_any())
    }
}

/// The array that a `PlainArray` stood for, over the buffer that came with it.
#[pyfunction]
pub fn rebuild_array<'py>(
    py: Python<'py>,
    code: &str,
    shape: &Bound<'py, PyTuple>,
    buffer: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let known = element_types(py)?;
    match CODES.iter().position(|other| *other == code) {
        Some(index) => known.array.bind(py).call1((shape, &known.types[index], buffer)),
        None => {
            let element = py.import("numpy")?.getattr("dtype")?.call1((code,))?;
            known.array.bind(py).call1((shape, element, buffer))
        }
    }
}
