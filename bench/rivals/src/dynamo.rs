//! dynamo-kv-router's compressed concurrent tree: an index only, which owns no blocks, counts no references, evicts nothing.

use crate::world::{Prompt, T};
use dynamo_kv_router::indexer::{SyncIndexer, WorkerTask};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData,
    LocalBlockHash, RouterEvent,
};
use dynamo_kv_router::ConcurrentRadixTreeCompressed;
use std::hint::black_box;
use std::time::Duration;

use cpu_time::ThreadTime;

pub struct Dynamo(ConcurrentRadixTreeCompressed);

/// Hashes of the blocks of a prompt, each alone: what the tree is searched by.
pub struct Keys(Vec<LocalBlockHash>);

fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31)
}

impl Keys {
    pub fn of(prompt: &Prompt) -> Self {
        let blocks = prompt.tokens.chunks_exact(T);
        let hash = |block: &[i32]| block.iter().fold(1, |hash, &token| mix(hash, token as u64));
        Self(blocks.map(|block| LocalBlockHash(hash(block))).collect())
    }

    /// Events that store it in runs of `run` blocks.
    fn events(&self, run: usize) -> Vec<RouterEvent> {
        let mut prefix = 7;
        let mut parent = None;
        let mut events = Vec::new();
        for blocks in self.0.chunks(run) {
            let before = parent;
            let stored = blocks.iter().map(|&tokens_hash| {
                prefix = mix(prefix, tokens_hash.0);
                parent = Some(ExternalSequenceBlockHash(prefix));
                KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(prefix),
                    tokens_hash,
                    mm_extra_info: None,
                }
            });
            let data = KvCacheEventData::Stored(KvCacheStoreData {
                blocks: stored.collect(),
                parent_hash: before,
                start_position: None,
            });
            let event = KvCacheEvent {
                event_id: 0,
                data,
                dp_rank: 0,
            };
            events.push(RouterEvent::new(1, event));
        }
        events
    }
}

impl Dynamo {
    pub fn new() -> Self {
        Self(ConcurrentRadixTreeCompressed::new())
    }

    /// Stores prompts in runs of `run` blocks; CPU time of its worker's loop, which this thread runs over a full channel.
    pub fn store(&self, prompts: &[Keys], run: usize) -> Duration {
        let (sender, receiver) = flume::unbounded();
        for event in prompts.iter().flat_map(|prompt| prompt.events(run)) {
            sender.send(WorkerTask::Event(event)).expect("a receiver");
        }
        sender.send(WorkerTask::Terminate).expect("a receiver");
        let start = ThreadTime::now();
        self.0.worker(receiver, None).expect("a worker");
        start.elapsed()
    }

    /// How many blocks of a prompt are stored, which must be all.
    pub fn find(&self, keys: &Keys) {
        let found = black_box(self.0.find_matches(&keys.0, false));
        assert!(found
            .scores
            .values()
            .all(|&blocks| blocks as usize == keys.0.len()));
        assert_eq!(found.scores.len(), 1);
    }
}
