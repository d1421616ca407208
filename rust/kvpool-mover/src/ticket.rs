//! Tickets: what became of one submission.

use crate::mover::Shared;
use crate::state::lock;
use crate::types::{Clock, Code, Direction, MoveError};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Progress {
    pub pool: usize,
    pub direction: Direction,
    pub src: Vec<i32>,
    pub dst: Vec<i32>,
    pub page_bytes: usize,
    /// Pieces of work that are not done.
    pub left: u32,
    /// The last piece in each stream.
    pub ends: Clock,
    /// By number in the batch.
    errors: BTreeMap<u32, Code>,
    pub given_up: bool,
}

impl Progress {
    pub fn new(pool: usize, direction: Direction, src: &[i32], dst: &[i32], page_bytes: usize) -> Self {
        Self {
            pool,
            direction,
            src: src.to_vec(),
            dst: dst.to_vec(),
            page_bytes,
            left: 0,
            ends: Clock::default(),
            errors: BTreeMap::new(),
            given_up: false,
        }
    }

    /// A page did not arrive. The first reason counts: what follows from it is no news.
    pub fn fail(&mut self, index: u32, code: Code) {
        if !self.given_up {
            self.errors.entry(index).or_insert(code);
        }
    }

    fn is_done(&self) -> bool {
        self.left == 0 || self.given_up
    }
}

/// What became of one submission. Dropping it changes nothing.
#[derive(Debug, Clone)]
pub struct Ticket {
    pub(crate) shared: Arc<Shared>,
    pub(crate) progress: Arc<Mutex<Progress>>,
}

impl Ticket {
    /// Whether it is over, well or not.
    pub fn is_done(&self) -> bool {
        let mut state = lock(&self.shared.state);
        let progress = lock(&self.progress);
        if progress.left == 0 {
            if let Some(checker) = &mut state.checker {
                checker.saw(&progress.ends);
            }
        }
        progress.is_done()
    }

    /// Waits until it is over. `false`: it was not in time.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let ends = lock(&self.progress).ends;
        self.shared.wait(&ends, timeout, Some(&self.progress))
    }

    /// The pages that did not arrive, the lowest number first, as far as is known now.
    pub fn errors(&self) -> Vec<MoveError> {
        let progress = lock(&self.progress);
        let error = |(&index, &code): (&u32, &Code)| MoveError {
            code,
            pool: progress.pool,
            slot: progress.src[index as usize] as u32,
            direction: progress.direction,
            index,
        };
        progress.errors.iter().map(error).collect()
    }

    /// Counts as failed from here on, if it is not done: pages that are not being copied yet never will be, and nobody
    /// waits for them. Its slots are reported as fenced.
    pub fn give_up(&self) -> bool {
        let mut state = lock(&self.shared.state);
        let mut progress = lock(&self.progress);
        if progress.is_done() {
            return false;
        }
        for index in 0..progress.src.len() {
            progress.fail(index as u32, Code::Timeout);
        }
        progress.given_up = true;
        let (from, to) = progress.direction.ends();
        let slots = progress.src.iter().map(|&slot| (from, slot));
        let slots = slots.chain(progress.dst.iter().map(|&slot| (to, slot)));
        let slots = slots.map(|(tier, slot)| (progress.pool, tier, slot as u32));
        state.fenced.extend(slots);
        drop(progress);
        state.withdraw(&self.progress);
        self.shared.changed(&state);
        true
    }
}
