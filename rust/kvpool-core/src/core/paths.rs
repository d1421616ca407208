//! Units for nodes of both tiers, and the claims of whole paths that are paid with them.

use super::Core;
use crate::pool::SlotPool;
use crate::sync::{weak, Weak};
use crate::tree::Claimed;
use crate::words::{Link, Stamp, Tier};

/// Units by [`Tier`], each of every full-attention pool.
type Units = [u32; 2];

impl Core {
    // -- promises ---------------------------------------------------------------------------

    /// The slots of a tier, by pool.
    pub(crate) fn slots(&self, tier: Tier) -> &[SlotPool] {
        match tier {
            Tier::Device => &self.pools,
            Tier::Host => &self.hosts,
        }
    }

    fn full_pools(&self, tier: Tier) -> impl Iterator<Item = &SlotPool> {
        self.slots(tier)
            .iter()
            .zip(&self.tree.windowed)
            .filter_map(|(pool, windowed)| (!windowed).then_some(pool))
    }

    /// Takes `n` slots of a tier off every full-attention pool, or nothing: the price of `n` nodes there.
    ///
    /// Two callers that want the last slots of several pools in different order of arrival may both be refused.
    pub(super) fn reserve_nodes(&self, tier: Tier, n: u32) -> bool {
        for (taken, pool) in self.full_pools(tier).enumerate() {
            if !pool.reserve(n) {
                if !weak(Weak::ReserveRollback) {
                    self.full_pools(tier)
                        .take(taken)
                        .for_each(|pool| pool.unreserve(n));
                }
                return false;
            }
        }
        true
    }

    pub(super) fn unreserve_nodes(&self, tier: Tier, n: u32) {
        self.full_pools(tier).for_each(|pool| pool.unreserve(n));
    }

    /// Gives units of both tiers back.
    fn refund_nodes(&self, units: Units) {
        self.unreserve_nodes(Tier::Device, units[Tier::Device as usize]);
        self.unreserve_nodes(Tier::Host, units[Tier::Host as usize]);
    }

    // -- claims of paths ----------------------------------------------------------------------

    /// Claims the deepest node of a path and with it all others. `Err(n)`: memory that others were promised, or
    /// references that can be counted, leave the first `n` blocks at most, or (`None`) a block went; nothing is held then.
    ///
    /// References are taken from the top down, each paid for before it is taken: an unclaimed node has no claimed
    /// descendant at any time, and a promise is never undermined. Lock-free; linearized at the last CAS.
    pub(super) fn claim_path(&self, path: &[Link]) -> std::result::Result<(), Option<usize>> {
        let Some(&deepest) = path.last() else {
            return Ok(());
        };
        loop {
            match self
                .tree
                .claim(deepest, weak(Weak::PayLater).then_some(Tier::Device))
            {
                Claimed::Joined => return Ok(()),
                Claimed::Gone => return Err(None),
                Claimed::Full => return Err(Some(path.len() - 1)),
                Claimed::First | Claimed::Unpaid(_) => {}
            }
            // Blocks [0, held) are claimed by others, [held, len) by nobody.
            let mut held = path.len() - 1;
            while held > 0 && self.tree.state(path[held - 1].index()).refs() == 0 {
                held -= 1;
            }
            // Blocks on the device first, those on the host below them: what moves meanwhile is paid again in `claim_down`.
            let far = |node: &&Link| self.tree.state(node.index()).tier() == Tier::Host;
            let on_host = if self.tiered {
                path[held..].iter().filter(far).count() as u32
            } else {
                0
            };
            let need = [(path.len() - held) as u32 - on_host, on_host];
            if !self.reserve_nodes(Tier::Device, need[0]) {
                return Err(Some(self.reach(Tier::Device, held, path.len())));
            }
            if !self.reserve_nodes(Tier::Host, need[1]) {
                self.unreserve_nodes(Tier::Device, need[0]);
                return Err(Some(self.reach(Tier::Host, held + need[0] as usize, path.len())));
            }
            let hold = if held > 0 {
                self.tree.claim(path[held - 1], None)
            } else {
                Claimed::Joined
            };
            if hold == Claimed::Joined {
                return self.claim_down(path, held, need);
            }
            self.refund_nodes(need);
            if hold == Claimed::Full {
                return Err(Some(held - 1));
            } // else it was released since: look again
        }
    }

    /// Blocks of a path that can be claimed beyond the first `held` with what is left on a tier; fewer than all.
    fn reach(&self, tier: Tier, held: usize, blocks: usize) -> usize {
        let left = self.full_pools(tier).map(SlotPool::available).min();
        (held + left.unwrap_or(0) as usize).min(blocks - 1)
    }

    /// Goes down from block `at - 1`, on which the caller has a reference, with `units` paid.
    fn claim_down(
        &self,
        path: &[Link],
        mut at: usize,
        mut units: Units,
    ) -> std::result::Result<(), Option<usize>> {
        let mut short = None;
        while at < path.len() {
            if units[Tier::Device as usize] > 0 && self.tree.claim_idle(path[at]) {
                units[Tier::Device as usize] -= 1;
                self.expire_at_claim(path[at].index());
                at += 1;
                continue;
            }
            let tier = self.tree.state(path[at].index()).tier();
            let paid = (units[tier as usize] > 0).then_some(tier);
            match self.tree.claim(path[at], paid) {
                Claimed::First => {
                    units[tier as usize] -= 1; // our reference on the parent is the child's now
                    self.expire_at_claim(path[at].index());
                }
                Claimed::Joined if at > 0 => self.release_path(path[at - 1], Stamp::NONE, 0),
                Claimed::Joined => {}
                Claimed::Unpaid(now) if self.reserve_nodes(now, 1) => {
                    units[now as usize] += 1;
                    continue;
                }
                Claimed::Unpaid(_) | Claimed::Full => {
                    short = Some(at);
                    break;
                }
                Claimed::Gone => break,
            }
            at += 1;
        }
        self.refund_nodes(units);
        if at == path.len() {
            return Ok(());
        }
        if at > 0 {
            self.release_path(path[at - 1], Stamp::NONE, 0);
        }
        Err(short)
    }

    /// Claims a child of a node that the caller holds (or a first block); the hold stays.
    pub(super) fn claim_child(&self, parent: Link, child: Link) -> Claimed {
        let mut paid = None;
        if !parent.is_nil() && self.tree.claim(parent, None) != Claimed::Joined {
            return Claimed::Full;
        }
        let claimed = loop {
            match self.tree.claim(child, paid) {
                Claimed::Unpaid(tier) => {
                    if let Some(before) = paid.take() {
                        self.unreserve_nodes(before, 1); // it has moved since
                    }
                    if !self.reserve_nodes(tier, 1) {
                        break Claimed::Unpaid(tier);
                    }
                    paid = Some(tier);
                }
                claimed => break claimed,
            }
        };
        if claimed == Claimed::First {
            self.expire_at_claim(child.index());
            return claimed;
        }
        if let Some(tier) = paid {
            self.unreserve_nodes(tier, 1);
        }
        if !parent.is_nil() {
            self.release_path(parent, Stamp::NONE, 0);
        }
        claimed
    }

    /// One claim less on a node; the blocks whose last claim it was get `stamp` and `segment`, and become
    /// available again. Lock-free; linearized at the first CAS.
    pub(super) fn release_path(&self, deepest: Link, stamp: Stamp, segment: u8) {
        let mut freed = [0, 0];
        let mut index = deepest.index();
        loop {
            let node = &self.tree.nodes[index];
            let parent = node.parent(); // read before the release: afterwards the node may go
            let mut rose = false;
            let unclaimed = self.tree.release(index, |node| {
                self.record_use(index, node, stamp);
                if segment > 0 && node.segment.get() < segment {
                    node.segment.set(segment);
                    rose = true;
                }
            });
            let Some(tier) = unclaimed else {
                if rose {
                    self.keeper.report_leaf(index, true); // risen in vain: somebody claimed meanwhile
                }
                self.record_behind_claims(index, stamp);
                break;
            };
            freed[tier as usize] += 1;
            if rose || node.children() == 0 || self.expiry(index) != 0 {
                self.keeper.report_leaf(index, rose);
            }
            if parent.is_nil() {
                break;
            }
            index = parent.index();
        }
        self.refund_nodes(freed);
    }

    /// A node stays claimed, maybe only by batches whose claims leave no trace: its use and that of its ancestors is
    /// recorded now. Who else holds one of them records a later use.
    fn record_behind_claims(&self, mut index: usize, stamp: Stamp) {
        if stamp == Stamp::NONE || self.in_work.get() == 0 {
            return;
        }
        loop {
            let node = &self.tree.nodes[index];
            self.record_use(index, node, stamp);
            let parent = node.parent();
            if parent.is_nil() {
                return;
            }
            index = parent.index();
        }
    }
}
