//! Prompts, the shape of a pool, and what a system under test must be able to do.

use dynamo_tokens::TokenBlockSequence;
use kvbm_logical::{KvbmSequenceHashProvider, SequenceHash};
use std::hint::black_box;

/// Tokens per block, blocks per sequence, cached sequences and blocks of the pool, where nothing else is said.
pub const T: usize = 16;
pub const BLOCKS: usize = 64;
pub const SEQUENCES: usize = 1000;
pub const SLOTS: usize = 65_536;

/// xorshift64: the same prompts in every run.
pub struct Rng(pub u64);

impl Rng {
    pub fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// One request as each system wants it: kvpool the tokens and one more, kvbm-logical its hashes.
pub struct Prompt {
    pub tokens: Vec<i32>,
    pub hashes: Vec<SequenceHash>,
}

impl Prompt {
    /// `blocks` whole blocks of random tokens, and one token so that the last block can be reused.
    pub fn random(rng: &mut Rng, blocks: usize, t: usize) -> Self {
        Self::of(
            (0..blocks * t + 1).map(|_| (rng.next() >> 33) as i32).collect(),
            t,
        )
    }

    /// Whole blocks and one token more.
    pub fn of(tokens: Vec<i32>, t: usize) -> Self {
        let hashes = hashes_of(&tokens[..tokens.len() - 1], t);
        Self { tokens, hashes }
    }

    /// Without hashes, for where kvpool is alone.
    pub fn bare(rng: &mut Rng, blocks: usize, t: usize) -> Self {
        let tokens = (0..blocks * t + 1).map(|_| (rng.next() >> 33) as i32).collect();
        Self {
            tokens,
            hashes: Vec::new(),
        }
    }

    pub fn many(rng: &mut Rng, count: usize, blocks: usize, t: usize) -> Vec<Self> {
        (0..count).map(|_| Self::random(rng, blocks, t)).collect()
    }
}

fn hashes_of(tokens: &[i32], t: usize) -> Vec<SequenceHash> {
    let tokens: Vec<u32> = tokens.iter().map(|&token| token as u32).collect();
    let sequence = TokenBlockSequence::from_slice(&tokens, t as u32, Some(1));
    let blocks = sequence.blocks().iter();
    blocks.map(|block| block.kvbm_sequence_hash()).collect()
}

/// Sizes of the system under test.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Blocks of each pool.
    pub slots: usize,
    /// Tokens per block.
    pub t: usize,
    /// Full-attention pools.
    pub full: usize,
    /// Pools with a window of 256 tokens besides.
    pub windowed: usize,
}

impl Shape {
    pub const PEERS: Self = Self {
        slots: SLOTS,
        t: T,
        full: 1,
        windowed: 0,
    };
}

/// A system under test: a pool of blocks with reuse. Dropping a request releases what it holds.
pub trait Side: Sync {
    type Request<'a>
    where
        Self: 'a;
    /// What must be kept until blocks that were evicted may be used again.
    type Evicted;

    const NAME: &'static str;

    fn new(shape: Shape) -> Self;

    /// Claims what is cached of the first `blocks` blocks.
    fn open<'a>(&'a self, prompt: &Prompt, blocks: usize) -> Self::Request<'a>;

    /// Blocks that `open` found.
    fn reused(request: &Self::Request<'_>) -> usize;

    /// Takes room for the rest of the first `blocks` blocks, evicting if it must, and commits them. `false`: no room.
    fn store(request: &mut Self::Request<'_>, prompt: &Prompt, blocks: usize) -> bool;

    /// A sum over the slots of the request, which must all be read for it.
    fn slots(request: &mut Self::Request<'_>) -> usize;

    /// Takes `blocks` unclaimed blocks from the cache.
    fn evict(&self, blocks: usize) -> Self::Evicted;

    /// Books, where there are any.
    fn check(&self) {}

    /// A request whose first `blocks` blocks are computed, cached, read and released.
    fn serve(&self, prompt: &Prompt, blocks: usize) {
        let mut request = self.open(prompt, blocks);
        assert!(Self::store(&mut request, prompt, blocks), "room");
        black_box(Self::slots(&mut request));
    }

    /// W1: claims the first `blocks` blocks, which are all cached, reads their slots and releases.
    fn claim(&self, prompt: &Prompt, blocks: usize) {
        let mut request = self.open(prompt, blocks);
        assert_eq!(Self::reused(&request), blocks);
        black_box(Self::slots(&mut request));
    }

    /// W2: as `serve` of a prompt of which nothing is known to be cached.
    fn churn(&self, prompt: &Prompt, blocks: usize) {
        self.serve(prompt, blocks);
    }
}
