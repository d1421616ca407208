//! The only module that names atomics: std's, loom's under `cfg(kvpool_loom)`, shuttle's under
//! `cfg(kvpool_shuttle)`; under `cfg(kvpool_stops)` std's, where a thread can be stopped at each access.
//!
//! Words that carry a protocol are used as plain atomics, with an ordering and its partner named at
//! each use. Three wrappers stand for the uses that need no thought per line: [`Field`] (written by
//! the owner before a node is published), [`Counter`] (a statistic) and [`Sole`] (one thread inside,
//! nobody waits).

#[cfg(kvpool_loom)]
mod explored;
#[cfg(kvpool_stops)]
pub mod stops;
#[cfg(any(kvpool_loom, kvpool_stops))]
mod wrapped;

#[cfg(kvpool_loom)]
pub use explored::{AtomicU32, AtomicU64, AtomicU8};
#[cfg(kvpool_loom)]
pub use loom::sync::atomic::{fence, Ordering};
#[cfg(kvpool_shuttle)]
pub use shuttle::sync::atomic::{fence, AtomicU32, AtomicU64, AtomicU8, Ordering};
#[cfg(not(any(kvpool_loom, kvpool_shuttle, kvpool_stops)))]
pub use std::sync::atomic::{fence, AtomicU32, AtomicU64, AtomicU8, Ordering};
#[cfg(kvpool_stops)]
pub use std::sync::atomic::{fence, Ordering};
#[cfg(kvpool_stops)]
pub use stops::{AtomicU32, AtomicU64, AtomicU8};

#[cfg(kvpool_loom)]
use loom::sync::{Mutex, MutexGuard};
#[cfg(kvpool_shuttle)]
use shuttle::sync::{Mutex, MutexGuard};
#[cfg(not(any(kvpool_loom, kvpool_shuttle)))]
use std::sync::Mutex;
#[cfg(not(any(kvpool_loom, kvpool_shuttle, kvpool_stops)))]
use std::sync::MutexGuard;

/// What is inside a [`Sole`], until it is dropped.
#[cfg(not(kvpool_stops))]
type Inside<'a, T> = MutexGuard<'a, T>;
#[cfg(kvpool_stops)]
use stops::Inside;

/// The word below [`Field`] and [`Counter`]: no point at which a checker need switch threads.
#[cfg(kvpool_loom)]
type Plain = loom::sync::atomic::AtomicU64;
#[cfg(not(kvpool_loom))]
type Plain = AtomicU64;

/// A value of a node: written by the node's owner before publication, read by anybody, and
/// believed only after the reader has seen that the node is still the one it was linked as.
#[derive(Debug)]
pub struct Field(Plain);

impl Field {
    /// A field with a first value.
    pub fn new(value: u64) -> Self {
        Self(Plain::new(value))
    }
    /// The value, of whichever node lives here now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed) // Relaxed: ordered by the fence in `Tree::is`, partner the fence in `Tree::write`
    }
    /// Sets it; owner only, or a hint that nobody relies on.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed); // Relaxed: made visible by the publishing CAS in `Chains::publish`
    }
    /// Sets it to `value` if it is still `seen`; a hint for the order of eviction.
    pub fn replace(&self, seen: u64, value: u64) {
        let _ = self
            .0
            .compare_exchange(seen, value, Ordering::Relaxed, Ordering::Relaxed);
        // Relaxed: a hint, nothing is read through it
    }
    /// Changes it to `next` of what is there, which is returned; `None` leaves it. For a field that carries a protocol.
    /// Lock-free; linearized at the CAS, or at the load of what stays.
    #[inline]
    pub fn turn(&self, next: impl Fn(u64) -> Option<u64>) -> u64 {
        loop {
            #[cfg(kvpool_loom)]
            explored::turn();
            let now = self.0.load(Ordering::Acquire); // Acquire: partner the CAS below: who finds an owner finds what it wrote before
            let Some(next) = next(now) else {
                return now;
            };
            #[cfg(kvpool_loom)]
            explored::turn();
            // AcqRel: partner the load above. Relaxed on failure: the loop loads again.
            let turned = self
                .0
                .compare_exchange(now, next, Ordering::AcqRel, Ordering::Relaxed);
            if turned.is_ok() {
                return now;
            }
        }
    }
    /// As `set`, of a field that others `turn`. For loom a store is not ordered beside read-modify-writes, as the standard has
    /// it: it sees a `turn` that came before as if it could be the later one.
    pub fn reset(&self, value: u64) {
        #[cfg(kvpool_loom)]
        self.0.swap(value, Ordering::Relaxed); // Relaxed: as in `set`
        #[cfg(not(kvpool_loom))]
        self.set(value);
    }
    /// As `raise` without a locked instruction: of two at the same moment either stays.
    pub fn advance(&self, value: u64) {
        if self.get() < value {
            self.set(value);
        }
    }
    /// Raises it to at least `value`; a hint for the order of eviction.
    pub fn raise(&self, value: u64) {
        if self.get() < value {
            self.0.fetch_max(value, Ordering::Relaxed); // Relaxed: the order of eviction is a hint, nothing is read through it
        }
    }
}

/// A statistic: exact once all threads have stopped, never part of a decision about memory.
#[derive(Debug)]
pub struct Counter(Plain);

impl Default for Counter {
    fn default() -> Self {
        Self(Plain::new(0))
    }
}

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed); // Relaxed: a statistic, partner none
    }
    /// Takes off.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed); // Relaxed: a statistic, partner none
    }
    /// The next number, unique: 1, 2, 3...
    pub fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1 // Relaxed: uniqueness comes from the RMW, partner none
    }
    /// The first of the next `n` numbers, unique like those of `next`.
    pub fn next_run(&self, n: u64) -> u64 {
        self.0.fetch_add(n, Ordering::Relaxed) + 1 // Relaxed: uniqueness comes from the RMW, partner none
    }
    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed) // Relaxed: a statistic, partner none
    }
}

/// Something that one thread uses at a time. Entering is one CAS; who does not get in goes another
/// way instead of waiting (`Mutex::lock` is never called).
#[derive(Debug)]
pub struct Sole<T>(Mutex<T>);

impl<T> Sole<T> {
    /// Nobody inside.
    pub fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }
    /// Enters, unless another thread is inside (or panicked there).
    #[cfg(not(kvpool_stops))]
    pub fn enter(&self) -> Option<Inside<'_, T>> {
        self.0.try_lock().ok()
    }
    /// As without the checker; both sides are points.
    #[cfg(kvpool_stops)]
    pub fn enter(&self) -> Option<Inside<'_, T>> {
        loop {
            stops::point();
            let inside = self.0.try_lock().ok().map(Inside);
            if inside.is_some() || !weak(Weak::EnterWaits) {
                return inside;
            }
        }
    }
}

/// Brings the memory of a word closer; a hint that the checkers do without.
#[inline(always)]
pub fn warm<T>(at: &T) {
    if !cfg!(any(kvpool_loom, kvpool_shuttle)) {
        kvpool_prefetch::read(at);
    }
}

/// A number that no other call in this process gets.
pub fn unique() -> u64 {
    static LAST: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    LAST.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1 // Relaxed: uniqueness comes from the RMW, partner none
}

/// A planted weakness: each makes one model, or the test of stopped threads, fail. Outside of them it is always `false`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code)]
#[repr(u8)]
pub enum Weak {
    /// No weakness.
    None,
    /// The head of a stack keeps its tag.
    StackTag,
    /// A popped index is not ordered after its push.
    StackOrder,
    /// A claim trusts the index alone, not the incarnation.
    ClaimBorn,
    /// A claim leaves the version as it is.
    ClaimVersion,
    /// Eviction looks at the references before it looks at the children, not in one word.
    KillChildren,
    /// A release is not ordered before an eviction.
    ReleaseOrder,
    /// A reader believes fields without looking at the incarnation again.
    ReadAgain,
    /// The writer of a new incarnation publishes its birth after its fields.
    WriteBirth,
    /// Publishing re-reads the head after the search.
    PublishHead,
    /// A published node's fields are not ordered before its link.
    PublishOrder,
    /// A chain's room is looked up at another head than the one in front of which a node is put.
    CrowdHead,
    /// An unlinked node is not marked first.
    UnlinkMark,
    /// A child is believed without a look at its parent link.
    ParentLink,
    /// A claim takes its unit after the reference.
    PayLater,
    /// Reserving in several pools does not give back what it took when one is short.
    ReserveRollback,
    /// Eviction of a page ignores claims.
    PageClaims,
    /// The inbox's flag is cleared after the look at the node.
    InboxFlag,
    /// The reader of events does not look again whether the slot was written meanwhile.
    EventAgain,
    /// A pin leaves the state as it is.
    PinQuietly,
    /// A mover does not look at pins and children on the device.
    SeizeBlind,
    /// The end of a move writes the state that the mover saw, not the one that is there.
    SettleStale,
    /// Who brings a page up looks at the others as they were a moment ago.
    LiftStale,
    /// The end of a page's move does not look whether the page is still the mover's.
    SettlePage,
    /// A page on the move is pinned.
    PinBusyPage,
    /// A commit joins a page wherever it is.
    ClaimFar,
    /// A private block is pinned after it can be seen.
    ParkUnpinned,
    /// A node on the move is killed.
    KillBusy,
    /// Of two that take a node out at once both have it.
    KillTwice,
    /// The units of a move follow the claims that there were at its beginning.
    SettleUnits,
    /// Who closes a cache looks at the children of its private blocks as they were a moment ago.
    ChildrenStale,
    /// Who reads a host slot does not look again whether the page is still there.
    LendOnce,
    /// A lost block that is claimed is not marked.
    LoseUnmarked,
    /// A page is in the tree before its slot says so.
    OwnerLate,
    /// Who passes a slot on does not look whether what it holds is bad.
    PassQuietly,
    /// Who looks for a slot to be retired has one unit for all that it has in hand.
    RetireUncovered,
    /// Who finds another thread inside waits for it.
    EnterWaits,
    /// A pin waits for the mover that has the node.
    PinWaits,
    /// A search for a slot that was promised goes on until there is one.
    TakeWaits,
}

#[cfg(any(kvpool_loom, kvpool_shuttle, kvpool_stops))]
static PLANTED: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Plants a weakness for the models that follow in this process.
#[cfg(any(kvpool_loom, kvpool_shuttle, kvpool_stops))]
pub fn plant(weak: Weak) {
    PLANTED.store(weak as u8, std::sync::atomic::Ordering::SeqCst); // SeqCst: set before the model's threads start, partner `weak`
}

/// Whether this weakness is planted.
#[inline(always)]
pub fn weak(_which: Weak) -> bool {
    #[cfg(any(kvpool_loom, kvpool_shuttle, kvpool_stops))]
    {
        PLANTED.load(std::sync::atomic::Ordering::SeqCst) == _which as u8 // SeqCst: partner `plant`
    }
    #[cfg(not(any(kvpool_loom, kvpool_shuttle, kvpool_stops)))]
    false
}
