//! The extension module `ray._raylet`: the runtime as Python sees it.
//!
//! It owns the border: ids cross it as bytes, values as pickles, failures as exceptions (`error`). It refuses to hold the
//! interpreter's lock while a thread waits.
//!
//! Invariants:
//! 1. No thread of the runtime takes the interpreter's lock; only threads that Python called do.
//! 2. Hooks of the language run with no lock of the runtime held.

mod arrays;
mod call_arguments;
mod completions;
mod conversion;
mod core;
mod core_cluster;
mod core_objects;
mod daemons;
mod error;
mod event_loop;
mod execution;
mod handles;
mod reference;
mod serialize;

use pyo3::prelude::*;

/// The runtime in this process, ids of objects, and the daemons' entry points.
#[pymodule]
fn _raylet(module: &Bound<'_, PyModule>) -> PyResult<()> {
    use ray_wire::layout;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("NUM_RETURNS_DYNAMIC", ray_wire::NUM_RETURNS_DYNAMIC)?;
    module.add("NUM_RETURNS_STREAMING", ray_wire::NUM_RETURNS_STREAMING)?;
    module.add("FORMAT_BYTES", layout::FORMAT_BYTES)?;
    module.add("FORMAT_PICKLE", layout::FORMAT_PICKLE)?;
    module.add("FORMAT_EXCEPTION", layout::FORMAT_EXCEPTION)?;
    module.add("FORMAT_ERROR", layout::FORMAT_ERROR)?;
    module.add("FORMAT_CROSS_LANGUAGE", layout::FORMAT_CROSS_LANGUAGE)?;
    module.add("FORMAT_NONE", layout::FORMAT_NONE)?;
    module.add("RayletError", module.py().get_type::<error::RayletError>())?;
    module.add_class::<reference::ObjectRef>()?;
    module.add(
        "DynamicObjectRef",
        module.py().get_type::<reference::DynamicObjectRef>(),
    )?;
    module.add_class::<serialize::ObjectBuffer>()?;
    module.add_class::<handles::TaskTemplate>()?;
    module.add_class::<handles::ActorCore>()?;
    module.add_class::<handles::StreamCore>()?;
    module.add_class::<completions::CompletionQueue>()?;
    module.add_class::<execution::RunningTask>()?;
    module.add_class::<event_loop::EventLoop>()?;
    module.add_class::<core::CoreWorker>()?;
    module.add_function(wrap_pyfunction!(arrays::rebuild_array, module)?)?;
    module.add_function(wrap_pyfunction!(reference::rebuild_reference, module)?)?;
    module.add_function(wrap_pyfunction!(arrays::rebuild_array, module)?)?;
    module.add_function(wrap_pyfunction!(reference::rebuild_references, module)?)?;
    module.add_function(wrap_pyfunction!(daemons::run_gcs, module)?)?;
    module.add_function(wrap_pyfunction!(daemons::run_raylet, module)?)?;
    error::install();
    Ok(())
}
