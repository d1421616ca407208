//! Slots for a cache: resume with its partial copy; and what a cache tells of itself.

use super::create::with_scratch;
use super::{pending, CacheInfo, Core};
use crate::cache::{Cache, Undo};
use crate::error::{CoreError, Result};
use crate::tree::Claimed;
use crate::types::{CacheState, PageCopy};
use crate::words::Stamp;

impl Core {
    pub(super) fn own(&self, cache: &Cache) -> Result<()> {
        if cache.core == self.id {
            Ok(())
        } else {
            Err(CoreError::State("the cache belongs to another core".into()))
        }
    }

    fn open(&self, cache: &Cache) -> Result<()> {
        self.own(cache)?;
        if cache.state == CacheState::Closed {
            return Err(CoreError::State("the cache is CLOSED".into()));
        }
        Ok(())
    }

    /// Open, and no copies are out.
    pub(super) fn ready(&self, cache: &Cache) -> Result<()> {
        self.open(cache)?;
        if cache.undo.is_some() {
            return Err(pending());
        }
        Ok(())
    }

    pub(super) fn active(&self, cache: &Cache, what: &str) -> Result<()> {
        self.ready(cache)?;
        if cache.state == CacheState::Active {
            return Ok(());
        }
        Err(CoreError::State(format!(
            "{what} needs an ACTIVE cache, this one is {}: call resume() first",
            cache.state.name()
        )))
    }

    /// What a cache tells of itself.
    pub fn info(&self, cache: &Cache) -> Result<CacheInfo> {
        self.open(cache)?;
        Ok(CacheInfo {
            state: cache.state,
            reused: cache.reused,
            capacity: cache.capacity,
            history: cache.history,
            committed: cache.committed,
        })
    }

    /// Whether it was closed; a step that it is in may still be launched.
    pub fn is_closed(&self, cache: &Cache) -> bool {
        cache.state == CacheState::Closed
    }

    /// Whether `close` would be refused: another thread has still to report copies of this cache.
    pub fn can_close(&self, cache: &Cache) -> Result<()> {
        self.own(cache)?;
        let here = std::thread::current().id();
        match &cache.undo {
            Some(undo) if undo.by != here => Err(pending()),
            _ => Ok(()),
        }
    }

    /// The slots of an ACTIVE cache in one pool, 0 for stale blocks.
    pub fn table<'a>(&self, cache: &'a Cache, pool: usize) -> Result<&'a [u32]> {
        self.active(cache, "a block table")?;
        Ok(&cache.tables[pool])
    }

    /// A number that stays as it is as long as an ACTIVE cache's tables only grow at their end, entries that become stale
    /// aside.
    pub fn alterations(&self, cache: &Cache) -> Result<u64> {
        self.active(cache, "a block table")?;
        Ok(cache.alterations)
    }

    // -- resume and suspend -------------------------------------------------------------------

    /// ACTIVE from here on. Returns the copies that the caller must make before anything else
    /// touches the cache, then report by [`Core::copies_done`].
    pub fn resume(&self, cache: &mut Cache, copies: &mut Vec<PageCopy>) -> Result<bool> {
        copies.clear();
        self.ready(cache)?;
        if cache.state == CacheState::Active {
            return Ok(true);
        }
        let mut resumed = self.provide(cache, cache.capacity, copies)?;
        if !resumed && !cache.source.is_nil() && self.fits_whole(cache) {
            self.shorten(cache);
            resumed = self.provide(cache, cache.capacity, copies)?;
        }
        if copies.is_empty() {
            self.copies_done(cache); // nothing to wait for
        }
        Ok(resumed)
    }

    /// Whether `provide` takes these arguments.
    pub fn can_provide(&self, cache: &Cache, capacity: u64) -> Result<()> {
        self.ready(cache)?;
        self.check_capacity(cache, Self::least_capacity(cache, capacity), cache.history)
    }

    /// `capacity`, or what the cache has; a `resize` that was broken off may have left its history ahead of that.
    fn least_capacity(cache: &Cache, capacity: u64) -> u64 {
        capacity.max(cache.capacity).max(cache.history)
    }

    /// ACTIVE, with at least `capacity` tokens of storage; or `false`, and the cache is as it was.
    ///
    /// Copies are appended; the caller makes them and reports by [`Core::copies_done`] or [`Core::copies_failed`].
    pub fn provide(&self, cache: &mut Cache, capacity: u64, copies: &mut Vec<PageCopy>) -> Result<bool> {
        self.can_provide(cache, capacity)?;
        let capacity = Self::least_capacity(cache, capacity);
        let new = capacity.div_ceil(self.t()) as usize;
        let pinned = cache.pinned;
        if !self.pin(cache) {
            return Ok(false);
        }
        self.look_far(cache, copies);
        let room = self.reserve_need(cache, cache.history, new);
        cache.far.fill(0);
        if !room {
            if !pinned {
                self.unpin(cache);
            }
            return Ok(false);
        }
        cache.undo = Some(Undo {
            state: cache.state,
            capacity: cache.capacity,
            blocks: cache.tables[0].len(),
            copying: cache.copying,
            pinned,
            by: std::thread::current().id(),
        });
        let made = copies.len();
        let up = self.take_copy(cache, copies) && self.take_up(cache, copies);
        let old = cache.tables[0].len();
        if !up || !(0..self.pools.len()).all(|pool| self.grow(cache, pool, old, new)) {
            copies.truncate(made);
            self.copies_failed(cache);
            return Ok(false);
        }
        self.empty_purse(cache);
        cache.capacity = capacity;
        self.set_holder(cache, CacheState::Active);
        Ok(true)
    }

    /// A slot in every pool for the partial block, out of the purse. `false`: one could not be found.
    fn take_copy(&self, cache: &mut Cache, copies: &mut Vec<PageCopy>) -> bool {
        if cache.source.is_nil() || cache.copying {
            return true;
        }
        for pool in 0..self.pools.len() {
            let Some(dst) = self.take_slot(pool) else {
                return false;
            };
            cache.purse[pool] -= 1;
            let page = self.lend(cache, pool);
            copies.push(PageCopy {
                pool: pool as u32,
                tier: page.tier(),
                up: false,
                block: cache.source,
                src: page.slot(),
                dst,
            });
            cache.tables[pool].push(dst);
            self.pools[pool].set_owner(dst, cache.private_owner());
            self.pools[pool].note_peak();
        }
        cache.copying = true;
        true
    }

    /// The copies of the last `resume` or `provide` are made (or ordered): their source is released, the claim holds.
    pub fn copies_done(&self, cache: &mut Cache) {
        if cache.core != self.id {
            return;
        }
        self.read(cache);
        // What an ACTIVE cache had was on the device, and stayed there.
        if cache
            .undo
            .take()
            .is_some_and(|undo| undo.state != CacheState::Active)
        {
            self.land(cache);
        }
        if cache.in_work && cache.state == CacheState::Active {
            self.settle(cache);
        }
        if cache.copying {
            let stamp = self.tick();
            self.release_source(cache, stamp);
        }
    }

    /// The copies of the last `resume` or `provide` could not be made: the cache is as it was before.
    pub fn copies_failed(&self, cache: &mut Cache) {
        if cache.core != self.id {
            return;
        }
        let Some(undo) = cache.undo.take() else {
            return;
        };
        self.read(cache);
        self.stay_down(cache);
        for pool in 0..self.pools.len() {
            while cache.tables[pool].len() > undo.blocks {
                cache.alterations += 1;
                let slot = cache.tables[pool].pop().unwrap_or(0);
                if slot != 0 {
                    self.pools[pool].give(slot);
                    cache.purse[pool] += 1;
                }
            }
            let before = std::mem::take(&mut cache.promise_before[pool]);
            let given_up = before.saturating_sub(cache.purse[pool]);
            if self.pools[pool].reserve(given_up) {
                cache.purse[pool] += given_up;
            }
            let promised = before.min(cache.purse[pool]);
            cache.promise[pool] = promised;
            self.pools[pool].promised.add(u64::from(promised));
            cache.purse[pool] -= promised;
        }
        cache.capacity = undo.capacity;
        cache.copying = undo.copying;
        self.set_holder(cache, undo.state);
        if !undo.pinned {
            self.unpin(cache);
        }
        self.empty_purse(cache);
    }

    /// The most whole blocks of a match that serve without the partial one.
    pub(super) fn whole_blocks(&self, cache: &Cache) -> usize {
        with_scratch(|scratch| {
            scratch.path.clear();
            scratch.path.extend_from_slice(&cache.nodes);
            self.count_runs(scratch);
            (0..=cache.nodes.len())
                .rev()
                .find(|&k| self.serves(scratch, k, k as u64 * self.t()))
                .unwrap_or(0)
        })
    }

    /// No slot for the partial block: the match ends at the longest whole block that still serves.
    pub(super) fn shorten(&self, cache: &mut Cache) {
        let t = self.t();
        let stamp = if cache.in_work { Stamp::NONE } else { self.tick() };
        let blocks = cache.nodes.len();
        let keep = self.whole_blocks(cache);
        // What becomes live must be held before anything is released; if it goes meanwhile, fewer blocks are kept.
        let keep = (0..=keep)
            .rev()
            .find(|&k| self.hold_window(cache, k) && self.hold_end(cache, k))
            .unwrap_or(0);
        for pool in 0..self.pools.len() {
            let (s, e) = self.config.pools[pool].stale(keep as u64 * t, t);
            let (s0, e0) = self.config.pools[pool].stale(cache.history, t);
            cache.stale_end[pool] = e;
            for i in 0..blocks {
                let live = i < keep && (i < s || i >= e);
                let slot = cache.tables[pool][i];
                if slot != 0 && live && self.tree.windowed[pool] && !cache.in_work {
                    self.tree.freshen(pool, cache.nodes[i].index());
                }
                if slot != 0 && !live && self.tree.windowed[pool] {
                    let held_in_vain = i >= s0 && i < e0;
                    let stamp = if held_in_vain { Stamp::NONE } else { stamp };
                    let idle = self.release_page(cache, pool, cache.nodes[i].index(), stamp, false);
                    self.announce(pool, idle);
                }
                if !live {
                    cache.tables[pool][i] = 0;
                }
            }
            cache.tables[pool].truncate(keep);
        }
        self.move_claim(cache, keep, stamp);
        self.release_source(cache, stamp);
        let m = keep as u64 * t;
        self.counters.reused_tokens.sub(cache.reused - m);
        self.counters.reused_blocks.sub((blocks - keep) as u64);
        cache.tail.clear();
        (cache.reused, cache.committed, cache.history, cache.capacity) = (m, m, m, m);
    }

    /// Claims the pages that are live at `keep` whole blocks and not held yet. `false`: one is missing, and
    /// what was claimed here is released.
    fn hold_window(&self, cache: &mut Cache, keep: usize) -> bool {
        let t = self.t();
        for pool in 0..self.pools.len() {
            let (s, e) = self.config.pools[pool].stale(keep as u64 * t, t);
            for i in (0..keep).filter(|&i| i < s || i >= e) {
                let index = cache.nodes[i].index();
                if cache.tables[pool][i] == 0 {
                    if self.tree.windowed[pool] && !self.hold_page(cache, pool, index) {
                        return false; // what is held in vain is released with the rest by `shorten`
                    }
                    cache.tables[pool][i] = self.tree.page(pool, index).slot();
                }
            }
        }
        true
    }

    /// Claims block `keep - 1`, which is claimed through its descendants; not one with as many references as can be counted.
    fn hold_end(&self, cache: &Cache, keep: usize) -> bool {
        keep == 0
            || keep == cache.nodes.len()
            || self.tree.claim(cache.nodes[keep - 1], None) == Claimed::Joined
    }

    /// The claim goes up to block `keep - 1`, which is held already.
    fn move_claim(&self, cache: &mut Cache, keep: usize, stamp: Stamp) {
        let blocks = cache.nodes.len();
        if keep == blocks {
            return;
        }
        let deepest = cache.nodes[blocks - 1];
        self.tree.nodes[deepest.index()]
            .holders
            .sub(cache.holder() as u64);
        cache.key = cache.root.key();
        if keep > 0 {
            let node = cache.nodes[keep - 1];
            let n = &self.tree.nodes[node.index()];
            n.holders.add(cache.holder() as u64);
            cache.key = n.key.get();
        }
        if cache.pinned {
            cache.nodes[keep..]
                .iter()
                .for_each(|node| self.unpin_node(node.index()));
        }
        self.release_path(deepest, stamp, 0);
        cache.nodes.truncate(keep);
    }

    /// SUSPENDED from here on; on one tier the pages stay where they are, claimed.
    pub fn suspend(&self, cache: &mut Cache) -> Result<()> {
        self.ready(cache)?;
        if cache.state == CacheState::Suspended {
            return Ok(()); // also a claim in work: its pages stay
        }
        self.set_holder(cache, CacheState::Suspended);
        if cache.in_flight == 0 {
            self.lower(cache);
        }
        Ok(())
    }
}
