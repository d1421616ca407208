//! Down to the host: run only by the one thread that is inside. docs/TIERS.md has the rules.

use super::order::Key;
use super::{Orders, Way};
use crate::core::Core;
use crate::pool::Owner;
use crate::sync::{weak, Weak};
use crate::tree::Dead;
use crate::words::{Link, Page, Tier};

impl Core {
    // -- what merits the host ---------------------------------------------------------------

    /// Whether the priority of a node or of one of its descendants is `enough`: so the highest one is, if `enough` only grows.
    fn any_worth(&self, orders: &mut Orders, index: usize, enough: impl Fn(i16) -> bool) -> bool {
        orders.below.clear();
        orders.below.push(self.tree.at(index));
        while let Some(node) = orders.below.pop() {
            if enough(self.rank(node.index())) {
                return true;
            }
            self.tree.children_of(node, &mut orders.below);
        }
        false
    }

    /// Whether a block merits the host.
    fn merits(&self, orders: &mut Orders, index: usize) -> bool {
        let least = i16::from(self.config.offload_min_priority);
        self.any_worth(orders, index, |priority| priority >= least)
    }

    /// Whether a page with this key of a block comes behind a victim, by the highest priority of the block and its
    /// descendants.
    fn comes_behind(&self, orders: &mut Orders, (index, key): (usize, Key), victim: Key) -> bool {
        self.any_worth(orders, index, |priority| {
            rank(victim) < rank(Key { priority, ..key })
        })
    }

    /// Drops all descendants of an unclaimed node; `below` is room for the way down.
    pub(crate) fn drop_below(&self, below: &mut Vec<Link>, index: usize) {
        if !self.tiered {
            return;
        }
        below.clear();
        below.push(self.tree.at(index));
        while let Some(&node) = below.last() {
            match self.tree.any_child(node) {
                Some(child) => below.push(child),
                None if below.len() == 1 => return,
                None => {
                    let Some(dead) = self.tree.kill(node.index()) else {
                        return; // somebody has it: then the node itself cannot be killed either
                    };
                    self.bury(dead, None);
                    below.pop();
                }
            }
        }
    }

    /// Takes the next leaf, to be dropped: of both tiers the one that comes first.
    pub(super) fn next_node(&self, orders: &mut Orders) -> Option<Dead> {
        self.catch_up(orders);
        loop {
            let near = self.first_leaf(orders, Tier::Device);
            let far = self.first_leaf(orders, Tier::Host);
            let (first, other) = match (near, far) {
                (Some(near), Some(far)) if near.0 < far.0 => (near, Some((Tier::Host, far))),
                (Some(near), Some(far)) => (far, Some((Tier::Device, near))),
                (near, far) => (near.or(far)?, None),
            };
            if let Some((tier, (key, node))) = other {
                orders.leaves[tier as usize].push(key, node);
            }
            let index = first.1.index();
            if let Some(dead) = self.tree.kill(index) {
                if self.tree.is_block(index) {
                    self.note_gone(orders, &dead);
                    return Some(dead);
                }
                self.bury(dead, None); // a private one whose cache is being closed
            } else if self.tree.is_live(first.1) {
                // Claimed meanwhile: it may move down yet. Popped again it is found to be no leaf.
                self.queue_leaf(orders, index, false);
            }
        }
    }

    /// Takes the first leaf of the tree in the order of a tier out of that order.
    pub(super) fn first_leaf(&self, orders: &mut Orders, tier: Tier) -> Option<(Key, Link)> {
        let mut first = None;
        while let Some((key, node)) = orders.leaves[tier as usize].pop() {
            let index = node.index();
            if !self.tree.is_live(node) || !self.is_victim(tier, index) {
                continue;
            }
            let now = self.leaf_key(index);
            if now > key {
                orders.leaves[tier as usize].push(now, node);
            } else if self.tree.is_leaf(index) {
                first = Some((now, node));
                break;
            } else {
                orders.aside.push((now, node)); // claimed by SUSPENDED caches, or with children on the host
            }
        }
        self.put_back(orders, |orders| &mut orders.leaves[tier as usize]);
        first
    }

    // -- room on the host -------------------------------------------------------------------

    /// A host slot: a free one, or that of the first unclaimed page there if it comes before a page of this block with
    /// this key (`None`: any). The caller has a unit for it.
    fn host_slot(&self, orders: &mut Orders, pool: usize, than: Option<(usize, Key)>) -> Option<u32> {
        loop {
            if let Some(slot) = self.hosts[pool].take() {
                self.hosts[pool].note_peak();
                self.hosts[pool].set_owner(slot, Owner::Fenced); // nobody's yet; what it held was given back
                return Some(slot);
            }
            let before =
                |orders: &mut Orders, key: Key| than.is_none_or(|than| self.comes_behind(orders, than, key));
            if self.tree.windowed[pool] {
                let (key, node) = self.first_host_page(orders, pool)?;
                if !before(orders, key) {
                    orders.pages[1][pool].push(key, node);
                    return None;
                }
                if let Some(page) = self.take_idle_page(pool, node.index()) {
                    self.slots(page.tier())[pool].give(page.slot());
                    self.remove_if_empty(node);
                }
            } else {
                let (key, node) = self.first_host_leaf(orders)?;
                if !before(orders, key) {
                    orders.leaves[1].push(key, node);
                    return None;
                }
                if let Some(dead) = self.tree.kill(node.index()) {
                    self.note_gone(orders, &dead);
                    self.bury(dead, None);
                    self.catch_up(orders); // its parent may be a leaf of the host now
                }
            }
        }
    }

    fn first_host_leaf(&self, orders: &mut Orders) -> Option<(Key, Link)> {
        loop {
            let (key, node) = orders.leaves[1].pop()?;
            if !self.tree.is_live(node) || !self.is_victim(Tier::Host, node.index()) {
                continue;
            }
            let now = self.leaf_key(node.index());
            if now == key {
                return Some((key, node));
            }
            orders.leaves[1].push(now, node);
        }
    }

    fn first_host_page(&self, orders: &mut Orders, pool: usize) -> Option<(Key, Link)> {
        self.catch_up_pages(orders, pool);
        loop {
            let (key, node) = orders.pages[1][pool].pop()?;
            if !self.tree.is_live(node) || !self.is_idle(Tier::Host, pool, node.index()) {
                continue;
            }
            let now = self.page_key(pool, node.index());
            if now == key {
                return Some((key, node));
            }
            orders.pages[1][pool].push(now, node);
        }
    }

    /// As `host_slot`, with its unit.
    fn host_room(&self, orders: &mut Orders, pool: usize, than: Option<(usize, Key)>) -> Option<u32> {
        if !self.hosts[pool].reserve(1) {
            return None;
        }
        let slot = self.host_slot(orders, pool, than);
        if slot.is_none() {
            self.hosts[pool].unreserve(1);
        }
        slot
    }

    fn give_host(&self, pool: usize, slot: u32) {
        self.hosts[pool].give(slot);
        self.hosts[pool].unreserve(1);
    }

    // -- moves ------------------------------------------------------------------------------

    /// Moves a block down with its pages in all pools, whole if SUSPENDED caches claim it. Returns its former slot in pool
    /// `keep`, and how many pages left the device. `None`: it stays where it is, or does not merit the host.
    pub(super) fn move_down(
        &self,
        orders: &mut Orders,
        index: usize,
        keep: Option<usize>,
    ) -> Option<(u32, u64)> {
        self.first_full?;
        let state = self.tree.seize(index)?;
        if state.tier() == Tier::Host {
            self.tree.settle(index, Tier::Host); // by another way meanwhile
            return None;
        }
        let (mut ways, mut pages) = (
            std::mem::take(&mut orders.ways),
            std::mem::take(&mut orders.pages_along),
        );
        ways.clear();
        pages.clear();
        let found = self.find_ways(orders, index, state.refs() > 0, &mut ways, &mut pages);
        let gone = if found && self.copy_down(orders, index, &ways, &mut pages) {
            Some(self.went_down(orders, index, &ways, &pages, keep))
        } else {
            for &(pool, from, to) in &pages {
                self.page_stays_put(orders, pool, index, from);
                self.give_host(pool, to);
            }
            ways.iter().for_each(|&(pool, _, to)| self.give_host(pool, to));
            self.tree.settle(index, Tier::Device);
            self.bury_left(index);
            None
        };
        (orders.ways, orders.pages_along) = (ways, pages);
        gone
    }

    /// A busy page of a windowed pool stays on the device, or its slot is free if it was taken away meanwhile.
    fn page_stays(&self, pool: usize, index: usize, from: u32) {
        let page = self.tree.settle_page(pool, index, from, Tier::Device, from);
        if page.is_none() {
            self.pools[pool].give(from);
        }
    }

    /// As `page_stays`, of one that was not taken out of its order.
    fn page_stays_put(&self, orders: &mut Orders, pool: usize, index: usize, from: u32) {
        self.page_stays(pool, index, from);
        self.queue_page(orders, pool, index, false); // a report may have come while it was busy
    }

    /// A private block whose cache was closed while it was busy.
    fn bury_left(&self, index: usize) {
        if !self.tree.is_block(index) && self.tree.state(index).refs() == 0 {
            self.bury_parked(self.tree.at(index));
        }
    }

    /// Host slots for a busy block, its full-attention pages first, and for those of its pages in windowed pools that go
    /// along, which are busy from here on. `false`: the block does not go.
    fn find_ways(
        &self,
        orders: &mut Orders,
        index: usize,
        claimed: bool,
        ways: &mut Vec<Way>,
        pages: &mut Vec<Way>,
    ) -> bool {
        let room = |pool: usize| !self.tree.windowed[pool] || self.tree.page(pool, index).is_held();
        // Whole or not at all: nothing must be displaced in vain.
        let stays =
            claimed && (0..self.pools.len()).any(|pool| room(pool) && self.hosts[pool].available() == 0);
        if stays || !claimed && !self.merits(orders, index) {
            return false;
        }
        for pool in (0..self.pools.len()).filter(|&pool| !self.tree.windowed[pool]) {
            let than = (!claimed).then(|| (index, self.leaf_key(index)));
            let Some(slot) = self.host_room(orders, pool, than) else {
                return false;
            };
            ways.push((pool, self.tree.page(pool, index).slot(), slot));
        }
        for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
            let Some(page) = self.tree.seize_page(pool, index) else {
                continue;
            };
            if let Some(slot) = self.page_room(orders, pool, index, page) {
                pages.push((pool, page.slot(), slot));
                continue;
            }
            self.page_stays_put(orders, pool, index, page.slot());
            if page.claims() > 0 {
                return false;
            }
        }
        true
    }

    /// Copies what goes down. An unclaimed page of a windowed pool whose copy fails is taken off the list. `false`: the copy
    /// of another one failed.
    fn copy_down(&self, orders: &mut Orders, index: usize, ways: &[Way], pages: &mut Vec<Way>) -> bool {
        let copy = |way: &Way| self.copy_page(index, way);
        if !ways.iter().all(copy) {
            return false;
        }
        let mut lost = false;
        pages.retain(|way| {
            let &(pool, from, to) = way;
            let copied = !lost && copy(way);
            if !copied && self.tree.page(pool, index).claims() == 0 {
                self.page_stays_put(orders, pool, index, from);
                self.give_host(pool, to);
                return false;
            }
            lost |= !copied;
            true
        });
        !lost
    }

    /// Copies a page of a busy block down. Who has the host slot is written down before the page is there: `lose` finds the
    /// block. `false`: the copy failed.
    fn copy_page(&self, index: usize, &(pool, from, to): &Way) -> bool {
        self.mover.offload(pool, from, to) && !self.hosts[pool].pass(to, Owner::Node(index as u32))
    }

    /// A host slot with its unit for a busy page of a windowed pool, if it is claimed or merits it.
    fn page_room(&self, orders: &mut Orders, pool: usize, index: usize, page: Page) -> Option<u32> {
        let claimed = page.claims() > 0;
        if !claimed && !self.merits(orders, index) {
            return None;
        }
        let than = (!claimed).then(|| (index, self.page_key(pool, index)));
        self.host_room(orders, pool, than)
    }

    /// The copies of a busy block are made.
    fn went_down(
        &self,
        orders: &mut Orders,
        index: usize,
        ways: &[Way],
        pages: &[Way],
        keep: Option<usize>,
    ) -> (u32, u64) {
        let (mut kept, mut gone) = (0, 0);
        for &(pool, from, to) in ways {
            self.arrive(pool, index, from, to);
            self.tree.place_page(pool, index, Tier::Host, to);
        }
        let before = self.tree.state(index);
        let after = self.tree.settle(index, Tier::Host);
        let claimed = if weak(Weak::SettleUnits) { before } else { after }.refs() > 0;
        for &(pool, from, _) in ways {
            // Claimed: the unit goes from here to there. Unclaimed: both tiers have it as available already.
            let tier = if claimed { Tier::Device } else { Tier::Host };
            if keep == Some(pool) {
                kept = from;
            } else {
                self.pools[pool].give(from);
            }
            self.slots(tier)[pool].unreserve(1);
            gone += 1;
        }
        for &(pool, from, to) in pages {
            gone += u64::from(self.page_went_down(orders, pool, index, from, to));
            self.pools[pool].give(from);
        }
        self.drop_left(pages, index);
        self.counters.offloaded.add(gone);
        let parent = self.tree.parent(index);
        if !parent.is_nil() && self.tree.near(parent.index()) == 0 {
            self.queue_leaf(orders, parent.index(), false);
        }
        self.queue_leaf(orders, index, false);
        self.bury_left(index);
        (kept, gone)
    }

    /// Pages of windowed pools that found no room are dropped alone.
    fn drop_left(&self, pages: &[Way], index: usize) {
        for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
            let page = self.tree.page(pool, index);
            if pages.iter().any(|way| way.0 == pool) || page.slot() == 0 || page.tier() == Tier::Host {
                continue;
            }
            if let Some(page) = self.take_idle_page(pool, index) {
                self.slots(page.tier())[pool].give(page.slot());
                self.counters.evicted.add(1);
            }
        }
    }

    /// What the host slot holds, before the page is there.
    fn arrive(&self, pool: usize, index: usize, from: u32, to: u32) {
        let key = self.pools[pool].key(from);
        self.hosts[pool].set_key(to, key);
        if self.tree.is_block(index) {
            self.note_moved(pool, key, Tier::Host);
        }
    }

    /// The copy of a busy page of a windowed pool is made. The device slot is the caller's. Returns `false` if the page
    /// was taken away meanwhile.
    fn page_went_down(&self, orders: &mut Orders, pool: usize, index: usize, from: u32, to: u32) -> bool {
        self.arrive(pool, index, from, to);
        let Some(page) = self.tree.settle_page(pool, index, from, Tier::Host, to) else {
            self.give_host(pool, to);
            if self.tree.is_block(index) && self.tree.page(pool, index).slot() != 0 {
                let key = self.tree.nodes[index].key.get();
                self.note_moved(pool, key, Tier::Device); // as who replaced it has said
            }
            return false;
        };
        let tier = if page.claims() > 0 {
            Tier::Device
        } else {
            Tier::Host
        };
        self.slots(tier)[pool].unreserve(1);
        self.queue_page(orders, pool, index, false);
        true
    }

    /// Moves a page of a windowed pool down alone. Returns its former slot. `None`: it stays, or does not merit the host.
    pub(super) fn move_page(&self, orders: &mut Orders, pool: usize, index: usize) -> Option<u32> {
        let page = self.tree.seize_page(pool, index)?;
        let from = page.slot();
        if let Some(to) = self.page_room(orders, pool, index, page) {
            if self.copy_page(index, &(pool, from, to)) {
                let moved = self.page_went_down(orders, pool, index, from, to);
                self.counters.offloaded.add(u64::from(moved));
                return Some(from);
            }
            self.give_host(pool, to);
        }
        self.page_stays(pool, index, from);
        None // not in the order: the caller has taken it out
    }
}

fn rank(key: Key) -> (i16, bool, u8, crate::words::Stamp) {
    (key.priority, key.in_window, key.segment, key.used)
}
