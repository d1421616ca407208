//! Choice of victims.
//!
//! The exact order is kept by one thread at a time ([`Sole`]): it takes the reports of all others out
//! of the inboxes and pops the least entry. Who does not get in takes any evictable page by a scan. The order
//! never decides *whether* a page may go: that is the CAS in `Tree::kill` or `Tree::take_page`.

mod exact;
mod many;
pub mod order;
pub mod policy;
mod room;
mod tiers;

pub use order::{Key, Order};
pub use policy::{Lru, Policy, Slru};
pub(crate) use room::Tries;

use crate::core::Core;
use crate::events::EventKind;
use crate::inbox::{Inbox, IDLE, LOWERED, ROSE};
use crate::sync::{weak, Counter, Sole, Weak};
use crate::tree::Dead;
use crate::types::PolicyKind;
use crate::words::{Link, Page, Tier};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rounds of searching after which a promised slot is given up: only a thread that is stopped in the middle
/// of handing slots on can hide them for so long.
const ROUNDS: usize = 16;

/// A page on its way: pool, device slot, host slot.
type Way = (usize, u32, u32);

/// What became of a killed node.
struct Stripped {
    /// The slot that was kept for the caller.
    kept: u32,
    /// Pages that left the device.
    near: u64,
    /// Pages that left the host.
    far: u64,
    /// Its former parent, which may be gone by now.
    parent: Link,
}

/// What only the thread inside may touch.
#[derive(Debug)]
struct Orders {
    /// By tier.
    leaves: [Order; 2],
    /// By tier, by pool.
    pages: [Vec<Order>; 2],
    /// Entries that could not go, to be put back. With a host tier only: without one who releases a leaf reports it.
    aside: Vec<(Key, Link)>,
    /// Descendants that are still to be looked at.
    below: Vec<Link>,
    /// Pages of full-attention pools of the block that moves.
    ways: Vec<Way>,
    /// Its pages of windowed pools that go along.
    pages_along: Vec<Way>,
    policy: Box<dyn Policy>,
    /// (expiry, node); those that do not hold any more are skipped. Grows with the blocks that have a duration.
    expiries: BinaryHeap<Reverse<(u64, Link)>>,
    /// Expiries with which that heap is built anew.
    most_expiries: usize,
    epoch: u64,
    reports: Vec<u32>,
}

/// Orders of eviction and the way to them.
#[derive(Debug)]
pub struct Keeper {
    orders: Sole<Orders>,
    leaves: Inbox,
    pages: Vec<Inbox>,
    cursor: Counter,
    wants_keys: bool,
}

impl Keeper {
    /// For a tree of `nodes` blocks; pools that have a window have an order of their own.
    pub fn new(nodes: u32, tiered: bool, windowed: &[bool], policy: PolicyKind) -> Self {
        let far = if tiered { nodes } else { 0 };
        let own = |&windowed: &bool| if windowed { nodes } else { 0 };
        let policy: Box<dyn Policy> = match policy {
            PolicyKind::Lru => Box::new(Lru),
            PolicyKind::Slru => Box::new(Slru::new(nodes as usize)),
        };
        Self {
            leaves: Inbox::new(nodes),
            pages: windowed.iter().map(own).map(Inbox::new).collect(),
            cursor: Counter::default(),
            wants_keys: policy.wants_keys(),
            orders: Sole::new(Orders {
                leaves: [Order::new(nodes as usize), Order::new(far as usize)],
                pages: [
                    windowed.iter().map(own).map(|n| Order::new(n as usize)).collect(),
                    windowed
                        .iter()
                        .map(|&windowed| Order::new(if windowed { far as usize } else { 0 }))
                        .collect(),
                ],
                aside: Vec::with_capacity(far as usize),
                below: Vec::with_capacity(far as usize),
                ways: Vec::with_capacity(windowed.len()),
                pages_along: Vec::with_capacity(windowed.len()),
                policy,
                expiries: BinaryHeap::new(),
                most_expiries: 2 * nodes as usize + 64,
                epoch: 0,
                reports: Vec::with_capacity(nodes as usize),
            }),
        }
    }

    /// A node may have become an evictable leaf; `rose`: it entered segment 1.
    pub fn report_leaf(&self, index: usize, rose: bool) {
        self.leaves.push(index, IDLE | if rose { ROSE } else { 0 });
    }

    /// The key of a node fell, and with it those of its pages.
    pub fn report_lowered(&self, index: usize) {
        for inbox in std::iter::once(&self.leaves).chain(&self.pages) {
            if inbox.has(index) {
                inbox.push(index, IDLE | LOWERED);
            }
        }
    }

    /// A page of a windowed pool may have become evictable; `lowered`: its key fell.
    pub fn report_page(&self, pool: usize, index: usize, lowered: bool) {
        self.pages[pool].push(index, IDLE | if lowered { LOWERED } else { 0 });
    }

    /// Whether [`Keeper::request`] wants to know keys.
    pub fn wants_keys(&self) -> bool {
        self.wants_keys
    }

    /// Segment for the blocks of a request that found the first `matched` of `keys`; 0 when another thread is inside.
    pub fn request(&self, keys: &[u64], matched: usize) -> u8 {
        match self.orders.enter() {
            Some(mut orders) => orders.policy.request(keys, matched),
            None => 0,
        }
    }
}

impl Core {
    // -- victims ----------------------------------------------------------------------------

    /// Indices of all nodes, beginning somewhere else each time.
    fn scan(&self) -> impl Iterator<Item = usize> {
        let count = self.tree.nodes.len();
        let from = self.keeper.cursor.next() as usize % count;
        (from..count).chain(0..from)
    }

    /// Makes the next leaf in order leave the device, or any if another thread is inside; keeps the slot of one pool for
    /// the caller, who has a promise there. Returns that slot.
    fn evict_leaf(&self, keep: Option<usize>) -> Option<u32> {
        let covered = self.cover(keep);
        let slot = self.leave_device(keep);
        self.uncover(covered);
        slot
    }

    fn leave_device(&self, keep: Option<usize>) -> Option<u32> {
        if let Some(mut orders) = self.keeper.orders.enter() {
            if let Some((slot, pages)) = self.next_leaf(&mut orders, keep) {
                self.counters.evicted.add(pages);
                return Some(slot);
            }
        }
        // A leaf of the host only where no leaf is on the device, and for a promise: it may cover blocks that are.
        let near = self
            .scan()
            .filter(|&index| self.tree.state(index).tier() == Tier::Device);
        let dead = { near }.find_map(|index| self.tree.kill(index));
        let far = || self.scan().find_map(|index| self.tree.kill(index));
        let dead = dead.or_else(|| keep.and_then(|_| far()))?;
        let (slot, pages) = self.bury(dead, keep);
        self.counters.evicted.add(pages);
        Some(slot)
    }

    /// Strips a killed node, keeping a slot for the caller, and gives it back. Returns that slot and the pages that left
    /// the device.
    fn bury(&self, dead: Dead, keep: Option<usize>) -> (u32, u64) {
        let (index, parent) = (dead.index(), self.tree.parent(dead.index()));
        let gone = self.strip(&dead, keep);
        self.tree.recycle(dead);
        if !self.tree.is_block(index) && !parent.is_nil() && !self.tree.is_block(parent.index()) {
            self.bury_parked(parent); // its cache's thread found it still with a child
        }
        gone
    }

    /// Takes the pages that an eviction is going to carry to the free stacks off `available` meanwhile, so that nobody
    /// is promised a slot that only a stopped thread could hand over. One bit per pool; best effort.
    fn cover(&self, keep: Option<usize>) -> u64 {
        (0..self.pools.len().min(64))
            .filter(|&pool| !self.tree.windowed[pool] && keep != Some(pool))
            .filter(|&pool| self.pools[pool].reserve(1))
            .fold(0, |covered, pool| covered | 1 << pool)
    }

    fn uncover(&self, covered: u64) {
        for (pool, slots) in self.pools.iter().enumerate().take(64) {
            slots.unreserve((covered >> pool & 1) as u32);
        }
    }

    /// Frees the pages of a killed node, keeps the device slot of one pool for the caller, and takes it out of the tables.
    /// Returns that slot and the pages that left the device.
    fn strip(&self, dead: &Dead, keep: Option<usize>) -> (u32, u64) {
        let stripped = self.strip_pages(dead, keep);
        if self.tree.is_block(dead.index()) {
            self.counters.dropped.add(stripped.near + stripped.far);
        }
        if !stripped.parent.is_nil() {
            self.keeper.report_leaf(stripped.parent.index(), false);
            self.remove_if_empty(stripped.parent);
        }
        (stripped.kept, stripped.near)
    }

    /// As `strip`, without telling anybody.
    fn strip_pages(&self, dead: &Dead, keep: Option<usize>) -> Stripped {
        let (mut kept, mut near, mut far) = (0, 0, 0);
        let block = self.tree.is_block(dead.index()); // a private block was in no cache of others
        for pool in 0..self.pools.len() {
            // A page of a windowed pool can be taken from the dead node by others too; cover its way as well.
            let covered = self.tree.windowed[pool] && self.pools[pool].reserve(1);
            if let Some(page) = self.tree.strip(pool, dead) {
                if block {
                    let key = self.tree.nodes[dead.index()].key.get();
                    self.events.push(EventKind::Removed, page.tier(), pool, key, None);
                }
                let slot = page.slot();
                match page.tier() {
                    _ if page.is_busy() => {} // its mover gives it back
                    Tier::Host => {
                        far += 1;
                        self.hosts[pool].give(slot);
                    }
                    Tier::Device if keep == Some(pool) => {
                        near += 1;
                        kept = slot;
                    }
                    Tier::Device => {
                        near += 1;
                        self.pools[pool].give(slot);
                    }
                }
            }
            self.pools[pool].unreserve(u32::from(covered));
        }
        Stripped {
            kept,
            near,
            far,
            parent: self.tree.bury(dead),
        }
    }

    /// Without a full-attention pool a node can lose its last page before it is a leaf.
    fn remove_if_empty(&self, node: Link) {
        let index = node.index();
        if self.first_full.is_some() || !self.tree.is_leaf(index) || !self.tree.has_no_page(index) {
            return;
        }
        if let Some(dead) = self.tree.kill(index) {
            self.bury(dead, None);
        }
    }

    /// A node that nobody claims any more, and the private blocks above it that have no other below: those of a closed cache.
    /// One that is on the move is buried by the mover.
    pub(crate) fn bury_parked(&self, node: Link) {
        let mut at = node;
        while self.tree.is_live(at) {
            let parent = self.tree.parent(at.index());
            self.tree.see_children(at.index());
            let Some(dead) = self.tree.kill(at.index()) else {
                return;
            };
            self.strip(&dead, None);
            self.tree.recycle(dead);
            if parent.is_nil() || self.tree.is_block(parent.index()) {
                return;
            }
            at = parent;
        }
    }

    /// Takes an unclaimed page of a windowed pool alone.
    fn take_idle_page(&self, pool: usize, index: usize) -> Option<Page> {
        let page = self.tree.take_page(pool, index)?;
        if self.tree.is_block(index) {
            self.note_removed(pool, page);
            self.counters.dropped.add(1);
        }
        Some(page)
    }

    /// The page that the caller has taken out of the tree is gone. Its key stands at the slot: the node may be another
    /// one's by now.
    fn note_removed(&self, pool: usize, page: Page) {
        let key = self.slots(page.tier())[pool].key(page.slot());
        self.events.push(EventKind::Removed, page.tier(), pool, key, None);
    }

    /// A device slot of a windowed pool by eviction.
    fn evict_page(&self, pool: usize) -> Option<u32> {
        if let Some(mut orders) = self.keeper.orders.enter() {
            if let Some(slot) = self.next_page(&mut orders, pool) {
                return Some(slot);
            }
        }
        self.scan().find_map(|index| {
            if self.tree.page(pool, index).tier() == Tier::Host {
                return None;
            }
            let page = self.take_idle_page(pool, index)?;
            self.remove_if_empty(self.tree.at(index));
            if page.tier() == Tier::Device {
                return Some(page.slot());
            }
            self.hosts[pool].give(page.slot()); // it moved meanwhile
            None
        })
    }

    // -- what the rest of the core calls ------------------------------------------------------

    /// A slot that was promised by `reserve`. `None`: see [`ROUNDS`]; the promise is still the caller's.
    pub(crate) fn take_slot(&self, pool: usize) -> Option<u32> {
        #[cfg(test)]
        match self.fault.get() {
            0 => {}
            left => {
                self.fault.set(left - 1);
                if left == 1 {
                    return None;
                }
            }
        }
        let mut round = 0;
        while round < ROUNDS || weak(Weak::TakeWaits) {
            if let Some(slot) = self.pools[pool].take() {
                return Some(slot);
            }
            round += 1;
            if self.tree.windowed[pool] {
                if let Some(slot) = self.evict_page(pool) {
                    self.counters.evicted.add(1);
                    return Some(slot);
                }
            } else if let Some(slot) = self.evict_leaf(Some(pool)) {
                if slot != 0 {
                    return Some(slot);
                }
                round = 0; // a leaf of the host went that covered blocks of the device
            }
        }
        None
    }

    /// As `take_slot`, `n` of them, appended to `slots`. `false`: fewer; the promises for those that are missing are still
    /// the caller's.
    pub(crate) fn take_slots(&self, pool: usize, n: usize, slots: &mut Vec<u32>) -> bool {
        let full = slots.len() + n;
        #[cfg(test)]
        let alone = self.fault.get() != 0;
        #[cfg(not(test))]
        let alone = false;
        if !alone {
            self.pools[pool].take_many(n, slots);
        }
        let many = !alone && !self.tree.windowed[pool] && !self.tiered;
        while slots.len() < full {
            if many && self.evict_leaves(Some(pool), full - slots.len(), slots) > 0 {
                continue;
            }
            let Some(slot) = self.take_slot(pool) else {
                return false;
            };
            slots.push(slot);
        }
        true
    }

    /// A node for a new block: a free one, else that of the next leaf. `None`: all are claimed.
    pub(crate) fn take_node(&self) -> Option<Dead> {
        if let Some(dead) = self.tree.take_node() {
            return Some(dead);
        }
        let covered = self.cover(None);
        let inside = match self.keeper.orders.enter() {
            Some(mut orders) => self.next_node(&mut orders),
            None => None,
        };
        let blocks = self.scan().filter(|&index| self.tree.is_block(index));
        let dead = inside.or_else(|| { blocks }.find_map(|index| self.tree.kill(index)));
        if let Some(dead) = &dead {
            let (_, pages) = self.strip(dead, None);
            self.counters.evicted.add(pages);
        }
        self.uncover(covered);
        dead
    }

    /// Up to `blocks` leaves in order leave the device; with windowed pools alone and a host tier, pages of the first pool,
    /// each alone. Returns how many did; fewer if the rest is promised to an operation that runs meanwhile.
    pub fn evict(&self, blocks: u64) -> u64 {
        let mut done = 0;
        if let (Some(pool), false) = (self.first_full, self.tiered) {
            let most = blocks.min(u64::from(self.pools[pool].available()));
            done = self.evict_leaves(None, most as usize, &mut Vec::new()) as u64;
        }
        while done < blocks && !self.is_all_promised() && self.evict_next() {
            done += 1;
        }
        done
    }

    fn evict_next(&self) -> bool {
        if self.first_full.is_some() || !self.tiered {
            return self.evict_leaf(None).is_some();
        }
        let slot = self.evict_page(0);
        if let Some(slot) = slot {
            self.counters.evicted.add(1);
            self.pools[0].give(slot);
        }
        slot.is_some()
    }

    /// Drops all that is unclaimed, and not promised to an operation that runs meanwhile.
    pub fn clear(&self) {
        while !self.is_all_promised() && self.drop_leaf() {}
        for tier in [Tier::Device, Tier::Host] {
            for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
                self.clear_pages(tier, pool);
            }
        }
    }

    fn clear_pages(&self, tier: Tier, pool: usize) {
        for index in 0..self.tree.nodes.len() {
            let page = self.tree.page(pool, index);
            if page.slot() == 0 || page.claims() > 0 || page.tier() != tier {
                continue;
            }
            let slots = &self.slots(tier)[pool];
            let covered = slots.reserve(1);
            if !covered && slots.available() == 0 && slots.promised.get() == 0 {
                return;
            }
            if let Some(page) = self.take_idle_page(pool, index) {
                self.slots(page.tier())[pool].give(page.slot());
                self.remove_if_empty(self.tree.at(index));
            }
            slots.unreserve(u32::from(covered));
        }
    }

    /// Whether every unclaimed page is promised to an operation that runs now. What claims of batches were promised may
    /// become free slots meanwhile: a promise is worth the same on either.
    fn is_promised_away(&self, pool: usize) -> bool {
        self.pools[pool].available() == 0 && self.pools[pool].promised.get() == 0
    }

    fn is_all_promised(&self) -> bool {
        self.first_full.is_some_and(|pool| self.is_promised_away(pool)) && !self.tiered
    }

    /// Drops an unclaimed leaf, whatever its tier.
    fn drop_leaf(&self) -> bool {
        let covered = self.cover(None);
        let inside = match self.keeper.orders.enter() {
            Some(mut orders) => self.next_node(&mut orders),
            None => None,
        };
        let dead = inside.or_else(|| self.scan().find_map(|index| self.tree.kill(index)));
        let dropped = dead.map(|dead| self.bury(dead, None)).is_some();
        self.uncover(covered);
        dropped
    }
}
