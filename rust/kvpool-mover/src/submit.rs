//! Submission: all arguments are checked before anything is taken.

use crate::hazard::Access;
use crate::mover::Mover;
use crate::slots::Slots;
use crate::state::{Part, State};
use crate::ticket::{Progress, Ticket};
use crate::types::{Clock, Direction, Refusal, Tier};
use std::sync::{Arc, Mutex};

fn reads(pool: usize, tier: Tier, slots: &[i32]) -> Slots<'_> {
    Slots {
        pool,
        tier,
        slots,
        access: Access::Read,
    }
}

fn writes(pool: usize, tier: Tier, slots: &[i32]) -> Slots<'_> {
    Slots {
        access: Access::Write,
        ..reads(pool, tier, slots)
    }
}

impl Mover {
    /// Page `src[i]` to `dst[i]` for all i, behind all that the slots' events name and the tickets `after`. `None`: the
    /// queue of the direction is full, nothing is taken.
    pub fn submit(
        &self,
        pool: usize,
        direction: Direction,
        src: &[i32],
        dst: &[i32],
        after: &[Ticket],
    ) -> Result<Option<Ticket>, Refusal> {
        let pools = &self.shared.pools;
        if src.len() != dst.len() {
            return Err(format!("src has {} slots, dst has {}", src.len(), dst.len()).into());
        }
        if after
            .iter()
            .any(|ticket| !Arc::ptr_eq(&ticket.shared, &self.shared))
        {
            return Err("after: a ticket is another mover's".into());
        }
        let (from, to) = direction.ends();
        let stream = direction as usize;
        let staged =
            direction == Direction::Offload && pools.get(pool).is_some_and(|p| p.rows(Tier::Staging) > 0);
        let streams = [stream, Direction::Copy as usize];
        let streams = &streams[..1 + usize::from(staged)];
        drop(self.open()?);
        if !src.is_empty() {
            for &stream in streams {
                self.start(stream)?;
            }
        }
        let mut state = self.open()?;
        state.books.exist(pools, reads(pool, from, src))?;
        state.books.exist(pools, writes(pool, to, dst))?;
        let null = |tier: Tier, slots: &[i32]| tier == Tier::Device && slots.contains(&0);
        if null(from, src) || null(to, dst) {
            return Err("slot 0 of the device is the null page: nobody moves it".into());
        }
        let books = &mut state.books;
        books.differ(pools, reads(pool, from, src), writes(pool, to, dst))?;
        let full = state
            .faults
            .as_mut()
            .is_some_and(|faults| faults.is_full(direction));
        if full || state.streams[stream].tickets >= self.shared.queue {
            state.totals.full += 1;
            return Ok(None);
        }
        let mut behind = Clock::default();
        for ticket in after {
            crate::types::join(&mut behind, &crate::state::lock(&ticket.progress).ends);
        }
        let page_bytes = pools[pool].page_bytes();
        let progress = Progress::new(pool, direction, src, dst, page_bytes);
        let progress = Arc::new(Mutex::new(progress));
        if !src.is_empty() {
            state.streams[stream].tickets += 1;
            match (direction, pools[pool].rows(Tier::Staging)) {
                (Direction::Offload, rows @ 1..) => {
                    stage(&mut state, pool, (src, dst), behind, rows, &progress)
                }
                _ => {
                    let failing = state.failing(direction, src.len());
                    let (src, dst) = (reads(pool, from, src), writes(pool, to, dst));
                    let part = Part {
                        index: 0,
                        after: behind,
                        failing,
                    };
                    state.enqueue_move(stream, src, dst, part, &progress);
                }
            }
        }
        self.shared.enqueued(state, streams);
        Ok(Some(Ticket {
            shared: self.shared.clone(),
            progress,
        }))
    }
}

/// An offload by way of the staging buffer: scattered pages are gathered there by the copy stream, then sent as one run.
fn stage(
    state: &mut State,
    pool: usize,
    (src, dst): (&[i32], &[i32]),
    behind: Clock,
    rows: u32,
    progress: &Arc<Mutex<Progress>>,
) {
    let staging: Vec<i32> = (0..rows as i32).collect();
    let failing = state.failing(Direction::Offload, src.len());
    let (copy, offload) = (Direction::Copy as usize, Direction::Offload as usize);
    let mut first = 0;
    for (src, dst) in src.chunks(rows as usize).zip(dst.chunks(rows as usize)) {
        let staging = &staging[..src.len()];
        let here = |index: &&u32| (first..first + src.len() as u32).contains(*index);
        let failing = failing.iter().filter(here).copied().collect();
        let gathered = writes(pool, Tier::Staging, staging);
        let source = reads(pool, Tier::Device, src);
        let gather = Part {
            index: first,
            after: behind,
            failing,
        };
        state.enqueue_move(copy, source, gathered, gather, progress);
        let sent = reads(pool, Tier::Staging, staging);
        let target = writes(pool, Tier::Host, dst);
        let send = Part {
            index: first,
            ..Part::default()
        };
        state.enqueue_move(offload, sent, target, send, progress);
        first += src.len() as u32;
    }
}
