//! The challenge that opens every TCP link: both sides prove the cluster token, and it never travels.
//!
//! Four messages of fixed size: the initiator names its target and a nonce; the acceptor answers with its node and a
//! nonce; the initiator proves itself first, so that a stranger learns nothing to guess the token from; the acceptor
//! proves itself or refuses with a status. Proofs are HMAC-SHA256 over a label of the direction, the target, the
//! acceptor's node and both nonces. Two pure state machines: bytes in, bytes out, nonces from outside.
//!
//! Invariants:
//! 1. Neither side asks for a byte beyond the message that is due, so the socket can be handed over afterwards.
//! 2. The acceptor sends no proof before it has verified one.
//! 3. Proofs are compared in constant time; each label is used in one direction only.

use std::fmt;

use hmac::{Hmac, Mac};
use ray_ids::{NodeId, WorkerId};
use sha2::Sha256;

use crate::config::Target;
use crate::error::RpcError;

const MAGIC: [u8; 4] = *b"HLA1";
const VERSION: u8 = 1;
/// The initiator's first message: magic, version, 3 zero bytes, node, process, nonce.
pub const OPENING_BYTES: usize = 8 + NodeId::SIZE + WorkerId::SIZE + NONCE_BYTES;
/// The acceptor's answer: magic, version, 3 zero bytes, node, nonce.
pub const CHALLENGE_BYTES: usize = 8 + NodeId::SIZE + NONCE_BYTES;
/// A proof.
pub const PROOF_BYTES: usize = 32;
/// The acceptor's last message: status, 3 zero bytes, proof.
pub const VERDICT_BYTES: usize = 4 + PROOF_BYTES;
/// A nonce.
pub const NONCE_BYTES: usize = 32;

const INITIATOR_LABEL: &[u8] = b"heliostat link v1 initiator";
const ACCEPTOR_LABEL: &[u8] = b"heliostat link v1 acceptor";

const STATUS_WELCOME: u8 = 0;
const STATUS_WRONG_PROOF: u8 = 1;

/// The secret of a cluster. It is proven, never sent and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthToken(Vec<u8>);

impl AuthToken {
    /// A token of these bytes, which must not be empty.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, RpcError> {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Err(RpcError::BadToken {
                problem: "it is empty".into(),
            });
        }
        Ok(Self(bytes))
    }

    /// A fresh token of 256 random bits.
    pub fn random() -> Result<Self, RpcError> {
        Ok(Self(random_nonce()?.to_vec()))
    }

    /// The secret itself, for writing it to its file.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for AuthToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthToken(redacted)")
    }
}

/// A nonce from the operating system's random source.
pub fn random_nonce() -> Result<[u8; NONCE_BYTES], RpcError> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce)
        .map_err(|error| RpcError::io("draw random bytes", std::io::Error::other(error.to_string())))?;
    Ok(nonce)
}

struct Transcript {
    target: Target,
    acceptor_node: NodeId,
    initiator_nonce: [u8; NONCE_BYTES],
    acceptor_nonce: [u8; NONCE_BYTES],
}

impl Transcript {
    fn mac(&self, token: &AuthToken, label: &[u8]) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&token.0).expect("HMAC takes a key of any length");
        // Every part has a fixed length given its label's, so no two transcripts read the same.
        mac.update(&[label.len() as u8]);
        mac.update(label);
        mac.update(&[VERSION]);
        mac.update(self.target.node.as_bytes());
        mac.update(self.target.process.as_bytes());
        mac.update(self.acceptor_node.as_bytes());
        mac.update(&self.initiator_nonce);
        mac.update(&self.acceptor_nonce);
        mac
    }

    fn prove(&self, token: &AuthToken, label: &[u8]) -> [u8; PROOF_BYTES] {
        self.mac(token, label).finalize().into_bytes().into()
    }

    fn verify(&self, token: &AuthToken, label: &[u8], proof: &[u8]) -> bool {
        self.mac(token, label).verify_slice(proof).is_ok()
    }
}

/// What a side does after a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Send this, then read the next message.
    Reply(Vec<u8>),
    /// Done: send this (it may be empty); the peer is proven and wants the target.
    Proven {
        /// The last message.
        reply: Vec<u8>,
        /// What the initiator wants, or the acceptor's own node in `node` for an initiator.
        target: Target,
    },
    /// Send this (it may be empty) and close with the sentence.
    Refused {
        /// The last message.
        reply: Vec<u8>,
        /// Why.
        sentence: String,
    },
}

fn refused(sentence: impl Into<String>) -> Step {
    Step::Refused {
        reply: Vec::new(),
        sentence: sentence.into(),
    }
}

fn check_preamble(message: &[u8]) -> Result<(), String> {
    if message[..4] != MAGIC {
        return Err("it does not speak the link protocol (its first bytes are not a link opening)".into());
    }
    if message[4] != VERSION {
        return Err(format!(
            "it speaks version {} of the link challenge, and this process version {VERSION}",
            message[4]
        ));
    }
    Ok(())
}

fn preamble() -> Vec<u8> {
    let mut message = Vec::with_capacity(OPENING_BYTES);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&[VERSION, 0, 0, 0]);
    message
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes
        .try_into()
        .expect("messages of the challenge have fixed sizes, which were read in full")
}

/// The side that accepts connections.
pub struct Acceptor {
    token: AuthToken,
    node: NodeId,
    nonce: [u8; NONCE_BYTES],
    transcript: Option<Transcript>,
}

impl Acceptor {
    /// An acceptor on `node`.
    pub fn new(token: AuthToken, node: NodeId, nonce: [u8; NONCE_BYTES]) -> Self {
        Self {
            token,
            node,
            nonce,
            transcript: None,
        }
    }

    /// How many bytes the message that is due has.
    pub fn wanted_bytes(&self) -> usize {
        match self.transcript {
            None => OPENING_BYTES,
            Some(_) => PROOF_BYTES,
        }
    }

    /// Takes a message of `wanted_bytes`.
    pub fn on_message(&mut self, message: &[u8]) -> Step {
        debug_assert_eq!(message.len(), self.wanted_bytes());
        match &self.transcript {
            None => self.on_opening(message),
            Some(transcript) => {
                if !transcript.verify(&self.token, INITIATOR_LABEL, message) {
                    let mut reply = vec![0; VERDICT_BYTES];
                    reply[0] = STATUS_WRONG_PROOF;
                    return Step::Refused {
                        reply,
                        sentence: "it could not prove the cluster token".into(),
                    };
                }
                let mut reply = vec![STATUS_WELCOME, 0, 0, 0];
                reply.extend_from_slice(&transcript.prove(&self.token, ACCEPTOR_LABEL));
                Step::Proven {
                    reply,
                    target: Target {
                        node: self.node,
                        process: transcript.target.process,
                    },
                }
            }
        }
    }

    fn on_opening(&mut self, message: &[u8]) -> Step {
        if let Err(sentence) = check_preamble(message) {
            return refused(sentence);
        }
        let (node, rest) = message[8..].split_at(NodeId::SIZE);
        let (process, nonce) = rest.split_at(WorkerId::SIZE);
        let target = Target {
            node: NodeId::from_array(array(node)),
            process: WorkerId::from_array(array(process)),
        };
        // A wrong node is not refused here: the initiator learns it from the challenge, which names this node.
        self.transcript = Some(Transcript {
            target,
            acceptor_node: self.node,
            initiator_nonce: array(nonce),
            acceptor_nonce: self.nonce,
        });
        let mut reply = preamble();
        reply.extend_from_slice(self.node.as_bytes());
        reply.extend_from_slice(&self.nonce);
        Step::Reply(reply)
    }
}

/// The side that connects.
pub struct Initiator {
    token: AuthToken,
    target: Target,
    nonce: [u8; NONCE_BYTES],
    transcript: Option<Transcript>,
}

impl Initiator {
    /// An initiator that wants `target`.
    pub fn new(token: AuthToken, target: Target, nonce: [u8; NONCE_BYTES]) -> Self {
        Self {
            token,
            target,
            nonce,
            transcript: None,
        }
    }

    /// The first message.
    pub fn opening(&self) -> Vec<u8> {
        let mut message = preamble();
        message.extend_from_slice(self.target.node.as_bytes());
        message.extend_from_slice(self.target.process.as_bytes());
        message.extend_from_slice(&self.nonce);
        message
    }

    /// How many bytes the message that is due has.
    pub fn wanted_bytes(&self) -> usize {
        match self.transcript {
            None => CHALLENGE_BYTES,
            Some(_) => VERDICT_BYTES,
        }
    }

    /// Takes a message of `wanted_bytes`.
    pub fn on_message(&mut self, message: &[u8]) -> Step {
        debug_assert_eq!(message.len(), self.wanted_bytes());
        match &self.transcript {
            None => self.on_challenge(message),
            Some(transcript) => match message[0] {
                STATUS_WELCOME if transcript.verify(&self.token, ACCEPTOR_LABEL, &message[4..]) => Step::Proven {
                    reply: Vec::new(),
                    target: Target {
                        node: transcript.acceptor_node,
                        process: self.target.process,
                    },
                },
                STATUS_WELCOME => refused("it could not prove the cluster token"),
                STATUS_WRONG_PROOF => refused("it refused this process's proof: the cluster tokens differ"),
                other => refused(format!("it refused with the unknown status {other}")),
            },
        }
    }

    fn on_challenge(&mut self, message: &[u8]) -> Step {
        if let Err(sentence) = check_preamble(message) {
            return refused(sentence);
        }
        let (node, nonce) = message[8..].split_at(NodeId::SIZE);
        let acceptor_node = NodeId::from_array(array(node));
        if !self.target.node.is_nil() && acceptor_node != self.target.node {
            return refused(format!(
                "node {acceptor_node} listens there, and node {} was wanted",
                self.target.node
            ));
        }
        let transcript = Transcript {
            target: self.target,
            acceptor_node,
            initiator_nonce: self.nonce,
            acceptor_nonce: array(nonce),
        };
        let proof = transcript.prove(&self.token, INITIATOR_LABEL);
        self.transcript = Some(transcript);
        Step::Reply(proof.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> AuthToken {
        AuthToken::new(text).unwrap()
    }

    fn node(byte: u8) -> NodeId {
        NodeId::from_array([byte; NodeId::SIZE])
    }

    fn run(initiator_token: &str, acceptor_token: &str, wanted: NodeId) -> (Option<Step>, Step) {
        let target = Target {
            node: wanted,
            process: WorkerId::from_array([9; WorkerId::SIZE]),
        };
        let mut initiator = Initiator::new(token(initiator_token), target, [1; 32]);
        let mut acceptor = Acceptor::new(token(acceptor_token), node(5), [2; 32]);
        let opening = initiator.opening();
        assert_eq!(opening.len(), acceptor.wanted_bytes());
        let Step::Reply(challenge) = acceptor.on_message(&opening) else {
            panic!("an opening is answered")
        };
        assert_eq!(challenge.len(), initiator.wanted_bytes());
        let proof = match initiator.on_message(&challenge) {
            Step::Reply(proof) => proof,
            other => return (None, other),
        };
        let verdict = acceptor.on_message(&proof);
        let reply = match &verdict {
            Step::Proven { reply, .. } | Step::Refused { reply, .. } => reply.clone(),
            Step::Reply(_) => panic!("the proof ends the challenge"),
        };
        assert_eq!(reply.len(), initiator.wanted_bytes());
        (Some(verdict), initiator.on_message(&reply))
    }

    #[test]
    fn equal_tokens_prove_each_other() {
        let (acceptor, initiator) = run("secret", "secret", node(5));
        assert!(matches!(acceptor, Some(Step::Proven { target, .. }) if target.node == node(5)));
        assert!(matches!(initiator, Step::Proven { target, .. } if target.node == node(5)));
        let (_, initiator) = run("secret", "secret", NodeId::NIL);
        assert!(
            matches!(initiator, Step::Proven { target, .. } if target.node == node(5)),
            "any node will do"
        );
    }

    #[test]
    fn differing_tokens_are_refused_with_sentences() {
        let (acceptor, initiator) = run("secret", "other", node(5));
        assert!(matches!(acceptor, Some(Step::Refused { sentence, .. }) if sentence.contains("could not prove")));
        assert!(matches!(initiator, Step::Refused { sentence, .. } if sentence.contains("tokens differ")));
    }

    #[test]
    fn another_node_is_refused_by_the_initiator() {
        let (_, initiator) = run("secret", "secret", node(6));
        assert!(matches!(initiator, Step::Refused { sentence, .. } if sentence.contains("was wanted")));
    }

    #[test]
    fn an_acceptor_that_cannot_prove_is_refused() {
        let target = Target::raylet(NodeId::NIL);
        let mut initiator = Initiator::new(token("secret"), target, [1; 32]);
        let mut liar = Acceptor::new(token("guess"), node(5), [2; 32]);
        let Step::Reply(challenge) = liar.on_message(&initiator.opening()) else {
            panic!()
        };
        let Step::Reply(proof) = initiator.on_message(&challenge) else {
            panic!()
        };
        // Reflecting the initiator's own proof must not work either: the labels differ.
        let mut verdict = vec![STATUS_WELCOME, 0, 0, 0];
        verdict.extend_from_slice(&proof);
        assert!(matches!(initiator.on_message(&verdict), Step::Refused { .. }));
    }

    #[test]
    fn garbage_and_versions_are_refused() {
        let mut acceptor = Acceptor::new(token("secret"), node(5), [2; 32]);
        assert!(
            matches!(acceptor.on_message(&[b'G'; OPENING_BYTES]), Step::Refused { sentence, .. }
            if sentence.contains("does not speak"))
        );
        let mut opening = Initiator::new(token("secret"), Target::raylet(node(5)), [1; 32]).opening();
        opening[4] = 7;
        assert!(
            matches!(acceptor.on_message(&opening), Step::Refused { sentence, .. } if sentence.contains("version 7"))
        );
    }

    #[test]
    fn a_token_is_never_printed() {
        assert_eq!(format!("{:?}", token("secret")), "AuthToken(redacted)");
        assert!(AuthToken::new(Vec::new()).is_err());
    }
}
