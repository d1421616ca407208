//! Slots of one pool on the device.
//!
//! `available == slots - private - claimed - promised`: what is free or evictable and promised to
//! nobody. An operation takes its whole need off `available` first ([`SlotPool::reserve`]), then finds the slots:
//! on the free stack or by evicting, which turns an evictable page into a free slot and leaves `available` as it is.
//! `owner[slot]` says who has it; `check` adds it up.

use crate::stack::Stack;
use crate::sync::{weak, AtomicU32, Counter, Field, Ordering, Weak};

/// Who has a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Nobody: it is on the free stack, or on its way there.
    Free,
    /// The private part of an ACTIVE cache.
    Active,
    /// The private part of a SUSPENDED cache.
    Held,
    /// Nobody yet: a launched step may still touch it.
    Fenced,
    /// Nobody for good: a move that was given up may still write it.
    Retired,
    /// A node of the tree.
    Node(u32),
}

impl Owner {
    fn to_u64(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Active => 1,
            Self::Held => 2,
            Self::Fenced => 3,
            Self::Retired => 4,
            Self::Node(index) => u64::from(index) + 5,
        }
    }
    fn from_u64(raw: u64) -> Self {
        match raw {
            0 => Self::Free,
            1 => Self::Active,
            2 => Self::Held,
            3 => Self::Fenced,
            4 => Self::Retired,
            index => Self::Node((index - 5) as u32),
        }
    }
}

/// What the slot holds turned out to be bad: a mark beside its owner, until it is given back or handed out anew.
const BAD: u64 = 1 << 63;

/// The page has left a slot that is still read.
const LEFT: u32 = 1 << 31;

/// See the module.
#[derive(Debug)]
pub struct SlotPool {
    free: Stack,
    available: AtomicU32,
    owner: Vec<Field>,
    /// By slot: plans that read it and are not made yet, and [`LEFT`].
    lent: Vec<AtomicU32>,
    /// Key of the block whose page a slot holds; written before the page is in the tree, read by who has taken it out.
    key: Vec<Field>,
    taken: Counter,
    /// Units that claims of batches keep from call to call.
    pub promised: Counter,
    /// Slots that come back when the steps in flight have ended; a monitor's reading.
    pub returning: Counter,
    peak: Field,
}

impl SlotPool {
    /// All of `1..=num_slots` free; the lowest is handed out first.
    pub fn new(num_slots: u32) -> Self {
        Self::make(num_slots, false)
    }

    /// As `new`, of slots that can be lent: those of the host.
    pub fn lending(num_slots: u32) -> Self {
        Self::make(num_slots, true)
    }

    fn make(num_slots: u32, lends: bool) -> Self {
        Self {
            free: Stack::full(num_slots),
            available: AtomicU32::new(num_slots),
            owner: (0..=num_slots).map(|_| Field::new(0)).collect(),
            key: (0..=num_slots).map(|_| Field::new(0)).collect(),
            lent: (0..=if lends { num_slots } else { 0 })
                .map(|_| AtomicU32::new(0))
                .collect(),
            taken: Counter::default(),
            promised: Counter::default(),
            returning: Counter::default(),
            peak: Field::new(0),
        }
    }

    /// Slots in all.
    pub fn num_slots(&self) -> u32 {
        (self.owner.len() - 1) as u32
    }

    /// Slots that are free or can be made free, and are promised to nobody.
    pub fn available(&self) -> u32 {
        self.available.load(Ordering::Relaxed) // Relaxed: a monitor's reading; who needs them calls `reserve`
    }

    /// Takes `n` off `available`, or nothing. Lock-free; linearized at the CAS.
    pub fn reserve(&self, n: u32) -> bool {
        if n == 0 {
            return true;
        }
        let mut now = self.available.load(Ordering::Relaxed); // Relaxed: the CAS below decides
        loop {
            let Some(left) = now.checked_sub(n) else {
                return false;
            };
            // Acquire: partner the fetch_add in `unreserve`, so that what was made evictable before is seen as such.
            // Relaxed on failure: the loop decides by the value alone.
            match self
                .available
                .compare_exchange_weak(now, left, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(seen) => now = seen,
            }
        }
    }

    /// Gives a promise back, or announces slots that were freed or became evictable before. Wait-free.
    pub fn unreserve(&self, n: u32) {
        if n > 0 {
            self.available.fetch_add(n, Ordering::Release); // Release: partner the CAS in `reserve`
        }
    }

    /// A free slot, if any; the caller holds a promise for it.
    pub fn take(&self) -> Option<u32> {
        let slot = self.free.pop()? + 1;
        self.taken.add(1);
        Some(slot)
    }

    /// As `take`, up to `n` slots, appended.
    pub fn take_many(&self, n: usize, slots: &mut Vec<u32>) {
        let before = slots.len();
        self.free.pop_many(n, slots, |index| index + 1);
        let taken = (slots.len() - before) as u64;
        if taken > 0 {
            self.taken.add(taken);
        }
    }

    /// Remembers how many slots are not free by now.
    pub fn note_peak(&self) {
        self.peak.raise(self.taken.get());
    }

    /// Gives a slot back without changing `available`: its page was evictable, or the promise goes elsewhere.
    pub fn give(&self, slot: u32) {
        debug_assert!(slot >= 1 && slot <= self.num_slots());
        self.set_owner(slot, Owner::Free);
        self.taken.sub(1);
        self.free.push(slot - 1);
    }

    /// A plan is going to read the slot, unless its page has left by now: the caller looks again behind this.
    pub fn lend(&self, slot: u32) {
        self.lent[slot as usize].fetch_add(1, Ordering::AcqRel); // AcqRel: partner the RMWs in `give_lent`: who leaves sees the reader, or the reader's second look sees the page gone
    }

    /// The plan is made, or was not begun. If the page has left and this was the last reader, the slot is given back.
    pub fn unlend(&self, slot: u32) {
        let word = &self.lent[slot as usize];
        // AcqRel: partner the RMWs in `give_lent`: what was read is read before the slot is used again.
        if word.fetch_sub(1, Ordering::AcqRel) == LEFT + 1 {
            // AcqRel: as above; one of the last readers gives it back. Relaxed on failure: another one does.
            let last = word.compare_exchange(LEFT, 0, Ordering::AcqRel, Ordering::Relaxed);
            if last.is_ok() {
                self.give(slot);
                self.unreserve(1);
            }
        }
    }

    /// The page has left a slot that its claims paid for: it is given back with its unit, by the last plan that reads it if
    /// there is one.
    pub fn give_lent(&self, slot: u32) {
        self.set_owner(slot, Owner::Fenced);
        let word = &self.lent[slot as usize];
        let mut now = 0;
        loop {
            let next = if now == 0 { 0 } else { now | LEFT };
            // AcqRel: partner the fetch_add in `lend` and the fetch_sub in `unlend`. Relaxed on failure: the loop decides by
            // the value alone.
            match word.compare_exchange(now, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(seen) => now = seen,
            }
        }
        if now == 0 {
            self.give(slot);
            self.unreserve(1);
        }
    }

    /// Whether the page has left a slot that is lent.
    pub fn is_left(&self, slot: u32) -> bool {
        self.lent[slot as usize].load(Ordering::Relaxed) & LEFT != 0 // Relaxed: `check` of a core at rest
    }

    /// Takes a free slot out of use for good, with its unit. `false`: it is not free now, or what is free is promised; or
    /// another thread was faster. O(free slots).
    pub fn retire(&self, slot: u32) -> bool {
        if self.owner(slot) != Owner::Free {
            return false;
        }
        let mut others = Vec::new();
        // A unit for each slot in hand: no promise rests on what nobody else can find meanwhile.
        let found = loop {
            let covered = !others.is_empty() && weak(Weak::RetireUncovered);
            if !covered && !self.reserve(1) {
                break false;
            }
            match self.take() {
                None => {
                    self.unreserve(1);
                    break false;
                }
                Some(other) if other == slot => break true,
                Some(other) => others.push(other),
            }
        };
        if found {
            self.set_owner(slot, Owner::Retired);
        }
        let units = if weak(Weak::RetireUncovered) {
            0
        } else {
            others.len() as u32
        };
        others.into_iter().rev().for_each(|other| self.give(other));
        self.unreserve(units);
        found
    }

    /// Most slots that were ever not free.
    pub fn peak(&self) -> u32 {
        self.peak.get() as u32
    }

    /// Who has a slot.
    pub fn owner(&self, slot: u32) -> Owner {
        Owner::from_u64(self.owner[slot as usize].get() & !BAD)
    }

    /// Writes down who has a slot from here on, whose content matters no more; only who has it does.
    pub fn set_owner(&self, slot: u32, owner: Owner) {
        self.owner[slot as usize].reset(owner.to_u64());
    }

    /// As `set_owner`, of a slot whose content stays. Returns whether it is bad, which it remains: of who passes a slot on and
    /// who calls `lose`, the second one sees what the first one did. Lock-free.
    #[inline]
    pub fn pass(&self, slot: u32, owner: Owner) -> bool {
        let next = |now: u64| {
            let mark = if weak(Weak::PassQuietly) { 0 } else { now & BAD };
            let next = owner.to_u64() | mark;
            (next != now).then_some(next)
        };
        self.owner[slot as usize].turn(next) & BAD != 0 && !weak(Weak::PassQuietly)
    }

    /// What the slot holds is bad. Returns who has it; nothing is changed if that is nobody. Lock-free.
    pub fn lose(&self, slot: u32) -> Owner {
        let of = |now: u64| Owner::from_u64(now & !BAD);
        let bad = |now: u64| (!matches!(of(now), Owner::Free | Owner::Retired)).then_some(now | BAD);
        of(self.owner[slot as usize].turn(bad))
    }

    /// Key of the block whose page the slot holds; only who has the slot asks.
    pub fn key(&self, slot: u32) -> u64 {
        self.key[slot as usize].get()
    }

    /// Writes down whose page the slot is about to hold.
    pub fn set_key(&self, slot: u32, key: u64) {
        self.key[slot as usize].set(key);
    }

    /// The free slots, for `check`.
    pub fn free_slots(&self) -> Vec<u32> {
        self.free.indices().into_iter().map(|index| index + 1).collect()
    }

    /// Slots counted as taken, for `check`.
    pub fn taken(&self) -> u64 {
        self.taken.get()
    }
}
