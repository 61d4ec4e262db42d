//! The bytes that wait to be sent on one link: how frames become segments, and one vectored write of them.
//!
//! Short pieces are gathered into runs; a longer payload segment stays the caller's memory and is never copied. A
//! descriptor is a mark in the queue and leaves with the first byte behind it.
//!
//! Invariants:
//! 1. Bytes leave in the order in which frames were pushed.
//! 2. A descriptor travels with the first byte of its own frame and in no other's write.
//! 3. Whatever a partial write left stays at the front.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::Errno;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::stats::{add, count, Stats};

/// A piece up to this length is cheaper to copy than to list in a vectored write.
const COPY_BYTES: usize = 512;
/// A run stops growing here, so that it can leave while the next one is filled.
const RUN_BYTES: usize = 32 << 10;
/// A sent run's memory is kept for the next one up to this size.
const SPARE_BYTES: usize = 16 << 10;
/// Pieces of one write.
const PIECES: usize = 64;

#[derive(Debug)]
enum Segment {
    Run(Vec<u8>),
    Shared(Bytes),
    Descriptor(OwnedFd),
}

/// Frames that were pushed and not yet taken by a writer.
#[derive(Debug, Default)]
pub(crate) struct SendQueue {
    segments: VecDeque<Segment>,
    spare: Vec<u8>,
}

impl SendQueue {
    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    pub(crate) fn push_descriptor(&mut self, descriptor: OwnedFd) {
        self.segments.push_back(Segment::Descriptor(descriptor));
    }

    pub(crate) fn push_copy(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Some(Segment::Run(run)) = self.segments.back_mut() {
            if run.len() < RUN_BYTES {
                run.extend_from_slice(bytes);
                return;
            }
        }
        let mut run = std::mem::take(&mut self.spare);
        run.extend_from_slice(bytes);
        self.segments.push_back(Segment::Run(run));
    }

    pub(crate) fn push(&mut self, bytes: &Bytes) {
        if bytes.len() <= COPY_BYTES {
            self.push_copy(bytes);
        } else {
            self.segments.push_back(Segment::Shared(bytes.clone()));
        }
    }

    pub(crate) fn keep_spare(&mut self, spare: Vec<u8>) {
        if self.spare.capacity() == 0 {
            self.spare = spare;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.segments.clear();
    }
}

/// How far a writer got.
#[derive(Debug)]
pub(crate) enum WriteEnd {
    Drained,
    Blocked,
    Failed(Errno),
}

/// What a writer has taken from the queue.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    /// The socket; none before a TCP link is proven and after the link is closed.
    pub(crate) socket: Option<Arc<OwnedFd>>,
    segments: VecDeque<Segment>,
    head_sent: usize,
    recycled: Vec<u8>,
}

impl InFlight {
    /// Takes everything from the queue.
    pub(crate) fn take_from(&mut self, queue: &mut SendQueue) {
        if self.segments.is_empty() {
            std::mem::swap(&mut self.segments, &mut queue.segments);
        } else {
            self.segments.append(&mut queue.segments);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    pub(crate) fn take_recycled(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.recycled)
    }

    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.head_sent = 0;
    }

    /// Writes until nothing is left, the socket is full or fails; `sent` is told about every byte that left.
    pub(crate) fn write(&mut self, stats: &Stats, mut sent: impl FnMut(usize)) -> WriteEnd {
        let Some(socket) = self.socket.clone() else {
            return WriteEnd::Blocked;
        };
        while !self.segments.is_empty() {
            count(&stats.writes);
            match self.write_once(&socket) {
                Ok(bytes) => {
                    add(&stats.bytes_sent, bytes as u64);
                    sent(bytes);
                    self.advance(bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return WriteEnd::Blocked,
                Err(error) => return WriteEnd::Failed(error),
            }
        }
        WriteEnd::Drained
    }

    fn write_once(&self, socket: &OwnedFd) -> Result<usize, Errno> {
        let mut pieces = [IoSlice::new(&[]); PIECES];
        let mut filled = 0;
        let mut descriptor = None;
        for (index, segment) in self.segments.iter().enumerate() {
            let bytes: &[u8] = match segment {
                Segment::Descriptor(fd) if index == 0 => {
                    descriptor = Some([fd.as_fd()]);
                    continue;
                }
                Segment::Descriptor(_) => break,
                Segment::Run(run) => run,
                Segment::Shared(bytes) => bytes,
            };
            if filled == PIECES {
                break;
            }
            pieces[filled] = IoSlice::new(if index == 0 { &bytes[self.head_sent..] } else { bytes });
            filled += 1;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(descriptor) = &descriptor {
            if !control.push(SendAncillaryMessage::ScmRights(descriptor)) {
                return Err(Errno::NOBUFS);
            }
        }
        sendmsg(
            socket,
            &pieces[..filled],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
    }

    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let Some(front) = self.segments.front_mut() else { return };
            let length = match front {
                // The first byte behind it has left, and with it the descriptor.
                Segment::Descriptor(_) => {
                    self.segments.pop_front();
                    continue;
                }
                Segment::Run(run) => run.len(),
                Segment::Shared(shared) => shared.len(),
            };
            if bytes < length - self.head_sent {
                self.head_sent += bytes;
                return;
            }
            bytes -= length - self.head_sent;
            self.head_sent = 0;
            if let Some(Segment::Run(mut run)) = self.segments.pop_front() {
                if run.capacity() <= SPARE_BYTES {
                    run.clear();
                    self.recycled = run;
                }
            }
        }
    }
}
