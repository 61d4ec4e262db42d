//! The daemons' entry points. They run on the calling thread, without the interpreter's lock, until they are told to end.

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::error::RayletError;

fn log_to_standard_error(name: &'static str) {
    let level = std::env::var("RAY_LOG_LEVEL")
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(tracing::Level::INFO);
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(level)
        .finish();
    // A process that logs already keeps its logger.
    let _ = tracing::subscriber::set_global_default(subscriber);
    tracing::debug!("{name} starts as process {}", std::process::id());
}

/// Runs the control plane until SIGTERM or the end of its parent's pipe.
#[pyfunction]
pub fn run_gcs(py: Python<'_>, config_json: &Bound<'_, PyString>) -> PyResult<()> {
    let config = serde_json::from_str(&config_json.to_string_lossy())
        .map_err(|error| RayletError::new_err(format!("the control plane's configuration is malformed: {error}")))?;
    log_to_standard_error("gcs_server");
    ray_rpc::raise_descriptor_limit();
    py.detach(|| ray_gcs::run(config))
        .map_err(|error| RayletError::new_err(error.to_string()))
}

/// Runs a node's daemon until SIGTERM or the end of its parent's pipe.
#[pyfunction]
#[pyo3(signature = (config_json, zygote_fd=None, zygote_pid=None))]
pub fn run_raylet(
    py: Python<'_>,
    config_json: &Bound<'_, PyString>,
    zygote_fd: Option<i32>,
    zygote_pid: Option<u32>,
) -> PyResult<()> {
    let mut config: ray_raylet::RayletConfig = serde_json::from_str(&config_json.to_string_lossy())
        .map_err(|error| RayletError::new_err(format!("the raylet's configuration is malformed: {error}")))?;
    log_to_standard_error("raylet");
    config.zygote = zygote_fd.zip(zygote_pid);
    // Its zygote and their workers inherit it.
    ray_rpc::raise_descriptor_limit();
    py.detach(|| ray_raylet::run(config))
        .map_err(|error| RayletError::new_err(error.to_string()))
}
