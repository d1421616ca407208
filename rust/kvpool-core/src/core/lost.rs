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
    /// [`Core::has_bad`] must not use its pages.
    pub fn lose(&self, pool: usize, tier: Tier, slot: u32) -> BadPage {
        let mut bad = BadPage {
            pool,
            tier,
            slot,
            node: None,
        };
        if let Owner::Node(index) = self.slots(tier)[pool].owner(slot) {
            let index = index as usize;
            let (node, page) = (self.tree.at(index), self.tree.page(pool, index));
            if self.tree.is_live(node) && page.slot() == slot && page.tier() == tier {
                bad.node = Some(node);
                if !weak(Weak::LoseUnmarked) {
                    self.tree.lose(index);
                }
                self.drop_if_unclaimed(index);
            }
        }
        bad
    }

    /// Whether the cache claims or owns the page.
    pub fn has_bad(&self, cache: &Cache, bad: &BadPage) -> bool {
        let Some(node) = bad.node else {
            let own = cache.tables[bad.pool].iter().skip(cache.nodes.len());
            return bad.tier == Tier::Device && { own }.any(|&slot| slot == bad.slot);
        };
        let path = cache.nodes.iter().zip(&cache.tables[bad.pool]);
        let live = |&(at, &slot): &(&Link, &u32)| *at == node && (slot != 0 || !self.tree.windowed[bad.pool]);
        cache.source == node || { path }.any(|at| live(&at))
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
