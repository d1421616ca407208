//! Where choices come from.

use std::sync::{Arc, Mutex, PoisonError};

/// A source of choices.
pub trait Choose {
    /// One of `0..n`, n >= 1.
    fn below(&mut self, n: usize) -> usize;

    /// Whether there are no more choices to be made.
    fn is_over(&self) -> bool {
        false
    }

    /// True once in so many times.
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `from..=to`.
    fn between(&mut self, from: usize, to: usize) -> usize {
        from + self.below(to - from + 1)
    }
}

/// Choices of a seed (xorshift, Marsaglia 2003). Never over.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Different seeds, different choices.
    pub fn new(seed: u64) -> Self {
        Self((seed ^ 0x5851_F42D_4C95_7F2D).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
}

impl Choose for Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n
    }
}

/// Choices that somebody wrote down, one byte each; clones read on in the same place. Zeros behind the end.
#[derive(Debug, Clone)]
pub struct Bytes(Arc<Mutex<(Vec<u8>, usize)>>);

impl Bytes {
    /// From the first byte on.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(Mutex::new((bytes.to_vec(), 0))))
    }
}

impl Choose for Bytes {
    fn below(&mut self, n: usize) -> usize {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = inner.1;
        inner.1 += 1;
        usize::from(inner.0.get(at).copied().unwrap_or(0)) % n
    }

    fn is_over(&self) -> bool {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.1 >= inner.0.len()
    }
}
