//! What the shell's tests stand on: a raylet in a process of its own, a pretended control plane, drivers and workers.
//!
//! Workers are this very test program, started by the real zygote through a pretended `worker_main`.

use bytes::Bytes;
use ray_ids::{JobId, NodeId, WorkerId};
use ray_rpc::{CloseReason, Config, Frame, Link, Reactor, Service};
use ray_wire::{
    kinds, Address, GcsCall, GcsReply, GcsRequest, LeaseGranted, LeaseSpecification, NodeRegistered, RegisterNode,
    RegisterProcess, RequestLease, ResourceAmount, Welcome, ROLE_DRIVER,
};
use std::collections::VecDeque;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// No wait of a test is longer.
pub const LIMIT: Duration = Duration::from_secs(10);

/// A command to a test's worker, in JSON.
pub const KIND_COMMAND: u16 = 9_000;
/// Its answer.
pub const KIND_ANSWER: u16 = 9_001;

pub type Handler = Box<dyn Fn(&Arc<Link>, &Frame) -> bool + Send + Sync>;

/// Takes frames in; a handler may answer some at once.
pub struct Inbox {
    frames: Mutex<VecDeque<(Arc<Link>, Frame)>>,
    arrived: Condvar,
    handler: Mutex<Option<Handler>>,
    closed: Mutex<Vec<(u64, String)>>,
    adopt: Mutex<Option<Arc<Reactor>>>,
}

impl Service for Inbox {
    fn on_frame(&self, link: &Arc<Link>, mut frame: Frame) {
        if frame.kind == kinds::HAND_OVER {
            if let (Some(reactor), Some(socket)) = (self.adopt.lock().unwrap().clone(), frame.descriptor.take()) {
                reactor.adopt(socket).unwrap();
            }
        }
        if self
            .handler
            .lock()
            .unwrap()
            .as_ref()
            .is_some_and(|handler| handler(link, &frame))
        {
            return;
        }
        self.frames.lock().unwrap().push_back((link.clone(), frame));
        self.arrived.notify_all();
    }

    fn on_ready(&self, _link: &Arc<Link>, _peer_hello: &[u8]) {}

    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        self.closed.lock().unwrap().push((link.id(), reason.sentence.clone()));
        self.arrived.notify_all();
    }
}

impl Inbox {
    /// The next frame of a kind that fits.
    pub fn wait_for(&self, kind: u16, fits: impl Fn(&Frame) -> bool) -> (Arc<Link>, Frame) {
        self.wait_any(&[kind], fits)
    }

    /// A frame of one of these kinds, if one comes within a moment.
    pub fn poll(&self, wanted: &[u16]) -> Option<(Arc<Link>, Frame)> {
        let mut frames = self.frames.lock().unwrap();
        if frames.is_empty() {
            frames = self.arrived.wait_timeout(frames, Duration::from_millis(200)).unwrap().0;
        }
        let at = frames.iter().position(|(_, frame)| wanted.contains(&frame.kind))?;
        frames.remove(at)
    }

    /// The links over which a kind came that nobody has taken.
    pub fn links_of(&self, kind: u16) -> Vec<Arc<Link>> {
        let frames = self.frames.lock().unwrap();
        frames
            .iter()
            .filter(|(_, frame)| frame.kind == kind)
            .map(|(link, _)| link.clone())
            .collect()
    }

    /// The next frame of one of these kinds that fits.
    pub fn wait_any(&self, wanted: &[u16], fits: impl Fn(&Frame) -> bool) -> (Arc<Link>, Frame) {
        let deadline = Instant::now() + LIMIT;
        let mut frames = self.frames.lock().unwrap();
        loop {
            if let Some(at) = frames
                .iter()
                .position(|(_, frame)| wanted.contains(&frame.kind) && fits(frame))
            {
                return frames.remove(at).unwrap();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let have: Vec<&str> = frames.iter().map(|(_, frame)| kinds::name(frame.kind)).collect();
                let closed = self.closed.lock().unwrap().clone();
                let names: Vec<&str> = wanted.iter().map(|kind| kinds::name(*kind)).collect();
                panic!("no {names:?} came; there are {have:?}; closed: {closed:?}");
            }
            frames = self.arrived.wait_timeout(frames, left).unwrap().0;
        }
    }

    pub fn wait<M: prost::Message + Default>(&self, kind: u16) -> M {
        ray_wire::decode("expected", self.wait_for(kind, |_| true).1.header).unwrap()
    }

    pub fn wait_closed(&self, link: u64) {
        until("the link closes", || {
            self.closed.lock().unwrap().iter().any(|(id, _)| *id == link)
        });
    }
}

/// A process of the test: a reactor with an inbox.
pub struct Party {
    pub reactor: Arc<Reactor>,
    pub inbox: Arc<Inbox>,
}

impl Party {
    pub fn new(handler: Option<Handler>) -> Self {
        let reactor = Reactor::new(Config {
            spin_us: 0,
            ..Default::default()
        })
        .unwrap();
        let inbox = Arc::new(Inbox {
            frames: Mutex::default(),
            arrived: Condvar::new(),
            handler: Mutex::new(handler),
            closed: Mutex::default(),
            adopt: Mutex::new(Some(reactor.clone())),
        });
        reactor.set_service(inbox.clone()).unwrap();
        reactor.start_background().unwrap();
        Self { reactor, inbox }
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        *self.inbox.adopt.lock().unwrap() = None;
        self.reactor.stop();
    }
}

/// Waits until something is so.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not so in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn alive(pid: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    state.is_some_and(|stat| !stat.rsplit(") ").next().unwrap_or("").starts_with('Z'))
}

/// A session with a pretended control plane, and any number of raylets.
pub struct Session {
    pub directory: PathBuf,
    pub gcs: Option<Party>,
    python_path: PathBuf,
}

/// Answers what every raylet asks; the rest waits in the inbox.
fn gcs_handler(nodes: Arc<Mutex<Vec<ray_wire::NodeInfo>>>) -> Handler {
    let jobs = Mutex::new(0_u64);
    Box::new(move |link, frame| {
        match frame.kind {
            kinds::REGISTER_NODE => {
                let register: RegisterNode = ray_wire::decode("RegisterNode", frame.header.clone()).unwrap();
                let mut known = nodes.lock().unwrap();
                known.extend(register.node);
                let answer = NodeRegistered {
                    cluster_id: Bytes::from_static(&[1; 28]),
                    nodes: known.clone(),
                    publisher_epoch: 1,
                    ..Default::default()
                };
                link.send(
                    kinds::NODE_REGISTERED,
                    frame.correlation,
                    ray_wire::encode(&answer),
                    &[],
                )
                .unwrap();
                // It is kept too, for tests that look at it.
                false
            }
            kinds::GCS_REQUEST => {
                let request: GcsRequest = ray_wire::decode("GcsRequest", frame.header.clone()).unwrap();
                let reply = match request.call {
                    Some(GcsCall::AddJob(_)) => {
                        *jobs.lock().unwrap() += 1;
                        GcsReply {
                            number: *jobs.lock().unwrap(),
                            ..Default::default()
                        }
                    }
                    Some(GcsCall::KvGet(key)) if key.key.as_ref() == b"slow" => return false,
                    Some(GcsCall::KvGet(key)) => GcsReply {
                        found: true,
                        value: key.key,
                        ..Default::default()
                    },
                    _ => GcsReply::default(),
                };
                let _ = link.send(kinds::GCS_REPLY, frame.correlation, ray_wire::encode(&reply), &[]);
                true
            }
            kinds::RESOURCE_REPORT => true,
            _ => false,
        }
    })
}

impl Session {
    pub fn new(name: &str) -> Self {
        let unique = &WorkerId::from_random().hex()[..8];
        let directory = std::env::temp_dir().join(format!("hl-{name}-{unique}"));
        let package = directory.join("python/ray/_private");
        std::fs::create_dir_all(&package).unwrap();
        std::fs::create_dir_all(directory.join("sockets")).unwrap();
        std::fs::write(directory.join("python/ray/__init__.py"), "").unwrap();
        std::fs::write(package.join("__init__.py"), "").unwrap();
        let zygote = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python/ray/_private/zygote.py");
        std::fs::copy(zygote, package.join("zygote.py")).unwrap();
        let program = std::env::current_exe().unwrap();
        let main = format!(
            "import json, os\n\ndef main(config):\n    os.environ['TEST_WORKER'] = json.dumps(config)\n    \
             os.execv({0:?}, [{0:?}, 'roles::worker_process', '--exact', '--ignored', '--nocapture'])\n",
            program.to_str().unwrap()
        );
        std::fs::write(package.join("worker_main.py"), main).unwrap();
        let mut session = Self {
            python_path: directory.join("python"),
            directory,
            gcs: None,
        };
        session.start_gcs();
        session
    }

    pub fn start_gcs(&mut self) {
        self.start_gcs_that_knows(Vec::new());
    }

    pub fn start_gcs_that_knows(&mut self, nodes: Vec<ray_wire::NodeInfo>) {
        self.start_gcs_with(Some(gcs_handler(Arc::new(Mutex::new(nodes)))));
    }

    /// One that answers nothing by itself.
    pub fn start_silent_gcs(&mut self) {
        self.start_gcs_with(None);
    }

    fn start_gcs_with(&mut self, handler: Option<Handler>) {
        let party = Party::new(handler);
        let path = self.directory.join("sockets/gcs");
        let _ = std::fs::remove_file(&path);
        party.reactor.listen_unix(&path).unwrap();
        self.gcs = Some(party);
    }

    pub fn gcs(&self) -> &Party {
        self.gcs.as_ref().unwrap()
    }

    pub fn start_raylet(&self, changes: serde_json::Value) -> RayletProcess {
        let node_id = NodeId::from_random();
        let mut config = serde_json::json!({
            "node_id": node_id.hex(),
            "session_directory": self.directory,
            "gcs_socket": self.directory.join("sockets/gcs"),
            "auth_token": "a token for tests",
            "is_head": true,
            "resources": {"CPU": 2.0},
            "object_store_memory_bytes": 64 << 20,
            "python_executable": "python3",
            "python_path": [self.python_path],
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        let (parent_read, parent_write) = rustix::pipe::pipe().unwrap();
        rustix::io::fcntl_setfd(&parent_write, rustix::io::FdFlags::CLOEXEC).unwrap();
        use std::os::fd::AsRawFd;
        config["parent_fd"] = parent_read.as_raw_fd().into();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["roles::raylet_process", "--exact", "--ignored", "--nocapture"]);
        command
            .env("TEST_RAYLET", config.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        // A raylet has its signals on its only thread; here the harness has another, which must not take them.
        // SAFETY: these functions are async-signal-safe and the set is filled before it is used.
        unsafe {
            command.pre_exec(|| {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&mut set);
                libc::sigaddset(&mut set, libc::SIGTERM);
                libc::sigaddset(&mut set, libc::SIGCHLD);
                libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        drop(parent_read);
        let socket = self.directory.join(format!("sockets/raylet-{}", node_id.hex()));
        until("the raylet listens", || socket.exists());
        RayletProcess {
            child,
            node_id,
            socket,
            session: self.directory.clone(),
            parent: Some(parent_write),
        }
    }

    /// Files of this session in shared memory.
    pub fn shared_files(&self) -> Vec<String> {
        let prefix = format!("ray-{}", self.directory.file_name().unwrap().to_str().unwrap());
        let entries = std::fs::read_dir("/dev/shm").unwrap().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(&prefix))
            .collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.gcs = None;
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

pub struct RayletProcess {
    pub child: Child,
    pub node_id: NodeId,
    pub socket: PathBuf,
    session: PathBuf,
    pub parent: Option<std::os::fd::OwnedFd>,
}

impl RayletProcess {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn wait_for_end(&mut self) -> Duration {
        let started = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < LIMIT, "the raylet does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        started.elapsed()
    }

    pub fn terminate(&mut self) -> Duration {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        self.wait_for_end()
    }

    pub fn connect_driver(&self) -> Driver {
        let party = Party::new(None);
        let worker = WorkerId::from_random();
        let link = party.reactor.connect_unix(&self.socket).unwrap();
        let register = RegisterProcess {
            role: ROLE_DRIVER,
            worker_id: Bytes::copy_from_slice(worker.as_bytes()),
            pid: std::process::id(),
            startup_token: 0,
            job_config_json: "{\"namespace\": \"n\"}".into(),
        };
        link.send(kinds::REGISTER_PROCESS, 1, ray_wire::encode(&register), &[])
            .unwrap();
        let welcome: Welcome = party.inbox.wait(kinds::WELCOME);
        assert_eq!(welcome.refusal, "");
        let job = JobId::from_binary(&welcome.job_id).unwrap();
        Driver {
            party,
            link,
            worker,
            job,
            welcome,
            session: self.session.clone(),
            next: Mutex::new(100),
        }
    }
}

impl Drop for RayletProcess {
    fn drop(&mut self) {
        let _ = self.terminate();
    }
}

/// A driver, as far as a raylet can tell.
pub struct Driver {
    pub party: Party,
    pub link: Arc<Link>,
    pub worker: WorkerId,
    pub job: JobId,
    pub welcome: Welcome,
    session: PathBuf,
    next: Mutex<u64>,
}

impl Driver {
    pub fn next(&self) -> u64 {
        *self.next.lock().unwrap() += 1;
        *self.next.lock().unwrap()
    }

    pub fn ask_lease(&self, cpus: f64) -> u64 {
        let correlation = self.next();
        let specification = LeaseSpecification {
            job_id: Bytes::copy_from_slice(self.job.as_bytes()),
            resources: vec![ResourceAmount {
                name: "CPU".into(),
                amount_e4: (cpus * 10_000.0) as i64,
            }],
            function_name: "f".into(),
            ..Default::default()
        };
        let message = RequestLease {
            specification: Some(specification),
            backlog: 1,
            ..Default::default()
        };
        self.link
            .send(kinds::REQUEST_LEASE, correlation, ray_wire::encode(&message), &[])
            .unwrap();
        correlation
    }

    pub fn lease(&self, cpus: f64) -> LeaseGranted {
        let correlation = self.ask_lease(cpus);
        let frame = self
            .party
            .inbox
            .wait_for(kinds::LEASE_GRANTED, |frame| frame.correlation == correlation)
            .1;
        ray_wire::decode("LeaseGranted", frame.header).unwrap()
    }

    pub fn give_back(&self, lease: &LeaseGranted) {
        let message = ray_wire::ReturnLease {
            lease_id: lease.lease_id.clone(),
            worker_exits: false,
        };
        self.link
            .send(kinds::RETURN_LEASE, 0, ray_wire::encode(&message), &[])
            .unwrap();
    }

    pub fn connect_worker(&self, address: &Address) -> Arc<Link> {
        let path = self.session.join("sockets").join(address.worker().unwrap().hex());
        self.party.reactor.connect_unix(path).unwrap()
    }

    /// Has a worker do something; its answer.
    pub fn command(&self, link: &Arc<Link>, command: serde_json::Value) -> serde_json::Value {
        let correlation = self.next();
        link.send(KIND_COMMAND, correlation, Bytes::from(command.to_string()), &[])
            .unwrap();
        let frame = self
            .party
            .inbox
            .wait_for(KIND_ANSWER, |frame| frame.correlation == correlation)
            .1;
        serde_json::from_slice(&frame.header).unwrap()
    }

    pub fn query(&self, query: serde_json::Value) -> serde_json::Value {
        let correlation = self.next();
        let message = ray_wire::NodeQuery {
            query_json: query.to_string(),
        };
        self.link
            .send(kinds::NODE_QUERY, correlation, ray_wire::encode(&message), &[])
            .unwrap();
        let frame = self
            .party
            .inbox
            .wait_for(kinds::NODE_ANSWER, |frame| frame.correlation == correlation)
            .1;
        let answer: ray_wire::NodeAnswer = ray_wire::decode("NodeAnswer", frame.header).unwrap();
        assert_eq!(answer.error, "");
        serde_json::from_str(&answer.answer_json).unwrap()
    }
}
