//! The child that begins like a prompt, among however many.
//!
//! A block is in one chain: its parent's own, if that has room (what has no parent has none); else, by its parent and
//! its first token; if that is full, by its first two tokens; then by four, and so on below the length of a block; then
//! in none. So a chain has at most [`CROWD`] blocks, whatever prompts have in common (a first token that begins them
//! all, a system prompt that ends inside a block), and what a look-up or the end of a block costs does not grow with
//! their number. An only child costs one word of its parent.
//!
//! A node has its chain: 0 for none, [`OWN`], or [`FIRST`] + n for that of its first 2^n tokens; and its rank there.
//!
//! - ranks grow towards the head, to [`SIBLINGS`] or [`CROWD`]: a chain has no more blocks than its head's rank
//! - a child that is in no chain which a look-up walks met a full one whose blocks share with it more than half of what
//!   it shares with the prompt
//! - the parent's word outlives its chain: children whose end is not over when the parent's place is written anew are
//!   in no chain then, and a CAS that one of them makes on the word fails by the incarnation
//!
//! Orderings: those of `Chains`.

use super::{Root, Tree};
use crate::chains::{Chains, Recycled, Visit};
use crate::sync::{warm, weak, AtomicU64, Field, Weak};
use crate::words::Link;

const CHECKED: bool = cfg!(any(kvpool_loom, kvpool_stops));
/// Most blocks of a parent's own chain.
const SIBLINGS: u8 = if CHECKED { 1 } else { 8 };
/// Most blocks of one chain.
pub(super) const CROWD: u8 = if CHECKED {
    1
} else if cfg!(test) {
    4
} else {
    64
};
/// The chain of a parent.
const OWN: u8 = 1;
/// The first chain by a beginning, of one token; each further one is of twice as many.
const FIRST: u8 = 2;

/// The chains.
#[derive(Debug)]
pub(super) struct Starts {
    chains: Chains,
    /// The last chain that a block can be in.
    last: u8,
    /// The last one that a block without a parent was ever in, and one with a parent.
    reached: [Field; 2],
}

impl Starts {
    /// For blocks of `t` tokens; `partial`: whether anybody is going to ask for a child that begins like something.
    pub fn new(t: usize, nodes: u32, partial: bool) -> Self {
        let longest = (t - 1).checked_ilog2().filter(|_| partial);
        let last = longest.map_or(OWN, |log| FIRST + log as u8);
        Self {
            chains: Chains::with_buckets(nodes, if last == OWN { 0 } else { nodes as usize }),
            last,
            reached: [Field::new(0), Field::new(0)],
        }
    }
}

/// Hash of a beginning: of the words of its tokens, two in each.
fn hash(above: Link, chain: u8, words: impl Iterator<Item = u64>) -> u64 {
    const MIX: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut x = (above.0 ^ u64::from(chain) << 40).wrapping_mul(MIX);
    let length = if chain == FIRST {
        1
    } else {
        1 << (chain - FIRST - 1)
    };
    for word in words.take(length) {
        let word = if chain == FIRST {
            u64::from(word as u32)
        } else {
            word
        };
        x = (x ^ x >> 32 ^ word).wrapping_mul(MIX);
    }
    let x = (x ^ (x >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 29)
}

fn words_of(tokens: &[i32]) -> impl Iterator<Item = u64> + '_ {
    tokens.chunks(2).map(super::lookup::pack)
}

/// A child, the leading tokens it shares, and its number.
type Best = Option<(Link, usize, u32)>;

impl Tree {
    /// The head of a chain, if there is such a chain.
    fn start(&self, above: Link, chain: u8, words: impl Iterator<Item = u64>) -> Option<&AtomicU64> {
        if chain == OWN {
            return self.nodes.get(above.index()).map(|parent| &parent.below);
        }
        let chains = &self.starts.chains;
        (chain > OWN).then(|| chains.cell(chains.bucket(hash(above, chain, words))))
    }

    /// The head of the chain of a node that was written, if it is in one. It may be another node's by now: then of any.
    fn own_start(&self, index: usize) -> Option<&AtomicU64> {
        let n = &self.nodes[index];
        let words = self.tokens[index * self.t.div_ceil(2)..].iter().map(Field::get);
        self.start(n.parent(), n.chain.get(), words)
    }

    /// Puts a claimed node into the first chain that has room. Lock-free; linearized at the CAS of a head.
    pub(super) fn enter_start(&self, root: &Root, parent: Link, tokens: &[i32], link: Link) {
        let Starts {
            chains,
            last,
            reached,
        } = &self.starts;
        let n = &self.nodes[link.index()];
        for chain in OWN..=*last {
            let Some(cell) = self.start(root.above(parent), chain, words_of(tokens)) else {
                continue;
            };
            let most = if chain == OWN { SIBLINGS } else { CROWD };
            loop {
                let head = Chains::first(cell);
                let rank = if head.is_nil() {
                    0
                } else {
                    self.nodes[head.index()].rank.get() // another node's by now: then the CAS fails
                };
                if rank >= most {
                    break;
                }
                let head = if weak(Weak::CrowdHead) {
                    Chains::first(cell)
                } else {
                    head
                };
                n.chain.set(chain);
                n.rank.set(rank + 1);
                reached[usize::from(!parent.is_nil())].advance(u64::from(chain));
                if chains.publish(cell, head, link) {
                    return;
                }
            }
        }
        n.chain.set(0);
    }

    /// Takes a dead node out of its chain.
    pub(super) fn leave_start(&self, link: Link) {
        if let Some(cell) = self.own_start(link.index()) {
            self.starts.chains.unlink(cell, link, |link| self.is(link));
        }
    }

    /// Brings the link behind a node closer.
    pub(super) fn warm_start_next(&self, index: usize) {
        self.starts.chains.warm_next(index);
    }

    /// Brings the head of a node's chain closer: its own lines are here.
    pub(super) fn warm_own_start(&self, index: usize) {
        if let Some(cell) = self.own_start(index) {
            warm(cell);
        }
    }

    /// The child of `parent` that shares most leading tokens with `tokens` and has a page in every pool; of several the one
    /// inserted first. Where more than [`CROWD`] children begin alike: the best, or one that shares more than half as many
    /// tokens. Cost: at most [`CROWD`] children for each power of two below the tokens of a block.
    pub fn closest_child(&self, root: &Root, parent: Link, tokens: &[i32]) -> Option<(Link, usize)> {
        let above = root.above(parent);
        let reached = self.starts.reached[usize::from(!parent.is_nil())].get() as u8;
        let long_enough = |chain: &u8| tokens.len() >> chain.saturating_sub(FIRST) > 0;
        let chains = (OWN..=reached).take_while(long_enough);
        let cells = chains.filter_map(|chain| self.start(above, chain, words_of(tokens)));
        cells.clone().skip(1).for_each(warm);
        loop {
            let mut best: Best = None;
            for cell in cells.clone() {
                let before = best;
                while self
                    .look_through(Chains::first(cell), (root, above), tokens, &mut best)
                    .is_err()
                {
                    best = before;
                }
            }
            let (link, common, _) = best?;
            let same = !above.is_nil() || self.begins(root, link.index());
            if self.is(link) {
                return same.then_some((link, common));
            }
        }
    }

    /// Leading tokens that a block shares with these, at most as many as it has.
    fn common(&self, index: usize, tokens: &[i32]) -> usize {
        let words = self.t.div_ceil(2);
        let stored = &self.tokens[index * words..(index + 1) * words];
        let mut pairs = tokens.chunks_exact(2);
        for (i, (pair, word)) in { &mut pairs }.zip(stored).enumerate() {
            let differ = word.get() ^ super::lookup::pack(pair);
            if differ != 0 {
                return 2 * i + usize::from(differ as u32 == 0);
            }
        }
        let last = pairs.remainder().first();
        let differs = |last: &i32| stored[tokens.len() / 2].get() as i32 != *last;
        tokens.len() - usize::from(last.is_some_and(differs))
    }

    /// A better one than `best` in a chain. `Err`: a node was recycled under it.
    fn look_through(
        &self,
        head: Link,
        (root, above): (&Root, Link),
        tokens: &[i32],
        best: &mut Best,
    ) -> Result<(), Recycled> {
        let visit = |link: Link| {
            let index = link.index();
            let common = self.common(index, tokens);
            let (most, before) = best.map_or((0, 0), |(_, most, before)| (most, before));
            if common < most.max(1) || !self.is_child_of(index, root, above) {
                return Visit::Next;
            }
            let number = self.numbers[index].get();
            // Inserted earlier, unless 2^31 were between them.
            let better = common > most || (number.wrapping_sub(before) as i32) < 0;
            if better && self.state(index).is_live() && self.has_all_pages(index) {
                *best = Some((link, common, number)); // believed only if `walk` finds the node unchanged behind us
            }
            Visit::Next
        };
        let walked = self.starts.chains.walk(head, |link| self.is(link), visit);
        walked.map(|_| ())
    }

    /// Whether a live block is where its place says, and the chain as long as its ranks say; for `check`.
    pub fn is_in_start(&self, index: usize) -> bool {
        let Some(cell) = self.own_start(index) else {
            return true;
        };
        let (mut found, mut before, mut sorted) = (false, CROWD.max(SIBLINGS) + 1, true);
        let visit = |link: Link| {
            let rank = self.nodes[link.index()].rank.get();
            sorted &= (1..before).contains(&rank);
            before = rank;
            found |= link == self.at(index);
            Visit::Next
        };
        let walked = { &self.starts.chains }.walk(Chains::first(cell), |link| self.is(link), visit);
        walked.is_ok() && found && sorted
    }
}
