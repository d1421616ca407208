//! All children of a node; with a host tier only.
//!
//! They are spread over as many chains as it takes to have about [`CROWD`] in each, so that what it costs when a child goes
//! does not grow with their number.
//!
//! - a child is in the chain `nest < 2^fan` of its parent, and `fan` only grows while the parent lives
//! - of a first block there is no parent to ask for its children: it is in none
//!
//! Orderings: those of `Chains`. Who sees a child sees the fan that it was put in by.

use super::Tree;
use crate::chains::{Chains, Visit};
use crate::sync::Field;
use crate::words::Link;

/// Children of one chain from which on there are twice as many.
const CROWD: u64 = super::starts::CROWD as u64;
/// Chains per [`CROWD`] children, at most.
const SPREAD: u64 = if cfg!(kvpool_loom) { 1 } else { 4 };

/// See the module.
#[derive(Debug)]
pub(super) struct Families {
    chains: Chains,
    /// By child: `[rank 32 | nest 32]`. A chain of one family is no longer than the rank of its head.
    place: Vec<Field>,
    /// By parent, log2 of its chains.
    fan: Vec<Field>,
}

impl Families {
    /// For so many blocks.
    pub fn new(blocks: u32) -> Self {
        Self {
            chains: Chains::new(blocks),
            place: (0..blocks).map(|_| Field::new(0)).collect(),
            fan: (0..blocks).map(|_| Field::new(0)).collect(),
        }
    }

    /// The bucket of one of the chains of a parent.
    fn bucket(&self, parent: Link, nest: u64) -> usize {
        let x = (parent.0 ^ nest << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.chains.bucket(x ^ (x >> 29))
    }

    /// A node is written anew: it has no children.
    pub fn start(&self, index: usize) {
        self.fan[index].set(0);
    }

    /// One of `children` of its parent. Lock-free; linearized at the CAS of a head.
    fn adopt(&self, parent: Link, link: Link, children: u64) {
        let fan = &self.fan[parent.index()];
        loop {
            let chains = fan.get();
            let nest = ((link.index() as u64).wrapping_mul(0x9E37_79B9) >> 16) & ((1 << chains) - 1);
            let cell = self.chains.cell(self.bucket(parent, nest));
            let head = Chains::first(cell);
            let rank = if head.is_nil() {
                0
            } else {
                self.place[head.index()].get() >> 32 // another node's by now: then the CAS fails
            };
            if rank >= CROWD && CROWD << chains <= SPREAD * children {
                fan.raise(chains + 1);
                continue;
            }
            self.place[link.index()].set((rank + 1) << 32 | nest);
            if self.chains.publish(cell, head, link) {
                return;
            }
        }
    }

    fn disown(&self, parent: Link, link: Link, is: impl Fn(Link) -> bool) {
        let cell = self.chains.cell(self.bucket(parent, self.nest(link.index())));
        self.chains.unlink(cell, link, is);
    }

    /// All chains of a parent, and their buckets.
    fn nests(&self, parent: Link) -> impl Iterator<Item = (u64, usize)> + '_ {
        (0..1 << self.fan[parent.index()].get()).map(move |nest| (nest, self.bucket(parent, nest)))
    }

    /// Which of its parent's chains a child is in; two of them may have one bucket.
    fn nest(&self, index: usize) -> u64 {
        self.place[index].get() & u64::from(u32::MAX)
    }
}

impl Tree {
    pub(super) fn adopt(&self, parent: Link, link: Link) {
        if let (Some(families), false) = (&self.families, parent.is_nil()) {
            families.adopt(parent, link, u64::from(self.children(parent.index())));
        }
    }

    pub(super) fn disown(&self, parent: Link, link: Link) {
        if let (Some(families), false) = (&self.families, parent.is_nil()) {
            families.disown(parent, link, |link| self.is(link));
        }
    }

    fn is_live_child(&self, link: Link, parent: Link) -> bool {
        self.parent(link.index()) == parent && self.is_live(link)
    }

    /// Where to look for children of a node, if it can have any that are blocks: those of a private one are not.
    fn families_with(&self, parent: Link) -> Option<&Families> {
        let index = parent.index();
        { self.families.as_ref() }.filter(|_| self.is_block(index) && self.children(index) > 0)
    }

    /// Appends the live children of a node.
    pub fn children_of(&self, parent: Link, into: &mut Vec<Link>) {
        let Some(families) = self.families_with(parent) else {
            return;
        };
        for (nest, bucket) in families.nests(parent) {
            let before = into.len();
            loop {
                let visit = |link: Link| {
                    if families.nest(link.index()) == nest && self.is_live_child(link, parent) {
                        into.push(link); // believed only if `walk` finds the node unchanged behind us
                    }
                    Visit::Next
                };
                let head = families.chains.head(bucket);
                if families.chains.walk(head, |link| self.is(link), visit).is_ok() {
                    break;
                }
                into.truncate(before);
            }
        }
    }

    /// A live child of a node, if any.
    pub fn any_child(&self, parent: Link) -> Option<Link> {
        let families = self.families_with(parent)?;
        families.nests(parent).find_map(|(nest, bucket)| loop {
            let here = |link: Link| families.nest(link.index()) == nest && self.is_live_child(link, parent);
            let visit = |link: Link| match here(link) {
                false => Visit::Next,
                true if self.is(link) => Visit::Found,
                true => Visit::Recycled,
            };
            let head = families.chains.head(bucket);
            if let Ok(found) = families.chains.walk(head, |link| self.is(link), visit) {
                return found;
            }
        })
    }
}
