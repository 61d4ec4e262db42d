//! Executing calls in a worker: the loop of its main thread, and how calls end that run elsewhere.
//!
//! Invariants:
//! 1. Every call that starts is answered once, unless the process ends.
//! 2. An argument that is a failure fails the call with that failure, without running it.
//! 3. What a call returns is serialized while the call is still current, so that references in it are counted.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use bytes::Bytes;
use pyo3::exceptions::{PyKeyboardInterrupt, PySystemExit, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyList};
use pyo3::{intern, IntoPyObjectExt};
use ray_wire::layout::{FORMAT_EXCEPTION, FORMAT_NONE};
use ray_wire::{LeaseAssigned, NUM_RETURNS_DYNAMIC, NUM_RETURNS_STREAMING};
use ray_worker::{Incoming, Outcome, Serialized, Work};

use crate::call_arguments::call_arguments;
use crate::core::{set_current_task, Runtime};
use crate::error::{take_raised, worker_error};
use crate::event_loop;
use crate::serialize;

/// A call being executed.
#[pyclass(module = "ray._raylet", frozen, weakref)]
pub struct RunningTask {
    pub incoming: Arc<Incoming>,
    next_item: AtomicU64,
    finished: AtomicBool,
    executor: Py<PyAny>,
}

#[pymethods]
impl RunningTask {
    #[getter]
    fn task_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.incoming.task_id.as_bytes())
    }

    #[getter]
    fn job_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.incoming.task_id.job_id().as_bytes())
    }

    #[getter]
    fn actor_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.incoming.task_id.actor_id().as_bytes())
    }

    #[getter]
    fn parent_task_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.incoming.parent.as_bytes())
    }

    #[getter]
    fn function_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.incoming.template.function_id)
    }

    #[getter]
    fn function_name(&self) -> &str {
        &self.incoming.template.function_name
    }

    #[getter]
    fn name(&self) -> &str {
        let template = &self.incoming.template;
        if template.name.is_empty() {
            &template.function_name
        } else {
            &template.name
        }
    }

    #[getter]
    fn method_name(&self) -> &str {
        &self.incoming.template.method_name
    }

    #[getter]
    fn concurrency_group(&self) -> &str {
        &self.incoming.template.concurrency_group
    }

    #[getter]
    fn attempt(&self) -> u32 {
        self.incoming.attempt
    }

    #[getter]
    fn num_returns(&self) -> i32 {
        self.incoming.template.num_returns
    }

    #[getter]
    fn retry_exceptions(&self) -> bool {
        self.incoming.template.retry_exceptions
    }

    #[getter]
    fn retry_exception_types<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.incoming.template.retry_exception_types)
    }

    #[getter]
    fn generator_backpressure(&self) -> u32 {
        self.incoming.template.generator_backpressure
    }

    #[getter]
    fn caller<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.incoming.caller_id.as_bytes())
    }

    #[getter]
    fn depth(&self) -> u32 {
        self.incoming.depth
    }
}

impl RunningTask {
    /// A call that is about to run.
    pub fn new(py: Python<'_>, incoming: Arc<Incoming>, executor: &Py<PyAny>) -> Self {
        Self {
            incoming,
            next_item: AtomicU64::new(0),
            finished: AtomicBool::new(false),
            executor: executor.clone_ref(py),
        }
    }
}

/// What the loop of the main thread keeps.
struct Loop<'a> {
    runtime: &'a Runtime,
    executor: &'a Py<PyAny>,
    functions: HashMap<Bytes, Py<PyAny>>,
    methods: HashMap<Bytes, (Py<PyAny>, Place)>,
}

/// Where a method runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Main,
    Elsewhere,
}

thread_local! {
    /// One call for each link on which answers wait for others; only this thread's.
    static CORKED: RefCell<Vec<Arc<Incoming>>> = const { RefCell::new(Vec::new()) };
}

/// Runs what is pushed here until the worker is to leave.
pub fn run(py: Python<'_>, runtime: &Runtime, executor: &Py<PyAny>) -> PyResult<()> {
    runtime.worker.begin_execution();
    if event_loop::is_wanted(py, executor)? {
        return event_loop::run(py, runtime, executor);
    }
    let mut state = Loop {
        runtime,
        executor,
        functions: HashMap::new(),
        methods: HashMap::new(),
    };
    loop {
        // Giving the interpreter's lock away between two calls costs more than a short call; threads that want it get it
        // from the calls' own code.
        let here = runtime.worker.next_work_here();
        match here.or_else(|| py.detach(|| runtime.worker.next_work())) {
            None => match take_raised() {
                // A cancellation that came too late for its task, or Ctrl-C, which is the driver's to handle.
                Some(error) if error.is_instance_of::<PyKeyboardInterrupt>(py) => {}
                Some(error) => return Err(error),
                None => {}
            },
            Some(Work::Exit(reason)) => {
                runtime.worker.announce_exit(&reason);
                return Ok(());
            }
            Some(Work::Cancel(task)) => {
                executor
                    .bind(py)
                    .call_method1(intern!(py, "cancel_elsewhere"), (PyBytes::new(py, task.as_bytes()),))?;
            }
            Some(Work::Lease(lease)) => {
                executor
                    .bind(py)
                    .call_method1(intern!(py, "prepare_lease"), (lease_dict(py, &lease)?,))?;
            }
            Some(Work::Task(incoming)) => {
                let makes_actor = incoming.creation.is_some();
                state.run_one(py, incoming)?;
                if makes_actor && event_loop::is_wanted(py, executor)? {
                    return event_loop::run(py, runtime, executor);
                }
            }
        }
    }
}

pub fn lease_dict<'py>(py: Python<'py>, lease: &LeaseAssigned) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let loads = py.import("json")?.getattr("loads")?;
    let instances = if lease.resource_instances_json.is_empty() {
        "{}"
    } else {
        &lease.resource_instances_json
    };
    dict.set_item("resource_instances", loads.call1((instances,))?)?;
    dict.set_item("job_config_json", &lease.job_config_json)?;
    dict.set_item("job_id", PyBytes::new(py, &lease.job_id))?;
    dict.set_item("runtime_env_json", &lease.runtime_env_json)?;
    Ok(dict)
}

impl Loop<'_> {
    fn run_one(&mut self, py: Python<'_>, incoming: Arc<Incoming>) -> PyResult<()> {
        let task = Bound::new(py, RunningTask::new(py, incoming.clone(), self.executor))?;
        set_current_task(Some(task.clone().unbind()));
        let outcome = self.call(py, &task);
        let result = match outcome {
            // Somebody else ends it.
            Ok(None) => Ok(()),
            Ok(Some(value)) => finish(self.runtime, task.get(), &value, None, false),
            Err(error) if error.is_instance_of::<PySystemExit>(py) && !incoming.template.method_name.is_empty() => {
                self.runtime
                    .worker
                    .exit_after_call("the actor's method raised SystemExit");
                finish(
                    self.runtime,
                    task.get(),
                    &py.None().into_bound(py),
                    Some(&raised(py, error)),
                    false,
                )
            }
            Err(error) if error.is_instance_of::<PySystemExit>(py) => {
                self.runtime.worker.announce_exit("a task called sys.exit()");
                Err(error)
            }
            Err(error) => finish(
                self.runtime,
                task.get(),
                &py.None().into_bound(py),
                Some(&raised(py, error)),
                false,
            ),
        };
        set_current_task(None);
        result
    }

    /// Runs the call. `None`: it runs elsewhere and ends there.
    fn call<'py>(&mut self, py: Python<'py>, task: &Bound<'py, RunningTask>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let incoming = task.get().incoming.clone();
        let executor = self.executor.bind(py);
        if let Some(creation) = &incoming.creation {
            let class = self.function(py, task)?;
            let (args, kwargs) = call_arguments(py, self.runtime, &incoming)?;
            let facts = PyDict::new(py);
            facts.set_item("class_name", &creation.class_name)?;
            facts.set_item("is_async", creation.is_async)?;
            facts.set_item("max_concurrency", creation.max_concurrency)?;
            let groups = if creation.concurrency_groups_json.is_empty() {
                "{}"
            } else {
                &creation.concurrency_groups_json
            };
            facts.set_item(
                "concurrency_groups",
                py.import("json")?.getattr("loads")?.call1((groups,))?,
            )?;
            facts.set_item("name", &creation.name)?;
            facts.set_item("namespace", &creation.namespace)?;
            facts.set_item("detached", creation.detached)?;
            facts.set_item("incarnation", incoming.incarnation)?;
            facts.set_item("max_restarts", creation.max_restarts)?;
            facts.set_item("max_task_retries", creation.max_task_retries)?;
            facts.set_item("out_of_order", creation.out_of_order)?;
            facts.set_item("max_pending_calls", creation.max_pending_calls)?;
            facts.set_item("handle_metadata", PyBytes::new(py, &creation.handle_metadata))?;
            self.begin(py, &incoming, true)?;
            let created = executor.call_method1(intern!(py, "create_actor"), (task, class, args, kwargs, facts));
            self.runtime.worker.user_code_ended();
            created?;
            return Ok(Some(py.None().into_bound(py)));
        }
        if incoming.lease.is_none() {
            return self.call_method(py, task, &incoming);
        }
        let function = self.function(py, task)?;
        let (args, kwargs) = call_arguments(py, self.runtime, &incoming)?;
        self.run_here(py, task, &function, &args, &kwargs)
    }

    /// Notes that user code begins. Raises KeyboardInterrupt, which ends as a cancellation, where it was cancelled before.
    fn begin(&self, py: Python<'_>, incoming: &Incoming, on_main: bool) -> PyResult<()> {
        if self.runtime.worker.starting(incoming, on_main) {
            return Ok(());
        }
        Err(PyErr::from_value(py.get_type::<PyKeyboardInterrupt>().call0()?))
    }

    /// Runs user code on this thread.
    fn run_here<'py>(
        &self,
        py: Python<'py>,
        task: &Bound<'py, RunningTask>,
        function: &Bound<'py, PyAny>,
        args: &Bound<'py, PyList>,
        kwargs: &Bound<'py, PyDict>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.begin(py, &task.get().incoming, true)?;
        let called = match (args.is_empty(), kwargs.is_empty()) {
            (true, true) => function.call0(),
            (_, true) => function.call1(args.to_tuple()),
            _ => function.call(args.to_tuple(), Some(kwargs)),
        };
        let value = called.and_then(|value| self.drive(py, task, value));
        self.runtime.worker.user_code_ended();
        value.map(Some)
    }

    fn call_method<'py>(
        &mut self,
        py: Python<'py>,
        task: &Bound<'py, RunningTask>,
        incoming: &Arc<Incoming>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let executor = self.executor.bind(py);
        let name = incoming.template.method_name.as_bytes();
        let (function, place) = match self.methods.get(name) {
            Some((function, place)) => (function.bind(py).clone(), *place),
            None => {
                let found = executor.call_method1(intern!(py, "method"), (task,))?;
                let (function, mode): (Bound<'py, PyAny>, String) = found.extract()?;
                let place = if mode == "main" { Place::Main } else { Place::Elsewhere };
                let name = Bytes::copy_from_slice(name);
                self.methods.insert(name, (function.clone().unbind(), place));
                (function, place)
            }
        };
        let (args, kwargs) = call_arguments(py, self.runtime, incoming)?;
        if place == Place::Elsewhere {
            self.begin(py, incoming, false)?;
            executor.call_method1(intern!(py, "run_elsewhere"), (task, function, args, kwargs))?;
            return Ok(None);
        }
        self.run_here(py, task, &function, &args, &kwargs)
    }

    /// A generator's items are sent or collected; any other value is the result.
    fn drive<'py>(
        &self,
        py: Python<'py>,
        task: &Bound<'py, RunningTask>,
        value: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let count = task.get().incoming.template.num_returns;
        let is_generator = count != 0 && is_generator(&value)?;
        if count < 0 || is_generator {
            if !is_generator && value.try_iter().is_err() {
                return Err(PyTypeError::new_err(format!(
                    "{} has num_returns=\"streaming\" or \"dynamic\" and must return a generator, not {}",
                    task.get().incoming.template.function_name,
                    value.get_type()
                )));
            }
            return self
                .executor
                .bind(py)
                .call_method1(intern!(py, "run_generator"), (task, value));
        }
        Ok(value)
    }

    fn function<'py>(&mut self, py: Python<'py>, task: &Bound<'py, RunningTask>) -> PyResult<Bound<'py, PyAny>> {
        let template = task.get().incoming.template.clone();
        if let Some(function) = self.functions.get(&template.function_id) {
            return Ok(function.bind(py).clone());
        }
        let blob = PyBytes::new(py, &template.function_blob);
        let function = self
            .executor
            .bind(py)
            .call_method1(intern!(py, "load_function"), (task, blob))?;
        self.functions
            .insert(template.function_id.clone(), function.clone().unbind());
        Ok(function)
    }
}

/// Whether calling a function made this generator (or async generator), rather than a result.
fn is_generator(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    static TYPES: PyOnceLock<[Py<PyAny>; 2]> = PyOnceLock::new();
    let py = value.py();
    let types = TYPES.get_or_try_init(py, || {
        let module = py.import("types")?;
        Ok::<_, PyErr>([
            module.getattr("GeneratorType")?.unbind(),
            module.getattr("AsyncGeneratorType")?.unbind(),
        ])
    })?;
    let class = value.get_type();
    Ok(types.iter().any(|known| class.is(known.bind(py))))
}

fn none() -> Serialized {
    Serialized {
        format: FORMAT_NONE,
        inband: Bytes::new(),
        buffers: Vec::new(),
        contained: Vec::new(),
    }
}

/// The returns of a call that ended well.
fn returns(runtime: &Runtime, task: &RunningTask, value: &Bound<'_, PyAny>) -> PyResult<Vec<Serialized>> {
    let incoming = &task.incoming;
    if incoming.creation.is_some() {
        return Ok(Vec::new());
    }
    match incoming.template.num_returns {
        0 => Ok(Vec::new()),
        NUM_RETURNS_STREAMING => Ok(vec![none()]),
        1 | NUM_RETURNS_DYNAMIC => Ok(vec![serialize::serialize(runtime, value)?]),
        count => {
            let name = &incoming.template.function_name;
            let items: Vec<Bound<'_, PyAny>> = match value.try_iter() {
                Ok(items) => items.collect::<PyResult<_>>()?,
                Err(_) => {
                    return Err(PyTypeError::new_err(format!(
                        "Task returned a {}, which has no items, but num_returns={count}. It is {name}.",
                        value.get_type()
                    )))
                }
            };
            if items.len() != count as usize {
                return Err(PyValueError::new_err(format!(
                    "Task returned {} objects, but num_returns={count}. It is {name}.",
                    items.len()
                )));
            }
            items.iter().map(|item| serialize::serialize(runtime, item)).collect()
        }
    }
}

/// Sends the answers of this thread that wait for others.
pub fn flush_replies(runtime: &Runtime) {
    for incoming in CORKED.with(RefCell::take) {
        runtime.worker.flush_replies(&incoming);
    }
}

/// Ends a call, wherever it ran. `corked`: its answer may wait for others, until this thread's `flush_replies`.
pub fn finish(
    runtime: &Runtime,
    task: &RunningTask,
    value: &Bound<'_, PyAny>,
    exception: Option<&Bound<'_, PyAny>>,
    corked: bool,
) -> PyResult<()> {
    let py = value.py();
    if task.finished.swap(true, Ordering::AcqRel) {
        return Err(PyValueError::new_err(format!(
            "the call {} was finished before",
            task.incoming.task_id
        )));
    }
    let worker = &runtime.worker;
    let outcome = match exception {
        None => match returns(runtime, task, value) {
            Ok(values) => Outcome::Returns(values),
            Err(error) => failed(runtime, task, &raised(py, error))?,
        },
        Some(exception) => failed(runtime, task, exception)?,
    };
    if corked {
        CORKED.with(|calls| {
            let mut calls = calls.borrow_mut();
            if !calls.iter().any(|other| other.shares_link(&task.incoming)) {
                calls.push(task.incoming.clone());
            }
        });
    }
    // A small answer is not worth giving the interpreter's lock away: sending one never waits.
    let replied = if is_small(&outcome) {
        worker.reply(&task.incoming, outcome, true)
    } else {
        py.detach(|| worker.reply(&task.incoming, outcome, corked))
    };
    match replied {
        Ok(()) => Ok(()),
        Err(error) => {
            // The returns could not be placed (a full store): the caller is told so.
            let error = worker_error(py, error);
            let outcome = failed(runtime, task, &raised(py, error))?;
            py.detach(|| worker.reply(&task.incoming, outcome, corked))
                .map_err(|error| worker_error(py, error))
        }
    }
}

fn is_small(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Returns(values) => values.iter().all(|value| value.size() <= ray_wire::INLINE_LIMIT_BYTES),
        Outcome::Exception { value, .. } => value.size() <= ray_wire::INLINE_LIMIT_BYTES,
        Outcome::Cancelled => true,
    }
}

/// The exception with its traceback, which only taking it out of a `PyErr` sets.
pub fn raised(py: Python<'_>, error: PyErr) -> Bound<'_, PyAny> {
    error.into_value(py).into_bound(py).into_any()
}

/// The outcome of a call that raised.
fn failed(runtime: &Runtime, task: &RunningTask, exception: &Bound<'_, PyAny>) -> PyResult<Outcome> {
    let py = exception.py();
    let incoming = &task.incoming;
    if runtime.worker.is_cancelled(&incoming.task_id) && is_interruption(exception) {
        return Ok(Outcome::Cancelled);
    }
    let executor = task.executor.bind(py);
    let pickled = executor.call_method1(intern!(py, "dump_exception"), (as_task(py, task)?, exception))?;
    let inband = Bytes::copy_from_slice(pickled.cast::<PyBytes>()?.as_bytes());
    let template = &incoming.template;
    let retryable = template.retry_exceptions
        && (template.retry_exception_types.is_empty()
            || executor
                .call_method1(
                    intern!(py, "is_retryable"),
                    (
                        as_task(py, task)?,
                        exception,
                        PyBytes::new(py, &template.retry_exception_types),
                    ),
                )?
                .extract::<bool>()?);
    let value = Serialized {
        format: FORMAT_EXCEPTION,
        inband,
        buffers: Vec::new(),
        contained: Vec::new(),
    };
    Ok(Outcome::Exception { value, retryable })
}

fn is_interruption(exception: &Bound<'_, PyAny>) -> bool {
    let name = exception
        .get_type()
        .name()
        .map(|name| name.to_string())
        .unwrap_or_default();
    exception.is_instance_of::<PyKeyboardInterrupt>() || name == "CancelledError" || name == "TaskCancelledError"
}

/// A fresh Python object for the same call, for hooks that only read it.
fn as_task<'py>(py: Python<'py>, task: &RunningTask) -> PyResult<Bound<'py, PyAny>> {
    RunningTask {
        incoming: task.incoming.clone(),
        next_item: AtomicU64::new(0),
        finished: AtomicBool::new(true),
        executor: task.executor.clone_ref(py),
    }
    .into_bound_py_any(py)
}

/// Sends one item of a generator. False: its consumer is gone.
pub fn put_generator_item(runtime: &Runtime, task: &RunningTask, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = value.py();
    let serialized = serialize::serialize(runtime, value)?;
    let index = task.next_item.fetch_add(1, Ordering::Relaxed);
    let worker = &runtime.worker;
    py.detach(|| worker.send_item(&task.incoming, index, serialized))
        .map_err(|error| worker_error(py, error))
}
