//! Links to other processes: finds or opens them, and keeps what was said on each.
//!
//! Invariants:
//! 1. There is at most one link per process that this one sends requests on; accepted links are answered on, and serve for
//!    requests where we have none of our own.
//! 2. A template's number is sent with its template exactly once a link.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use ray_ids::{NodeId, WorkerId};
use ray_rpc::{Link, Peer, RpcError, Target};
use ray_wire::{Address, TaskTemplate};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::connect::{node_of, raylet_address};
use crate::inner::{Inner, State};
use crate::session::{is_alive, PeerSession};
use crate::slot::lock;
use crate::WorkerError;

/// What was said on a link.
#[derive(Debug, Default)]
pub(crate) struct LinkState {
    /// Who is at the other end, once known.
    pub peer: OnceLock<Address>,
    pub peer_id: OnceLock<WorkerId>,
    /// Set for links to raylets of other nodes.
    pub raylet_of: OnceLock<NodeId>,
    pub sent_templates: Mutex<FxHashSet<u32>>,
    pub received_templates: Mutex<FxHashMap<u32, Arc<TaskTemplate>>>,
    /// Set for links to processes of other nodes. The links of a session share this whole state.
    pub session: OnceLock<Arc<PeerSession>>,
}

/// What was said on the link so far.
pub(crate) fn link_state(link: &Arc<Link>) -> &Arc<LinkState> {
    if link.user_data().is_none() {
        // Somebody else may be quicker; what counts is what is there afterwards.
        let _ = link.set_user_data(Box::new(Arc::new(LinkState::default())));
    }
    link.user_data_as::<Arc<LinkState>>()
        .expect("a link's user data is set here and where a session's link is made, and is of this type")
}

/// Whether the template's number is new on this link; notes it as sent.
pub(crate) fn note_template(link: &Arc<Link>, template: u32) -> bool {
    lock(&link_state(link).sent_templates).insert(template)
}

fn resolve(address: &Address) -> Result<SocketAddr, WorkerError> {
    let invalid = || WorkerError::Invalid(format!("{}:{} is not an address", address.host, address.port));
    let port = u16::try_from(address.port).map_err(|_| invalid())?;
    (address.host.as_str(), port)
        .to_socket_addrs()
        .ok()
        .and_then(|mut found| found.next())
        .ok_or_else(invalid)
}

impl Inner {
    /// Remembers where a process and its node are.
    pub fn note_address(&self, state: &mut State, address: &Address) {
        if let (Ok(worker), Ok(node)) = (address.worker(), address.node()) {
            if !worker.is_nil() {
                state.addresses.entry(worker).or_insert_with(|| address.clone());
            }
            state.nodes.entry(node).or_insert_with(|| raylet_address(address));
        }
    }

    /// The link to a process whose address is known; opens it where there is none.
    pub fn worker_link(&self, state: &mut State, worker: WorkerId) -> Result<Arc<Link>, WorkerError> {
        if let Some(link) = state.links.get(&worker) {
            if is_alive(link) {
                return Ok(link.clone());
            }
        }
        let address = state
            .addresses
            .get(&worker)
            .cloned()
            .ok_or_else(|| WorkerError::Invalid(format!("the address of process {worker} is not known")))?;
        let link = if node_of(&address) == self.node_id {
            self.reactor
                .connect_unix(Path::new(&self.session_directory).join("sockets").join(worker.hex()))?
        } else {
            let link = self.open_tcp(&address, worker)?;
            let session = PeerSession::new(true, &link);
            let _ = link_state(&link).session.set(Arc::new(session));
            link
        };
        let said = link_state(&link);
        let _ = said.peer.set(address);
        let _ = said.peer_id.set(worker);
        state.links.insert(worker, link.clone());
        Ok(link)
    }

    /// A link to a process of another node.
    pub fn open_tcp(&self, address: &Address, worker: WorkerId) -> Result<Arc<Link>, WorkerError> {
        let target = Target {
            node: address.node()?,
            process: worker,
        };
        self.connect_tcp(address, target)
    }

    /// The state of a link that the process opened to this one: between nodes, that of its session.
    pub fn accepted_state(&self, state: &mut State, link: &Arc<Link>, worker: WorkerId) {
        if link.user_data().is_some() || !matches!(link.peer(), Peer::Tcp { .. }) {
            return;
        }
        let said = state.accepted.entry(worker).or_insert_with(|| {
            let said = LinkState::default();
            let _ = said.session.set(Arc::new(PeerSession::new(false, link)));
            Arc::new(said)
        });
        let _ = link.set_user_data(Box::new(said.clone()));
    }

    /// Sends to this node's raylet. A closed link is the raylet's death, whoever notices it first.
    pub fn tell_raylet(&self, kind: u16, correlation: u64, header: Bytes) -> Result<(), WorkerError> {
        match self.raylet.send(kind, correlation, header, &[]) {
            Ok(_) => Ok(()),
            Err(RpcError::LinkClosed { reason, .. }) => Err(WorkerError::RayletGone(reason)),
            Err(error) => Err(error.into()),
        }
    }

    /// The link to a node's raylet.
    pub fn raylet_link(&self, state: &mut State, node: NodeId) -> Result<Arc<Link>, WorkerError> {
        if node == self.node_id {
            return Ok(self.raylet.clone());
        }
        if let Some(link) = state.raylets.get(&node) {
            if link.is_open() {
                return Ok(link.clone());
            }
        }
        let address = state
            .nodes
            .get(&node)
            .cloned()
            .ok_or_else(|| WorkerError::Invalid(format!("the address of node {node} is not known")))?;
        let link = self.connect_tcp(&address, Target::raylet(node))?;
        let _ = link_state(&link).raylet_of.set(node);
        state.raylets.insert(node, link.clone());
        Ok(link)
    }

    fn connect_tcp(&self, address: &Address, target: Target) -> Result<Arc<Link>, WorkerError> {
        let token = self.auth_token.clone().ok_or_else(|| {
            WorkerError::Invalid("this process has no cluster token, so it cannot reach other nodes".into())
        })?;
        Ok(self.reactor.connect_tcp(resolve(address)?, target, token)?)
    }
}
