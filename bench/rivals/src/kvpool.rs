//! kvpool-core under every workload: the one place that calls it.
//!
//! It is given tokens: in each call it hashes them, compares them with what is cached and copies them into the request.

use crate::world::{Prompt, Shape, Side};
use kvpool_core::types::{CoreConfig, PolicyKind, PoolSpec};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, Core};

pub struct Kvpool {
    pub core: Core,
    t: usize,
}

/// An open cache.
pub struct Request<'a> {
    side: &'a Kvpool,
    pub cache: Cache,
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        self.side.core.close(&mut self.cache).expect("an open cache");
    }
}

impl Kvpool {
    pub fn with_policy(shape: Shape, policy: PolicyKind) -> Self {
        let pool = |name: String, window| PoolSpec {
            name,
            num_slots: shape.slots as u32,
            host_slots: 0,
            window,
            sink_tokens: 0,
        };
        let full = (0..shape.full).map(|i| pool(format!("full {i}"), None));
        let windowed = (0..shape.windowed).map(|i| pool(format!("window {i}"), Some(256)));
        let core = Core::new(CoreConfig {
            tokens_per_block: shape.t as u32,
            pools: full.chain(windowed).collect(),
            max_blocks: shape.slots as u32,
            max_seq_len: None,
            partial_reuse: true,
            hash_seed: 1,
            policy,
            offload_min_priority: 30,
            collide: false,
        });
        Self {
            core: core.expect("memory"),
            t: shape.t,
        }
    }

    /// Blocks of the first pool that hold nothing.
    pub fn free(&self) -> usize {
        self.core.books(Tier::Device)[0].free as usize
    }

    /// Makes a claimed request ACTIVE: every live page on the device.
    pub fn resume(request: &mut Request<'_>) {
        let mut copies = Vec::new();
        let core = &request.side.core;
        assert!(core.resume(&mut request.cache, &mut copies).expect("open"));
        core.copies_done(&mut request.cache);
    }

    /// Storage for `blocks` whole blocks.
    pub fn resize(request: &mut Request<'_>, blocks: usize) -> bool {
        let tokens = (blocks * request.side.t) as u64;
        let core = &request.side.core;
        core.resize(&mut request.cache, tokens, None).expect("active")
    }

    /// The first `blocks` blocks of the prompt are final; what was reused is so already, and may end inside a block.
    pub fn commit(request: &mut Request<'_>, prompt: &Prompt, blocks: usize) {
        let core = &request.side.core;
        let from = core.info(&request.cache).expect("open").committed as usize;
        let tokens = &prompt.tokens[from..blocks * request.side.t];
        core.commit(&mut request.cache, tokens).expect("active");
    }
}

impl Side for Kvpool {
    type Request<'a> = Request<'a>;
    type Evicted = ();

    const NAME: &'static str = "kvpool-core";

    fn new(shape: Shape) -> Self {
        Self::with_policy(shape, PolicyKind::Lru)
    }

    fn open<'a>(&'a self, prompt: &Prompt, blocks: usize) -> Request<'a> {
        let tokens = &prompt.tokens[..blocks * self.t + 1];
        let cache = self.core.create(tokens, b"", None, None).expect("a cache");
        Request { side: self, cache }
    }

    fn reused(request: &Request<'_>) -> usize {
        let info = request.side.core.info(&request.cache).expect("open");
        info.reused as usize / request.side.t
    }

    fn store(request: &mut Request<'_>, prompt: &Prompt, blocks: usize) -> bool {
        Self::resume(request);
        if !Self::resize(request, blocks) {
            return false;
        }
        Self::commit(request, prompt, blocks);
        true
    }

    fn slots(request: &mut Request<'_>) -> usize {
        Self::resume(request);
        let core = &request.side.core;
        let tables = (0..core.num_pools()).map(|pool| core.table(&request.cache, pool).expect("active"));
        tables.flatten().map(|&slot| slot as usize).sum()
    }

    fn evict(&self, blocks: usize) {
        assert_eq!(self.core.evict(blocks as u64), blocks as u64);
    }

    fn check(&self) {
        self.core.check(&[]).expect("books");
    }
}
