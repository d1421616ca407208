//! Birth, claim, release and death of nodes and pages.
//!
//! ```text
//!            publish                claim (0 -> 1)
//!   dead ───────────────> claimed <───────────────> unclaimed
//!    ^  Dead owns it        refs >= 1  release (1 -> 0)  │ refs == 0
//!    └──────────────────────── kill ─────────────────────┘ and no children
//! ```
//!
//! A node with children is never killed, and a child appears only under a claimed node; so whoever
//! claims a node holds its ancestors too.

use super::lookup::{pack, pairs_of};
use super::{Root, Tree};
use crate::sync::{fence, weak, Ordering, Weak};
use crate::words::{Link, Page, State, Tier, MAX_CLAIMS, MAX_REFS};

/// A dead node in the hands of one owner, who publishes or recycles it.
#[derive(Debug)]
#[must_use = "a dead node that is dropped is lost: publish or recycle it"]
pub struct Dead(pub(super) u32);

/// What came of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claimed {
    /// Nobody had it: it is no longer evictable, and the caller's hold on the parent is now its own.
    First,
    /// Others have it too: the caller's hold on the parent is one too many.
    Joined,
    /// It would be the first claim, and the caller has no unit of this tier for it.
    Unpaid(Tier),
    /// It is no longer there.
    Gone,
    /// It has as many references as can be counted, or it is on the move between tiers.
    Full,
}

impl Dead {
    /// Its index.
    pub fn index(&self) -> usize {
        self.0 as usize
    }
}

impl Tree {
    // -- birth ------------------------------------------------------------------------------

    /// A free node, if any.
    pub fn take_node(&self) -> Option<Dead> {
        self.free.pop().map(Dead)
    }

    /// Up to `n` free nodes for blocks in one step, appended.
    pub fn take_nodes(&self, n: usize, nodes: &mut Vec<Dead>) {
        self.free.pop_many(n, nodes, Dead);
    }

    /// Gives a dead node back.
    pub fn recycle(&self, dead: Dead) {
        if self.is_block(dead.index()) {
            self.free.push(dead.0);
        } else {
            self.spare.push(dead.0 - self.max_blocks);
        }
    }

    /// Gives dead blocks back, in one step.
    pub fn recycle_all(&self, dead: impl Iterator<Item = Dead>) {
        self.free.push_each(dead.map(|dead| dead.0));
    }

    /// Writes a node that nobody can see yet. Its pages are set by [`Tree::set_page`].
    pub fn write(
        &self,
        dead: &Dead,
        root: &Root,
        parent: Link,
        key: u64,
        tokens: &[i32],
        priority: u8,
    ) -> Link {
        let index = dead.index();
        let n = &self.nodes[index];
        let born = self.state(index).version();
        if !weak(Weak::WriteBirth) {
            n.born.store(born, Ordering::Release); // Release: partner the load in `Tree::born`
            fence(Ordering::Release); // Release: partner the fence in `Tree::is`: who reads a field below and looks again sees the birth
        }
        n.key.set(key);
        n.parent.set(parent.0);
        // Children of the former node that are not out of its chain yet are in none from here on. Relaxed: nobody follows it
        // before the node is published; a child's CAS that comes later fails, one that came before left what this reads.
        if n.below.load(Ordering::Relaxed) != Link::NIL.0 {
            n.below.swap(Link::NIL.0, Ordering::Relaxed); // Relaxed: as above
        }
        if let Some(families) = &self.families {
            families.start(index);
        }
        let depth = if parent.is_nil() {
            0
        } else {
            self.depth(parent.index()) + 1
        };
        self.set_depth(index, depth);
        n.used.set(0);
        n.priority.set(u64::from(priority));
        n.segment.set(0);
        n.seq.set(self.seq.next());
        n.epoch.set(root.epoch);
        for (field, value) in n.scope.iter().zip(root.digest) {
            field.set(value);
        }
        let words = self.t.div_ceil(2);
        let stored = &self.tokens[index * words..(index + 1) * words];
        match pairs_of(tokens) {
            Some(pairs) => stored
                .iter()
                .zip(pairs)
                .for_each(|(field, pair)| field.set(*pair)),
            None => stored
                .iter()
                .zip(tokens.chunks(2))
                .for_each(|(field, pair)| field.set(pack(pair))),
        }
        if weak(Weak::WriteBirth) {
            n.born.store(born, Ordering::Release); // Release: the planted weakness
        }
        Link::new(born, dead.0)
    }

    /// Puts a written node into the tree with one claim, or finds the live one that has its place.
    ///
    /// The caller holds a claim on the parent, which is the new node's from here on. Lock-free;
    /// linearized at the CAS of the bucket's head. `Err`: the other node, and the dead one back.
    pub fn publish(
        &self,
        dead: Dead,
        link: Link,
        root: &Root,
        parent: Link,
        key: u64,
        tokens: &[i32],
    ) -> Result<(), (Dead, Link)> {
        let bucket = self.by_key.bucket(key);
        let n = &self.nodes[link.index()];
        if !parent.is_nil() {
            self.nodes[parent.index()]
                .children
                .fetch_add(1, Ordering::Relaxed); // Relaxed: the parent is claimed; the release of that claim orders it, see `Tree::kill`
        }
        self.come_near(parent);
        self.note_claimed(Tier::Device, true);
        n.state
            .store(self.state(link.index()).born().0, Ordering::Release); // Release: partner the load in `Tree::claim`: who sees it live sees its birth
        loop {
            let head = self.by_key.head(bucket);
            match self.search(head, root, parent, key, tokens) {
                Ok(Some(other)) => {
                    let state = self.state(link.index()).killed();
                    n.state.store(state.0, Ordering::Release); // Release: partner the load in `Tree::write`: nobody else saw it alive
                    if !parent.is_nil() {
                        self.nodes[parent.index()]
                            .children
                            .fetch_sub(1, Ordering::Relaxed); // Relaxed: as the fetch_add above
                    }
                    self.go_far(parent);
                    self.note_claimed(Tier::Device, false);
                    return Err((dead, other));
                }
                Ok(None) if self.by_key.publish(self.by_key.cell(bucket), head, link) => break,
                _ => {}
            }
        }
        self.enter_start(root, parent, tokens, link);
        self.adopt(parent, link);
        Ok(())
    }

    // -- claims -----------------------------------------------------------------------------

    /// One reference more on a node. `paid`: the tier of which the caller has a unit of every full-attention pool for it.
    ///
    /// Lock-free; linearized at the CAS.
    pub fn claim(&self, link: Link, paid: Option<Tier>) -> Claimed {
        let n = &self.nodes[link.index()];
        loop {
            let now = self.state(link.index());
            let other = self.born(link.index()) != link.born() && !weak(Weak::ClaimBorn);
            if !now.is_live() || other {
                return Claimed::Gone;
            }
            if now.refs() >= MAX_REFS || now.is_busy() {
                return Claimed::Full;
            }
            let first = now.refs() == 0;
            if first && paid != Some(now.tier()) {
                return Claimed::Unpaid(now.tier());
            }
            let next = now.claimed(weak(Weak::ClaimVersion));
            // AcqRel: Acquire partner the CAS in `release` (what was done under the last claim is visible),
            // Release partner the load in `kill` (the version tells that a claim came between).
            // Relaxed on failure: the loop loads again.
            let swapped = n
                .state
                .compare_exchange(now.0, next.0, Ordering::AcqRel, Ordering::Relaxed);
            if swapped.is_ok() {
                if !first {
                    return Claimed::Joined;
                }
                self.note_claimed(now.tier(), true);
                return Claimed::First;
            }
        }
    }

    /// The first reference on a block of the device, for which the caller has a unit. `false`: it is not idle, or gone; see
    /// `claim`. Wait-free; linearized at the CAS.
    #[inline]
    pub fn claim_idle(&self, link: Link) -> bool {
        let n = &self.nodes[link.index()];
        let now = n.state();
        if !now.is_idle() || (n.born() != link.born() && !weak(Weak::ClaimBorn)) {
            return false;
        }
        let next = now.claimed(weak(Weak::ClaimVersion));
        // AcqRel, Relaxed on failure: as in `claim`, with the same partners.
        let claimed = n
            .state
            .compare_exchange(now.0, next.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        if claimed {
            self.note_claimed(Tier::Device, true);
        }
        claimed
    }

    /// One reference less. `last` runs before a release that will be the last one (it may run in vain).
    /// If the node is unclaimed now, the tier on which it is: its unit is available there. Lock-free; linearized at the CAS.
    #[inline]
    pub fn release(&self, index: usize, mut last: impl FnMut(&super::Node)) -> Option<Tier> {
        let n = &self.nodes[index];
        loop {
            let now = n.state();
            debug_assert!(now.is_live() && now.refs() > 0, "release of an unclaimed node");
            if now.refs() == 1 {
                last(n);
            }
            let success = if weak(Weak::ReleaseOrder) {
                Ordering::Relaxed // Relaxed: the planted weakness
            } else {
                Ordering::Release // Release: partner the loads in `state`: a child inserted under this claim is counted before a kill looks
            };
            let next = now.released();
            let swapped = n
                .state
                .compare_exchange(now.0, next.0, success, Ordering::Relaxed); // Relaxed on failure: the loop loads again
            if swapped.is_ok() {
                let last = now.refs() == 1;
                if last {
                    self.note_claimed(now.tier(), false);
                }
                return last.then(|| now.tier());
            }
        }
    }

    // -- death ------------------------------------------------------------------------------

    /// Takes an unclaimed node without children. Its pages are still on it; the caller strips them and
    /// calls [`Tree::bury`]. Lock-free, without a loop; linearized at the CAS.
    pub fn kill(&self, index: usize) -> Option<Dead> {
        let busy = |now: State| now.is_busy() && !weak(Weak::KillBusy);
        let now = self.state(index);
        if !now.is_live() || busy(now) || now.refs() > 0 || self.children(index) > 0 {
            return None;
        }
        let now = if weak(Weak::KillChildren) {
            self.state(index)
        } else {
            now
        };
        if !now.is_live() || busy(now) || now.refs() > 0 {
            return None;
        }
        let n = &self.nodes[index];
        if weak(Weak::KillTwice) {
            n.state.store(now.killed().0, Ordering::Release); // Release: the planted weakness
        } else {
            // AcqRel: Acquire partner the CAS in `release`; Release partner the load in `state` of who finds it dead.
            // Relaxed on failure: it was claimed or killed, nothing is read.
            n.state
                .compare_exchange(now.0, now.killed().0, Ordering::AcqRel, Ordering::Relaxed)
                .ok()?;
        }
        // At once, so that a thread that is stopped further on does not keep the parent from being evicted.
        let parent = self.parent(index);
        if now.tier() == Tier::Device {
            self.go_far(parent);
        }
        if !parent.is_nil() {
            self.nodes[parent.index()].children.fetch_sub(1, Ordering::AcqRel); // AcqRel: partner the RMW in `see_children`: of who kills the last child and who releases the parent, one sees both
        }
        Some(Dead(index as u32))
    }

    /// What `kill` sees of the children from here on is not older than what the caller did to the node before.
    pub fn see_children(&self, index: usize) {
        if !weak(Weak::ChildrenStale) {
            self.nodes[index].children.fetch_add(0, Ordering::AcqRel); // AcqRel: partner the fetch_sub in `kill`
        }
    }

    /// Takes a killed node out of the tables. Returns its former parent, which may be gone by now.
    pub fn bury(&self, dead: &Dead) -> Link {
        let index = dead.index();
        let n = &self.nodes[index];
        let link = self.at(index);
        let parent = self.parent(index);
        if !self.is_block(index) {
            return parent;
        }
        self.by_key
            .unlink(self.by_key.cell(self.by_key.bucket(n.key.get())), link, |link| {
                self.is(link)
            });
        self.leave_start(link);
        self.disown(parent, link);
        parent
    }

    // -- pages ------------------------------------------------------------------------------

    /// Gives a node that the caller owns, or holds and knows to be without, a page on the device. `false`: it has one.
    pub fn set_page(&self, pool: usize, index: usize, slot: u32, claims: u64, active: u64) -> bool {
        let word = &self.pages[pool].word[index];
        let new = Page::new(slot, claims, active);
        // AcqRel: partner the load in `page`: the slot's content was written before. Relaxed on failure: nothing is read.
        word.compare_exchange(Page::NONE.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// As `set_page`, of a full-attention pool and a node that the caller owns: nobody else touches the word.
    pub fn put_page(&self, pool: usize, dead: &Dead, slot: u32) {
        debug_assert_eq!(self.page(pool, dead.index()), Page::NONE);
        let word = &self.pages[pool].word[dead.index()];
        word.store(Page::new(slot, 0, 0).0, Ordering::Release); // Release: partner the load in `page`: the slot's content was written before
    }

    /// Takes the page off a node that was written and not published.
    pub fn unset_page(&self, pool: usize, dead: &Dead) {
        self.pages[pool].word[dead.index()].store(Page::NONE.0, Ordering::Relaxed);
        // Relaxed: nobody else sees the node
    }

    /// A claim on the page holds: it is not stale any more.
    pub fn freshen(&self, pool: usize, index: usize) {
        loop {
            let now = self.page(pool, index);
            if !now.is_stale() || self.change_page(pool, index, now, now.fresh()) {
                return;
            }
        }
    }

    /// One claim more on the page of a claimed node in a windowed pool, by an `active` cache or not. `paid`: the tier of
    /// which the caller has a unit for it.
    pub fn claim_page(&self, pool: usize, index: usize, paid: Option<Tier>, active: bool) -> Claimed {
        loop {
            let now = self.page(pool, index);
            if now.slot() == 0 {
                return Claimed::Gone;
            }
            if now.claims() >= MAX_CLAIMS || now.is_busy() {
                return Claimed::Full;
            }
            let first = now.claims() == 0;
            if first && paid != Some(now.tier()) {
                return Claimed::Unpaid(now.tier());
            }
            if self.change_page(pool, index, now, now.claimed(active)) {
                return if first { Claimed::First } else { Claimed::Joined };
            }
        }
    }

    /// One claim less on a page, of an `active` cache or not. If it is idle now, the tier on which it is.
    pub fn release_page(&self, pool: usize, index: usize, stale: bool, active: bool) -> Option<Tier> {
        loop {
            let now = self.page(pool, index);
            debug_assert!(now.claims() > 0, "release of an unclaimed page");
            if self.change_page(pool, index, now, now.released(stale, active)) {
                return (now.claims() == 1).then(|| now.tier());
            }
        }
    }

    /// Takes the page of a node in a windowed pool if nobody claims it.
    pub fn take_page(&self, pool: usize, index: usize) -> Option<Page> {
        let now = self.page(pool, index);
        let claimed = now.claims() > 0 && !weak(Weak::PageClaims);
        if now.slot() == 0 || claimed || now.is_busy() || !self.change_page(pool, index, now, Page::NONE) {
            return None;
        }
        Some(now)
    }

    /// Takes the page of a dead node, if it has one. The slot of one that is busy stays its mover's.
    pub fn strip(&self, pool: usize, dead: &Dead) -> Option<Page> {
        let word = &self.pages[pool].word[dead.index()];
        if !self.windowed[pool] && self.families.is_none() {
            let page = self.page(pool, dead.index());
            word.store(Page::NONE.0, Ordering::Relaxed); // Relaxed: pages of such pools change with their nodes only, and this one is ours
            return (page.slot() != 0).then_some(page);
        }
        let page = Page(word.swap(Page::NONE.0, Ordering::AcqRel)); // AcqRel: partner the CAS in `change_page` of who takes the page alone
        debug_assert_eq!(page.claims(), 0, "a claimed page of a dead node");
        (page.slot() != 0).then_some(page)
    }

    pub(super) fn change_page(&self, pool: usize, index: usize, from: Page, to: Page) -> bool {
        let word = &self.pages[pool].word[index];
        // AcqRel: partner the load in `page`: what was done with the page before is visible to its next owner.
        // Relaxed on failure: the caller loads again or gives up.
        let changed = word
            .compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        if changed && self.families.is_some() && from.is_held() != to.is_held() {
            let held = &self.pages[pool].held;
            if to.is_held() {
                held.add(1);
            } else {
                held.sub(1);
            }
        }
        changed
    }

    /// The state of a node as a number, for messages.
    pub fn describe(&self, index: usize) -> String {
        let State(word) = self.state(index);
        format!(
            "node {index} (version {}, live {}, refs {})",
            State(word).version(),
            State(word).is_live(),
            State(word).refs()
        )
    }
}
