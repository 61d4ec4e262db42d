//! `CoreWorker`: submitting, getting, putting and waiting.
//!
//! Invariant: 1. Whatever may wait releases the interpreter's lock first; submitting and small puts do not wait.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use pyo3::IntoPyObjectExt;
use ray_ids::{ActorId, FunctionId, TaskId, WorkerId};
use ray_worker::{
    ActorOptions, Arguments, ConnectConfig, CoreWorker as Worker, LogEntry, PassedReference, Reference, Role,
    Submitted, TemplateOptions,
};

use crate::arrays;
use crate::conversion::{bytes_field, field, id_error, optional, resources, strategy};
use crate::error::worker_error;
use crate::event_loop::{set_task_variable, task_of_context};
use crate::execution::RunningTask;
use crate::handles::{ActorCore, StreamCore, TaskTemplate};
use crate::reference::{DynamicObjectRef, ObjectRef};
use crate::serialize::{self, Reading};

/// The core worker and the language's hooks.
#[derive(Clone)]
pub struct Runtime {
    pub worker: Worker,
    pub hooks: Arc<Py<PyAny>>,
}

/// The runtime that this process joined last, for references that are read outside any value.
static CURRENT: Mutex<Option<Runtime>> = Mutex::new(None);

thread_local! {
    /// The call that runs on this thread.
    static CURRENT_TASK: RefCell<Option<Py<RunningTask>>> = const { RefCell::new(None) };
}

/// The runtime that this process joined last.
pub fn current_runtime() -> Option<Runtime> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Makes a call this thread's current one.
pub fn set_current_task(task: Option<Py<RunningTask>>) {
    // The old one is dropped outside the cell: its end may run code that looks here.
    let _old = CURRENT_TASK.with(|current| current.replace(task));
}

impl Runtime {
    /// The task that this thread runs; a driver's root task outside any.
    pub fn current_task_id(&self, py: Python<'_>) -> TaskId {
        let running = CURRENT_TASK.with(|current| current.borrow().as_ref().map(|task| task.get().incoming.task_id));
        let running = running.or_else(|| task_of_context(py).map(|task| task.get().incoming.task_id));
        running.unwrap_or_else(|| match self.worker.actor() {
            Some((actor, _)) => TaskId::for_actor_creation(actor),
            None => TaskId::for_driver(self.worker.job_id()),
        })
    }

    pub fn reading(&self, outer: &Reference) -> Reading {
        Reading {
            runtime: self.clone(),
            task: None,
            outer: Some(outer.id()),
        }
    }

    /// Arguments in the form they travel in.
    fn arguments(&self, args: &Bound<'_, PyTuple>, kwargs: Option<&Bound<'_, PyDict>>) -> PyResult<Arguments> {
        let kwargs = kwargs.filter(|kwargs| !kwargs.is_empty());
        if args.is_empty() && kwargs.is_none() {
            return Ok(Arguments::default());
        }
        let py = args.py();
        let mut references = Vec::new();
        let mut by_value = kwargs.is_some();
        let keyword_values = kwargs.into_iter().flatten().map(|(_, value)| value);
        let replaces_arrays = arrays::are_alone(args.iter().chain(keyword_values));
        let positional = PyList::empty(py);
        for (index, value) in args.iter().enumerate() {
            match value.cast::<ObjectRef>() {
                Ok(reference) => {
                    let object = reference.get().counted()?.id();
                    references.push(PassedReference {
                        index: index as u32,
                        keyword: String::new(),
                        object,
                    });
                    positional.append(py.None())?;
                }
                Err(_) => {
                    by_value = true;
                    positional.append(arrays::replaced(value, replaces_arrays)?)?;
                }
            }
        }
        let keywords = PyDict::new(py);
        for (key, value) in kwargs.into_iter().flatten() {
            match value.cast::<ObjectRef>() {
                Ok(reference) => {
                    let object = reference.get().counted()?.id();
                    references.push(PassedReference {
                        index: 0,
                        keyword: key.extract()?,
                        object,
                    });
                    keywords.set_item(key, py.None())?;
                }
                Err(_) => keywords.set_item(key, arrays::replaced(value, replaces_arrays)?)?,
            }
        }
        let values = if by_value {
            let pair = PyTuple::new(py, [positional.into_any(), keywords.into_any()])?;
            Some(serialize::serialize(self, pair.as_any())?)
        } else {
            None
        };
        Ok(Arguments { values, references })
    }

    fn submitted<'py>(&self, py: Python<'py>, submitted: Submitted, num_returns: i32) -> PyResult<Bound<'py, PyAny>> {
        match submitted {
            Submitted::Stream(stream) => StreamCore { stream }.into_bound_py_any(py),
            Submitted::References(mut references) => match num_returns {
                0 => Ok(py.None().into_bound(py)),
                1 => match references.pop() {
                    Some(reference) => ObjectRef::wrap(reference).into_bound_py_any(py),
                    None => Ok(py.None().into_bound(py)),
                },
                ray_wire::NUM_RETURNS_DYNAMIC => match references.pop() {
                    Some(reference) => Ok(Bound::new(py, DynamicObjectRef::wrap(reference))?.into_any()),
                    None => Ok(py.None().into_bound(py)),
                },
                _ => {
                    let list = PyList::empty(py);
                    for reference in references {
                        list.append(ObjectRef::wrap(reference).into_bound_py_any(py)?)?;
                    }
                    Ok(list.into_any())
                }
            },
        }
    }
}

fn is_large(arguments: &Arguments) -> bool {
    arguments
        .values
        .as_ref()
        .is_some_and(|values| values.size() > ray_wire::INLINE_LIMIT_BYTES)
}

/// The runtime in this process.
#[pyclass(module = "ray._raylet", frozen, weakref)]
pub struct CoreWorker {
    pub runtime: Runtime,
}

#[pymethods]
impl CoreWorker {
    #[staticmethod]
    fn connect(py: Python<'_>, config: &Bound<'_, PyDict>, hooks: Py<PyAny>) -> PyResult<Self> {
        let role = match optional::<String>(config, "role")?.as_deref() {
            Some("driver") | None => Role::Driver,
            Some("worker") => Role::Worker,
            Some("tool") => Role::Tool,
            Some(other) => return Err(PyValueError::new_err(format!("{other:?} is no role of a process"))),
        };
        let worker_id = bytes_field(config, "worker_id")?;
        let seconds = optional::<f64>(config, "connect_timeout_s")?.unwrap_or(30.0);
        let config = ConnectConfig {
            raylet_socket: field(config, "raylet_socket")?,
            role,
            worker_id: match worker_id.is_empty() {
                true => None,
                false => Some(WorkerId::from_binary(&worker_id).map_err(id_error)?),
            },
            startup_token: field(config, "startup_token")?,
            job_config_json: field(config, "job_config_json")?,
            timeout: Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))?,
        };
        let worker = py
            .detach(|| Worker::connect(config))
            .map_err(|error| worker_error(py, error))?;
        let runtime = Runtime {
            worker,
            hooks: Arc::new(hooks),
        };
        *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = Some(runtime.clone());
        Ok(Self { runtime })
    }

    // --- facts ---

    fn job_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.runtime.worker.job_id().as_bytes())
    }

    fn worker_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.runtime.worker.worker_id().as_bytes())
    }

    fn node_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.runtime.worker.node_id().as_bytes())
    }

    fn session_directory(&self) -> String {
        self.runtime.worker.session_directory().to_owned()
    }

    fn details<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let text = self.runtime.worker.details_json();
        let text = if text.is_empty() { "{}" } else { text };
        let details = py.import("json")?.getattr("loads")?.call1((text,))?;
        // The token proves membership; programs have no use for it.
        if let Ok(dict) = details.cast::<PyDict>() {
            if dict.contains("auth_token")? {
                dict.del_item("auth_token")?;
            }
        }
        Ok(details)
    }

    fn address<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.runtime.worker.address().encode_to_vec())
    }

    fn current_task_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.runtime.current_task_id(py).as_bytes())
    }

    fn current_actor_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let actor = self.runtime.worker.actor().map_or(ActorId::NIL, |(actor, _)| actor);
        PyBytes::new(py, actor.as_bytes())
    }

    fn assigned_resources<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for amount in self
            .runtime
            .worker
            .assigned()
            .map(|assigned| assigned.resources)
            .unwrap_or_default()
        {
            dict.set_item(amount.name, amount.amount_e4 as f64 / 1e4)?;
        }
        Ok(dict)
    }

    fn resource_instances<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let text = self
            .runtime
            .worker
            .assigned()
            .map(|assigned| assigned.resource_instances_json)
            .unwrap_or_default();
        let text = if text.is_empty() { "{}".to_owned() } else { text };
        py.import("json")?.getattr("loads")?.call1((text,))
    }

    fn current_strategy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let strategy = self
            .runtime
            .worker
            .assigned()
            .and_then(|assigned| assigned.strategy)
            .unwrap_or_default();
        let dict = PyDict::new(py);
        dict.set_item("kind", strategy.kind)?;
        dict.set_item("placement_group_id", PyBytes::new(py, &strategy.placement_group_id))?;
        dict.set_item("bundle_index", strategy.bundle_index)?;
        dict.set_item("capture_child_tasks", strategy.capture_child_tasks)?;
        Ok(dict)
    }

    fn shutdown(&self, py: Python<'_>) {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if current
            .as_ref()
            .is_some_and(|runtime| runtime.worker.worker_id() == self.runtime.worker.worker_id())
        {
            *current = None;
        }
        drop(current);
        py.detach(|| self.runtime.worker.shutdown());
    }

    // --- submitting ---

    fn make_template(&self, py: Python<'_>, options: &Bound<'_, PyDict>) -> PyResult<TaskTemplate> {
        let function_id = bytes_field(options, "function_id")?;
        let options = TemplateOptions {
            function_id: match function_id.is_empty() {
                true => None,
                false => Some(FunctionId::from_binary(&function_id).map_err(id_error)?),
            },
            function_blob: bytes_field(options, "function_blob")?,
            function_name: field(options, "function_name")?,
            name: field(options, "name")?,
            num_returns: optional(options, "num_returns")?.unwrap_or(1),
            resources: resources(options, "resources")?,
            strategy: strategy(options, "strategy")?,
            max_retries: field(options, "max_retries")?,
            retry_exceptions: field(options, "retry_exceptions")?,
            retry_exception_types: bytes_field(options, "retry_exception_types")?,
            runtime_env_json: field(options, "runtime_env_json")?,
            max_calls: field(options, "max_calls")?,
            generator_backpressure: field(options, "generator_backpressure")?,
            method_name: field(options, "method_name")?,
            concurrency_group: field(options, "concurrency_group")?,
            actor_id: None,
        };
        let template = self
            .runtime
            .worker
            .make_template(options)
            .map_err(|error| worker_error(py, error))?;
        Ok(TaskTemplate {
            template: Arc::new(template),
        })
    }

    #[pyo3(signature = (template, args, kwargs = None))]
    fn submit_task<'py>(
        &self,
        py: Python<'py>,
        template: &TaskTemplate,
        args: &Bound<'py, PyTuple>,
        kwargs: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments = self.runtime.arguments(args, kwargs)?;
        let parent = self.runtime.current_task_id(py);
        let worker = &self.runtime.worker;
        let submitted = if is_large(&arguments) {
            py.detach(|| worker.submit_task(&template.template, arguments, parent))
        } else {
            worker.submit_task(&template.template, arguments, parent)
        };
        let submitted = submitted.map_err(|error| worker_error(py, error))?;
        self.runtime.submitted(py, submitted, template.template.num_returns())
    }

    #[pyo3(signature = (actor, template, args, kwargs = None))]
    fn submit_actor_task<'py>(
        &self,
        py: Python<'py>,
        actor: &ActorCore,
        template: &TaskTemplate,
        args: &Bound<'py, PyTuple>,
        kwargs: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if actor.runtime.worker.is_shut_down() {
            return Err(PyValueError::new_err(format!(
                "the handle to actor {} is of a session that was shut down. Handles do not outlive ray.shutdown()",
                actor.actor
            )));
        }
        let arguments = self.runtime.arguments(args, kwargs)?;
        let parent = self.runtime.current_task_id(py);
        let worker = &self.runtime.worker;
        let submitted = if is_large(&arguments) {
            py.detach(|| worker.submit_actor_task(actor.actor, &template.template, arguments, parent))
        } else {
            worker.submit_actor_task(actor.actor, &template.template, arguments, parent)
        };
        let submitted = submitted.map_err(|error| worker_error(py, error))?;
        self.runtime.submitted(py, submitted, template.template.num_returns())
    }

    fn create_actor<'py>(
        &self,
        py: Python<'py>,
        template: &TaskTemplate,
        args: &Bound<'py, PyTuple>,
        kwargs: Option<&Bound<'py, PyDict>>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<ActorCore> {
        let arguments = self.runtime.arguments(args, kwargs)?;
        let groups =
            optional::<std::collections::BTreeMap<String, u32>>(options, "concurrency_groups")?.unwrap_or_default();
        let options = ActorOptions {
            resources: resources(options, "resources")?,
            placement_resources: resources(options, "placement_resources")?,
            strategy: strategy(options, "strategy")?,
            max_restarts: field(options, "max_restarts")?,
            max_task_retries: field(options, "max_task_retries")?,
            max_concurrency: optional(options, "max_concurrency")?.unwrap_or(1),
            is_async: field(options, "is_async")?,
            concurrency_groups_json: serde_json::to_string(&groups).unwrap_or_default(),
            detached: field(options, "detached")?,
            name: field(options, "name")?,
            namespace: field(options, "namespace")?,
            get_if_exists: field(options, "get_if_exists")?,
            out_of_order: field(options, "out_of_order")?,
            class_name: field(options, "class_name")?,
            runtime_env_json: field(options, "runtime_env_json")?,
            handle_metadata: bytes_field(options, "handle_metadata")?,
            max_pending_calls: optional(options, "max_pending_calls")?.unwrap_or(-1),
        };
        let parent = self.runtime.current_task_id(py);
        let worker = &self.runtime.worker;
        let (actor, reference, _) = py
            .detach(|| worker.create_actor(&template.template, arguments, options, parent))
            .map_err(|error| worker_error(py, error))?;
        Ok(ActorCore {
            runtime: self.runtime.clone(),
            actor,
            reference,
        })
    }

    fn actor_from_reference(
        &self,
        py: Python<'_>,
        reference: &ObjectRef,
        metadata: &Bound<'_, PyDict>,
    ) -> PyResult<ActorCore> {
        let counted = reference.counted()?.clone();
        let actor = counted.id().task_id().actor_id();
        let (class_name, out_of_order) = (
            field::<String>(metadata, "class_name")?,
            field(metadata, "out_of_order")?,
        );
        let limit = optional(metadata, "max_pending_calls")?.unwrap_or(-1);
        self.runtime
            .worker
            .know_actor(actor, &class_name, out_of_order, limit)
            .map_err(|error| worker_error(py, error))?;
        Ok(ActorCore {
            runtime: self.runtime.clone(),
            actor,
            reference: Some(counted),
        })
    }

    fn get_named_actor<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        namespace: &str,
    ) -> PyResult<(ActorCore, Bound<'py, PyBytes>)> {
        let worker = &self.runtime.worker;
        let view = py
            .detach(|| worker.get_named_actor(name, namespace))
            .map_err(|error| worker_error(py, error))?;
        let core = ActorCore {
            runtime: self.runtime.clone(),
            actor: view.actor_id,
            reference: None,
        };
        Ok((core, PyBytes::new(py, &view.handle_metadata)))
    }

    fn kill_actor(&self, py: Python<'_>, actor_id: &[u8], no_restart: bool) -> PyResult<()> {
        let actor = ActorId::from_binary(actor_id).map_err(id_error)?;
        self.runtime
            .worker
            .kill_actor(actor, no_restart)
            .map_err(|error| worker_error(py, error))
    }

    fn cancel(&self, py: Python<'_>, reference: &ObjectRef, force: bool, recursive: bool) -> PyResult<()> {
        self.runtime
            .worker
            .cancel(&reference.id, force, recursive)
            .map_err(|error| worker_error(py, error))
    }

    // --- executing ---

    fn run_task_loop(&self, py: Python<'_>, executor: Py<PyAny>) -> PyResult<()> {
        crate::execution::run(py, &self.runtime, &executor)
    }

    #[pyo3(signature = (task, value, exception, corked = false))]
    fn finish(
        &self,
        task: &RunningTask,
        value: &Bound<'_, PyAny>,
        exception: Option<&Bound<'_, PyAny>>,
        corked: bool,
    ) -> PyResult<()> {
        crate::execution::finish(&self.runtime, task, value, exception, corked)
    }

    fn flush_replies(&self) {
        crate::execution::flush_replies(&self.runtime);
    }

    fn put_generator_item(&self, task: &RunningTask, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        crate::execution::put_generator_item(&self.runtime, task, value)
    }

    #[pyo3(signature = (task))]
    fn set_current_task(&self, task: Option<Py<RunningTask>>) {
        set_current_task(task);
    }

    fn current_task(&self, py: Python<'_>) -> Option<Py<RunningTask>> {
        CURRENT_TASK
            .with(|current| current.borrow().as_ref().map(|task| task.clone_ref(py)))
            .or_else(|| task_of_context(py))
    }

    fn set_task_variable(&self, variable: &Bound<'_, PyAny>) -> PyResult<()> {
        let kind = variable.py().import("contextvars")?.getattr("ContextVar")?;
        if !variable.is_instance(&kind)? {
            return Err(PyTypeError::new_err("a contextvars.ContextVar is needed"));
        }
        set_task_variable(variable.clone().unbind());
        Ok(())
    }

    fn current_actor_handle<'py>(&self, py: Python<'py>) -> PyResult<(ActorCore, Bound<'py, PyBytes>)> {
        let (actor, reference, metadata) = self
            .runtime
            .worker
            .own_actor_handle()
            .map_err(|error| worker_error(py, error))?;
        let core = ActorCore {
            runtime: self.runtime.clone(),
            actor,
            reference: Some(reference),
        };
        Ok((core, PyBytes::new(py, &metadata)))
    }

    fn exit_worker(&self, reason: &str) {
        self.runtime.worker.exit_after_call(reason);
    }

    fn is_cancelled(&self, task: &RunningTask) -> bool {
        self.runtime.worker.is_cancelled(&task.incoming.task_id)
    }

    fn is_interrupt_wanted(&self) -> bool {
        self.runtime.worker.is_interrupt_wanted()
    }

    fn next_log_line<'py>(&self, py: Python<'py>, timeout_s: f64) -> PyResult<Option<Vec<Bound<'py, PyDict>>>> {
        let limit = Duration::try_from_secs_f64(timeout_s.max(0.0)).unwrap_or(Duration::from_secs(1));
        let worker = &self.runtime.worker;
        let Some(entries) = py.detach(|| worker.next_logs(limit)) else {
            return Ok(None);
        };
        let mut all = Vec::with_capacity(entries.len());
        for entry in entries {
            let dict = PyDict::new(py);
            match entry {
                LogEntry::Lines(lines) => {
                    dict.set_item("pid", lines.pid)?;
                    dict.set_item("name", lines.name)?;
                    dict.set_item("host", lines.host)?;
                    dict.set_item("is_error", lines.is_error)?;
                    dict.set_item("lines", lines.lines)?;
                }
                LogEntry::Message(message) => {
                    dict.set_item("level", message.level)?;
                    dict.set_item("message", message.message)?;
                }
            }
            all.push(dict);
        }
        Ok(Some(all))
    }
}

/// Bytes for a message.
pub fn message_bytes(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
