//! Slots of one pool on the device.
//!
//! `free.len() + (slots in the tree, in caches, fenced) == num_slots`; who holds the others is the
//! tree's and the caches' business, and `check` adds it up.

/// Free slots of one pool.
#[derive(Debug)]
pub struct SlotPool {
    num_slots: u32,
    free: Vec<u32>,
    peak: u32,
}

impl SlotPool {
    /// All of `1..=num_slots` free; the lowest is handed out first.
    pub fn new(num_slots: u32) -> Self {
        Self {
            num_slots,
            free: (1..=num_slots).rev().collect(),
            peak: 0,
        }
    }

    /// Slots in all.
    pub fn num_slots(&self) -> u32 {
        self.num_slots
    }

    /// Slots in nobody's hands.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Most slots that were ever taken at once.
    pub fn peak(&self) -> u32 {
        self.peak
    }

    /// A free slot, if any.
    pub fn take(&mut self) -> Option<u32> {
        let slot = self.free.pop()?;
        self.peak = self.peak.max(self.num_slots - self.free());
        Some(slot)
    }

    /// Gives a slot back.
    pub fn give(&mut self, slot: u32) {
        debug_assert!(slot >= 1 && slot <= self.num_slots);
        self.free.push(slot);
    }

    /// The free slots, for `check`.
    pub fn free_slots(&self) -> &[u32] {
        &self.free
    }
}
