//! Finding children. Readers write nothing: they read a node's fields, then look whether the node is
//! still the one that was linked; if not, they start the bucket again.

use super::{Root, Tree};
use crate::chains::{Recycled, Visit};
use crate::sync::{weak, Field, Ordering, Weak};
use crate::words::Link;

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
        let visit = |link: Link| {
            let index = link.index();
            let n = &self.nodes[index];
            if n.key.get() != key
                || !self.is_child_of(index, &root.digest, parent)
                || !self.has_tokens(index, tokens)
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

    pub(super) fn is_child_of(&self, index: usize, root: &[u64; 2], parent: Link) -> bool {
        if weak(Weak::ParentLink) {
            return true;
        }
        let n = &self.nodes[index];
        n.parent.get() == parent.0
            && (!parent.is_nil() || n.scope.iter().zip(root).all(|(a, b)| a.get() == *b))
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
