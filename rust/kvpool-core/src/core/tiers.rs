//! Up and down, as seen by one cache: what keeps its pages on the device, what lets them go, what brings them back.

use super::Core;
use crate::cache::Cache;
use crate::pool::Owner;
use crate::sync::{weak, Weak};
use crate::tree::Claimed;
use crate::types::{CacheState, PageCopy, Retain};
use crate::words::{Link, Page, Stamp, Tier};

impl Core {
    /// Pins the path, and the pages that are claimed in windowed pools, to their place. `false`: a block or a page is on
    /// the move; nothing is pinned then.
    pub(super) fn pin(&self, cache: &mut Cache) -> bool {
        if !self.tiered || cache.pinned {
            return true;
        }
        let source = (!cache.source.is_nil()).then_some(cache.source);
        for (i, node) in cache.nodes.iter().chain(&source).enumerate() {
            if !self.tree.pin(node.index()) {
                self.keeper.report_leaf(node.index(), false); // it may have been looked at while we tried
                for node in cache.nodes.iter().chain(&source).take(i) {
                    self.unpin_node(node.index());
                }
                return false;
            }
        }
        cache.pinned = true;
        let stays = |(pool, index)| self.tree.pin_page(pool, index);
        let moves = self.claimed_pages(cache).position(|page| !stays(page));
        if let Some(pages) = moves {
            self.unpin_first(cache, pages);
        }
        moves.is_none()
    }

    /// The path may move down.
    pub(super) fn unpin(&self, cache: &mut Cache) {
        if cache.pinned {
            self.unpin_first(cache, usize::MAX);
        }
    }

    /// Unpins the path, and the first `pages` of the pages that are claimed in windowed pools.
    fn unpin_first(&self, cache: &mut Cache, pages: usize) {
        cache.pinned = false;
        for (pool, index) in self.claimed_pages(cache).take(pages) {
            self.tree.unpin_page(pool, index);
            self.keeper.report_page(pool, index, false);
        }
        let source = (!cache.source.is_nil()).then_some(cache.source);
        for node in cache.nodes.iter().chain(&source) {
            self.unpin_node(node.index());
        }
    }

    /// (pool, node) of the pages that the cache claims in windowed pools.
    fn claimed_pages<'a>(&'a self, cache: &'a Cache) -> impl Iterator<Item = (usize, usize)> + 'a {
        let source = (!cache.source.is_nil()).then_some(cache.source);
        let windowed = (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]);
        windowed.flat_map(move |pool| {
            let live = cache.nodes.iter().zip(&cache.tables[pool]);
            let live = live.filter(|(_, &slot)| slot != 0).map(|(&node, _)| node);
            let source = source.filter(|_| pool < cache.source_pools);
            live.chain(source).map(move |node| (pool, node.index()))
        })
    }

    pub(super) fn unpin_node(&self, index: usize) {
        if self.tree.unpin(index) && self.tree.near_now(index) == 0 {
            self.keeper.report_leaf(index, false);
        }
    }

    /// SUSPENDED and no step may touch it: its pages may move down, ranked as released now.
    pub(super) fn lower(&self, cache: &mut Cache) {
        if !self.tiered || !cache.pinned {
            return;
        }
        let stamp = self.tick();
        self.park(cache);
        for i in 0..cache.nodes.len() {
            let index = cache.nodes[i].index();
            self.rank_use(index, stamp);
            for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
                if cache.tables[pool].get(i).is_some_and(|&slot| slot != 0) {
                    let pages = &self.tree.pages[pool];
                    if !self.tree.page(pool, index).is_stale() {
                        pages.used[index].raise(stamp.count);
                        pages.time[index].raise(stamp.time);
                    }
                }
            }
        }
        self.unpin(cache);
    }

    /// Private blocks become nodes that nobody can find, as far as there are any left.
    fn park(&self, cache: &mut Cache) {
        let blocks = cache.tables[0].len();
        let holder = cache.holder();
        let deepest = cache.deepest();
        while cache.nodes.len() < blocks {
            let i = cache.nodes.len();
            let Some(dead) = self.tree.take_spare() else {
                break;
            };
            let index = dead.index();
            let retain = cache.retain(i as u64 * self.t());
            self.first_retain(
                index,
                Retain {
                    duration: f64::INFINITY,
                    ..retain
                },
            );
            for pool in 0..self.pools.len() {
                let slot = cache.tables[pool][i];
                if slot != 0 {
                    let windowed = self.tree.windowed[pool];
                    self.tree
                        .set_page(pool, index, slot, u64::from(windowed), u64::from(windowed));
                    if windowed {
                        self.tree.pages[pool].used[index].set(0);
                        self.tree.pages[pool].time[index].set(0);
                        self.tree.pages[pool].holders[index].add(holder as u64);
                    }
                }
            }
            let node = self
                .tree
                .park(dead, &cache.root, cache.deepest(), i as u64, retain.priority);
            // Behind the birth of the node, which nobody else can find or move.
            let own = (0..self.pools.len()).filter(|&pool| cache.tables[pool][i] != 0);
            own.for_each(|pool| self.offer(pool, index, cache.tables[pool][i]));
            cache.nodes.push(node);
            cache.parked += 1;
        }
        if cache.parked > 0 {
            if !deepest.is_nil() {
                self.tree.nodes[deepest.index()].holders.sub(holder as u64);
            }
            self.tree.nodes[cache.deepest().index()]
                .holders
                .add(holder as u64);
        }
    }

    /// Private blocks are the cache's own again. All of them are on the device, and pinned.
    fn unpark(&self, cache: &mut Cache) {
        if cache.parked == 0 {
            return;
        }
        let holder = cache.holder() as u64;
        self.tree.nodes[cache.deepest().index()].holders.sub(holder);
        while cache.parked > 0 {
            let i = cache.nodes.len() - 1;
            let index = cache.deepest().index();
            let dead = self.tree.dissolve(index);
            for pool in 0..self.pools.len() {
                let slot = self.tree.strip_own(pool, &dead).slot();
                if slot != 0 {
                    cache.tables[pool][i] = slot;
                    self.pools[pool].pass(slot, cache.private_owner());
                    if self.tree.windowed[pool] {
                        self.tree.pages[pool].holders[index].sub(holder);
                    }
                }
            }
            self.tree.recycle(dead);
            cache.nodes.pop();
            cache.parked -= 1;
        }
        if let Some(deepest) = cache.nodes.last() {
            self.tree.nodes[deepest.index()].holders.add(holder);
        }
    }

    /// Counts the live pages that are on the host and that `copies` does not bring up already.
    pub(super) fn look_far(&self, cache: &mut Cache, copies: &[PageCopy]) {
        cache.far.fill(0);
        if !self.tiered || cache.state == CacheState::Active {
            return;
        }
        for pool in 0..self.pools.len() {
            for (&node, &slot) in cache.nodes.iter().zip(&cache.tables[pool]) {
                let far = slot != 0 && self.tree.page(pool, node.index()).tier() == Tier::Host;
                if far && !self.comes_up(copies, pool, node) {
                    cache.far[pool] += 1;
                }
            }
        }
    }

    /// Whether a SUSPENDED cache whose partial block finds no room would find room without it. Changes nothing.
    pub(super) fn fits_whole(&self, cache: &Cache) -> bool {
        if !self.tiered {
            return true; // all that is left is on the device
        }
        let keep = self.whole_blocks(cache);
        // What stays, and what nobody would claim any more, is not among what could move down.
        let (mut blocks, mut pages) = (Vec::new(), Vec::new());
        let change: Vec<(u32, u32)> = (0..self.pools.len())
            .map(|pool| match self.tree.windowed[pool] {
                true => self.change_of_pages(cache, pool, keep, &mut pages),
                false => self.change_of_blocks(cache, keep),
            })
            .collect();
        blocks.extend_from_slice(&cache.nodes[..keep]);
        blocks.extend(self.left_behind(cache, keep));
        blocks.retain(|node| self.tree.pin(node.index()));
        // A page that only others claim is claimed too meanwhile: it might go.
        pages.retain(|&(pool, index, held)| match held {
            true => self.tree.pin_page(pool, index),
            false => self.tree.claim_page(pool, index, None, true) == Claimed::Joined,
        });
        let fits = self.can_have(|pool| change[pool].0.saturating_sub(change[pool].1));
        for &(pool, index, held) in &pages {
            if held {
                self.tree.unpin_page(pool, index);
            } else {
                let idle = self.tree.release_page(pool, index, false, true);
                self.announce(pool, idle);
            }
            self.keeper.report_page(pool, index, false);
        }
        blocks.iter().for_each(|node| self.unpin_node(node.index()));
        fits
    }

    /// Blocks that nobody claims once a cache is cut to `keep` blocks: its partial source and the end of its path.
    fn left_behind(&self, cache: &Cache, keep: usize) -> Vec<Link> {
        let mut left = Vec::new();
        let mut references = 1; // ours, or that of the block below, which goes first
        let source = self.tree.state(cache.source.index());
        if source.refs() == 1 {
            left.push(cache.source);
            references += 1;
        }
        for node in cache.nodes[keep..].iter().rev() {
            if self.tree.state(node.index()).refs() > references {
                break;
            }
            left.push(*node);
            references = 1;
        }
        left
    }

    /// Slots of a full-attention pool that a cache cut to `keep` blocks needs, and those that the cut makes available.
    fn change_of_blocks(&self, cache: &Cache, keep: usize) -> (u32, u32) {
        let on = |tier: Tier| move |node: &&Link| self.tree.state(node.index()).tier() == tier;
        let need = cache.nodes[..keep].iter().filter(on(Tier::Host)).count();
        let left = self.left_behind(cache, keep);
        let back = left.iter().filter(on(Tier::Device)).count();
        (need as u32, back as u32)
    }

    /// As `change_of_blocks`, of a pool with a window: what becomes live by the cut is needed too. Appends the pages that
    /// the cut cache or nobody would claim.
    fn change_of_pages(
        &self,
        cache: &Cache,
        pool: usize,
        keep: usize,
        pages: &mut Vec<(usize, usize, bool)>,
    ) -> (u32, u32) {
        let (s, e) = self.config.pools[pool].stale(keep as u64 * self.t(), self.t());
        let (mut need, mut back) = (0, 0);
        let source = std::iter::once((cache.source, false, true));
        let path = cache.nodes.iter().enumerate();
        let path = path.map(|(i, &node)| (node, i < keep && (i < s || i >= e), cache.tables[pool][i] != 0));
        for (node, live, held) in path.chain(source) {
            let page = self.tree.page(pool, node.index());
            let near = page.tier() == Tier::Device;
            let last = held && page.claims() == 1;
            need += u32::from(live && (!near || page.claims() == 0));
            back += u32::from(!live && near && last);
            if live || last {
                pages.push((pool, node.index(), held));
            }
        }
        (need, back)
    }

    /// A device slot for every live page on the host, out of the purse. `false`: one could not be found.
    pub(super) fn take_up(&self, cache: &mut Cache, copies: &mut Vec<PageCopy>) -> bool {
        if !self.tiered || cache.state == CacheState::Active {
            return true;
        }
        let before = copies.len();
        for pool in 0..self.pools.len() {
            for i in 0..cache.nodes.len() {
                let block = cache.nodes[i];
                let page = self.tree.page(pool, block.index());
                let up = page.tier() == Tier::Device || self.comes_up(&copies[..before], pool, block);
                if cache.tables[pool][i] == 0 || up {
                    continue;
                }
                if cache.purse[pool] == 0 && !self.pools[pool].reserve(1) {
                    return false;
                }
                cache.purse[pool] = cache.purse[pool].max(1);
                let Some(dst) = self.take_slot(pool) else {
                    return false;
                };
                cache.purse[pool] -= 1;
                self.pools[pool].set_owner(dst, Owner::Active);
                copies.push(PageCopy {
                    pool: pool as u32,
                    tier: Tier::Host,
                    up: true,
                    block,
                    src: page.slot(),
                    dst,
                });
                cache.onboards.push((i as u32, pool as u32, dst));
            }
            self.pools[pool].note_peak();
        }
        true
    }

    /// The copies to the device are made: pages change their tier, private blocks are the cache's own again.
    pub(super) fn land(&self, cache: &mut Cache) {
        if !self.tiered {
            return;
        }
        cache.onboards.sort_unstable();
        for pages in cache.onboards.chunk_by(|(a, ..), (b, ..)| a == b) {
            let node = cache.nodes[pages[0].0 as usize];
            self.land_block(node, pages.iter().map(|&(_, pool, dst)| (pool as usize, dst)));
        }
        cache.onboards.clear();
        self.unpark(cache);
        for pool in 0..self.pools.len() {
            for i in 0..cache.nodes.len() {
                if cache.tables[pool][i] != 0 {
                    cache.tables[pool][i] = self.tree.page(pool, cache.nodes[i].index()).slot();
                }
            }
        }
    }

    /// The pages of a block that the caller pins come up into these slots; where others were faster they are given back.
    fn land_block(&self, node: Link, slots: impl Iterator<Item = (usize, u32)>) {
        let index = node.index();
        for (pool, dst) in slots {
            self.offer(pool, index, dst);
            match self.tree.raise_page(pool, index, dst) {
                Some(from) => self.came_up(pool, index, from.slot(), dst),
                None => {
                    self.pools[pool].give(dst);
                    self.pools[pool].unreserve(1);
                }
            }
        }
        self.tree.lift(index);
    }

    fn came_up(&self, pool: usize, index: usize, from: u32, to: u32) {
        let key = self.hosts[pool].key(from);
        self.pools[pool].set_key(to, key);
        self.hosts[pool].give_lent(from); // it was claimed there, and is claimed here
        self.counters.onboarded.add(1);
        if self.tree.is_block(index) {
            self.note_moved(pool, key, Tier::Device);
        }
    }

    /// The copies to the device are not made: their slots are given back.
    pub(super) fn stay_down(&self, cache: &mut Cache) {
        for (_, pool, dst) in cache.onboards.drain(..) {
            self.pools[pool as usize].give(dst);
            cache.purse[pool as usize] += 1;
        }
    }

    /// The page of the partial source in a pool, which stays where it is until [`Core::read`].
    pub(super) fn lend(&self, cache: &mut Cache, pool: usize) -> Page {
        loop {
            let page = self.tree.page(pool, cache.source.index());
            if page.tier() == Tier::Device {
                return page; // pinned
            }
            self.hosts[pool].lend(page.slot());
            let now = self.tree.page(pool, cache.source.index());
            if weak(Weak::LendOnce) || (now.tier(), now.slot()) == (page.tier(), page.slot()) {
                cache.lent.push((pool as u32, page.slot()));
                return page;
            }
            self.hosts[pool].unlend(page.slot());
        }
    }

    /// The copies of the partial source are made, or will not be.
    pub(super) fn read(&self, cache: &mut Cache) {
        for (pool, slot) in cache.lent.drain(..) {
            self.hosts[pool as usize].unlend(slot);
        }
    }

    /// Whether an earlier request of the batch brings this page up: then it pins the block as well.
    fn comes_up(&self, copies: &[PageCopy], pool: usize, block: Link) -> bool {
        let same = |copy: &PageCopy| copy.up && copy.pool as usize == pool && copy.block == block;
        !copies.is_empty() && self.tree.pins(block.index()) > 1 && copies.iter().any(same)
    }

    /// Ranks a claimed node as used now, without starting the clock of its retention.
    fn rank_use(&self, index: usize, stamp: Stamp) {
        self.tree.nodes[index].used.raise(stamp.count);
        self.rank_time(index, stamp);
    }
}
