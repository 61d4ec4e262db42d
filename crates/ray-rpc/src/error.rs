//! Errors of this crate and the reasons for which links close.
//!
//! It owns the wording: each message is a sentence that names the peer and the cause. It refuses to carry secrets.
//!
//! Invariants:
//! 1. Every refused call returns one `RpcError`; every closed link has one `CloseReason`, fixed by whoever closed first.

use std::fmt;
use std::io;

/// Why a call on a reactor or a link was refused.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// The link takes no more frames.
    #[error("the link to {peer} is closed: {reason}")]
    LinkClosed {
        /// Who was at the other end.
        peer: String,
        /// Why it closed.
        reason: String,
    },
    /// The frame would be refused by the peer.
    #[error("a frame of {bytes} bytes for {peer} exceeds the limit of {limit_bytes} bytes")]
    FrameTooLarge {
        /// Who was to receive it.
        peer: String,
        /// How long it would be.
        bytes: usize,
        /// What the limit is.
        limit_bytes: usize,
    },
    /// A descriptor cannot leave the machine.
    #[error("a file descriptor cannot be sent to {peer}: only a Unix socket carries descriptors")]
    DescriptorOverTcp {
        /// Who was to receive it.
        peer: String,
    },
    /// The operating system refused.
    #[error("cannot {action}: {source}{}", crate::descriptors::remedy(source))]
    Io {
        /// What was tried.
        action: String,
        /// What the system answered.
        source: io::Error,
    },
    /// The process holds as many links as it may.
    #[error("this process already holds {limit} links, which is its limit (Config::max_links)")]
    TooManyLinks {
        /// The limit.
        limit: usize,
    },
    /// A link was wanted before there was anybody to serve it.
    #[error("the reactor has no service yet: call set_service before listening or connecting")]
    NoService,
    /// The service is fixed for the reactor's life.
    #[error("the reactor has a service already")]
    ServiceAlreadySet,
    /// The process at the other end of a Unix socket belongs to somebody else.
    #[error("{peer} runs as user {peer_uid}, but only user {own_uid} may connect")]
    ForeignUser {
        /// The peer.
        peer: String,
        /// Its user.
        peer_uid: u32,
        /// Ours.
        own_uid: u32,
    },
    /// The cluster token is unusable.
    #[error("the cluster token is unusable: {problem}")]
    BadToken {
        /// What is wrong with it, never the token itself.
        problem: String,
    },
    /// The reactor was stopped.
    #[error("the reactor is stopped")]
    Stopped,
}

impl RpcError {
    pub(crate) fn io(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            action: action.into(),
            source: source.into(),
        }
    }

    /// Whether a limit of this process or machine is the cause, so that it says nothing about the peer.
    pub fn is_own_limit(&self) -> bool {
        match self {
            Self::Io { source, .. } => !crate::descriptors::remedy(source).is_empty(),
            Self::TooManyLinks { .. } => true,
            _ => false,
        }
    }
}

/// What kind of event closed a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseCause {
    /// This process closed it.
    Local,
    /// The peer closed it or died.
    PeerClosed,
    /// The peer broke the protocol: garbage, an oversized or truncated frame, a version it does not speak.
    Protocol,
    /// The peer could not prove the cluster token, or refused our proof.
    Authentication,
    /// The operating system reported an error.
    Io,
    /// The peer kept silent beyond a limit.
    Timeout,
    /// A fault policy closed it.
    Fault,
}

/// Why a link closed: a kind for code and a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseReason {
    /// The kind of event.
    pub cause: CloseCause,
    /// A sentence that names the peer and the cause.
    pub sentence: String,
}

impl CloseReason {
    /// A reason of this cause.
    pub fn new(cause: CloseCause, sentence: impl Into<String>) -> Self {
        Self {
            cause,
            sentence: sentence.into(),
        }
    }

    /// A close that this process decided.
    pub fn local(sentence: impl Into<String>) -> Self {
        Self::new(CloseCause::Local, sentence)
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}
