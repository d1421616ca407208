//! The façade, and who runs the streams: a thread each, or a simulation.

use crate::checker::Finding;
use crate::faults::Faults;
use crate::hazard::{Access, Hazard};
use crate::memory::Pool;
use crate::slots::Slots;
use crate::state::{lock, State, Totals};
use crate::ticket::Progress;
use crate::types::{Clock, Direction, Order, Random, Refusal, Tier, CALLER, STREAMS};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a mover works.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tickets that a direction takes before it is full.
    pub queue: usize,
    /// Whether the checker runs.
    pub check: bool,
    /// A simulation in this order instead of threads.
    pub order: Option<Order>,
    /// Whether faults may be asked for.
    pub faults: bool,
    /// The kind of wait that is left out: a planted bug.
    pub plant: Option<Hazard>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue: 64,
            check: false,
            order: None,
            faults: false,
            plant: None,
        }
    }
}

/// Slots that the engine reads or writes.
#[derive(Debug, Clone, Copy)]
pub struct Use<'a> {
    /// Pool index.
    pub pool: usize,
    /// Tier.
    pub tier: Tier,
    /// Slots.
    pub slots: &'a [i32],
    /// Whether it writes them.
    pub writes: bool,
}

impl<'a> Use<'a> {
    fn slots(&self) -> Slots<'a> {
        Slots {
            pool: self.pool,
            tier: self.tier,
            slots: self.slots,
            access: if self.writes { Access::Write } else { Access::Read },
        }
    }
}

pub(crate) struct Shared {
    pub state: Mutex<State>,
    pub pools: Vec<Pool>,
    pub queue: usize,
    /// A simulation's order, and its choices.
    order: Option<(Order, Mutex<Random>)>,
    /// A stream's head may be runnable.
    wake: [Condvar; STREAMS],
    /// Something is done.
    pub news: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mover of {} pools", self.pools.len())
    }
}

impl Shared {
    /// Runs the head of a stream, without the lock.
    fn run<'a>(&'a self, mut state: MutexGuard<'a, State>, stream: usize) -> MutexGuard<'a, State> {
        let mut task = state.take(stream);
        drop(state);
        task.run(&self.pools);
        state = lock(&self.state);
        state.finish(task);
        self.changed(&state);
        state
    }

    /// Wakes whoever may go on now.
    pub fn changed(&self, state: &State) {
        for (stream, wake) in self.wake.iter().enumerate() {
            if state.closed || !state.is_idle(stream) {
                wake.notify_one(); // closed: a thread whose last work was done by a waiter has to end
            }
        }
        self.news.notify_all();
    }

    /// A stream's thread: until the mover is closed and nothing is left.
    fn serve(&self, stream: usize) {
        let mut state = lock(&self.state);
        loop {
            if state.is_runnable(stream) {
                state = self.run(state, stream);
            } else if state.closed && state.is_idle(stream) {
                return;
            } else {
                state = self.wake[stream]
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Work was put on a stream.
    pub fn enqueued<'a>(&'a self, mut state: MutexGuard<'a, State>, streams: &[usize]) {
        if self.order.is_none() {
            drop(state); // who is woken needs it
            streams.iter().for_each(|&stream| self.wake[stream].notify_one());
            return;
        }
        while let Some(next) = self.choose(&state, false) {
            state = self.run(state, next);
        }
    }

    /// The stream that a simulation runs next; `waited`: somebody waits.
    fn choose(&self, state: &State, waited: bool) -> Option<usize> {
        let (order, random) = self.order.as_ref()?;
        let runnable = |stream: &usize| state.is_runnable(*stream);
        let mut moves = (0..CALLER).filter(runnable);
        let mut kernels = (CALLER..STREAMS).filter(runnable);
        match order {
            Order::ComputeLast if waited => moves.next().or_else(|| kernels.next()),
            Order::ComputeLast => None,
            Order::CopiesEager => moves.next().or_else(|| kernels.next().filter(|_| waited)),
            Order::CopiesLast => kernels.next().or_else(|| moves.next_back().filter(|_| waited)),
            Order::Random(_) => {
                let mut random = lock(random);
                let all: Vec<usize> = moves.chain(kernels).collect();
                let none = all.is_empty() || (!waited && random.below(2) == 0);
                (!none).then(|| all[random.below(all.len())])
            }
        }
    }

    /// Waits until all this is done, or the ticket given up. `false`: it was not in time (in a simulation: it never will be).
    pub fn wait(&self, wanted: &Clock, timeout: Option<Duration>, ticket: Option<&Mutex<Progress>>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = lock(&self.state);
        while !state.is_done(wanted) {
            if ticket.is_some_and(|ticket| lock(ticket).given_up) {
                return true;
            }
            if self.order.is_some() {
                match self.choose(&state, true) {
                    Some(stream) => state = self.run(state, stream),
                    None => return false,
                }
                continue;
            }
            // Whoever waits helps: it costs a copy, not a change of threads.
            if let Some(stream) = state.helpful(wanted, STREAMS) {
                state = self.run(state, stream);
                continue;
            }
            let news = match deadline {
                None => self.news.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let waited = self.news.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state = news;
        }
        if let Some(checker) = &mut state.checker {
            checker.saw(wanted);
        }
        true
    }
}

/// Moves pages, in order. Shared by all threads.
#[derive(Debug)]
pub struct Mover {
    pub(crate) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The engine's streams that were handed out.
    streams: Mutex<usize>,
    /// The process that has the threads: a child of it has none.
    process: u32,
}

impl Mover {
    /// Over these pools. A direction gets its thread with its first batch, unless it is simulated.
    pub fn new(pools: Vec<Pool>, options: Options) -> Result<Self, Refusal> {
        if options.queue == 0 {
            return Err("queue: 0 would take nothing; give at least 1".into());
        }
        let seed = match options.order {
            Some(Order::Random(seed)) => seed,
            _ => 0,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(&pools, options.check, options.plant, options.faults)),
            pools,
            queue: options.queue,
            order: options.order.map(|order| (order, Mutex::new(Random(seed)))),
            wake: Default::default(),
            news: Condvar::new(),
        });
        Ok(Self {
            shared,
            threads: Mutex::new(Vec::new()),
            streams: Mutex::new(CALLER + 1),
            process: std::process::id(),
        })
    }

    /// The stream has a thread.
    pub(crate) fn start(&self, stream: usize) -> Result<(), Refusal> {
        if self.shared.order.is_some() {
            return Ok(());
        }
        let first = !std::mem::replace(&mut self.lock().streams[stream].started, true);
        if !first {
            return Ok(());
        }
        let shared = self.shared.clone();
        let name = format!("kvpool {}", crate::types::stream_name(stream));
        let thread = std::thread::Builder::new().name(name);
        let thread = thread.spawn(move || shared.serve(stream));
        lock(&self.threads)
            .push(thread.map_err(|error| Refusal::State(format!("no thread for a stream: {error}")))?);
        Ok(())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    /// Refuses a closed mover.
    pub(crate) fn open(&self) -> Result<MutexGuard<'_, State>, Refusal> {
        let state = self.lock();
        if state.closed {
            return Err(Refusal::State("the mover is closed".into()));
        }
        Ok(state)
    }

    // -- the engine's side ------------------------------------------------------------------

    /// A new stream of the engine.
    pub fn stream(&self) -> Result<usize, Refusal> {
        drop(self.open()?);
        let mut next = lock(&self.streams);
        if *next == STREAMS {
            return Err(Refusal::State(format!(
                "there are {} streams already",
                STREAMS - CALLER - 1
            )));
        }
        self.start(*next)?;
        *next += 1;
        Ok(*next - 1)
    }

    fn known(&self, stream: Option<usize>) -> Result<usize, Refusal> {
        match stream {
            None => Ok(CALLER),
            Some(stream) if (CALLER + 1..*lock(&self.streams)).contains(&stream) => Ok(stream),
            Some(stream) => Err(format!("stream: {stream} is none of this mover's").into()),
        }
    }

    /// The stream, or the caller if it is `None`, waits for everything that touches these slots. `false`: a caller that
    /// has waited for `timeout` in vain.
    pub fn wait_on(
        &self,
        stream: Option<usize>,
        uses: &[Use<'_>],
        timeout: Option<Duration>,
    ) -> Result<bool, Refusal> {
        let id = self.known(stream)?;
        let mut state = self.open()?;
        let mut waits = Clock::default();
        for used in uses {
            let slots = Slots {
                access: Access::Write,
                ..used.slots()
            };
            state.books.exist(&self.shared.pools, slots)?;
            state.books.waits(id, slots, state.plant, &mut waits);
        }
        if stream.is_some() {
            crate::types::join(&mut state.streams[id].pending, &waits);
            return Ok(true);
        }
        drop(state);
        Ok(self.shared.wait(&waits, timeout, None))
    }

    /// Work of the engine, in its stream; never on the caller's thread, unless simulated.
    pub fn launch(&self, stream: usize, call: Box<dyn FnOnce() + Send>) -> Result<(), Refusal> {
        let stream = self.known(Some(stream))?;
        let mut state = self.open()?;
        state.enqueue_call(stream, call);
        self.shared.enqueued(state, &[stream]);
        Ok(())
    }

    /// What was launched so far (by the caller itself if `stream` is `None`: is done and) used these slots.
    pub fn record(&self, stream: Option<usize>, uses: &[Use<'_>]) -> Result<(), Refusal> {
        let stream = self.known(stream)?;
        let mut state = self.open()?;
        let uses: Vec<Slots<'_>> = uses.iter().map(Use::slots).collect();
        for &slots in &uses {
            state.books.exist(&self.shared.pools, slots)?;
        }
        state.enqueue_mark(stream, &uses);
        self.shared.enqueued(state, &[stream]);
        Ok(())
    }

    /// Waits for all that was enqueued on a stream, or in all directions. `false`: in vain for `timeout`.
    pub fn synchronize(&self, stream: Option<usize>, timeout: Option<Duration>) -> Result<bool, Refusal> {
        let mut waits = Clock::default();
        let streams = match stream {
            None => 0..CALLER,
            Some(_) => {
                let id = self.known(stream)?;
                id..id + 1
            }
        };
        let state = self.lock();
        for stream in streams {
            waits[stream] = state.streams[stream].placed;
        }
        drop(state);
        Ok(self.shared.wait(&waits, timeout, None))
    }

    // -- what happened ------------------------------------------------------------------------

    /// What the checker found since the last call.
    pub fn findings(&self) -> Vec<Finding> {
        let mut state = self.lock();
        let checker = state.checker.as_mut();
        checker.map_or(Vec::new(), |checker| std::mem::take(&mut checker.findings))
    }

    /// A finding for people.
    pub fn text(&self, finding: &Finding) -> String {
        let names: Vec<String> = self.shared.pools.iter().map(|pool| pool.name.clone()).collect();
        finding.text(&names)
    }

    /// In all.
    pub fn totals(&self) -> Totals {
        self.lock().totals
    }

    /// Tickets of a direction that are not done.
    pub fn pending(&self, direction: Direction) -> usize {
        self.lock().streams[direction as usize].tickets
    }

    /// (pool, tier, slot) of tickets that were given up.
    pub fn fenced(&self) -> Vec<(usize, Tier, u32)> {
        self.lock().fenced.clone()
    }

    // -- faults -------------------------------------------------------------------------------

    fn faults<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> Result<T, Refusal> {
        let mut state = self.open()?;
        let faults = state.faults.as_mut();
        faults
            .map(change)
            .ok_or_else(|| Refusal::State("faults are for tests: make the mover with faults=True".into()))
    }

    /// The k-th page from now, from 1, fails.
    pub fn fail(&self, k: u64, direction: Option<Direction>) -> Result<(), Refusal> {
        self.faults(|faults| faults.fail(k, direction))
    }

    /// Every page fails with this probability.
    pub fn fail_at_random(&self, rate: f64, seed: u64) -> Result<(), Refusal> {
        self.faults(|faults| faults.fail_at_random(rate, seed))
    }

    /// The next submissions of a direction find its queue full.
    pub fn fill(&self, direction: Direction, times: u64) -> Result<(), Refusal> {
        self.faults(|faults| faults.full[direction as usize] = times)
    }

    /// A direction stands still, or goes on.
    pub fn stall(&self, direction: Direction, stalled: bool) -> Result<(), Refusal> {
        self.faults(|_| ())?;
        let stream = direction as usize;
        let mut state = self.lock();
        state.streams[stream].stalled = stalled;
        self.shared.enqueued(state, &[stream]);
        self.shared.news.notify_all();
        Ok(())
    }

    // -- the end --------------------------------------------------------------------------------

    /// No more work; what stands still fails.
    fn end(&self) {
        let mut state = self.lock();
        state.closed = true;
        drop(state);
        self.shared.wake.iter().for_each(Condvar::notify_one);
        self.shared.news.notify_all();
    }

    /// Takes no more work and waits for what is enqueued; what stands still fails. Twice is a no-op.
    pub fn close(&self) {
        self.end();
        let threads = std::mem::take(&mut *lock(&self.threads));
        let me = std::thread::current().id();
        if self.process != std::process::id() {
            std::mem::forget(threads); // of the parent; there is nobody here to wait for
            return;
        }
        if threads.iter().any(|thread| thread.thread().id() == me) {
            return; // a stream's own thread cannot wait for itself
        }
        let state = self.lock();
        let mut waits = Clock::default();
        for (wait, stream) in waits.iter_mut().zip(&state.streams) {
            *wait = stream.placed;
        }
        waits[CALLER] = 0; // done when it was recorded
        drop(state);
        self.shared.wait(&waits, None, None);
        for thread in threads {
            drop(thread.join()); // its panics were caught
        }
    }
}

impl Drop for Mover {
    /// Does not wait: the threads end, and let the memory go, when their work is done.
    fn drop(&mut self) {
        self.end();
    }
}
