//! Many leaves in one entry, by the one thread that is inside: what a leaf uncovers goes next if it comes before all
//! others, without a way through the inbox and the heap. Who does not get in takes a leaf that it finds, and what that
//! uncovers. One tier only; with two a leaf may move instead of going.

use super::Orders;
use crate::core::Core;
use crate::tree::Dead;
use crate::words::{Link, Tier};

/// Dead nodes that are given back at once.
const RUN: usize = 32;

impl Core {
    /// Up to `n` leaves leave in order. Those slots of pool `keep` for which the caller has promises are appended to
    /// `slots`, all others are freed. Returns how many left: fewer if another thread is inside (and then in any order), or
    /// if there are no more.
    pub(super) fn evict_leaves(&self, keep: Option<usize>, n: usize, slots: &mut Vec<u32>) -> usize {
        let covered = self.cover(keep);
        let gone = match self.keeper.orders.enter() {
            Some(mut orders) => self.leaves_go(&mut orders, keep, n, slots),
            None => self.any_leaves_go(keep, n, slots),
        };
        self.uncover(covered);
        gone
    }

    /// A leaf, and those above it that become leaves by it.
    fn any_leaves_go(&self, keep: Option<usize>, n: usize, slots: &mut Vec<u32>) -> usize {
        let (mut gone, mut pages) = (0, 0);
        let mut next = self.scan().find_map(|index| self.tree.kill(index));
        while let Some(dead) = next.take() {
            let stripped = self.strip_pages(&dead, keep);
            self.tree.recycle(dead);
            if stripped.kept != 0 {
                slots.push(stripped.kept);
            }
            pages += stripped.near;
            gone += 1;
            if stripped.parent.is_nil() {
                break;
            }
            let above = stripped.parent.index();
            if gone < n {
                next = self.tree.kill(above);
            }
            if next.is_none() {
                self.keeper.report_leaf(above, false);
            }
        }
        self.counters.evicted.add(pages);
        self.counters.dropped.add(pages);
        gone
    }

    fn leaves_go(&self, orders: &mut Orders, keep: Option<usize>, n: usize, slots: &mut Vec<u32>) -> usize {
        self.catch_up(orders);
        let (mut gone, mut pages) = (0, 0);
        let mut dead: [Option<Dead>; RUN] = [const { None }; RUN];
        let mut next = None;
        let mut scout = Link::NIL;
        while gone < n {
            let Some(node) = next.take().or_else(|| {
                scout = Link::NIL;
                self.first_leaf(orders, Tier::Device).map(|(_, node)| node)
            }) else {
                break;
            };
            scout = self.look_up(scout, node);
            let Some(killed) = self.tree.kill(node.index()) else {
                continue; // claimed meanwhile: who releases it reports it again
            };
            self.note_gone(orders, &killed);
            let stripped = self.strip_pages(&killed, keep);
            if stripped.kept != 0 {
                slots.push(stripped.kept);
            }
            pages += stripped.near;
            next = self.uncovered(orders, stripped.parent);
            dead[gone % RUN] = Some(killed);
            gone += 1;
            if gone % RUN == 0 {
                self.tree.recycle_all(dead.iter_mut().filter_map(Option::take));
            }
        }
        self.tree.recycle_all(dead.iter_mut().filter_map(Option::take));
        if let Some(node) = next {
            self.queue_leaf(orders, node.index(), false);
        }
        self.counters.evicted.add(pages);
        self.counters.dropped.add(pages);
        gone
    }

    /// Fetches what the next nodes on the way up will need, two ahead of the one that goes now.
    fn look_up(&self, scout: Link, node: Link) -> Link {
        let mut at = scout;
        for _ in 0..if at.is_nil() { 3 } else { 1 } {
            at = if at.is_nil() {
                node
            } else {
                self.tree.parent(at.index())
            };
            if at.is_nil() {
                return node; // the top: what comes again is here already
            }
            self.tree.warm_burial(at.index());
            let above = self.tree.parent(at.index());
            if !above.is_nil() {
                self.tree.warm_node(above.index());
            }
        }
        at
    }

    /// A node has lost a child: it goes next if it is a leaf before all others now; else it takes its place in the order.
    fn uncovered(&self, orders: &mut Orders, node: Link) -> Option<Link> {
        if node.is_nil() || !self.tree.is_live(node) || !self.tree.is_leaf(node.index()) {
            return None;
        }
        self.queue_expiry(orders, node.index());
        let order = &orders.leaves[0];
        let key = self.leaf_key(node.index());
        if !order.has(node) && order.least().is_none_or(|least| key < least) {
            return Some(node);
        }
        self.queue_leaf(orders, node.index(), false);
        None
    }
}
