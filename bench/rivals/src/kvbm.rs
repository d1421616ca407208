//! kvbm-logical: given precomputed hashes, it compares no tokens.

use crate::world::{Prompt, Shape, Side};
use kvbm_logical::{BlockManager, BlockRegistry, ImmutableBlock, MutableBlock};
use std::hint::black_box;

#[derive(Clone, Debug)]
pub struct Meta;

pub struct Kvbm {
    manager: BlockManager<Meta>,
    t: usize,
}

/// Blocks that are held.
pub struct Request<'a> {
    side: &'a Kvbm,
    blocks: Vec<ImmutableBlock<Meta>>,
    reused: usize,
}

impl Kvbm {
    fn register(&self, prompt: &Prompt, from: usize, to: usize) -> Option<Vec<ImmutableBlock<Meta>>> {
        let blocks = self.manager.allocate_blocks(to - from)?.into_iter();
        let staged = blocks.zip(&prompt.hashes[from..to]);
        let staged = staged.map(|(block, &hash)| block.stage(hash, self.t).expect("size"));
        Some(self.manager.register_blocks(staged.collect()))
    }
}

impl Side for Kvbm {
    type Request<'a> = Request<'a>;
    type Evicted = Vec<MutableBlock<Meta>>;

    const NAME: &'static str = "kvbm-logical";

    fn new(shape: Shape) -> Self {
        let manager = BlockManager::builder()
            .block_count(shape.slots)
            .block_size(shape.t)
            .registry(BlockRegistry::builder().build())
            .with_lru_backend()
            .build();
        Self {
            manager: manager.expect("a manager"),
            t: shape.t,
        }
    }

    fn open<'a>(&'a self, prompt: &Prompt, blocks: usize) -> Request<'a> {
        let found = self.manager.match_blocks(&prompt.hashes[..blocks]);
        Request {
            side: self,
            reused: found.len(),
            blocks: found,
        }
    }

    fn reused(request: &Request<'_>) -> usize {
        request.reused
    }

    fn store(request: &mut Request<'_>, prompt: &Prompt, blocks: usize) -> bool {
        let Some(fresh) = request.side.register(prompt, request.reused, blocks) else {
            return false;
        };
        request.blocks.extend(fresh);
        true
    }

    fn slots(request: &mut Request<'_>) -> usize {
        request.blocks.iter().map(|block| block.block_id()).sum()
    }

    fn evict(&self, blocks: usize) -> Vec<MutableBlock<Meta>> {
        self.manager.allocate_blocks(blocks).expect("room")
    }

    fn churn(&self, prompt: &Prompt, blocks: usize) {
        black_box(self.register(prompt, 0, blocks).expect("room"));
    }
}
