//! The event loop of an asyncio actor runs on the worker's main thread: where its selector would sleep, it serves the
//! links, so that a call passes from the socket to its coroutine without a second thread.
//!
//! Invariants:
//! 1. Every call that is taken from the queue here is answered once: by its coroutine, or at once where it cannot start.
//! 2. Calls start in the order in which they came, also where the arguments of one must be fetched first.
//! 3. The interpreter's lock is given away only to sleep.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pyo3::exceptions::{PyKeyboardInterrupt, PySystemExit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use pyo3::{ffi, intern};
use ray_worker::{Incoming, Work};

use crate::call_arguments::call_arguments;
use crate::core::{set_current_task, Runtime};
use crate::error::worker_error;
use crate::execution::{finish, flush_replies, lease_dict, raised, RunningTask};

/// Calls that one turn of the loop takes, so that its other callbacks have their turns.
const CALLS_A_TURN: usize = 256;

/// What the selector of an asyncio actor's loop calls.
#[pyclass(module = "ray._raylet", frozen)]
pub struct EventLoop {
    runtime: Runtime,
    executor: Py<PyAny>,
    methods: Mutex<HashMap<Bytes, Py<PyAny>>>,
    /// The arguments of a call are being fetched, and later calls wait behind it.
    fetching: AtomicBool,
    exit: Mutex<Option<String>>,
}

/// Whether this worker is an asyncio actor.
pub fn is_wanted(py: Python<'_>, executor: &Py<PyAny>) -> PyResult<bool> {
    executor
        .bind(py)
        .getattr(intern!(py, "runs_event_loop"))?
        .extract::<bool>()
}

/// Runs the event loop until the worker is to leave.
pub fn run(py: Python<'_>, runtime: &Runtime, executor: &Py<PyAny>) -> PyResult<()> {
    let event_loop = Bound::new(
        py,
        EventLoop {
            runtime: runtime.clone(),
            executor: executor.clone_ref(py),
            methods: Mutex::default(),
            fetching: AtomicBool::new(false),
            exit: Mutex::default(),
        },
    )?;
    loop {
        let ended = executor
            .bind(py)
            .call_method1(intern!(py, "run_event_loop"), (&event_loop,));
        if let Err(error) = ended {
            if error.is_instance_of::<PySystemExit>(py) {
                runtime.worker.announce_exit("an asyncio task called sys.exit()");
            }
            return Err(error);
        }
        let exit = event_loop
            .get()
            .exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(reason) = exit {
            runtime.worker.announce_exit(&reason);
            return Ok(());
        }
        // The actor's own code stopped the loop; its calls need it.
    }
}

#[pymethods]
impl EventLoop {
    /// Has `step` return when the loop's own poller may have events.
    fn watch_poller(&self, py: Python<'_>, descriptor: i32) -> PyResult<()> {
        // SAFETY: the caller holds the poller open; the reactor makes a duplicate of its own.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let watched = self.runtime.worker.watch_event_loop(descriptor);
        watched.map_err(|error| worker_error(py, error))
    }

    /// Sends answers that wait, waits for something to do, at most so long, and starts the calls that came. Returns
    /// whether the loop's own poller may have events.
    #[pyo3(signature = (timeout_s))]
    fn step(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        flush_replies(&self.runtime);
        let worker = &self.runtime.worker;
        let sleeps = timeout_s.is_none_or(|timeout_s| timeout_s > 0.0);
        if sleeps && !worker.has_work() {
            let limit = timeout_s.and_then(|timeout_s| Duration::try_from_secs_f64(timeout_s).ok());
            let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
            py.detach(|| worker.wait_for_event_loop(deadline));
            py.check_signals()?;
        }
        for _ in 0..CALLS_A_TURN {
            match worker.next_work_here() {
                Some(work) => self.start(py, work)?,
                None => break,
            }
        }
        if sleeps {
            if let Some(exit) = worker.reason_to_exit() {
                self.start(py, exit)?;
            }
        }
        Ok(worker.take_poller_news())
    }

    /// Function and arguments of a call, fetched where need be; from a thread that may wait.
    #[allow(clippy::type_complexity)]
    fn load<'py>(
        &self,
        py: Python<'py>,
        task: &Bound<'py, RunningTask>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyList>, Bound<'py, PyDict>)> {
        let function = self.method(py, task)?;
        set_current_task(Some(task.clone().unbind()));
        let arguments = call_arguments(py, &self.runtime, &task.get().incoming);
        set_current_task(None);
        let (args, kwargs) = arguments?;
        Ok((function, args, kwargs))
    }

    /// No call waits behind another's arguments any more.
    fn caught_up(&self) {
        self.fetching.store(false, Ordering::Release);
    }
}

impl EventLoop {
    fn start(&self, py: Python<'_>, work: Work) -> PyResult<()> {
        let executor = self.executor.bind(py);
        match work {
            Work::Task(incoming) => self.start_call(py, incoming)?,
            Work::Cancel(task) => {
                executor.call_method1(intern!(py, "cancel_elsewhere"), (PyBytes::new(py, task.as_bytes()),))?;
            }
            Work::Lease(lease) => {
                executor.call_method1(intern!(py, "prepare_lease"), (lease_dict(py, &lease)?,))?;
            }
            Work::Exit(reason) => {
                *self.exit.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                executor.call_method0(intern!(py, "stop_event_loop"))?;
            }
        }
        Ok(())
    }

    fn start_call(&self, py: Python<'_>, incoming: Arc<Incoming>) -> PyResult<()> {
        let task = Bound::new(py, RunningTask::new(py, incoming.clone(), &self.executor))?;
        let started = self.hand_over(py, &task, &incoming);
        let Err(error) = started else { return Ok(()) };
        let none = py.None().into_bound(py);
        finish(&self.runtime, task.get(), &none, Some(&raised(py, error)), false)
    }

    fn hand_over(&self, py: Python<'_>, task: &Bound<'_, RunningTask>, incoming: &Arc<Incoming>) -> PyResult<()> {
        let executor = self.executor.bind(py);
        if !self.runtime.worker.starting(incoming, false) {
            return Err(PyErr::from_value(py.get_type::<PyKeyboardInterrupt>().call0()?));
        }
        if self.fetching.load(Ordering::Acquire) || !self.runtime.worker.arguments_are_here(incoming) {
            self.fetching.store(true, Ordering::Release);
            executor.call_method1(intern!(py, "admit_when_fetched"), (task,))?;
            return Ok(());
        }
        let (function, args, kwargs) = self.load(py, task)?;
        executor.call_method1(intern!(py, "admit"), (task, function, args, kwargs))?;
        Ok(())
    }

    fn method<'py>(&self, py: Python<'py>, task: &Bound<'py, RunningTask>) -> PyResult<Bound<'py, PyAny>> {
        let name = task.get().incoming.template.method_name.as_bytes();
        let lock = || self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = lock().get(name) {
            return Ok(function.bind(py).clone());
        }
        let executor = self.executor.bind(py);
        let (function, _): (Bound<'py, PyAny>, String) =
            executor.call_method1(intern!(py, "method"), (task,))?.extract()?;
        lock().insert(Bytes::copy_from_slice(name), function.clone().unbind());
        Ok(function)
    }
}

/// The context variable that holds the call of a coroutine; set in asyncio actors only.
static TASK_VARIABLE: Mutex<Option<Py<PyAny>>> = Mutex::new(None);
static HAS_TASK_VARIABLE: AtomicBool = AtomicBool::new(false);

/// From now on the current call may be found in this context variable.
pub fn set_task_variable(variable: Py<PyAny>) {
    *TASK_VARIABLE.lock().unwrap_or_else(PoisonError::into_inner) = Some(variable);
    HAS_TASK_VARIABLE.store(true, Ordering::Release);
}

/// The call whose coroutine runs, or what it started.
pub fn task_of_context(py: Python<'_>) -> Option<Py<RunningTask>> {
    if !HAS_TASK_VARIABLE.load(Ordering::Acquire) {
        return None;
    }
    let variable = TASK_VARIABLE
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_ref()?
        .clone_ref(py);
    let mut value = std::ptr::null_mut();
    // SAFETY: the lock is held, the object is a context variable (checked when it was set), and the place is ours.
    let failed = unsafe { ffi::PyContextVar_Get(variable.as_ptr(), std::ptr::null_mut(), &mut value) } < 0;
    if failed || value.is_null() {
        PyErr::take(py);
        return None;
    }
    // SAFETY: the call above gave us a reference of our own.
    let value = unsafe { Bound::from_owned_ptr(py, value) };
    value.cast_into::<RunningTask>().ok().map(Bound::unbind)
}
