//! Room for a need that exceeds what is available: pages that only SUSPENDED caches claim move down.
//!
//! - `held(pool) == pages on the device that only SUSPENDED caches claim`, kept as they are claimed, pinned and moved
//!
//! Victims leave in their one order, claimed or not, until every pool has enough available: the move of a claimed page adds
//! to it, that of an unclaimed one is part of the need anyway.

use crate::core::Core;
use crate::words::Tier;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

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
        let windowed = &self.tree.windowed;
        let hosts =
            (0..self.hosts.len()).filter(|&other| other == pool || !windowed[other] && !windowed[pool]);
        let room = hosts.map(|pool| self.hosts[pool].available()).min().unwrap_or(0);
        self.pools[pool].available() + self.suspended_pages(pool).min(room)
    }

    /// Whether each pool could have so many slots available. One comparison by pool, unless pages of SUSPENDED caches have
    /// to move and a windowed pool's part of the host is too small for all of its own: then the moves are tried on paper.
    pub(crate) fn can_have(&self, need: impl Fn(usize) -> u32) -> bool {
        let mut pools = 0..self.pools.len();
        let short = |pool: usize| need(pool) > self.pools[pool].available();
        if !pools.clone().any(short) {
            return true;
        }
        if !self.tiered
            || pools
                .clone()
                .any(|pool| short(pool) && need(pool) > self.reachable(pool))
        {
            return false;
        }
        let crowded =
            |pool| self.tree.windowed[pool] && self.suspended_pages(pool) > self.hosts[pool].available();
        !pools.any(crowded) || OnPaper::new(self).can_have(&need)
    }

    /// The most slots that each pool could have available at once.
    pub(crate) fn most_for_all(&self) -> u32 {
        let mut most = self.pools.iter().map(|pool| pool.available()).min().unwrap_or(0);
        let mut too_much = self.pools.iter().map(|pool| pool.num_slots()).min().unwrap_or(0) + 1;
        while self.tiered && too_much - most > 1 {
            let middle = most + (too_much - most) / 2;
            if self.can_have(|_| middle) {
                most = middle;
            } else {
                too_much = middle;
            }
        }
        most
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

/// What would come of `make_room`.
struct OnPaper<'a> {
    core: &'a Core,
    /// By pool, available.
    device: Vec<u32>,
    host: Vec<u32>,
    /// By node, children on the device.
    near: Vec<u32>,
    /// By pool and node, pages that left.
    gone: Vec<Vec<bool>>,
}

impl<'a> OnPaper<'a> {
    fn new(core: &'a Core) -> Self {
        let nodes = core.tree.nodes.len();
        Self {
            core,
            device: core.pools.iter().map(|pool| pool.available()).collect(),
            host: core.hosts.iter().map(|pool| pool.available()).collect(),
            near: (0..nodes).map(|index| core.tree.near(index)).collect(),
            gone: vec![vec![false; nodes]; core.pools.len()],
        }
    }

    fn can_have(&mut self, need: &impl Fn(usize) -> u32) -> bool {
        (0..self.device.len()).all(|pool| {
            if self.core.tree.windowed[pool] {
                self.pages(pool, need(pool));
            } else {
                self.blocks(pool, need(pool));
            }
            self.device[pool] >= need(pool)
        })
    }

    /// Pages of a windowed pool leave until it has `need`.
    fn pages(&mut self, pool: usize, need: u32) {
        let core = self.core;
        let idle = |&index: &usize| core.is_idle(Tier::Device, pool, index) && !self.gone[pool][index];
        let mut order: Vec<_> = (0..self.near.len()).filter(idle).collect();
        order.sort_by_key(|&index| core.page_key(pool, index));
        for index in order {
            if self.device[pool] >= need {
                return;
            }
            self.gone[pool][index] = self.leaves(pool, index) || core.tree.page(pool, index).claims() == 0;
        }
    }

    /// A page that only SUSPENDED caches claim moves down. `false`: it is none, or finds no room.
    fn leaves(&mut self, pool: usize, index: usize) -> bool {
        let moves = self.is_held(pool, index) && self.host[pool] > 0;
        if moves {
            self.host[pool] -= 1;
            self.device[pool] += 1;
        }
        moves
    }

    fn is_held(&self, pool: usize, index: usize) -> bool {
        let core = self.core;
        !self.gone[pool][index]
            && if core.tree.windowed[pool] {
                core.tree.page(pool, index).is_held()
            } else {
                core.tree.state(index).refs() > 0
            }
    }

    /// Blocks leave until a full-attention pool has `need`.
    fn blocks(&mut self, pool: usize, need: u32) {
        let core = self.core;
        let first = |&index: &usize| {
            let state = core.tree.state(index);
            let here = state.is_live() && state.tier() == Tier::Device && !self.gone[pool][index];
            here && self.near[index] == 0 && core.tree.pins(index) == 0
        };
        let leaves = (0..self.near.len()).filter(first);
        let mut order: BinaryHeap<_> = leaves
            .map(|index| Reverse((core.leaf_key(index), index)))
            .collect();
        while self.device[pool] < need {
            let Some(Reverse((_, index))) = order.pop() else {
                return;
            };
            let pools = 0..self.device.len();
            if core.tree.state(index).refs() > 0 {
                let stays = |pool| self.is_held(pool, index) && self.host[pool] == 0;
                if pools.clone().any(stays) {
                    continue;
                }
                pools.clone().for_each(|pool| {
                    self.leaves(pool, index);
                });
            }
            pools.for_each(|pool| self.gone[pool][index] = true);
            let parent = core.tree.parent(index);
            if parent.is_nil() {
                continue;
            }
            self.near[parent.index()] -= 1;
            if self.near[parent.index()] == 0 && core.tree.pins(parent.index()) == 0 {
                order.push(Reverse((core.leaf_key(parent.index()), parent.index())));
            }
        }
    }
}
