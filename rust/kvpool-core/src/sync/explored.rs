//! loom's atomics, explored completely.
//!
//! loom 0.7 leaves interleavings out when a thread loads a word and later writes it (tokio-rs/loom issues 166 and 392): every CAS
//! loop is such a case. Each operation here therefore first touches one word that all threads share, by a
//! relaxed read-modify-write: all operations conflict, so loom tries all their orders; being relaxed it orders
//! no memory, so stale reads are still explored.

use super::wrapped::wrapped;
use loom::sync::atomic::{self, Ordering};

loom::lazy_static! {
    static ref TURN: atomic::AtomicU32 = atomic::AtomicU32::new(0);
}

pub(super) fn turn() {
    TURN.fetch_add(0, Ordering::Relaxed); // Relaxed: a point at which loom may switch threads, orders nothing
}

wrapped!(AtomicU8, u8, atomic::AtomicU8, turn);
wrapped!(AtomicU32, u32, atomic::AtomicU32, turn);
wrapped!(AtomicU64, u64, atomic::AtomicU64, turn);
