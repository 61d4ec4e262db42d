//! Lines for the driver's terminal: a bounded queue between the links and the thread that prints.
//!
//! Invariant: 1. What is dropped because the printer is behind is counted and said.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use ray_wire::*;

use crate::inner::CoreWorker;
use crate::slot::lock;

/// Lines for the driver's terminal.
#[derive(Debug)]
pub enum LogEntry {
    Lines(LogLines),
    Message(DriverMessage),
}

#[derive(Debug, Default)]
struct LogState {
    entries: VecDeque<LogEntry>,
    closed: bool,
    dropped: u64,
}

/// Lines that wait for the thread that prints them; bounded.
#[derive(Debug, Default)]
pub(crate) struct LogQueue {
    state: Mutex<LogState>,
    arrived: std::sync::Condvar,
}

/// Lines kept for a printer that is behind.
const MAX_LOG_ENTRIES: usize = 10_000;

impl LogQueue {
    pub(crate) fn push(&self, entry: LogEntry) {
        let mut state = lock(&self.state);
        if state.entries.len() >= MAX_LOG_ENTRIES {
            state.entries.pop_front();
            state.dropped += 1;
        }
        state.entries.push_back(entry);
        drop(state);
        self.arrived.notify_one();
    }

    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.arrived.notify_all();
    }
}

impl CoreWorker {
    /// The next entries for the driver's terminal; empty at the time's end, `None` after shutdown.
    pub fn next_logs(&self, timeout: Duration) -> Option<Vec<LogEntry>> {
        let queue = &self.0.logs;
        let mut state = lock(&queue.state);
        if state.entries.is_empty() && !state.closed {
            state = match queue.arrived.wait_timeout(state, timeout) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        if state.entries.is_empty() && state.closed {
            return None;
        }
        let dropped = std::mem::take(&mut state.dropped);
        let mut entries: Vec<LogEntry> = state.entries.drain(..).collect();
        if dropped > 0 {
            let message =
                format!("{dropped} batches of worker output were dropped: they came faster than they were printed");
            entries.push(LogEntry::Message(DriverMessage {
                level: "warning".into(),
                message,
            }));
        }
        Some(entries)
    }
}
