//! Down to the host: run only by the one thread that is inside. docs/TIERS.md has the rules.

use super::order::Key;
use super::{Orders, Which};
use crate::core::Core;
use crate::pool::Owner;
use crate::tree::Dead;
use crate::words::{Link, Tier};

/// A page on its way: pool, device slot, host slot.
type Way = (usize, u32, u32);

impl Core {
    // -- what merits the host ---------------------------------------------------------------

    /// The highest priority of a node and its descendants.
    fn worth(&self, index: usize) -> i16 {
        let mut worth = self.rank(index);
        let mut below = vec![self.tree.at(index)];
        while let Some(node) = below.pop() {
            self.tree.each_child(node, |child| {
                worth = worth.max(self.rank(child.index()));
                below.push(child);
            });
        }
        worth
    }

    /// Drops all descendants of an unclaimed node.
    pub(crate) fn drop_below(&self, index: usize) {
        if !self.tiered {
            return;
        }
        let mut path = vec![self.tree.at(index)];
        while let Some(&node) = path.last() {
            let mut child = None;
            self.tree.each_child(node, |link| child = Some(link));
            match child {
                Some(child) => path.push(child),
                None if path.len() == 1 => return,
                None => {
                    let Some(dead) = self.tree.kill(node.index()) else {
                        return; // somebody has it: then the node itself cannot be killed either
                    };
                    self.bury(dead, None);
                    path.pop();
                }
            }
        }
    }

    /// Takes the next leaf, to be dropped: on the host, else on the device.
    pub(super) fn next_node(&self, orders: &mut Orders) -> Option<Dead> {
        self.catch_up(orders);
        for tier in [Tier::Host, Tier::Device] {
            let mut taken = None;
            while let Some((key, node)) = orders.leaves[tier as usize].pop() {
                let index = node.index();
                if !self.tree.is_live(node) || !self.is_victim(tier, index) {
                    continue;
                }
                let now = self.leaf_key(index);
                if now > key {
                    orders.leaves[tier as usize].push(now, node);
                    continue;
                }
                if let Some(dead) = self.tree.kill(index) {
                    orders.policy.removed(self.tree.nodes[index].key.get());
                    taken = Some(dead);
                    break;
                }
                orders.aside.push((now, node)); // claimed by SUSPENDED caches, or with children on the host
            }
            self.put_back(orders, |orders| &mut orders.leaves[tier as usize]);
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    // -- room on the host -------------------------------------------------------------------

    /// A host slot: a free one, or that of the first unclaimed page there if it comes before `than` (`None`: any). The
    /// caller has a unit for it.
    fn host_slot(&self, orders: &mut Orders, pool: usize, than: Option<Key>) -> Option<u32> {
        loop {
            if let Some(slot) = self.hosts[pool].take() {
                self.hosts[pool].note_peak();
                return Some(slot);
            }
            let before = |key: Key| than.is_none_or(|than| rank(key) < rank(than));
            if self.tree.windowed[pool] {
                let (key, node) = self.first_host_page(orders, pool)?;
                if !before(key) {
                    orders.pages[1][pool].push(key, node);
                    return None;
                }
                if let Some(page) = self.take_idle_page(pool, node.index()) {
                    self.slots(page.tier())[pool].give(page.slot());
                    self.remove_if_empty(node);
                }
            } else {
                let (key, node) = self.first_host_leaf(orders)?;
                if !before(key) {
                    orders.leaves[1].push(key, node);
                    return None;
                }
                if let Some(dead) = self.tree.kill(node.index()) {
                    orders.policy.removed(self.tree.nodes[dead.index()].key.get());
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

    /// A host slot with its unit, for a page that is claimed or has this key.
    fn host_room(&self, orders: &mut Orders, pool: usize, than: Option<Key>) -> Option<u32> {
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
        let claimed = state.refs() > 0;
        let worth = if claimed { 0 } else { self.worth(index) };
        let merits = claimed || worth >= i16::from(self.config.offload_min_priority);
        let than = |key: Key| {
            (!claimed).then_some(Key {
                priority: worth,
                ..key
            })
        };
        let mut ways: Vec<Way> = Vec::with_capacity(self.pools.len());
        let mut pages: Vec<Way> = Vec::new();
        let mut whole = merits && self.tree.pins(index) == 0 && state.tier() == Tier::Device;
        for pool in 0..self.pools.len() {
            if !whole {
                break;
            }
            if !self.tree.windowed[pool] {
                match self.host_room(orders, pool, than(self.leaf_key(index))) {
                    Some(slot) => ways.push((pool, self.tree.page(pool, index).slot(), slot)),
                    None => whole = false,
                }
            } else if let Some(page) = self.tree.seize_page(pool, index) {
                let than = if page.claims() > 0 {
                    None
                } else {
                    than(self.page_key(pool, index))
                };
                match self.host_room(orders, pool, than) {
                    Some(slot) => pages.push((pool, page.slot(), slot)),
                    None => {
                        self.tree
                            .settle_page(pool, index, page.slot(), Tier::Device, page.slot());
                        whole = page.claims() == 0;
                    }
                }
            }
        }
        let all = ways.iter().chain(&pages);
        whole = whole && { all }.all(|&(pool, from, to)| self.mover.offload(pool, from, to));
        if !whole {
            for &(pool, from, to) in &pages {
                self.tree.settle_page(pool, index, from, Tier::Device, from);
                self.give_host(pool, to);
            }
            ways.iter().for_each(|&(pool, _, to)| self.give_host(pool, to));
            self.tree.settle(index, state.tier());
            return None;
        }
        Some(self.went_down(orders, index, &ways, &pages, keep))
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
        let claimed = self.tree.settle(index, Tier::Host).refs() > 0;
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
        if !claimed && !self.tree.is_block(index) {
            if let Some(dead) = self.tree.kill(index) {
                self.bury(dead, None); // its cache was closed meanwhile
            }
        }
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

    /// Who has the host slot, before the page is there.
    fn arrive(&self, pool: usize, index: usize, from: u32, to: u32) {
        let key = self.pools[pool].key(from);
        self.hosts[pool].set_key(to, key);
        self.hosts[pool].set_owner(to, Owner::Node(index as u32));
        if self.tree.is_block(index) {
            self.note_moved(pool, key, Tier::Host);
        }
    }

    /// The copy of a busy page of a windowed pool is made. The device slot is the caller's. Returns `false` if the page
    /// was taken away or claimed meanwhile.
    fn page_went_down(&self, orders: &mut Orders, pool: usize, index: usize, from: u32, to: u32) -> bool {
        self.arrive(pool, index, from, to);
        match self.tree.settle_page(pool, index, from, Tier::Host, to) {
            Some(page) if page.tier() == Tier::Host => {
                let tier = if page.claims() > 0 {
                    Tier::Device
                } else {
                    Tier::Host
                };
                self.slots(tier)[pool].unreserve(1);
                self.queue_page(orders, pool, index, false);
                true
            }
            _ => {
                self.give_host(pool, to);
                false
            }
        }
    }

    /// Moves a page of a windowed pool down alone. Returns its former slot. `None`: it stays, or does not merit the host.
    pub(super) fn move_page(&self, orders: &mut Orders, pool: usize, index: usize) -> Option<u32> {
        let page = self.tree.seize_page(pool, index)?;
        let from = page.slot();
        let claimed = page.claims() > 0;
        let worth = if claimed { 0 } else { self.worth(index) };
        let mut room = None;
        if claimed || worth >= i16::from(self.config.offload_min_priority) {
            let key = self.page_key(pool, index);
            let than = (!claimed).then_some(Key {
                priority: worth,
                ..key
            });
            room = self.host_room(orders, pool, than);
        }
        if let Some(to) = room {
            if self.mover.offload(pool, from, to) {
                if self.page_went_down(orders, pool, index, from, to) {
                    self.counters.offloaded.add(1);
                    return Some(from);
                }
                return None;
            }
            self.give_host(pool, to);
        }
        self.tree.settle_page(pool, index, from, Tier::Device, from);
        None
    }

    // -- room for a need ----------------------------------------------------------------------

    /// Pages that only SUSPENDED caches claim and that could move down now, by pool.
    fn movable(&self, pool: usize) -> u32 {
        let movable = |index: &usize| {
            let (state, page) = (self.tree.state(*index), self.tree.page(pool, *index));
            let here = state.is_live() && page.slot() != 0 && page.tier() == Tier::Device;
            here && if self.tree.windowed[pool] {
                page.claims() > 0 && page.active() == 0
            } else {
                state.refs() > 0 && self.tree.pins(*index) == 0
            }
        };
        let count = (0..self.tree.nodes.len()).filter(movable).count() as u32;
        count.min(self.hosts[pool].available())
    }

    /// Slots of a pool that could be had now: what is available, and what could move down.
    pub(crate) fn reachable(&self, pool: usize) -> u32 {
        let available = self.pools[pool].available();
        if self.tiered {
            available + self.movable(pool)
        } else {
            available
        }
    }

    /// Moves pages of SUSPENDED caches down until every pool has so many available. `false`: it cannot be; nothing has
    /// moved then, unless a block found no room in another pool.
    pub(crate) fn make_room(&self, need: impl Fn(usize) -> u32) -> bool {
        let short = |pool: usize| self.pools[pool].available() < need(pool);
        let pools = || 0..self.pools.len();
        if !self.tiered || !pools().all(|pool| !short(pool) || self.reachable(pool) >= need(pool)) {
            return false;
        }
        let Some(mut orders) = self.keeper.orders.enter() else {
            return false;
        };
        for pool in pools() {
            while short(pool) {
                let gone = if self.tree.windowed[pool] {
                    self.next_page(&mut orders, pool, Which::Claimed).map(|slot| {
                        self.pools[pool].give(slot);
                        1
                    })
                } else {
                    self.next_leaf(&mut orders, None, Which::Claimed)
                        .map(|(_, pages)| pages)
                };
                let Some(pages) = gone else {
                    return false;
                };
                self.counters.evicted.add(pages);
            }
        }
        true
    }
}

fn rank(key: Key) -> (i16, bool, u8, crate::words::Stamp) {
    (key.priority, key.in_window, key.segment, key.used)
}
