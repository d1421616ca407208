//! Commit: full blocks enter the tree, or give way to what the tree has.

use super::create::{with_scratch, Scratch};
use super::Core;
use crate::cache::Cache;
use crate::error::{CoreError, Result};
use crate::events::EventKind;
use crate::pool::Owner;
use crate::sync::{weak, Weak};
use crate::tree::{Claimed, Dead};
use crate::types::Retain;
use crate::words::{Link, Page, Stamp, Tier, MAX_CLAIMS};

/// Nodes that a commit takes at once.
const AHEAD: usize = 32;
/// Blocks whose memory is fetched side by side.
const RUN: usize = 8;

/// How a block is in the tree.
enum Entered {
    /// With the cache's own pages: no table entry changes.
    New,
    /// As the one that was there; `changed`: a table entry.
    Joined { changed: bool },
}

/// Why a block did not enter the tree.
enum Refused {
    /// Another thread put it there, or took it out: look again.
    Changed,
    /// No node can be had, or the one that is there has as many references as can be counted.
    Full,
}

impl Core {
    /// Declares tokens final; full blocks enter the tree. Returns whether a table entry changed.
    ///
    /// Never fails for want of memory: a page of one's own pays for the tree's page that replaces it. A block
    /// for which no node can be had stays private, and so do those behind it.
    pub fn commit(&self, cache: &mut Cache, tokens: &[i32]) -> Result<bool> {
        self.active(cache, "commit")?;
        if cache.committed + tokens.len() as u64 > cache.capacity {
            return Err(CoreError::Value(format!(
                "commit: {} committed + {} tokens exceed the capacity {}",
                cache.committed,
                tokens.len(),
                cache.capacity
            )));
        }
        let prompt = cache.prompt.get(cache.committed as usize..).unwrap_or(&[]);
        let both = prompt.len().min(tokens.len());
        if both > 0 && prompt[..both] != tokens[..both] {
            let at = prompt.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            return Err(CoreError::State(format!(
                "commit: token {} at position {} differs from the prompt's {}",
                tokens[at],
                cache.committed + at as u64,
                prompt[at]
            )));
        }
        let mut changed = false;
        if cache.tail.len() + tokens.len() < self.config.tokens_per_block as usize {
            cache.tail.extend_from_slice(tokens);
            cache.committed += tokens.len() as u64;
        } else {
            changed = with_scratch(|scratch| self.commit_blocks(scratch, cache, tokens));
        }
        if cache.committed > cache.history {
            cache.history = cache.committed;
            changed |= self.make_stale(cache);
        }
        self.empty_purse(cache);
        Ok(changed)
    }

    /// The full blocks among what is final now, at least one, enter the tree; the rest waits in `tail`.
    fn commit_blocks(&self, scratch: &mut Scratch, cache: &mut Cache, tokens: &[i32]) -> bool {
        let t = self.config.tokens_per_block as usize;
        let before = cache.deepest();
        let mut left = (cache.tail.len() + tokens.len()) / t;
        let mut changed = false;
        let mut rest = tokens;
        if !cache.tail.is_empty() {
            let (run, behind) = tokens.split_at(t - cache.tail.len());
            let mut block = std::mem::take(&mut cache.tail);
            block.extend_from_slice(run);
            changed |= self.commit_block(scratch, cache, &block, left);
            left -= 1;
            block.clear();
            cache.tail = block;
            rest = behind;
        }
        let (whole, tail) = rest.split_at(rest.len() / t * t);
        for run in whole.chunks(RUN * t) {
            self.warm_run(scratch, cache, run, left);
            for block in run.chunks_exact(t) {
                changed |= self.commit_block(scratch, cache, block, left);
                left -= 1;
            }
        }
        cache.tail.extend_from_slice(tail);
        cache.committed += tokens.len() as u64;
        self.end_blocks(scratch, cache, before);
        changed
    }

    /// Keys and nodes of the next blocks, and what will be touched to put them into the tree.
    fn warm_run(&self, scratch: &mut Scratch, cache: &Cache, run: &[i32], left: usize) {
        if cache.detached {
            return;
        }
        let t = self.config.tokens_per_block as usize;
        let mut key = cache.key;
        scratch.ahead.clear();
        for block in run.chunks_exact(t) {
            key = self.tree.extend_key(key, block);
            scratch.ahead.push(key);
        }
        self.stock(scratch, left);
        self.tree.warm_births(&scratch.ahead);
        scratch.ahead.reverse();
    }

    /// What the blocks of a commit have in common: nodes that were too many, who holds the path, and what is told.
    fn end_blocks(&self, scratch: &mut Scratch, cache: &Cache, before: Link) {
        self.tree.recycle_all(scratch.nodes.drain(..));
        let holder = cache.holder() as u64;
        if before != cache.deepest() {
            if !before.is_nil() {
                self.tree.nodes[before.index()].holders.sub(holder);
            }
            self.tree.nodes[cache.deepest().index()].holders.add(holder);
        }
        self.note_entered(cache, &scratch.entered);
        scratch.entered.clear();
        scratch.ahead.clear();
    }

    /// These blocks of a cache, which claims them, are in the tree with its own pages.
    fn note_entered(&self, cache: &Cache, entered: &[usize]) {
        if entered.is_empty() {
            return;
        }
        let own = |&i: &usize| cache.tables.iter().filter(|table| table[i] != 0).count();
        let mut number = self.events.reserve(entered.iter().map(own).sum());
        for &i in entered {
            let (key, above) = self.keys_of(cache.nodes[i].index());
            for (pool, _) in cache.tables.iter().enumerate().filter(|(_, table)| table[i] != 0) {
                self.events
                    .put(number, EventKind::Stored, Tier::Device, pool, key, above);
                number += 1;
            }
        }
    }

    /// The next block enters the tree, or the cache takes the tree's pages for it. `left`: blocks to come, with this one.
    fn commit_block(&self, scratch: &mut Scratch, cache: &mut Cache, block: &[i32], left: usize) -> bool {
        if cache.detached || cache.root.epoch < self.epoch() {
            cache.detached = true;
            return false;
        }
        let parent = cache.deepest();
        let known = scratch.ahead.pop();
        let key = known.unwrap_or_else(|| self.tree.extend_key(cache.key, block));
        let first = (cache.nodes.len() * self.config.tokens_per_block as usize) as u64;
        let retain = cache.retain(first);
        let changed = loop {
            let done = match self.tree.child(&cache.root, parent, key, block) {
                Some(node) => self.join(cache, parent, node, retain),
                None => self
                    .node_for(scratch, left)
                    .and_then(|dead| self.enter(cache, dead, (parent, key), block, retain)),
            };
            match done {
                Ok(Entered::New) => {
                    scratch.entered.push(cache.nodes.len() - 1);
                    break false;
                }
                Ok(Entered::Joined { changed }) => break changed,
                Err(Refused::Changed) => {}
                Err(Refused::Full) => {
                    cache.detached = true;
                    return false;
                }
            }
        };
        cache.key = key;
        changed
    }

    fn stock(&self, scratch: &mut Scratch, left: usize) {
        if scratch.nodes.is_empty() {
            self.tree.take_nodes(left.min(AHEAD), &mut scratch.nodes);
            scratch.nodes.reverse();
        }
    }

    /// A node for the next of `left` blocks: those for all of them are taken at once.
    fn node_for(&self, scratch: &mut Scratch, left: usize) -> std::result::Result<Dead, Refused> {
        self.stock(scratch, left);
        let dead = scratch.nodes.pop().or_else(|| self.take_node());
        dead.ok_or(Refused::Full)
    }

    /// A new node with the cache's own pages.
    fn enter(
        &self,
        cache: &mut Cache,
        dead: Dead,
        (parent, key): (Link, u64),
        block: &[i32],
        retain: Retain,
    ) -> std::result::Result<Entered, Refused> {
        let i = cache.nodes.len();
        let index = dead.index();
        let link = self
            .tree
            .write(&dead, &cache.root, parent, key, block, retain.priority);
        self.first_retain(index, retain);
        let owner = Owner::Node(index as u32);
        let mut bad = false;
        for pool in 0..self.pools.len() {
            let own = cache.tables[pool][i];
            if own == 0 {
                continue;
            }
            self.pools[pool].set_key(own, key);
            if self.tree.windowed[pool] {
                let active = u64::from(self.tiered);
                self.tree.set_page(pool, index, own, 1, active);
                self.tree.pages[pool].holders[index].add(cache.holder() as u64);
            } else {
                self.tree.put_page(pool, &dead, own);
            }
            // Behind the page and before the block can be found: `lose` finds it from here on.
            bad |= !weak(Weak::OwnerLate) && self.pools[pool].pass(own, owner);
        }
        if self.tiered {
            self.tree.pin_first(&dead);
        }
        let dead = match bad {
            true => dead,
            false => match self.tree.publish(dead, link, &cache.root, parent, key, block) {
                Ok(()) => {
                    if weak(Weak::OwnerLate) {
                        self.pass_own(cache, owner);
                    }
                    cache.nodes.push(link);
                    return Ok(Entered::New);
                }
                Err((dead, _)) => dead,
            },
        };
        let bad = self.take_back(cache, dead);
        Err(if bad { Refused::Full } else { Refused::Changed })
    }

    /// The slots of the next block go over to another owner. Returns whether one of them is bad.
    fn pass_own(&self, cache: &Cache, owner: Owner) -> bool {
        let mut bad = false;
        for (pool, table) in self.pools.iter().zip(&cache.tables) {
            let own = table[cache.nodes.len()];
            bad |= own != 0 && pool.pass(own, owner);
        }
        bad
    }

    /// The next block is not in the tree: it is private again, and the node free. Returns whether a page of it is bad.
    fn take_back(&self, cache: &Cache, dead: Dead) -> bool {
        for (pool, table) in cache.tables.iter().enumerate() {
            self.tree.unset_page(pool, &dead);
            if table[cache.nodes.len()] != 0 && self.tree.windowed[pool] {
                self.tree.pages[pool].holders[dead.index()].sub(cache.holder() as u64);
            }
        }
        if self.tiered {
            self.tree.unpin(dead.index());
        }
        let bad = self.pass_own(cache, cache.private_owner());
        self.tree.recycle(dead);
        bad
    }

    /// The slot of the block that the caller has claimed, and pins, is that of a page of it in a moment. Before the page is
    /// there, so that `lose` finds the block; if what it holds is bad already, nobody finds the block any more.
    pub(super) fn offer(&self, pool: usize, index: usize, own: u32) {
        if self.pools[pool].pass(own, Owner::Node(index as u32)) {
            self.tree.lose(index);
        }
    }

    /// Claims the tree's node for the block and switches to its pages. Returns whether a table entry changed.
    fn join(
        &self,
        cache: &mut Cache,
        parent: Link,
        node: Link,
        retain: Retain,
    ) -> std::result::Result<Entered, Refused> {
        let (i, index) = (cache.nodes.len(), node.index());
        let crowded = |pool: usize| self.tree.page(pool, index).claims() > MAX_CLAIMS / 2;
        if (0..self.pools.len()).any(crowded) || (cache.in_flight > 0 && !self.prepay(cache, node)) {
            return Err(Refused::Full);
        }
        // Before the claim: what it costs is settled while the block cannot move.
        if self.tiered && !self.tree.pin(index) {
            self.keeper.report_leaf(index, false);
            return Err(Refused::Full);
        }
        let mut unpaid = false;
        let claimed = match self.claim_for(node, &mut unpaid) {
            Claimed::First => true, // our reference on the parent is the child's now
            Claimed::Joined => {
                if !parent.is_nil() {
                    self.release_path(parent, Stamp::NONE, 0); // never the last reference: the child has one
                }
                false
            }
            refused => {
                if self.tiered {
                    self.unpin_node(index);
                }
                let full = refused == Claimed::Full;
                return Err(if full { Refused::Full } else { Refused::Changed });
            }
        };
        self.bring_up(cache, node);
        if cache.retention.is_some() {
            self.raise_retain(index, retain);
        }
        let mut changed = false;
        for pool in 0..self.pools.len() {
            let own = cache.tables[pool][i];
            if own == 0 {
                continue;
            }
            let windowed = self.tree.windowed[pool];
            let owes = if windowed {
                self.take_over(pool, index, own)
            } else {
                claimed && unpaid && self.tree.page(pool, index).slot() != own
            };
            let theirs = self.tree.page(pool, index).slot();
            if windowed {
                self.tree.freshen(pool, index);
                self.tree.pages[pool].holders[index].add(cache.holder() as u64);
            }
            if theirs != own {
                cache.tables[pool][i] = theirs;
                cache.alterations += 1;
                self.give_private(cache, pool, own);
                changed = true;
                if owes {
                    self.pay(cache, pool);
                }
            }
        }
        cache.nodes.push(node);
        Ok(Entered::Joined { changed })
    }

    /// The caller's own pages become those of a block that it pins, where the block's are on the host.
    fn bring_up(&self, cache: &mut Cache, node: Link) {
        let (i, index) = (cache.nodes.len(), node.index());
        if self.tree.state(index).tier() == Tier::Device {
            return;
        }
        let key = self.tree.nodes[index].key.get();
        for pool in (0..self.pools.len()).filter(|&pool| !self.tree.windowed[pool]) {
            let own = cache.tables[pool][i];
            self.pools[pool].set_key(own, key);
            self.offer(pool, index, own);
            if let Some(page) = self.tree.raise_page(pool, index, own) {
                self.replaced(pool, key, page.slot(), true);
            }
        }
        self.tree.lift(index);
    }

    /// A page on the host gave way to one's own. `paid`: it was claimed.
    fn replaced(&self, pool: usize, key: u64, slot: u32, paid: bool) {
        if paid {
            self.hosts[pool].give_lent(slot);
        } else {
            self.hosts[pool].give(slot);
        }
        self.note_moved(pool, key, Tier::Device);
    }

    /// In flight one's own slots come back later only: the units for pages that nobody claims must be had now, or the
    /// block stays private. Others may have been promised them.
    fn prepay(&self, cache: &mut Cache, node: Link) -> bool {
        self.empty_purse(cache); // what the block before did not need
        let i = cache.nodes.len();
        let unclaimed = self.tree.state(node.index()).refs() == 0;
        for pool in 0..self.pools.len() {
            let page = self.tree.page(pool, node.index());
            let costs = page.tier() == Tier::Device
                && if self.tree.windowed[pool] {
                    cache.tables[pool][i] != 0 && page.slot() != 0 && page.claims() == 0
                } else {
                    unclaimed
                };
            if costs {
                if !self.pools[pool].reserve(1) {
                    return false; // what was had is given back with the purse
                }
                cache.purse[pool] += 1;
            }
        }
        true
    }

    /// Claims a node, with units of its own if it would be the first claim and they can be had; `unpaid`: one's own
    /// pages must pay.
    fn claim_for(&self, node: Link, unpaid: &mut bool) -> Claimed {
        let claimed = self.tree.claim(node, None);
        let Claimed::Unpaid(tier) = claimed else {
            return claimed;
        };
        *unpaid = !self.reserve_nodes(tier, 1);
        if *unpaid && tier == Tier::Host {
            return Claimed::Full; // for a moment: another thread has the unit
        }
        let claimed = self.tree.claim(node, Some(tier));
        if claimed == Claimed::First {
            self.expire_at_claim(node.index());
        } else if !*unpaid {
            self.unreserve_nodes(tier, 1);
        }
        claimed
    }

    /// Claims the page of the tree in a windowed pool, or gives it one's own if it has none there. Returns whether
    /// one's own page must pay for it.
    fn take_over(&self, pool: usize, index: usize, own: u32) -> bool {
        let key = self.tree.nodes[index].key.get();
        self.pools[pool].set_key(own, key);
        loop {
            let far = |page: Page| page.slot() != 0 && (page.tier() == Tier::Host || page.is_busy());
            let replaced = far(self.tree.page(pool, index)).then(|| {
                self.offer(pool, index, own);
                self.tree.replace_page(pool, index, own)
            });
            if let Some(page) = replaced.flatten() {
                if page.is_busy() {
                    // Its mover frees both slots; what its claims paid is available again.
                    self.pools[pool].unreserve(u32::from(page.claims() > 0));
                    self.note_moved(pool, key, Tier::Device);
                } else {
                    self.replaced(pool, key, page.slot(), page.claims() > 0);
                }
                return false;
            }
            match self.tree.claim_near(pool, index, false, self.tiered) {
                Claimed::Joined => return false,
                Claimed::Unpaid(_) => {
                    let paid = self.pools[pool].reserve(1);
                    let claimed = self.tree.claim_near(pool, index, true, self.tiered);
                    if claimed == Claimed::First {
                        return !paid;
                    }
                    self.pools[pool].unreserve(u32::from(paid));
                    if claimed == Claimed::Joined {
                        return false;
                    }
                }
                Claimed::Gone => {
                    self.offer(pool, index, own);
                    if self.tree.set_page(pool, index, own, 1, u64::from(self.tiered)) {
                        self.note_stored(pool, index);
                        return false;
                    }
                }
                Claimed::First | Claimed::Full => {} // it moves: look again
            }
        }
    }

    /// Pays for a page that nobody claimed before: with the unit of the slot that it replaces, or, while that one is
    /// fenced, with one of its own; at worst when the fence falls.
    fn pay(&self, cache: &mut Cache, pool: usize) {
        if cache.purse[pool] > 0 {
            cache.purse[pool] -= 1;
        } else if !self.pools[pool].reserve(1) {
            cache.debt[pool] += 1;
        }
    }
}
