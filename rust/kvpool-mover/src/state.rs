//! What the mutex guards: streams, events, descriptors, and what came of the work.

use crate::checker::Checker;
use crate::faults::Faults;
use crate::hazard::{Access, Hazard};
use crate::memory::Pool;
use crate::runs::Run;
use crate::slots::{Books, Slots};
use crate::ticket::Progress;
use crate::types::{Clock, Code, Direction, Event, Tier, STREAMS};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Runs of one driver call at most: more have crashed drivers.
const CALL: usize = 4096;

/// Never fails: what a panicking thread leaves behind is whole, since nothing of others' runs under a lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has been done, in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages that arrived.
    pub pages: u64,
    /// Pages that did not.
    pub failed: u64,
    /// Runs of neighbours that they were merged into.
    pub runs: u64,
    /// Driver calls.
    pub calls: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Submissions that found the queue full.
    pub full: u64,
}

type Buffer = Arc<Mutex<Vec<Run>>>;

/// Descriptor buffers. One belongs to its move until that is done.
#[derive(Debug, Default)]
struct Descriptors {
    buffers: Vec<Buffer>,
    free: Vec<usize>,
    /// The last move that read each buffer.
    last: Vec<Option<Event>>,
}

impl Descriptors {
    /// A buffer for a move; a planted bug takes the newest one, whoever has it.
    fn take(&mut self, planted: bool) -> usize {
        if planted && !self.buffers.is_empty() {
            return self.buffers.len() - 1;
        }
        self.free.pop().unwrap_or_else(|| {
            self.buffers.push(Buffer::default());
            self.last.push(None);
            self.buffers.len() - 1
        })
    }
}

/// A move between two tiers of a pool.
#[derive(Debug)]
pub(crate) struct Move {
    pub pool: usize,
    pub from: Tier,
    pub to: Tier,
    buffer: usize,
    runs: Buffer,
    /// Numbers of the pages that fail on purpose.
    failing: Vec<u32>,
    pub ticket: Arc<Mutex<Progress>>,
}

/// One piece of a ticket's batch.
#[derive(Debug, Default)]
pub(crate) struct Part {
    /// Number of its first page in the batch.
    pub index: u32,
    /// What it waits for besides.
    pub after: Clock,
    /// Numbers of the pages that fail on purpose.
    pub failing: Vec<u32>,
}

pub(crate) enum Work {
    Move(Move),
    /// A kernel of the engine.
    Call(Box<dyn FnOnce() + Send>),
    /// Slots that the engine has written by now.
    Mark(Vec<(usize, Tier, u32)>),
}

struct Entry {
    place: u64,
    waits: Clock,
    work: Work,
}

#[derive(Default)]
pub(crate) struct Stream {
    queue: VecDeque<Entry>,
    /// Work that was ever enqueued.
    pub placed: u64,
    running: bool,
    pub stalled: bool,
    /// Whether it has a thread.
    pub started: bool,
    /// What the next work waits for besides.
    pub pending: Clock,
    /// Tickets that are not done.
    pub tickets: usize,
}

/// The head of a stream, to be run without the lock.
pub(crate) struct Task {
    pub stream: usize,
    work: Option<Work>,
    /// Pages that are not copied, by number.
    skip: Vec<(u32, Code)>,
    calls: u64,
}

pub(crate) struct State {
    pub books: Books,
    pub streams: [Stream; STREAMS],
    /// Work that is done.
    pub done: Clock,
    pub checker: Option<Checker>,
    pub plant: Option<Hazard>,
    pub faults: Option<Faults>,
    /// Slots whose content did not arrive.
    bad: HashSet<(usize, Tier, u32)>,
    descriptors: Descriptors,
    pub closed: bool,
    pub totals: Totals,
    /// Slots of tickets that were given up.
    pub fenced: Vec<(usize, Tier, u32)>,
}

impl State {
    pub fn new(pools: &[Pool], check: bool, plant: Option<Hazard>, faults: bool) -> Self {
        Self {
            books: Books::new(pools),
            streams: Default::default(),
            done: [0; STREAMS],
            checker: check.then(Checker::default),
            plant,
            faults: faults.then(Faults::default),
            bad: HashSet::new(),
            descriptors: Descriptors::default(),
            closed: false,
            totals: Totals::default(),
            fenced: Vec::new(),
        }
    }

    // -- enqueue ----------------------------------------------------------------------------

    /// Work with its uses of slots enters a stream; what it waits for is `after`, and what the slots' events say.
    fn enqueue(
        &mut self,
        stream: usize,
        uses: &[Slots<'_>],
        mut after: Clock,
        ordered: bool,
    ) -> (Event, Clock) {
        crate::types::join(&mut after, &std::mem::take(&mut self.streams[stream].pending));
        self.streams[stream].placed += 1;
        let place = self.streams[stream].placed;
        let event = Event { stream, place };
        if ordered {
            for &slots in uses {
                self.books.waits(stream, slots, self.plant, &mut after);
            }
        }
        if let Some(checker) = &mut self.checker {
            checker.enqueue(event, &after);
            for &slots in uses {
                self.books.check(event, slots, checker);
            }
        }
        for &slots in uses {
            self.books.mark(event, slots);
        }
        (event, after)
    }

    /// A checked move.
    pub fn enqueue_move(
        &mut self,
        stream: usize,
        src: Slots<'_>,
        dst: Slots<'_>,
        part: Part,
        ticket: &Arc<Mutex<Progress>>,
    ) {
        let (event, waits) = self.enqueue(stream, &[src, dst], part.after, true);
        let buffer = self
            .descriptors
            .take(self.plant == Some(Hazard::DescriptorRewrite));
        let last = self.descriptors.last[buffer].replace(event);
        if let (Some(checker), Some(last)) = (&mut self.checker, last) {
            if self.plant == Some(Hazard::DescriptorRewrite) && !checker.has_seen(last) {
                checker.rewritten(event, last, buffer as u32);
            }
        }
        let runs = self.descriptors.buffers[buffer].clone();
        crate::runs::merge(src.slots, dst.slots, part.index, &mut lock(&runs));
        let mut progress = lock(ticket);
        progress.left += 1;
        progress.ends[stream] = event.place;
        drop(progress);
        self.streams[stream].queue.push_back(Entry {
            place: event.place,
            waits,
            work: Work::Move(Move {
                pool: src.pool,
                from: src.tier,
                to: dst.tier,
                buffer,
                runs,
                failing: part.failing,
                ticket: ticket.clone(),
            }),
        });
    }

    /// Work of the engine on one of its streams.
    pub fn enqueue_call(&mut self, stream: usize, call: Box<dyn FnOnce() + Send>) {
        let (event, waits) = self.enqueue(stream, &[], [0; STREAMS], false);
        self.streams[stream].queue.push_back(Entry {
            place: event.place,
            waits,
            work: Work::Call(call),
        });
    }

    /// The engine's work so far used these slots; on its own streams when the stream gets here, else already.
    pub fn enqueue_mark(&mut self, stream: usize, uses: &[Slots<'_>]) {
        // What a kernel waits for was said before it; here only the books are written.
        let (event, waits) = self.enqueue(stream, uses, [0; STREAMS], false);
        let written = uses.iter().filter(|slots| slots.access == Access::Write);
        let written: Vec<_> = written
            .flat_map(|slots| {
                slots
                    .slots
                    .iter()
                    .map(|&slot| (slots.pool, slots.tier, slot as u32))
            })
            .collect();
        if stream == crate::types::CALLER {
            self.done[stream] = event.place;
            self.heal(&written);
            return;
        }
        self.streams[stream].queue.push_back(Entry {
            place: event.place,
            waits,
            work: Work::Mark(written),
        });
    }

    /// Numbers of the pages of a batch that fail on purpose.
    pub fn failing(&mut self, direction: Direction, pages: usize) -> Vec<u32> {
        let faults = self.faults.as_mut();
        faults.map_or(Vec::new(), |faults| faults.failing(direction, pages))
    }

    // -- run --------------------------------------------------------------------------------

    pub fn is_done(&self, clock: &Clock) -> bool {
        self.done.iter().zip(clock).all(|(done, wanted)| done >= wanted)
    }

    pub fn is_idle(&self, stream: usize) -> bool {
        self.streams[stream].queue.is_empty() && !self.streams[stream].running
    }

    pub fn is_runnable(&self, stream: usize) -> bool {
        let s = &self.streams[stream];
        !s.running
            && (!s.stalled || self.closed)
            && s.queue.front().is_some_and(|head| self.is_done(&head.waits))
    }

    /// A stream that a waiter may run to get nearer to `wanted`: moves only, a kernel is its own thread's.
    pub fn helpful(&self, wanted: &Clock, depth: usize) -> Option<usize> {
        (0..crate::types::CALLER).find_map(|stream| {
            if self.done[stream] >= wanted[stream] {
                None
            } else if self.is_runnable(stream) {
                Some(stream)
            } else {
                let head = self.streams[stream].queue.front()?;
                let deeper = depth > 0 && !self.streams[stream].running;
                deeper.then(|| self.helpful(&head.waits, depth - 1))?
            }
        })
    }

    /// Takes the head of a runnable stream.
    pub fn take(&mut self, stream: usize) -> Task {
        let Some(entry) = self.streams[stream].queue.pop_front() else {
            unreachable!("only a runnable stream's head is taken");
        };
        self.streams[stream].running = true;
        let mut task = Task {
            stream,
            work: None,
            skip: Vec::new(),
            calls: 0,
        };
        if let Work::Move(m) = &entry.work {
            let all = if lock(&m.ticket).given_up {
                Some(Code::Timeout)
            } else {
                (self.closed && self.streams[stream].stalled).then_some(Code::Closed)
            };
            let runs = lock(&m.runs);
            if let Some(code) = all {
                let pages = runs.iter().flat_map(|run| run.pages());
                task.skip = pages.map(|page| (page.index, code)).collect();
            } else {
                let bad = |page: &Run| self.bad.contains(&(m.pool, m.from, page.src));
                let mut skip: BTreeMap<u32, Code> =
                    m.failing.iter().map(|&index| (index, Code::Copy)).collect();
                if !self.bad.is_empty() {
                    let pages = runs.iter().flat_map(|run| run.pages()).filter(bad);
                    skip.extend(pages.map(|page| (page.index, Code::Source)));
                }
                task.skip = skip.into_iter().collect();
            }
        }
        task.work = Some(entry.work);
        task
    }

    /// All work before the head of a stream that does not run is done, or was taken out.
    fn advance(&mut self, stream: usize) {
        let s = &self.streams[stream];
        if !s.running {
            self.done[stream] = s.queue.front().map_or(s.placed, |head| head.place - 1);
        }
    }

    /// Takes the pieces of a ticket out that do not run yet: they never will, and nobody needs to wait for them.
    pub fn withdraw(&mut self, ticket: &Arc<Mutex<Progress>>) {
        for stream in 0..STREAMS {
            let queue = std::mem::take(&mut self.streams[stream].queue);
            for entry in queue {
                match entry.work {
                    Work::Move(m) if Arc::ptr_eq(&m.ticket, ticket) => {
                        let pages = lock(&m.runs)
                            .iter()
                            .flat_map(|run| run.pages())
                            .collect::<Vec<_>>();
                        let skip: Vec<_> = pages.iter().map(|page| (page.index, Code::Timeout)).collect();
                        self.finish_move(m, &skip, 0);
                    }
                    work => self.streams[stream].queue.push_back(Entry { work, ..entry }),
                }
            }
            self.advance(stream);
        }
    }

    /// The head of a stream was run.
    pub fn finish(&mut self, task: Task) {
        self.streams[task.stream].running = false;
        self.advance(task.stream);
        match task.work {
            Some(Work::Move(m)) => self.finish_move(m, &task.skip, task.calls),
            Some(Work::Mark(written)) => self.heal(&written),
            _ => {}
        }
    }

    /// Slots that were written anew.
    fn heal(&mut self, written: &[(usize, Tier, u32)]) {
        if !self.bad.is_empty() {
            for slot in written {
                self.bad.remove(slot);
            }
        }
    }

    fn finish_move(&mut self, m: Move, skip: &[(u32, Code)], calls: u64) {
        let mut progress = lock(&m.ticket);
        let runs = lock(&m.runs);
        let pages: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
        if !skip.is_empty() || !self.bad.is_empty() {
            for page in runs.iter().flat_map(|run| run.pages()) {
                let slot = (m.pool, m.to, page.dst);
                match skip.binary_search_by_key(&page.index, |&(index, _)| index) {
                    Ok(at) => {
                        self.bad.insert(slot);
                        progress.fail(page.index, skip[at].1);
                    }
                    Err(_) => {
                        self.bad.remove(&slot);
                    }
                }
            }
        }
        if m.to != Tier::Staging {
            let arrived = pages - skip.len() as u64;
            self.totals.pages += arrived;
            self.totals.failed += skip.len() as u64;
            self.totals.bytes += arrived * progress.page_bytes as u64;
        }
        self.totals.runs += runs.len() as u64;
        self.totals.calls += calls;
        progress.left -= 1;
        if progress.left == 0 {
            self.streams[progress.direction as usize].tickets -= 1;
        }
        if !self.descriptors.free.contains(&m.buffer) {
            self.descriptors.free.push(m.buffer); // twice only after a planted bug
        }
    }
}

impl Task {
    /// Does the work, without the lock.
    pub fn run(&mut self, pools: &[Pool]) {
        match self.work.take() {
            Some(Work::Move(m)) => {
                for runs in lock(&m.runs).chunks(CALL) {
                    self.calls += 1;
                    for run in runs {
                        if self.skip.is_empty() {
                            pools[m.pool].copy(m.from, m.to, run);
                            continue;
                        }
                        for page in run.pages() {
                            let skipped = self.skip.binary_search_by_key(&page.index, |&(index, _)| index);
                            if skipped.is_err() {
                                pools[m.pool].copy(m.from, m.to, &page);
                            }
                        }
                    }
                }
                self.work = Some(Work::Move(m));
            }
            Some(Work::Call(call)) => {
                // A kernel that panics is over all the same; its owner learns of it by other ways.
                drop(std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)));
            }
            work => self.work = work,
        }
    }
}
