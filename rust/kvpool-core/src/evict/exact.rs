//! The exact order: run only by the one thread that is inside.

use super::order::Key;
use super::Orders;
use crate::core::Core;
use crate::inbox::{LOWERED, ROSE};
use crate::tree::Dead;
use crate::words::Stamp;
use std::cmp::Reverse;

impl Core {
    // -- keys -------------------------------------------------------------------------------

    fn rank(&self, index: usize) -> i16 {
        let n = &self.tree.nodes[index];
        if n.epoch.get() < self.epoch() {
            -1
        } else {
            n.priority.get() as i16
        }
    }

    fn leaf_key(&self, index: usize) -> Key {
        let n = &self.tree.nodes[index];
        Key {
            priority: self.rank(index),
            in_window: true,
            segment: n.segment.get() as u8,
            used: self.used(index),
            depth: Reverse(n.depth.get() as u32),
            slot: self.tree.page(self.first_full.unwrap_or(0), index).slot(),
        }
    }

    fn page_key(&self, pool: usize, index: usize) -> Key {
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
            depth: Reverse(n.depth.get() as u32),
            slot: page.slot(),
        }
    }

    fn is_idle(&self, pool: usize, index: usize) -> bool {
        let page = self.tree.page(pool, index);
        page.slot() != 0 && page.claims() == 0 && self.tree.state(index).is_live()
    }

    // -- the exact order: inside only ---------------------------------------------------------

    fn queue_leaf(&self, orders: &mut Orders, index: usize, lowered: bool) {
        let node = self.tree.at(index);
        if lowered {
            orders.leaves.forget(node); // also of a node that is no leaf now: it may become one
        }
        if !self.tree.is_leaf(index) || orders.leaves.has(node) {
            return;
        }
        if orders.leaves.is_full() {
            return self.rebuild_leaves(orders);
        }
        orders.leaves.push(self.leaf_key(index), node);
    }

    fn queue_page(&self, orders: &mut Orders, pool: usize, index: usize, lowered: bool) {
        let node = self.tree.at(index);
        if lowered {
            orders.pages[pool].forget(node);
        }
        if !self.is_idle(pool, index) || orders.pages[pool].has(node) {
            return;
        }
        if orders.pages[pool].is_full() {
            return self.rebuild_pages(orders, pool);
        }
        orders.pages[pool].push(self.page_key(pool, index), node);
    }

    fn rebuild_leaves(&self, orders: &mut Orders) {
        orders.leaves.clear();
        for index in 0..self.tree.nodes.len() {
            if self.tree.is_leaf(index) {
                orders.leaves.push(self.leaf_key(index), self.tree.at(index));
            }
        }
    }

    fn rebuild_pages(&self, orders: &mut Orders, pool: usize) {
        orders.pages[pool].clear();
        for index in 0..self.tree.nodes.len() {
            if self.is_idle(pool, index) {
                orders.pages[pool].push(self.page_key(pool, index), self.tree.at(index));
            }
        }
    }

    /// Takes what was reported since, and a new epoch, into the orders.
    fn catch_up(&self, orders: &mut Orders) {
        if orders.epoch != self.epoch() {
            orders.epoch = self.epoch();
            self.rebuild_leaves(orders);
            for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
                self.rebuild_pages(orders, pool);
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

    fn queue_expiry(&self, orders: &mut Orders, index: usize) {
        let when = self.expiry(index);
        if when == 0 || self.tree.state(index).refs() > 0 {
            return; // who releases it reports it again
        }
        if orders.expiries.len() == orders.expiries.capacity() {
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

    fn catch_up_pages(&self, orders: &mut Orders, pool: usize) {
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

    pub(super) fn next_leaf(&self, orders: &mut Orders) -> Option<Dead> {
        self.catch_up(orders);
        while let Some((key, node)) = orders.leaves.pop() {
            if !self.tree.is_live(node) || !self.tree.is_leaf(node.index()) {
                continue; // who releases or uncovers it reports it again
            }
            let now = self.leaf_key(node.index());
            if now > key {
                orders.leaves.push(now, node);
            } else if let Some(dead) = self.tree.kill(node.index()) {
                orders.policy.removed(self.tree.nodes[dead.index()].key.get());
                return Some(dead);
            }
        }
        None
    }

    pub(super) fn next_page(&self, orders: &mut Orders, pool: usize) -> Option<(usize, u32)> {
        self.catch_up(orders);
        self.catch_up_pages(orders, pool);
        while let Some((key, node)) = orders.pages[pool].pop() {
            let index = node.index();
            if !self.tree.is_live(node) || !self.is_idle(pool, index) {
                continue;
            }
            let now = self.page_key(pool, index);
            if now > key {
                orders.pages[pool].push(now, node);
            } else if let Some(slot) = self.take_idle_page(pool, index) {
                return Some((index, slot));
            }
        }
        None
    }
}
