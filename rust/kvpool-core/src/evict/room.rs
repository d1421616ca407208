//! Room for a need that exceeds what is available: pages that only SUSPENDED caches claim move down.
//!
//! - `held(pool) == pages on the device that only SUSPENDED caches claim`, kept as they are claimed, pinned and moved
//!
//! Victims leave in their one order, claimed or not, until every pool has enough available: the move of a claimed page adds
//! to it, that of an unclaimed one is part of the need anyway.

use super::order::Key;
use super::Orders;
use crate::core::Core;
use crate::pool::SlotPool;
use crate::words::Tier;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

impl Core {
    /// Pages of a pool that only SUSPENDED caches claim. A hint while others are at work.
    pub(crate) fn suspended_pages(&self, pool: usize) -> u32 {
        if self.tree.windowed[pool] {
            self.tree.pages[pool].held.get() as u32
        } else {
            self.tree.held()
        }
    }

    /// Slots of a pool that could be had now at most: what is available, and what could move down if no other pool's part
    /// of the host were in the way.
    pub(crate) fn reachable(&self, pool: usize) -> u32 {
        self.pools[pool].available() + self.movable(pool)
    }

    /// Pages of a pool that could move down at most. Not the difference of two looks at `available`: with others at work the
    /// second may show more.
    pub(crate) fn movable(&self, pool: usize) -> u32 {
        let windowed = &self.tree.windowed;
        let hosts =
            (0..self.hosts.len()).filter(|&other| other == pool || !windowed[other] && !windowed[pool]);
        let room = hosts.map(|pool| self.hosts[pool].available()).min().unwrap_or(0);
        self.suspended_pages(pool).min(room)
    }

    /// Whether each pool could have so many slots available. One comparison by pool, unless pages of SUSPENDED caches have
    /// to move and a windowed pool's part of the host is too small for all of its own: then the moves are tried on paper.
    pub(crate) fn can_have(&self, need: impl Fn(usize) -> u32) -> bool {
        match self.is_within_bounds(&need) {
            Some(answer) => answer,
            // Another thread inside: a moment's answer, by the bound alone.
            None => self.on_paper().is_none_or(|mut paper| paper.can_have(&need)),
        }
    }

    /// `None`: it is not above the bound, which may not be reached.
    fn is_within_bounds(&self, need: &impl Fn(usize) -> u32) -> Option<bool> {
        let mut pools = 0..self.pools.len();
        let short = |pool: usize| need(pool) > self.pools[pool].available();
        if !pools.clone().any(short) {
            return Some(true);
        }
        let beyond = |pool: usize| short(pool) && need(pool) > self.reachable(pool);
        if !self.tiered || pools.clone().any(beyond) {
            return Some(false);
        }
        let windowed = &self.tree.windowed;
        let crowded =
            |pool: usize| windowed[pool] && self.suspended_pages(pool) > self.hosts[pool].available();
        (!pools.any(crowded)).then_some(true)
    }

    fn on_paper(&self) -> Option<OnPaper<'_>> {
        let mut orders = self.keeper.orders.enter()?;
        Some(OnPaper::new(self, &mut orders))
    }

    /// The most slots that each pool could have available at once.
    pub(crate) fn most_for_all(&self) -> u32 {
        let pools = || 0..self.pools.len();
        // One look at each pool: `most` is below `too_much` whatever others do meanwhile.
        let (mut most, mut too_much) = pools().fold((u32::MAX, u32::MAX), |(most, too_much), pool| {
            let there = self.pools[pool].available();
            (most.min(there), too_much.min(there + self.movable(pool) + 1))
        });
        let mut tries = Tries::new(self, true);
        while self.tiered && too_much - most > 1 {
            let middle = most + (too_much - most) / 2;
            if tries.can_have(|_| middle) {
                most = middle;
            } else {
                too_much = middle;
            }
        }
        most
    }

    /// Whether a victim has to leave before a block that only SUSPENDED caches claim can, or is one.
    fn is_in_the_way(&self, mut index: usize) -> bool {
        loop {
            if self.tree.state(index).refs() > 0 {
                return self.tree.pins(index) == 0;
            }
            let parent = self.tree.parent(index);
            if parent.is_nil() {
                return false;
            }
            index = parent.index();
        }
    }

    /// Moves pages down until every pool has so many available. `false`: it cannot be, and nothing has changed (or another
    /// thread is at it, or a copy failed: then some pages have moved).
    pub(crate) fn make_room(&self, need: impl Fn(usize) -> u32) -> bool {
        if !self.tiered || !self.can_have(&need) {
            return false;
        }
        let Some(mut orders) = self.keeper.orders.enter() else {
            return false;
        };
        for pool in 0..self.pools.len() {
            while self.pools[pool].available() < need(pool) {
                let gone = if self.tree.windowed[pool] {
                    self.next_page(&mut orders, pool).map(|slot| {
                        self.pools[pool].give(slot);
                        1
                    })
                } else {
                    self.next_leaf(&mut orders, None).map(|(_, pages)| pages)
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

/// Several questions at one moment: what their tries on paper have in common is looked at once.
pub(crate) struct Tries<'a> {
    core: &'a Core,
    /// Whether pages of SUSPENDED caches may move.
    moves: bool,
    /// `Some(None)`: another thread is inside.
    paper: Option<Option<OnPaper<'a>>>,
}

impl<'a> Tries<'a> {
    pub(crate) fn new(core: &'a Core, moves: bool) -> Self {
        Self {
            core,
            moves,
            paper: None,
        }
    }

    /// As [`Core::can_have`].
    pub(crate) fn can_have(&mut self, need: impl Fn(usize) -> u32) -> bool {
        if !self.moves {
            return (0..self.core.pools.len()).all(|pool| need(pool) <= self.core.pools[pool].available());
        }
        match self.core.is_within_bounds(&need) {
            Some(answer) => answer,
            None => self.on_paper().is_none_or(|mut paper| paper.can_have(&need)),
        }
    }

    /// Per pool, how many slots are missing for that: none in any pool if, and only if, `can_have` says so.
    pub(crate) fn lacking(&mut self, need: impl Fn(usize) -> u32) -> Vec<u32> {
        let core = self.core;
        let paper = match self.moves.then(|| core.is_within_bounds(&need)) {
            Some(None) => self.on_paper(),
            _ => None,
        };
        if let Some(mut paper) = paper {
            return paper.lacking(&need);
        }
        let most = |pool: usize| match self.moves {
            true => core.reachable(pool),
            false => core.pools[pool].available(),
        };
        let lacks = |pool: usize| need(pool).saturating_sub(most(pool));
        (0..core.pools.len()).map(lacks).collect()
    }

    fn on_paper(&mut self) -> Option<OnPaper<'a>> {
        let core = self.core;
        self.paper.get_or_insert_with(|| core.on_paper()).clone()
    }
}

/// What would come of `make_room`. Victims that are no block of a SUSPENDED cache and stand below none change nothing: it
/// costs a walk up from each leaf, and then as much as what could move and what stands below it.
#[derive(Clone)]
struct OnPaper<'a> {
    core: &'a Core,
    /// By pool, available.
    device: Vec<u32>,
    host: Vec<u32>,
    /// Blocks that may leave next.
    leaves: BinaryHeap<Reverse<(Key, usize)>>,
    /// By windowed pool, pages that only SUSPENDED caches claim, in order.
    pages: Vec<Vec<usize>>,
    /// By node, children on the device, where one of them left.
    near: HashMap<usize, u32>,
    /// By pool and node, pages that left.
    gone: HashSet<(usize, usize)>,
}

impl<'a> OnPaper<'a> {
    fn new(core: &'a Core, orders: &mut Orders) -> Self {
        core.catch_up(orders);
        let mut seen = HashSet::new();
        let first = |&index: &usize| {
            core.is_victim(Tier::Device, index) && core.is_in_the_way(index) && seen.insert(index)
        };
        let leaves = orders.leaves[0].indices().filter(first);
        let mut paper = Self {
            core,
            device: core.pools.iter().map(SlotPool::available).collect(),
            host: core.hosts.iter().map(SlotPool::available).collect(),
            leaves: leaves
                .map(|index| Reverse((core.leaf_key(index), index)))
                .collect(),
            pages: vec![Vec::new(); core.pools.len()],
            near: HashMap::new(),
            gone: HashSet::new(),
        };
        for pool in (0..core.pools.len()).filter(|&pool| core.tree.windowed[pool]) {
            core.catch_up_pages(orders, pool);
            let pages = &mut paper.pages[pool];
            pages.extend(orders.pages[0][pool].indices());
            pages.retain(|&index| {
                core.is_idle(Tier::Device, pool, index) && core.tree.page(pool, index).is_held()
            });
            // Cached: a key that another thread changes meanwhile would be no order, and the sort would panic.
            pages.sort_by_cached_key(|&index| core.page_key(pool, index));
            pages.dedup();
        }
        paper
    }

    fn can_have(&mut self, need: &impl Fn(usize) -> u32) -> bool {
        (0..self.device.len()).all(|pool| self.leave(pool, need(pool)) == 0)
    }

    fn lacking(&mut self, need: &impl Fn(usize) -> u32) -> Vec<u32> {
        (0..self.device.len())
            .map(|pool| self.leave(pool, need(pool)))
            .collect()
    }

    /// What has to leave a pool for it to have `need` leaves. Returns how many are missing then.
    fn leave(&mut self, pool: usize, need: u32) -> u32 {
        if self.core.tree.windowed[pool] {
            self.leave_pages(pool, need);
        } else {
            self.leave_blocks(pool, need);
        }
        need.saturating_sub(self.device[pool])
    }

    /// Pages of a windowed pool move down until it has `need`; unclaimed ones between them change nothing.
    fn leave_pages(&mut self, pool: usize, need: u32) {
        for index in std::mem::take(&mut self.pages[pool]) {
            if self.device[pool] < need && self.goes_down(pool, index) {
                self.gone.insert((pool, index));
            }
        }
    }

    /// A page that only SUSPENDED caches claim moves down. `false`: it is none, or finds no room.
    fn goes_down(&mut self, pool: usize, index: usize) -> bool {
        let goes = self.is_held(pool, index) && self.host[pool] > 0;
        if goes {
            self.host[pool] -= 1;
            self.device[pool] += 1;
        }
        goes
    }

    fn is_held(&self, pool: usize, index: usize) -> bool {
        let tree = &self.core.tree;
        !self.gone.contains(&(pool, index))
            && if tree.windowed[pool] {
                tree.page(pool, index).is_held()
            } else {
                tree.state(index).refs() > 0
            }
    }

    /// Blocks leave until a full-attention pool has `need`. One that finds no room stays for good, and what is above it.
    fn leave_blocks(&mut self, pool: usize, need: u32) {
        let tree = &self.core.tree;
        while self.device[pool] < need {
            let Some(Reverse((_, index))) = self.leaves.pop() else {
                return;
            };
            let pools = 0..self.device.len();
            if tree.state(index).refs() > 0 {
                if pools
                    .clone()
                    .any(|pool| self.is_held(pool, index) && self.host[pool] == 0)
                {
                    continue;
                }
                pools.clone().for_each(|pool| {
                    self.goes_down(pool, index);
                });
            }
            self.gone.extend(pools.map(|pool| (pool, index)));
            let parent = tree.parent(index);
            if parent.is_nil() {
                continue;
            }
            let above = parent.index();
            let near = self.near.entry(above).or_insert_with(|| tree.near(above));
            *near = near.saturating_sub(1);
            if *near == 0 && tree.pins(above) == 0 {
                self.leaves.push(Reverse((self.core.leaf_key(above), above)));
            }
        }
    }
}
