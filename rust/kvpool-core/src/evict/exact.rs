//! The exact order: run only by the one thread that is inside.

use super::order::{Key, Order};
use super::Orders;
use crate::core::Core;
use crate::inbox::{LOWERED, ROSE};
use crate::tree::Dead;
use crate::words::{Stamp, Tier};
use std::cmp::Reverse;

impl Core {
    // -- keys -------------------------------------------------------------------------------

    pub(super) fn rank(&self, index: usize) -> i16 {
        let n = &self.tree.nodes[index];
        if n.epoch.get() < self.epoch() {
            -1
        } else {
            n.priority.get() as i16
        }
    }

    pub(super) fn leaf_key(&self, index: usize) -> Key {
        let n = &self.tree.nodes[index];
        Key {
            priority: self.rank(index),
            in_window: true,
            segment: n.segment.get() as u8,
            used: self.used(index),
            depth: Reverse(self.tree.depth(index) as u32),
            slot: self.tree.page(self.first_full.unwrap_or(0), index).slot(),
        }
    }

    pub(super) fn page_key(&self, pool: usize, index: usize) -> Key {
        let n = &self.tree.nodes[index];
        let page = self.tree.page(pool, index);
        let pages = &self.tree.pages[pool];
        let used = Stamp {
            time: self.time(&pages.time[index]),
            count: pages.used[index].get(),
        };
        Key {
            priority: self.rank(index),
            in_window: !page.is_stale(),
            segment: n.segment.get() as u8,
            used: if page.is_stale() {
                used
            } else {
                used.max(self.used(index))
            },
            depth: Reverse(self.tree.depth(index) as u32),
            slot: page.slot(),
        }
    }

    /// Whether a node may be the next to leave a tier.
    pub(super) fn is_victim(&self, tier: Tier, index: usize) -> bool {
        let tree = &self.tree;
        if !self.tiered || self.first_full.is_none() {
            return tier == Tier::Device && tree.is_leaf(index);
        }
        let state = tree.state(index);
        if !state.is_live() || state.is_busy() || state.tier() != tier {
            return false;
        }
        match tier {
            Tier::Device => tree.near(index) == 0 && tree.pins(index) == 0,
            Tier::Host => state.refs() == 0 && tree.children(index) == 0,
        }
    }

    /// Whether a page of a windowed pool may be the next to leave a tier.
    pub(super) fn is_idle(&self, tier: Tier, pool: usize, index: usize) -> bool {
        let page = self.tree.page(pool, index);
        let claimed = match tier {
            Tier::Device if self.tiered => page.active() > 0,
            _ => page.claims() > 0,
        };
        let here = page.slot() != 0 && page.tier() == tier && !page.is_busy();
        here && !claimed && self.tree.state(index).is_live()
    }

    fn tiers(&self) -> &'static [Tier] {
        if self.tiered {
            &[Tier::Device, Tier::Host]
        } else {
            &[Tier::Device]
        }
    }

    // -- the exact order: inside only ---------------------------------------------------------

    pub(super) fn queue_leaf(&self, orders: &mut Orders, index: usize, lowered: bool) {
        let node = self.tree.at(index);
        for &tier in self.tiers() {
            let order = &mut orders.leaves[tier as usize];
            if lowered {
                order.forget(node); // also of a node that is no leaf now: it may become one
            }
            if !self.is_victim(tier, index) || order.has(node) {
                continue;
            }
            if order.is_full() {
                self.rebuild_leaves(orders, tier);
            } else {
                order.push(self.leaf_key(index), node);
            }
        }
    }

    pub(super) fn queue_page(&self, orders: &mut Orders, pool: usize, index: usize, lowered: bool) {
        let node = self.tree.at(index);
        for &tier in self.tiers() {
            let order = &mut orders.pages[tier as usize][pool];
            if lowered {
                order.forget(node);
            }
            if !self.is_idle(tier, pool, index) || order.has(node) {
                continue;
            }
            if order.is_full() {
                self.rebuild_pages(orders, tier, pool);
            } else {
                order.push(self.page_key(pool, index), node);
            }
        }
    }

    fn rebuild_leaves(&self, orders: &mut Orders, tier: Tier) {
        let order = &mut orders.leaves[tier as usize];
        order.clear();
        for index in 0..self.tree.nodes.len() {
            if self.is_victim(tier, index) {
                order.push(self.leaf_key(index), self.tree.at(index));
            }
        }
    }

    fn rebuild_pages(&self, orders: &mut Orders, tier: Tier, pool: usize) {
        let order = &mut orders.pages[tier as usize][pool];
        order.clear();
        for index in 0..self.tree.nodes.len() {
            if self.is_idle(tier, pool, index) {
                order.push(self.page_key(pool, index), self.tree.at(index));
            }
        }
    }

    /// Takes what was reported since, and a new epoch, into the orders.
    pub(super) fn catch_up(&self, orders: &mut Orders) {
        if orders.epoch != self.epoch() {
            orders.epoch = self.epoch();
            for &tier in self.tiers() {
                self.rebuild_leaves(orders, tier);
                for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
                    self.rebuild_pages(orders, tier, pool);
                }
            }
        }
        let mut reports = std::mem::take(&mut orders.reports);
        self.keeper.leaves.take_all(&mut reports);
        for &index in &reports {
            let flags = self.keeper.leaves.open(index);
            if flags & ROSE != 0 && self.tree.nodes[index as usize].segment.get() == 1 {
                let node = self.tree.at(index as usize);
                orders
                    .policy
                    .protect(node, self.tree.nodes[index as usize].used.get());
                self.demote_overflow(orders);
            }
            self.queue_leaf(orders, index as usize, flags & LOWERED != 0);
            self.queue_expiry(orders, index as usize);
            #[cfg(kvpool_loom)]
            self.keeper.leaves.clear_late(index);
        }
        orders.reports = reports;
        if self.is_timed() {
            self.apply_expiries(orders);
        }
    }

    pub(super) fn queue_expiry(&self, orders: &mut Orders, index: usize) {
        let when = self.expiry(index);
        if when == 0 || self.tree.state(index).refs() > 0 {
            return; // who releases it reports it again
        }
        if orders.expiries.len() == orders.most_expiries {
            orders.expiries.clear();
            for index in 0..self.tree.nodes.len() {
                let state = self.tree.state(index);
                if state.is_live() && state.refs() == 0 && self.expiry(index) != 0 {
                    orders
                        .expiries
                        .push(Reverse((self.expiry(index), self.tree.at(index))));
                }
            }
        } else {
            orders.expiries.push(Reverse((when, self.tree.at(index))));
        }
    }

    /// All expiries up to now, in their order.
    fn apply_expiries(&self, orders: &mut Orders) {
        let now = self.clock.get();
        while let Some(&Reverse((when, node))) = orders.expiries.peek() {
            if when > now {
                return;
            }
            orders.expiries.pop();
            let index = node.index();
            let idle = self.tree.is_live(node) && self.tree.state(index).refs() == 0;
            if !idle || self.expiry(index) != when {
                continue;
            }
            self.expire(index);
            self.queue_lowered(orders, index);
        }
    }

    /// The key of a node fell, and with it those of its pages.
    fn queue_lowered(&self, orders: &mut Orders, index: usize) {
        self.queue_leaf(orders, index, true);
        for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
            self.queue_page(orders, pool, index, true);
        }
    }

    pub(super) fn catch_up_pages(&self, orders: &mut Orders, pool: usize) {
        let mut reports = std::mem::take(&mut orders.reports);
        self.keeper.pages[pool].take_all(&mut reports);
        for &index in &reports {
            let flags = self.keeper.pages[pool].open(index);
            self.queue_page(orders, pool, index as usize, flags & LOWERED != 0);
        }
        orders.reports = reports;
    }

    fn demote_overflow(&self, orders: &mut Orders) {
        while let Some((node, used)) = orders.policy.overflow() {
            let n = &self.tree.nodes[node.index()];
            if !self.tree.is_live(node) || n.segment.get() == 0 {
                orders.policy.demoted();
                continue;
            }
            let now = n.used.get();
            if now > used {
                orders.policy.keep(node, now);
                continue;
            }
            n.segment.set(0);
            orders.policy.demoted();
            self.queue_lowered(orders, node.index());
        }
    }

    /// The next leaf leaves the device: down, or for good. Returns its slot in pool `keep` and the pages that left.
    pub(super) fn next_leaf(&self, orders: &mut Orders, keep: Option<usize>) -> Option<(u32, u64)> {
        self.catch_up(orders);
        let mut gone = None;
        while let Some((key, node)) = orders.leaves[0].pop() {
            let index = node.index();
            if !self.tree.is_live(node) || !self.is_victim(Tier::Device, index) {
                continue; // who releases or uncovers it reports it again
            }
            let now = self.leaf_key(index);
            if now > key {
                orders.leaves[0].push(now, node);
                continue;
            }
            let claimed = self.tree.state(index).refs() > 0;
            if self.tiered {
                gone = self.move_down(orders, index, keep);
                if gone.is_some() {
                    break;
                }
            }
            if claimed {
                orders.aside.push((now, node));
                continue;
            }
            self.drop_below(&mut orders.below, index);
            if let Some(dead) = self.tree.kill(index) {
                self.note_gone(orders, &dead);
                gone = Some(self.bury(dead, keep));
                break;
            }
            if self.tiered {
                orders.aside.push((now, node)); // claimed meanwhile: it may move down yet
            }
        }
        self.put_back(orders, |orders| &mut orders.leaves[0]);
        gone
    }

    /// A block has left the tree: the policy may remember it.
    pub(super) fn note_gone(&self, orders: &mut Orders, dead: &Dead) {
        if self.tree.is_block(dead.index()) {
            orders.policy.removed(self.tree.nodes[dead.index()].key.get());
        }
    }

    /// What could not go is in its order again.
    pub(super) fn put_back(&self, orders: &mut Orders, order: impl Fn(&mut Orders) -> &mut Order) {
        while let Some((key, node)) = orders.aside.pop() {
            order(orders).push(key, node);
        }
    }

    /// The next page of a windowed pool leaves the device: down, or for good. Returns its slot.
    pub(super) fn next_page(&self, orders: &mut Orders, pool: usize) -> Option<u32> {
        self.catch_up(orders);
        self.catch_up_pages(orders, pool);
        let mut gone = None;
        while let Some((key, node)) = orders.pages[0][pool].pop() {
            let index = node.index();
            if !self.tree.is_live(node) || !self.is_idle(Tier::Device, pool, index) {
                continue;
            }
            let now = self.page_key(pool, index);
            if now > key {
                orders.pages[0][pool].push(now, node);
                continue;
            }
            let claimed = self.tree.page(pool, index).claims() > 0;
            if self.tiered {
                gone = self.move_page(orders, pool, index);
                if gone.is_some() {
                    break;
                }
            }
            if claimed {
                orders.aside.push((now, node));
                continue;
            }
            if let Some(page) = self.take_idle_page(pool, index) {
                self.remove_if_empty(node);
                gone = Some(page.slot());
                break;
            }
            if self.tiered {
                orders.aside.push((now, node)); // claimed meanwhile: it may move down yet
            }
        }
        self.put_back(orders, |orders| &mut orders.pages[0][pool]);
        gone
    }
}
