//! Pages whose move failed: what they held is bad, and with it the block and all blocks below it.

use super::Core;
use crate::cache::Cache;
use crate::pool::Owner;
use crate::sync::{weak, Weak};
use crate::words::{Link, Tier};

/// A page whose content is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPage {
    /// Pool index.
    pub pool: usize,
    /// Tier of the slot.
    pub tier: Tier,
    /// Slot, from 1.
    pub slot: u32,
    /// The block in the tree that has it there.
    pub node: Option<Link>,
}

impl Core {
    /// The page in this slot is bad: no look-up finds its block any more, nor what is below it. Blocks that nobody claims
    /// are dropped; the others when [`Core::drop_lost`] is called after their last release. Until then whoever is in
    /// [`Core::has_bad`] must not use its pages. A private page does not enter the tree any more; if it takes the place of
    /// another one at this moment, the claimants of that block learn it by [`Core::is_lost`].
    pub fn lose(&self, pool: usize, tier: Tier, slot: u32) -> BadPage {
        let node = match self.slots(tier)[pool].lose(slot) {
            Owner::Node(index) => self.lose_block((pool, tier, slot), index as usize),
            _ => None, // private: who has it keeps it out of the tree from here on
        };
        BadPage {
            pool,
            tier,
            slot,
            node,
        }
    }

    /// The page in this slot is one of the block, or is about to be. `None`: it is gone, and the slot on its way.
    fn lose_block(&self, (pool, tier, slot): (usize, Tier, u32), index: usize) -> Option<Link> {
        let (node, page) = (self.tree.at(index), self.tree.page(pool, index));
        let here = page.slot() == slot && page.tier() == tier;
        let live = self.tree.is_live(node);
        // A page may yet come up, or into a window, where another one is or none. If it does not, the block is lost in vain.
        let comes = live && (self.tiered || self.tree.windowed[pool]);
        if !here && !comes {
            return None;
        }
        if !weak(Weak::LoseUnmarked) {
            self.tree.lose(index);
        }
        if live {
            self.drop_if_unclaimed(index);
        } // else a commit is about to publish it, marked
        Some(node)
    }

    /// Whether the cache claims or owns the page.
    pub fn has_bad(&self, cache: &Cache, bad: &BadPage) -> bool {
        let table = &cache.tables[bad.pool];
        let own = || {
            let private = table.iter().skip(cache.nodes.len());
            let comes = cache
                .onboards
                .iter()
                .any(|&(_, pool, slot)| (pool as usize, slot) == (bad.pool, bad.slot));
            comes || { private }.any(|&slot| slot == bad.slot)
        };
        let mut path = cache.nodes.iter().zip(table);
        let claimed = match bad.node {
            Some(node) => {
                let live = |slot: u32| slot != 0 || !self.tree.windowed[bad.pool];
                cache.source == node || path.any(|(at, &slot)| *at == node && live(slot))
            }
            // It was private: whose it was has put it into its path since.
            None => path.any(|(at, &slot)| {
                let page = self.tree.page(bad.pool, at.index());
                let parked = !self.tree.is_block(at.index()) && self.tree.is_lost(at.index());
                slot != 0 && (parked || (page.tier(), page.slot()) == (bad.tier, bad.slot))
            }),
        };
        claimed || bad.tier == Tier::Device && own()
    }

    /// Whether a block on its path, or the source of its partial match, is lost.
    pub fn is_lost(&self, cache: &Cache) -> bool {
        let source = (!cache.source.is_nil()).then_some(cache.source);
        let mut path = cache.nodes.iter().chain(&source);
        path.any(|node| self.tree.is_lost(node.index()))
    }

    /// Takes a slot out of use for good, counted as fenced: a move that was given up may still write it. `false`: it is not
    /// free, or what is free is promised; try again later.
    pub fn retire(&self, pool: usize, tier: Tier, slot: u32) -> bool {
        self.slots(tier)[pool].retire(slot)
    }

    /// Drops lost blocks that nobody claims any more, with all that is below them. O(nodes).
    pub fn drop_lost(&self) {
        for index in 0..self.tree.nodes.len() {
            if self.tree.state(index).is_live() && self.tree.is_lost(index) {
                self.drop_if_unclaimed(index);
            }
        }
    }

    fn drop_if_unclaimed(&self, index: usize) {
        if self.tree.state(index).refs() > 0 {
            return;
        }
        self.drop_below(&mut Vec::new(), index);
        let node = self.tree.at(index);
        if self.tree.state(index).is_live() {
            self.bury_parked(node);
        }
    }
}
