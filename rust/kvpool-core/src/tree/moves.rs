//! The two tiers: who keeps a node on the device, and how a move excludes others. docs/TIERS.md has the protocol.
//!
//! - `pins(n) == ACTIVE caches and batches in work whose path contains n`
//! - `near(n) == children of n that are on the device`

use super::{Claimed, Dead, Root, Tree};
use crate::sync::{weak, Ordering, Weak};
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
        if self.families.is_some() && tier == Tier::Device {
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

    /// A child of `parent` is on the device.
    pub(super) fn come_near(&self, parent: Link) {
        if self.families.is_some() && !parent.is_nil() {
            let near = &self.nodes[parent.index()].near;
            near.fetch_add(1, Ordering::Relaxed); // Relaxed: ordered by the release of the pin, see `Tree::seize`
        }
    }

    /// A child of `parent` is no longer on the device.
    pub(super) fn go_far(&self, parent: Link) {
        if self.families.is_some() && !parent.is_nil() {
            let near = &self.nodes[parent.index()].near;
            near.fetch_sub(1, Ordering::AcqRel); // AcqRel: partner the RMW in `near_now`
        }
    }

    /// Nodes below that are on the device, not older than what the caller did to the node before: of who unpins it and who
    /// takes the last child off the device, one sees both.
    pub fn near_now(&self, index: usize) -> u32 {
        self.nodes[index].near.fetch_add(0, Ordering::AcqRel) // AcqRel: partner the fetch_sub in `go_far`
    }

    // -- pins -------------------------------------------------------------------------------

    /// An ACTIVE cache has this node, on which it has a claim, in its path. `false`: it is on the move.
    pub fn pin(&self, index: usize) -> bool {
        let n = &self.nodes[index];
        let before = n.pins.fetch_add(1, Ordering::Relaxed); // Relaxed: the CAS below orders it before the look in `seize`
        loop {
            let now = self.state(index);
            if now.is_busy() {
                if weak(Weak::PinWaits) {
                    continue;
                }
                self.unpin(index);
                return false;
            }
            // AcqRel: partner the load and the CAS in `seize`: a mover sees the pin, or its CAS fails, or it was first and we
            // see it busy. Relaxed on failure: the loop loads again.
            let next = now.stirred();
            let pinned = weak(Weak::PinQuietly)
                || n.state
                    .compare_exchange(now.0, next.0, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok();
            if pinned {
                if before & NEAR == 0 && now.tier() == Tier::Device {
                    self.note_pinned(index);
                }
                return true;
            }
        }
    }

    /// As `pin`, of a node that nobody else can see yet.
    pub fn pin_first(&self, dead: &Dead) {
        self.nodes[dead.index()].pins.fetch_add(1, Ordering::Relaxed); // Relaxed: published with the node
        self.note_pinned(dead.index());
    }

    /// One pin less. Returns whether it was the last.
    pub fn unpin(&self, index: usize) -> bool {
        let pins = &self.nodes[index].pins;
        let mut now = pins.load(Ordering::Relaxed); // Relaxed: the CAS below decides
        loop {
            let last = now & !NEAR == 1;
            let next = if last { 0 } else { now - 1 };
            // Release: partner the load in `pins`: a child that came near under the pin is counted. Relaxed on failure: the
            // loop decides by the value alone.
            match pins.compare_exchange_weak(now, next, Ordering::Release, Ordering::Relaxed) {
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

    /// Makes a node that nobody pins, with no child on the device, busy: only the caller changes its pages of
    /// full-attention pools from here on. `None`: it is not live or not such a node, or somebody else has it.
    pub fn seize(&self, index: usize) -> Option<State> {
        loop {
            let now = self.state(index);
            let blind = weak(Weak::SeizeBlind);
            if !now.is_live() || now.is_busy() || (!blind && (self.pins(index) > 0 || self.near(index) > 0)) {
                return None;
            }
            let word = &self.nodes[index].state;
            // AcqRel: partner the CAS in `pin`, which changes the word: no pin came since the look, and who pins now sees it
            // busy. Relaxed on failure: the loop loads again.
            let swapped = word.compare_exchange(now.0, now.busy().0, Ordering::AcqRel, Ordering::Relaxed);
            if swapped.is_ok() {
                return Some(now);
            }
        }
    }

    /// The move of a busy node is over. Returns its state from now on: who is claimed at this moment is told by it.
    pub fn settle(&self, index: usize, tier: Tier) -> State {
        let word = &self.nodes[index].state;
        let mut now = self.state(index);
        // Before the node can be killed: as long as it is busy its parent stays the one it has.
        if tier != now.tier() {
            self.go_far(self.parent(index));
        }
        if weak(Weak::SettleStale) {
            word.store(now.settled(tier).0, Ordering::Release); // Release: the planted weakness
            return now.settled(tier);
        }
        loop {
            let next = now.settled(tier);
            // AcqRel: partner the loads in `state`: who claims it finds its pages there. Acquire on failure: as in `state`.
            match word.compare_exchange(now.0, next.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    if tier != now.tier() && now.refs() > 0 {
                        self.note_claimed(Tier::Device, false);
                    }
                    return next;
                }
                Err(seen) => now = State(seen),
            }
        }
    }

    /// A pinned block whose pages of full-attention pools have all come up is one of the device.
    pub fn lift(&self, index: usize) {
        let all = (0..self.pages.len()).filter(|&pool| !self.windowed[pool]);
        if !all.into_iter().all(|pool| self.is_up(pool, index)) {
            return; // who brings the last one up will see all of them
        }
        loop {
            let now = self.state(index);
            if now.tier() == Tier::Device {
                return;
            }
            let word = &self.nodes[index].state;
            let next = now.settled(Tier::Device);
            // AcqRel: partner the loads in `state`: who claims it finds its pages there. Relaxed on failure: the loop loads again.
            let swapped = word.compare_exchange(now.0, next.0, Ordering::AcqRel, Ordering::Relaxed);
            if swapped.is_ok() {
                if now.refs() > 0 {
                    self.note_claimed(Tier::Device, true);
                }
                self.note_pinned(index); // who brings it up has pinned it
                return self.come_near(self.parent(index));
            }
        }
    }

    /// Whether a page is on the device now, not a moment ago: of two threads that each bring one of two pages up, one sees
    /// both there.
    fn is_up(&self, pool: usize, index: usize) -> bool {
        loop {
            let now = self.page(pool, index);
            if weak(Weak::LiftStale) || self.change_page(pool, index, now, now) {
                return now.tier() == Tier::Device;
            }
        }
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

    /// The move of a busy page is over: it goes to `(tier, slot)`. Returns its word from now on; `None`: it was taken away,
    /// and both slots are the caller's.
    pub fn settle_page(&self, pool: usize, index: usize, from: u32, tier: Tier, slot: u32) -> Option<Page> {
        loop {
            let now = self.page(pool, index);
            if !weak(Weak::SettlePage) && (!now.is_busy() || now.slot() != from) {
                return None;
            }
            let next = now.settled(tier, slot);
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

    /// The page of a block that the caller pins comes up into a device slot. Returns where it was; `None`: it is up already.
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

    /// A claim on a page becomes one of an ACTIVE cache. `false`: the page is on the move.
    pub fn pin_page(&self, pool: usize, index: usize) -> bool {
        loop {
            let now = self.page(pool, index);
            if now.is_busy() && !weak(Weak::PinBusyPage) {
                return false;
            }
            if self.change_page(pool, index, now, now.pinned()) {
                return true;
            }
        }
    }

    /// A claim on a page of an ACTIVE cache becomes one of a SUSPENDED cache.
    pub fn unpin_page(&self, pool: usize, index: usize) {
        loop {
            let now = self.page(pool, index);
            if self.change_page(pool, index, now, now.unpinned()) {
                return;
            }
        }
    }

    /// One claim more, of an ACTIVE cache, on a page of a windowed pool that is at rest on the device. `paid`: the caller
    /// has a unit for it. `Full`: it is on the host or on its way there.
    pub fn claim_near(&self, pool: usize, index: usize, paid: bool, active: bool) -> Claimed {
        loop {
            let now = self.page(pool, index);
            if now.slot() == 0 {
                return Claimed::Gone;
            }
            if (now.is_busy() || now.tier() == Tier::Host) && !weak(Weak::ClaimFar) {
                return Claimed::Full;
            }
            let first = now.claims() == 0;
            if first && !paid {
                return Claimed::Unpaid(Tier::Device);
            }
            if self.change_page(pool, index, now, now.claimed(active)) {
                return if first { Claimed::First } else { Claimed::Joined };
            }
        }
    }

    // -- private blocks of SUSPENDED caches -----------------------------------------------------

    /// A node for a private block, if any is left.
    pub fn take_spare(&self) -> Option<Dead> {
        self.spare.pop().map(|index| Dead(index + self.max_blocks))
    }

    /// Puts a private block below its parent, pinned, with the caller's claim, which was the parent's before. Nobody can
    /// find it by its tokens; the order can.
    pub fn park(&self, dead: Dead, root: &Root, parent: Link, depth: u64, priority: u8) -> Link {
        let index = dead.index();
        let n = &self.nodes[index];
        let born = self.state(index).version();
        n.born.store(born, Ordering::Release); // Release: partner the load in `Tree::born`
        n.parent.set(parent.0);
        self.set_depth(index, depth);
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
        let late = weak(Weak::ParkUnpinned);
        if !late {
            self.pin_first(&dead);
        }
        n.state.store(self.state(index).born().0, Ordering::Release); // Release: partner the loads in `state`
        if late {
            self.pin(index);
        }
        Link::new(born, dead.0)
    }

    /// Takes a private block that only the caller claims, and pins, out again; the claim is the parent's from here on, and
    /// the pages the caller's.
    pub fn dissolve(&self, index: usize) -> Dead {
        let n = &self.nodes[index];
        let parent = self.parent(index);
        // Swap: it is pinned and claimed by nobody else, so nobody else changes it. AcqRel: partner the CAS in `seize`, which
        // fails from here on.
        let now = State(n.state.swap(self.state(index).killed().0, Ordering::AcqRel));
        debug_assert!(now.is_live() && now.refs() == 1 && !now.is_busy());
        if now.tier() == Tier::Device {
            self.go_far(parent);
        }
        if !parent.is_nil() {
            self.nodes[parent.index()]
                .children
                .fetch_sub(1, Ordering::Relaxed); // Relaxed: the parent is claimed
        }
        self.note_claimed(now.tier(), false);
        self.unpin(index);
        Dead(index as u32)
    }

    /// Takes the page of a node that the caller dissolved, with its claim.
    pub fn strip_own(&self, pool: usize, dead: &Dead) -> Page {
        let word = &self.pages[pool].word[dead.index()];
        Page(word.swap(Page::NONE.0, Ordering::AcqRel)) // AcqRel: partner the CAS in `change_page`
    }
}
