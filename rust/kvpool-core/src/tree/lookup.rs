//! Finding children. Readers write nothing: they read a node's fields, then look whether the node is
//! still the one that was linked; if not, they start the bucket again.

use super::{Root, Tree};
use crate::chains::{Recycled, Visit};
use crate::sync::{weak, Field, Ordering, Weak};
use crate::words::{Birth, Link};
use xxhash_rust::xxh3::{xxh3_64_with_seed, Xxh3};

impl Tree {
    /// The live child of `parent` with exactly these tokens. Lock-free; linearized at the read of the
    /// state that showed it live, or at the read of the head from which it was missed.
    pub fn child(&self, root: &Root, parent: Link, key: u64, tokens: &[i32]) -> Option<Link> {
        let bucket = self.by_key.bucket(key);
        loop {
            if let Ok(found) = self.search(self.by_key.head(bucket), root, parent, key, tokens) {
                return found;
            }
        }
    }

    /// The live child of `parent`, or first block of `root`, with exactly these tokens: by the way down if that is the one,
    /// else by its key.
    #[inline]
    pub fn below(&self, root: &Root, parent: Link, tokens: &[i32]) -> Option<Link> {
        if parent.is_nil() {
            return self.child(root, parent, self.extend_key(root.key(), tokens), tokens);
        }
        self.follow(parent, tokens).or_else(|| {
            // If the parent went since it was found, the key is another's, and finds nothing: neither would the right one.
            let before = self.nodes[parent.index()].key.get();
            self.child(root, parent, self.extend_key(before, tokens), tokens)
        })
    }

    /// As `child`, of the first in the parent's own chain, mostly the one that was published last below `parent`, which is
    /// not nil: without a hash and a bucket. `None` says nothing. Wait-free; linearized at the read of the state.
    #[inline]
    pub fn follow(&self, parent: Link, tokens: &[i32]) -> Option<Link> {
        let link = Link(self.nodes[parent.index()].below.load(Ordering::Acquire)); // Acquire: partner the CAS in `Chains::publish`
        if link.is_nil() {
            return None;
        }
        let index = link.index();
        let n = &self.nodes[index];
        let same = n.parent.get() == parent.0 && self.has_tokens(index, tokens);
        let live = same && n.state().is_live();
        (live && self.is(link)).then_some(link)
    }

    /// One search from a head. `Err`: a node was recycled under it.
    pub(super) fn search(
        &self,
        head: Link,
        root: &Root,
        parent: Link,
        key: u64,
        tokens: &[i32],
    ) -> Result<Option<Link>, Recycled> {
        let above = root.above(parent);
        let visit = |link: Link| {
            let index = link.index();
            let n = &self.nodes[index];
            if n.key.get() != key || !self.is_child_of(index, root, above) || !self.has_tokens(index, tokens)
            {
                return Visit::Next;
            }
            let live = self.state(index).is_live();
            if !self.is(link) {
                return Visit::Recycled;
            }
            if live {
                Visit::Found
            } else {
                Visit::Next
            }
        };
        self.by_key.walk(head, |link| self.is(link), visit)
    }

    /// Of a first block: whether the second word of its root's digest is the same. The first one is in the key.
    pub(super) fn is_child_of(&self, index: usize, root: &Root, above: Link) -> bool {
        if weak(Weak::ParentLink) {
            return true;
        }
        let n = &self.nodes[index];
        n.parent.get() == above.0 && (!above.is_nil() || n.birth().low() == Birth::root_bits(root.digest[1]))
    }

    #[inline]
    fn has_tokens(&self, index: usize, tokens: &[i32]) -> bool {
        debug_assert_eq!(tokens.len(), self.t);
        let words = self.t.div_ceil(2);
        let stored = &self.tokens[index * words..(index + 1) * words];
        match pairs_of(tokens) {
            // Without a branch for each word: mostly all are equal.
            Some(pairs) => {
                let mut runs = pairs.chunks_exact(8);
                let mut of = stored.chunks_exact(8);
                let differ = |pairs: &[u64], words: &[Field]| {
                    let both = pairs.iter().zip(words);
                    both.fold(0, |differ, (pair, word)| differ | (pair ^ word.get())) != 0
                };
                !{ &mut runs }
                    .zip(&mut of)
                    .any(|(pairs, words)| differ(pairs, words))
                    && !differ(runs.remainder(), of.remainder())
            }
            None => {
                let mut pairs = tokens.chunks(2).zip(stored);
                pairs.all(|(pair, word)| word.get() == pack(pair))
            }
        }
    }

    /// Whether the first word of the digest of a first block's root is this root's: its key tells, for given tokens.
    #[cold]
    pub(super) fn begins(&self, root: &Root, index: usize) -> bool {
        let mut pairs = [0; 32];
        let hash = if self.t <= 2 * pairs.len() && cfg!(target_endian = "little") {
            let stored = &self.tokens[index * self.t.div_ceil(2)..];
            pairs
                .iter_mut()
                .zip(stored)
                .for_each(|(at, word)| *at = word.get());
            let tokens: &[i32] = bytemuck::cast_slice(&pairs);
            xxh3_64_with_seed(bytemuck::cast_slice(&tokens[..self.t]), self.seed)
        } else {
            let mut hasher = Xxh3::with_seed(self.seed); // a thousand instructions more
            let tokens = self.tokens(index);
            tokens.for_each(|token| hasher.update(&token.to_ne_bytes()));
            hasher.digest()
        };
        self.collide || Self::mix_key(root.key(), hash) == self.nodes[index].key.get()
    }
}

/// The words of an even number of tokens, where they lie in memory as [`pack`] has them.
#[inline]
pub(super) fn pairs_of(tokens: &[i32]) -> Option<&[u64]> {
    let pairs = bytemuck::try_cast_slice(tokens).ok()?;
    cfg!(target_endian = "little").then_some(pairs)
}

/// Two tokens (or one) in a word.
pub(super) fn pack(pair: &[i32]) -> u64 {
    let high = pair.get(1).map_or(0, |&token| u64::from(token as u32));
    high << 32 | u64::from(pair[0] as u32)
}

#[cfg(all(test, not(any(kvpool_loom, kvpool_shuttle))))]
mod tests {
    use super::*;

    /// All 128 bits of a root's digest count, for whole blocks and for parts of one; and what is below is nobody else's.
    #[test]
    fn a_root_that_differs_in_one_bit_finds_nothing() {
        [4, 5, 64, 65, 200].into_iter().for_each(one_bit_of_a_root);
    }

    fn one_bit_of_a_root(t: usize) {
        let tree = Tree::new(t, 8, None, vec![false], 1, false, true);
        let block = |from: i32| (from..from + t as i32).collect::<Vec<i32>>();
        let root = |word: usize, bit: u64| {
            let mut digest = [0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210];
            digest[word] ^= bit;
            Root { digest, epoch: 0 }
        };
        let own = root(0, 0);
        let mut above = Link::NIL;
        for (tokens, slot) in [(block(1), 1), (block(500), 2)] {
            let before = if above.is_nil() {
                own.key()
            } else {
                tree.nodes[above.index()].key.get()
            };
            let key = tree.extend_key(before, &tokens);
            let dead = tree.take_node().unwrap();
            let link = tree.write(&dead, &own, above, key, &tokens, 35);
            tree.put_page(0, &dead, slot);
            tree.publish(dead, link, &own, above, key, &tokens).unwrap();
            assert_eq!(tree.depth(link.index()), slot - 1);
            above = link;
        }
        let found = |root: &Root| {
            let first = tree.below(root, Link::NIL, &block(1));
            let part = tree.closest_child(root, Link::NIL, &[1, 2, 9]);
            let second = first.and_then(|first| tree.below(root, first, &block(500)));
            (first.is_some(), part.map(|(_, common)| common), second)
        };
        assert_eq!(found(&own), (true, Some(2), Some(above)));
        for (word, bit) in (0..2).flat_map(|word| (0..64).map(move |bit| (word, 1 << bit))) {
            let other = root(word, bit);
            assert_eq!(found(&other), (false, None, None), "word {word}, bit {bit:#x}");
            assert_eq!(tree.root_of(0).digest[1], own.digest[1]);
        }
    }

    /// Of several children that share as much the one inserted first is the closest.
    #[test]
    fn the_closest_child_is_the_one_inserted_first() {
        let tree = Tree::new(4, 8, None, vec![false], 1, false, true);
        let root = tree.root(b"", 0);
        let links: Vec<Link> = [[1, 7, 7, 7], [1, 2, 7, 7], [1, 2, 8, 8], [1, 9, 9, 9]]
            .iter()
            .zip(1..)
            .map(|(tokens, slot)| {
                let key = tree.extend_key(root.key(), tokens);
                let dead = tree.take_node().unwrap();
                let link = tree.write(&dead, &root, Link::NIL, key, tokens, 35);
                tree.put_page(0, &dead, slot);
                tree.publish(dead, link, &root, Link::NIL, key, tokens).unwrap();
                link
            })
            .collect();
        assert_eq!(
            tree.closest_child(&root, Link::NIL, &[1, 2, 3]),
            Some((links[1], 2))
        );
        assert_eq!(tree.closest_child(&root, Link::NIL, &[1, 3]), Some((links[0], 1)));
        assert_eq!(
            tree.closest_child(&root, Link::NIL, &[1, 9, 9]),
            Some((links[3], 3))
        );
        assert_eq!(tree.closest_child(&root, Link::NIL, &[2]), None);
    }
}
