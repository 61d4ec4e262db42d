//! One direction pair of frames between two processes that outlives their links: owns what was sent and is not known to
//! have arrived, and how much was taken in.
//!
//! A link is ordered and loses nothing until it breaks; then whatever was under way is lost, and neither side knows how
//! much that was. Both sides count frames (nothing is added to a frame), tell each other now and then how many they took
//! in (`acknowledge`), and on a fresh link first say that number (`resume`); the sender then sends the rest again. So a
//! broken link between two living processes delays frames and does nothing else: no borrow, reply or acknowledgement is
//! lost or taken twice. Only a death ends a session.
//!
//! It refuses a peer that says it took in more than was sent, or less than it had acknowledged before.
//!
//! Invariants:
//! 1. Every frame handed to `send` is taken in by the peer exactly once and in order, unless one of the two dies.
//! 2. What is retained is exactly what was sent above the peer's last word.

use std::collections::VecDeque;

/// After how many frames taken in a word is due to the peer.
pub const ACKNOWLEDGE_EVERY: u64 = 64;

/// The peer's numbers make no sense: one of the two is not who it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer says it took in {claimed} frames; {sent} were sent and {acknowledged} acknowledged before")]
pub struct SessionError {
    pub claimed: u64,
    pub sent: u64,
    pub acknowledged: u64,
}

/// One process's end of a session with one peer. `M` is a frame, cheap to clone.
#[derive(Debug)]
pub struct Session<M> {
    retained: VecDeque<M>,
    sent: u64,
    acknowledged: u64,
    received: u64,
    told: u64,
    connected: bool,
}

impl<M: Clone> Default for Session<M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Clone> Session<M> {
    /// Nothing sent, nothing taken in, no link.
    pub fn new() -> Self {
        Self {
            retained: VecDeque::new(),
            sent: 0,
            acknowledged: 0,
            received: 0,
            told: 0,
            connected: false,
        }
    }

    /// Hands over a frame. Returns whether it is to be written to the link now; else it goes with the next `resumed`.
    pub fn send(&mut self, frame: M) -> bool {
        self.sent += 1;
        self.retained.push_back(frame);
        self.connected
    }

    /// A frame of the session arrived on the current link and is to be handled. Returns a number to tell the peer
    /// (`acknowledge`), where one is due.
    pub fn receive(&mut self) -> Option<u64> {
        self.received += 1;
        if self.received - self.told < ACKNOWLEDGE_EVERY {
            return None;
        }
        self.told = self.received;
        Some(self.received)
    }

    /// The peer took in that many frames.
    pub fn acknowledged(&mut self, count: u64) -> Result<(), SessionError> {
        if count > self.sent || count < self.acknowledged {
            return Err(SessionError {
                claimed: count,
                sent: self.sent,
                acknowledged: self.acknowledged,
            });
        }
        self.retained.drain(..(count - self.acknowledged) as usize);
        self.acknowledged = count;
        Ok(())
    }

    /// The link broke: until `resumed`, frames are only retained.
    pub fn broken(&mut self) {
        self.connected = false;
    }

    /// How many frames were taken in: the first word on a fresh link (`resume`), or a word at leisure.
    pub fn take_in_count(&mut self) -> u64 {
        self.told = self.received;
        self.received
    }

    /// The peer's first word on a fresh link. Returns what is to be written to it, in order.
    pub fn resumed(&mut self, count: u64) -> Result<Vec<M>, SessionError> {
        self.acknowledged(count)?;
        self.connected = true;
        Ok(self.retained.iter().cloned().collect())
    }

    /// Whether frames go to a link at once.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Frames not known to have arrived, oldest first.
    pub fn retained(&self) -> impl Iterator<Item = &M> {
        self.retained.iter()
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        if self.sent - self.acknowledged != self.retained.len() as u64 {
            return Err(format!(
                "{} frames are retained; {} were sent and {} acknowledged",
                self.retained.len(),
                self.sent,
                self.acknowledged
            ));
        }
        if self.told > self.received {
            return Err(format!(
                "{} frames were taken in and the peer was told {}",
                self.received, self.told
            ));
        }
        Ok(())
    }
}
