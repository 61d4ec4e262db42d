//! Workers' logs: owns which files are followed, how far each was read, and the names that their lines carry.
//!
//! Changes come from inotify, so nothing is done while nobody prints. `:actor_name:` and `:task_name:` lines set the
//! name for what follows and are not shown.
//!
//! Invariants:
//! 1. Only files of live workers are followed, each from its beginning; a line is sent once, whole (or cut at a limit).

use super::config::RayletError;
use super::node::{Node, Timer};
use ray_ids::{JobId, WorkerId};
use ray_wire::{kinds, LogLines};
use rustc_hash::{FxHashMap, FxHashSet};
use rustix::fs::inotify;
use std::ffi::OsString;
use std::io::{Read, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A line longer than this is shown in pieces.
const LINE_LIMIT_BYTES: usize = 64 << 10;

#[derive(Debug)]
struct Followed {
    worker: WorkerId,
    pid: u32,
    path: PathBuf,
    is_error: bool,
    read: u64,
    partial: Vec<u8>,
    name: String,
}

/// New lines of one file.
#[derive(Debug, PartialEq)]
pub struct NewLines {
    pub worker: WorkerId,
    pub pid: u32,
    pub name: String,
    pub is_error: bool,
    pub lines: Vec<String>,
}

/// The followed files.
pub struct Logs {
    directory: PathBuf,
    inotify: OwnedFd,
    files: FxHashMap<OsString, Followed>,
    changed: FxHashSet<OsString>,
}

impl Logs {
    /// Watches a directory.
    pub fn new(directory: &Path) -> Result<Self, RayletError> {
        let fail = |error: rustix::io::Errno| RayletError::io(format!("watch {}", directory.display()), error);
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).map_err(fail)?;
        inotify::add_watch(&inotify, directory, inotify::WatchFlags::MODIFY).map_err(fail)?;
        Ok(Self {
            directory: directory.to_path_buf(),
            inotify,
            files: FxHashMap::default(),
            changed: FxHashSet::default(),
        })
    }

    /// To be watched for readability.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Follows a worker's two files.
    pub fn add_worker(&mut self, worker: WorkerId, job: Option<JobId>, pid: u32) {
        let job = job.map_or_else(|| "ffffffff".to_string(), |job| job.hex());
        for (suffix, is_error) in [("out", false), ("err", true)] {
            let name = OsString::from(format!("worker-{}-{job}-{pid}.{suffix}", worker.hex()));
            let path = self.directory.join(&name);
            let file = Followed {
                worker,
                pid,
                path,
                is_error,
                read: 0,
                partial: Vec::new(),
                name: String::new(),
            };
            // It may have printed before it was known.
            self.changed.insert(name.clone());
            self.files.insert(name, file);
        }
    }

    /// No longer follows a worker's files.
    pub fn remove_worker(&mut self, worker: &WorkerId) {
        self.files.retain(|_, file| file.worker != *worker);
    }

    /// Takes what inotify has. True if a followed file changed.
    pub fn take_events(&mut self) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                // Some changes were not told: every file may have changed.
                self.changed.extend(self.files.keys().cloned());
            } else if let Some(name) = event.file_name() {
                let name = std::ffi::OsStr::from_bytes(name.to_bytes());
                if self.files.contains_key(name) {
                    self.changed.insert(name.to_os_string());
                }
            }
        }
        !self.changed.is_empty()
    }

    /// Reads what changed, at most so much of each file. True beside it if more is left.
    pub fn read(&mut self, limit_bytes: u64) -> (Vec<NewLines>, bool) {
        let mut all = Vec::new();
        let mut more = false;
        for name in std::mem::take(&mut self.changed) {
            let Some(file) = self.files.get_mut(&name) else {
                continue;
            };
            let Ok(bytes) = read_from(&file.path, file.read, limit_bytes) else {
                continue;
            };
            if bytes.is_empty() {
                continue;
            }
            file.read += bytes.len() as u64;
            if bytes.len() as u64 == limit_bytes {
                more = true;
                self.changed.insert(name);
            }
            file.partial.extend_from_slice(&bytes);
            take_lines(file, &mut all);
        }
        (all, more)
    }

    /// The last lines of a worker's error log, or of its output where that is empty.
    pub fn tail(&self, worker: &WorkerId, lines: usize) -> String {
        let mut paths: Vec<&Followed> = self.files.values().filter(|file| file.worker == *worker).collect();
        paths.sort_by_key(|file| !file.is_error);
        let texts = paths.iter().map(|file| self.tail_of(&file.path, lines));
        texts.into_iter().find(|text| !text.is_empty()).unwrap_or_default()
    }

    /// The last lines of a file.
    pub fn tail_of(&self, path: &Path, lines: usize) -> String {
        const TAIL_BYTES: u64 = 64 << 10;
        let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let bytes = read_from(path, length.saturating_sub(TAIL_BYTES), TAIL_BYTES).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let shown: Vec<&str> = text.lines().filter(|line| name_line(line).is_none()).collect();
        shown[shown.len().saturating_sub(lines)..].join("\n")
    }
}

fn read_from(path: &Path, from: u64, limit_bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(limit_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The name that a line sets for those after it.
fn name_line(line: &str) -> Option<&str> {
    line.strip_prefix(":actor_name:")
        .or_else(|| line.strip_prefix(":task_name:"))
}

fn take_lines(file: &mut Followed, all: &mut Vec<NewLines>) {
    let mut lines: Vec<String> = Vec::new();
    let mut flush = |name: &str, lines: &mut Vec<String>| {
        if !lines.is_empty() {
            let (worker, pid, is_error) = (file.worker, file.pid, file.is_error);
            all.push(NewLines {
                worker,
                pid,
                name: name.to_string(),
                is_error,
                lines: std::mem::take(lines),
            });
        }
    };
    let mut start = 0;
    while start < file.partial.len() {
        let rest = &file.partial[start..];
        let end = match rest.iter().position(|byte| *byte == b'\n') {
            Some(end) => end,
            None if rest.len() >= LINE_LIMIT_BYTES => LINE_LIMIT_BYTES,
            None => break,
        };
        let line = String::from_utf8_lossy(&rest[..end]).trim_end_matches('\r').to_string();
        start += end + usize::from(rest.get(end) == Some(&b'\n'));
        match name_line(&line) {
            Some(name) => {
                flush(&file.name, &mut lines);
                file.name = name.to_string();
            }
            None => lines.push(line),
        }
    }
    flush(&file.name, &mut lines);
    file.partial.drain(..start);
}

/// The channel on which lines travel whose driver is on another node.
const LOG_CHANNEL: &str = "logs";

impl Node {
    /// Reads what changed and sends it to the drivers.
    pub(super) fn read_logs(&mut self) {
        let (all, more) = self.logs.read(self.limits.log_batch_bytes);
        for new in all {
            let Some(job) = self.processes.get(&new.worker).and_then(|process| process.job) else {
                continue;
            };
            let message = LogLines {
                pid: new.pid,
                name: new.name,
                host: self.config.host.clone(),
                is_error: new.is_error,
                lines: new.lines,
                job_id: ray_wire::id_bytes(job.as_bytes()),
            };
            match self.jobs().drivers.get(&job) {
                Some(driver) => self.send_to(driver, kinds::LOG_LINES, 0, ray_wire::encode(&message)),
                None => self.publish_on(LOG_CHANNEL, log_json(&message)),
            }
        }
        if more && !self.has_timer(Timer::ReadLogs) {
            self.at(self.limits.log_interval_ms, Timer::ReadLogs);
        }
    }

    /// Lines from another node, for a driver here.
    pub(super) fn logs_from_elsewhere(&mut self, json: &str) {
        let Some(message) = serde_json::from_str(json).ok().and_then(|json| log_from_json(&json)) else {
            return;
        };
        let driver = JobId::from_binary(&message.job_id)
            .ok()
            .and_then(|job| self.jobs().drivers.get(&job).copied());
        if let Some(driver) = driver {
            self.send_to(&driver, kinds::LOG_LINES, 0, ray_wire::encode(&message));
        }
    }
}

fn log_json(message: &LogLines) -> String {
    serde_json::json!({
        "pid": message.pid, "name": message.name, "host": message.host, "is_error": message.is_error,
        "lines": message.lines, "job_id": ray_ids::to_hex(&message.job_id),
    })
    .to_string()
}

fn log_from_json(json: &serde_json::Value) -> Option<LogLines> {
    let text = |name: &str| json.get(name).and_then(|value| value.as_str()).map(str::to_string);
    let lines = json
        .get("lines")?
        .as_array()?
        .iter()
        .filter_map(|line| line.as_str().map(str::to_string));
    Some(LogLines {
        pid: u32::try_from(json.get("pid")?.as_u64()?).ok()?,
        name: text("name")?,
        host: text("host")?,
        is_error: json.get("is_error")?.as_bool()?,
        lines: lines.collect(),
        job_id: ray_ids::from_hex(&text("job_id")?)?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_are_read_once_and_names_are_taken_out() {
        let directory = std::env::temp_dir().join(format!("ray-logs-{}", WorkerId::from_random().hex()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut logs = Logs::new(&directory).unwrap();
        let worker = WorkerId::from_random();
        let path = directory.join(format!("worker-{}-ffffffff-7.out", worker.hex()));
        let mut file = std::fs::File::create(&path).unwrap();
        writeln!(file, "before").unwrap();
        logs.add_worker(worker, None, 7);
        let (lines, more) = logs.read(1 << 20);
        assert!(!more);
        assert_eq!(lines[0].lines, ["before"]);
        write!(file, ":actor_name:A\none\ntwo\n:task_name:f\nthree\npart").unwrap();
        assert!(logs.take_events());
        let (lines, _) = logs.read(1 << 20);
        let said: Vec<(&str, usize)> = lines.iter().map(|new| (new.name.as_str(), new.lines.len())).collect();
        assert_eq!(said, [("A", 2), ("f", 1)]);
        writeln!(file, "ial").unwrap();
        assert!(logs.take_events());
        assert_eq!(logs.read(1 << 20).0[0].lines, ["partial"]);
        assert!(!logs.take_events());
        assert_eq!(logs.tail(&worker, 2), "three\npartial");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
