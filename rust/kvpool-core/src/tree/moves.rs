//! The two tiers: who keeps a node on the device, and how a move excludes others. docs/TIERS.md has the protocol.
//!
//! - `pins(n) == ACTIVE caches and batches in work whose path contains n`
//! - `near(n) == children of n that are on the device`

use super::{Dead, Root, Tree};
use crate::chains::Visit;
use crate::sync::Ordering;
use crate::words::{Link, Page, State, Tier};

/// Mark in the word of the pins: the node is counted in `pinned_near`. Only a pinned node has it.
pub(super) const NEAR: u64 = 1 << 63;

impl Tree {
    // -- what could move down ---------------------------------------------------------------

    /// Nodes on the device that only SUSPENDED caches claim. A hint while others are at work.
    pub fn held(&self) -> u32 {
        self.claimed_near.get().saturating_sub(self.pinned_near.get()) as u32
    }

    /// A node on this tier is claimed from here on, or no longer.
    pub(super) fn note_claimed(&self, tier: Tier, claimed: bool) {
        if self.by_parent.is_some() && tier == Tier::Device {
            if claimed {
                self.claimed_near.add(1);
            } else {
                self.claimed_near.sub(1);
            }
        }
    }

    /// A pinned node is on the device.
    fn note_pinned(&self, index: usize) {
        let before = self.nodes[index].pins.fetch_or(NEAR, Ordering::Relaxed); // Relaxed: a mark for a statistic, partner the CAS in `unpin`
        if before & NEAR == 0 {
            self.pinned_near.add(1);
        }
    }

    // -- children ---------------------------------------------------------------------------

    fn family(parent: Link) -> u64 {
        let x = parent.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x ^ (x >> 29)
    }

    /// A child of `parent` is on the device.
    pub(super) fn come_near(&self, parent: Link) {
        if self.by_parent.is_some() && !parent.is_nil() {
            let near = &self.nodes[parent.index()].near;
            near.fetch_add(1, Ordering::Relaxed); // Relaxed: a hint for the order of eviction
        }
    }

    /// A child of `parent` is no longer on the device.
    pub(super) fn go_far(&self, parent: Link) {
        if self.by_parent.is_some() && !parent.is_nil() {
            let near = &self.nodes[parent.index()].near;
            near.fetch_sub(1, Ordering::Relaxed); // Relaxed: a hint for the order of eviction
        }
    }

    pub(super) fn adopt(&self, parent: Link, link: Link) {
        if let Some(chains) = &self.by_parent {
            let bucket = chains.bucket(Self::family(parent));
            while !chains.publish(bucket, chains.head(bucket), link) {}
        }
    }

    pub(super) fn disown(&self, parent: Link, link: Link) {
        if let Some(chains) = &self.by_parent {
            let bucket = chains.bucket(Self::family(parent));
            chains.unlink(bucket, link, |link| self.is(link));
        }
    }

    /// Calls `visit` with the live children of a node, maybe with some twice if others insert meanwhile.
    pub fn each_child(&self, parent: Link, mut visit: impl FnMut(Link)) {
        let Some(chains) = &self.by_parent else {
            return;
        };
        loop {
            let head = chains.head(chains.bucket(Self::family(parent)));
            let all = |link: Link| {
                if self.parent(link.index()) == parent && self.is_live(link) {
                    visit(link);
                }
                Visit::Next
            };
            let mut all = all;
            if chains.walk(head, |link| self.is(link), &mut all).is_ok() {
                return;
            }
        }
    }

    // -- pins -------------------------------------------------------------------------------

    /// An ACTIVE cache has this node, on which it has a claim, in its path. `false`: it is on the move.
    pub fn pin(&self, index: usize) -> bool {
        let pins = &self.nodes[index].pins;
        let before = pins.fetch_add(1, Ordering::SeqCst); // SeqCst: partner the CAS in `seize`: it sees the pin, or the load below sees it busy
        let now = State(self.nodes[index].state.load(Ordering::SeqCst)); // SeqCst: partner the CAS in `seize`
        if now.is_busy() {
            self.unpin(index);
            return false;
        }
        if before == 0 && now.tier() == Tier::Device {
            self.note_pinned(index);
        }
        true
    }

    /// One pin less. Returns whether it was the last.
    pub fn unpin(&self, index: usize) -> bool {
        let pins = &self.nodes[index].pins;
        let mut now = pins.load(Ordering::Relaxed); // Relaxed: the CAS below decides
        loop {
            let last = now & !NEAR == 1;
            let next = if last { 0 } else { now - 1 };
            // SeqCst: partner the load in `pins`. Relaxed on failure: the loop decides by the value alone.
            match pins.compare_exchange_weak(now, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) if last && now & NEAR != 0 => self.pinned_near.sub(1),
                Ok(_) => {}
                Err(seen) => {
                    now = seen;
                    continue;
                }
            }
            return last;
        }
    }

    // -- moves ------------------------------------------------------------------------------

    /// Makes a node busy: only the caller changes its pages of full-attention pools from here on. `None`: it is not live,
    /// or somebody else has it.
    pub fn seize(&self, index: usize) -> Option<State> {
        loop {
            let now = self.state(index);
            if !now.is_live() || now.is_busy() {
                return None;
            }
            let word = &self.nodes[index].state;
            // SeqCst: partner the fetch_add in `pin`. Relaxed on failure: the loop loads again.
            let swapped = word.compare_exchange(now.0, now.busy().0, Ordering::SeqCst, Ordering::Relaxed);
            if swapped.is_ok() {
                return Some(now);
            }
        }
    }

    /// The move of a busy node is over. Returns its state from now on: who is claimed at this moment is told by it.
    pub fn settle(&self, index: usize, tier: Tier) -> State {
        let word = &self.nodes[index].state;
        let mut now = self.state(index);
        loop {
            let next = now.settled(tier);
            // AcqRel: partner the loads in `state`: who claims it finds its pages there. Acquire on failure: as in `state`.
            match word.compare_exchange(now.0, next.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(seen) => now = State(seen),
            }
        }
        if now.tier() != tier {
            if now.refs() > 0 {
                self.note_claimed(Tier::Device, tier == Tier::Device);
            }
            match tier {
                Tier::Device => {
                    self.note_pinned(index); // who brings it up has pinned it
                    self.come_near(self.parent(index));
                }
                Tier::Host => self.go_far(self.parent(index)),
            }
        }
        now.settled(tier)
    }

    /// Puts the page of a busy node into another slot. Returns what was there.
    pub fn place_page(&self, pool: usize, index: usize, tier: Tier, slot: u32) -> Page {
        loop {
            let now = self.page(pool, index);
            if self.change_page(pool, index, now, now.settled(tier, slot)) {
                return now;
            }
        }
    }

    /// Makes the page of a windowed pool busy if it is there, on the device, and no ACTIVE cache claims it.
    pub fn seize_page(&self, pool: usize, index: usize) -> Option<Page> {
        loop {
            let now = self.page(pool, index);
            if now.slot() == 0 || now.tier() == Tier::Host || now.is_busy() || now.active() > 0 {
                return None;
            }
            if self.change_page(pool, index, now, now.busy()) {
                return Some(now);
            }
        }
    }

    /// The move of a busy page is over: it goes to `(tier, slot)` unless an ACTIVE cache has claimed it since. Returns its
    /// word from now on; `None`: it was taken away, and both slots are the caller's.
    pub fn settle_page(&self, pool: usize, index: usize, from: u32, tier: Tier, slot: u32) -> Option<Page> {
        loop {
            let now = self.page(pool, index);
            if !now.is_busy() || now.slot() != from {
                return None;
            }
            let next = if now.active() > 0 {
                now.settled(now.tier(), from)
            } else {
                now.settled(tier, slot)
            };
            if self.change_page(pool, index, now, next) {
                return Some(next);
            }
        }
    }

    /// A page of a windowed pool that is on the host or on its way there gives way to the caller's own, with a claim of an ACTIVE cache more.
    /// Returns it.
    pub fn replace_page(&self, pool: usize, index: usize, own: u32) -> Option<Page> {
        loop {
            let now = self.page(pool, index);
            if now.slot() == 0 || (now.tier() == Tier::Device && !now.is_busy()) {
                return None;
            }
            let next = now.settled(Tier::Device, own).claimed(true).fresh();
            if self.change_page(pool, index, now, next) {
                return Some(now);
            }
        }
    }

    /// The claimed page of a windowed pool comes up into a device slot. Returns where it was; `None`: it is up already.
    pub fn raise_page(&self, pool: usize, index: usize, slot: u32) -> Option<Page> {
        loop {
            let now = self.page(pool, index);
            if now.slot() == 0 || now.tier() == Tier::Device {
                return None;
            }
            if self.change_page(pool, index, now, now.settled(Tier::Device, slot)) {
                return Some(now);
            }
        }
    }

    /// A claim on a page became one of an ACTIVE cache, or ceased to be.
    pub fn pin_page(&self, pool: usize, index: usize, active: bool) {
        loop {
            let now = self.page(pool, index);
            let next = if active { now.pinned() } else { now.unpinned() };
            if self.change_page(pool, index, now, next) {
                return;
            }
        }
    }

    // -- private blocks of SUSPENDED caches -----------------------------------------------------

    /// A node for a private block, if any is left.
    pub fn take_spare(&self) -> Option<Dead> {
        self.spare.pop().map(|index| Dead(index + self.max_blocks))
    }

    /// Puts a private block below its parent, with the caller's claim, which was the parent's before. Nobody can find it.
    pub fn park(&self, dead: Dead, root: &Root, parent: Link, depth: u64, priority: u8) -> Link {
        let index = dead.index();
        let n = &self.nodes[index];
        let born = self.state(index).version();
        n.born.store(born, Ordering::Release); // Release: partner the load in `Tree::born`
        n.parent.set(parent.0);
        n.depth.set(depth);
        n.used.set(0);
        n.priority.set(u64::from(priority));
        n.segment.set(0);
        n.epoch.set(root.epoch);
        if !parent.is_nil() {
            self.nodes[parent.index()]
                .children
                .fetch_add(1, Ordering::Relaxed); // Relaxed: the parent is claimed, as in `publish`
        }
        self.come_near(parent);
        self.note_claimed(Tier::Device, true);
        n.state.store(self.state(index).born().0, Ordering::Release); // Release: partner the loads in `state`
        Link::new(born, dead.0)
    }

    /// Takes a private block that only the caller claims out again; the claim is the parent's from here on. `false`: it is
    /// on the move.
    pub fn dissolve(&self, index: usize) -> Option<Dead> {
        let now = self.seize(index)?;
        let dead = now.killed();
        let parent = self.parent(index);
        self.nodes[index].state.store(dead.0, Ordering::Release); // Release: partner the loads in `state`; busy: nobody else writes it
        if !parent.is_nil() {
            self.nodes[parent.index()]
                .children
                .fetch_sub(1, Ordering::Relaxed); // Relaxed: the parent is claimed
        }
        self.note_claimed(now.tier(), false);
        if now.tier() == Tier::Device {
            self.go_far(parent);
        }
        Some(Dead(index as u32))
    }
}
