//! The `Core` class and its caches: converts arguments, calls, converts the result.
//!
//! The core itself is shared without a lock; `cache.rs` says who may be in a cache. Calls of microseconds keep the GIL
//! (letting it go costs more than it gives); those that walk all blocks let it go.

use crate::cache::{distinct, enter_all, with, Cache};
use crate::convert::{claim, int32s, lengths, outcome, plan, raise, retention, Copies, Lengths, Ranges};
use crate::recorded::{Offload, Recorded};
use crate::tables;
use kvpool_core::events::{Event, EventKind};
use kvpool_core::types::{CoreConfig, Mover, NoMover, PageCopy, PolicyKind, PoolSpec, RetentionSpec};
use kvpool_core::words::Tier;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyDict;
use std::collections::{HashMap, HashSet};

/// Tree, pools and their books. `core()` before a call in which the time counts.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Core {
    pub core: kvpool_core::Core,
    clock: Option<Py<PyAny>>,
    pub recorded: Recorded,
}

impl Core {
    /// The core, with the clock read if a block has a duration.
    pub fn core(&self, py: Python<'_>) -> PyResult<&kvpool_core::Core> {
        if self.core.is_timed() {
            self.read_clock(py)?;
        }
        Ok(&self.core)
    }

    pub fn copies_failed(&self, py: Python<'_>, caches: &[Py<Cache>]) -> PyResult<()> {
        for cache in caches.iter().rev() {
            let mut entered = outcome(py, cache.get().enter_soon(py))?;
            self.core.copies_failed(&mut entered);
        }
        Ok(())
    }

    pub fn read_clock(&self, py: Python<'_>) -> PyResult<()> {
        let Some(clock) = &self.clock else {
            return Ok(());
        };
        let now: f64 = clock.call0(py)?.extract(py)?;
        if now.is_nan() {
            return Err(PyValueError::new_err(
                "clock() returned nan: it must return seconds",
            ));
        }
        self.core.advance(now);
        Ok(())
    }
}

/// -> whether its id is free again; its last lengths, `None` if it was closed before
fn close(
    core: &kvpool_core::Core,
    cache: &mut kvpool_core::Cache,
) -> kvpool_core::Result<(bool, Option<Lengths>)> {
    let last = core.info(cache).ok().map(|info| lengths(&info));
    Ok((core.close(cache)?, last))
}

#[pymethods]
impl Core {
    /// Pools: (name, device slots, host slots, window or None, sink_tokens). offload(pool, device slot, host slot) -> whether
    /// the page was copied, both slots from 1; without it, `record`: they are kept for `Recorder.take`.
    #[new]
    #[pyo3(signature = (*, tokens_per_block, pools, max_blocks, max_seq_len=None, partial_reuse=true, hash_seed=0, policy="lru", collide=false, clock=None, offload_min_priority=30, offload=None, record=false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        tokens_per_block: u32,
        pools: Vec<(String, u32, u32, Option<u64>, u64)>,
        max_blocks: u32,
        max_seq_len: Option<u64>,
        partial_reuse: bool,
        hash_seed: u64,
        policy: &str,
        collide: bool,
        clock: Option<Py<PyAny>>,
        offload_min_priority: u8,
        offload: Option<Py<PyAny>>,
        record: bool,
    ) -> PyResult<Self> {
        let policy = match policy {
            "lru" => PolicyKind::Lru,
            "slru" => PolicyKind::Slru,
            other => {
                return Err(PyValueError::new_err(format!(
                    "policy: {other:?} is none of 'lru', 'slru'"
                )))
            }
        };
        let pools = pools
            .into_iter()
            .map(|(name, num_slots, host_slots, window, sink_tokens)| PoolSpec {
                name,
                num_slots,
                host_slots,
                window,
                sink_tokens,
            })
            .collect();
        let config = CoreConfig {
            tokens_per_block,
            pools,
            max_blocks,
            max_seq_len,
            partial_reuse,
            hash_seed,
            policy,
            offload_min_priority,
            collide,
        };
        let recorded = Recorded::default();
        let mover: Box<dyn Mover> = match offload {
            Some(call) => Box::new(Offload(call)),
            None if record => Box::new(recorded.clone()),
            None => Box::new(NoMover),
        };
        let core = kvpool_core::Core::with_mover(config, mover).map_err(|error| raise(py, error))?;
        Ok(Self {
            core,
            clock,
            recorded,
        })
    }

    /// The cache claims the longest match of `tokens`.
    #[pyo3(signature = (tokens, scope, epoch=None, ranges=None))]
    fn create(
        &self,
        py: Python<'_>,
        tokens: PyBuffer<i32>,
        scope: &[u8],
        epoch: Option<u64>,
        ranges: Option<Ranges>,
    ) -> PyResult<Cache> {
        let tokens = int32s(py, &tokens)?;
        let retention = ranges.map(retention);
        if self.core.is_timed() || retention.as_ref().is_some_and(RetentionSpec::is_timed) {
            self.read_clock(py)?;
        }
        let cache = self.core.create(tokens, scope, epoch, retention);
        outcome(py, cache).map(Cache::new)
    }

    /// Tokens that `create` would reuse now.
    #[pyo3(signature = (tokens, scope, epoch=None))]
    fn probe(
        &self,
        py: Python<'_>,
        tokens: PyBuffer<i32>,
        scope: &[u8],
        epoch: Option<u64>,
    ) -> PyResult<u64> {
        let tokens = int32s(py, &tokens)?;
        outcome(py, self.core.probe(&tokens, scope, epoch))
    }

    /// -> (resumed, [(pool, source slot, destination slot)]); report the copies by `copies_done`.
    fn resume(&self, py: Python<'_>, cache: &Bound<'_, Cache>) -> PyResult<(bool, Copies)> {
        let mut copies: Vec<PageCopy> = Vec::new();
        let core = self.core(py)?;
        let resumed = with(py, cache, |cache| core.resume(cache, &mut copies))?;
        Ok((resumed, plan(&copies)))
    }

    /// Claims of a batch, in order: (tokens, scope, epoch, retention, fewest new tokens or None). `promised`: a claim is
    /// kept only with its need, and all before it; None for those that are not.
    #[allow(clippy::type_complexity)]
    fn claim(
        &self,
        py: Python<'_>,
        requests: Vec<(
            PyBuffer<i32>,
            PyBackedBytes,
            Option<u64>,
            Option<Ranges>,
            Option<u64>,
        )>,
        promised: bool,
    ) -> PyResult<Vec<Option<Cache>>> {
        let mut tokens = Vec::with_capacity(requests.len());
        let mut timed = self.core.is_timed();
        for (given, ..) in &requests {
            tokens.push(int32s(py, given)?);
        }
        let mut claims = Vec::with_capacity(requests.len());
        for ((_, scope, epoch, ranges, least), tokens) in requests.iter().zip(tokens) {
            let claim = claim(tokens, scope, (*epoch, ranges), (*least, None));
            timed |= claim.retention.as_ref().is_some_and(RetentionSpec::is_timed);
            claims.push(claim);
        }
        if timed {
            self.read_clock(py)?;
        }
        let caches = outcome(py, self.core.claim_all(claims, promised))?;
        Ok(caches.into_iter().map(|cache| cache.map(Cache::new)).collect())
    }

    /// Room for (cache, tokens behind its history, most tokens in all) in order -> (per cache: whether it has it, None if
    /// it was claimed by the batch and is closed now; copies to make). `stop`: at the first one without room.
    fn provide(
        &self,
        py: Python<'_>,
        caches: Vec<(Py<Cache>, u64, u64)>,
        stop: bool,
    ) -> PyResult<(Vec<Option<bool>>, Copies)> {
        let core = self.core(py)?;
        let handles: Vec<Py<Cache>> = caches.iter().map(|(cache, ..)| cache.clone_ref(py)).collect();
        let mut entered = enter_all(py, &handles)?;
        if entered.len() != caches.len() {
            return Err(PyValueError::new_err("caches: one is listed twice"));
        }
        // Everything that can be refused is refused before anything is provided.
        let mut capacities = Vec::with_capacity(caches.len());
        for ((cache, _), (_, tokens, most)) in entered.iter().zip(&caches) {
            let history = outcome(py, core.info(cache))?.history;
            let capacity = history.saturating_add(*tokens).min(*most);
            outcome(py, core.can_provide(cache, capacity))?;
            capacities.push(capacity);
        }
        let (mut provided, mut copies) = (Vec::with_capacity(caches.len()), Vec::new());
        for ((cache, _), capacity) in entered.iter_mut().zip(capacities) {
            let mut done = Some(outcome(py, core.provide(cache, capacity, &mut copies))?);
            if done == Some(false) && core.is_in_work(cache) {
                outcome(py, core.close(cache))?;
                done = None;
            }
            provided.push(done);
            if stop && done != Some(true) {
                break;
            }
        }
        Ok((provided, plan(&copies)))
    }

    /// Which of the caches a batch has claimed and not provided; none that another thread does not leave.
    fn in_work(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<Vec<bool>> {
        let core = self.core(py)?;
        let claimed = |cache: &Py<Cache>| cache.get().look(py).is_ok_and(|cache| core.is_in_work(&cache));
        Ok(caches.iter().map(claimed).collect())
    }

    /// The copies of the last `resume` or `provide` are made.
    fn copies_done(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<()> {
        let core = self.core(py)?;
        for cache in &caches {
            let mut entered = outcome(py, cache.get().enter_soon(py))?;
            core.copies_done(&mut entered);
        }
        Ok(())
    }

    /// The copies of the last `resume` or `provide` could not be made: the caches are as they were before it.
    #[pyo3(name = "copies_failed")]
    fn py_copies_failed(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<()> {
        self.copies_failed(py, &caches)
    }

    fn suspend(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<()> {
        for (cache, _) in &mut enter_all(py, &caches)? {
            outcome(py, self.core.suspend(cache))?;
        }
        Ok(())
    }

    #[pyo3(signature = (cache, capacity, history_length=None))]
    fn resize(
        &self,
        py: Python<'_>,
        cache: &Bound<'_, Cache>,
        capacity: u64,
        history_length: Option<u64>,
    ) -> PyResult<bool> {
        let core = self.core(py)?;
        with(py, cache, |cache| core.resize(cache, capacity, history_length))
    }

    /// -> whether a block table entry changed
    fn commit(&self, py: Python<'_>, cache: &Bound<'_, Cache>, tokens: PyBuffer<i32>) -> PyResult<bool> {
        let tokens = int32s(py, &tokens)?;
        let core = self.core(py)?;
        with(py, cache, |cache| core.commit(cache, &tokens))
    }

    /// -> whether its id is free again (not so while a step is in flight, nor if it was closed before); its last
    /// (reused, capacity, history_length, committed), None if it was closed before
    fn close_one(&self, py: Python<'_>, cache: &Bound<'_, Cache>) -> PyResult<(bool, Option<Lengths>)> {
        let core = self.core(py)?;
        with(py, cache, |cache| close(core, cache))
    }

    /// As `close_one`, per cache: all are closed, or none.
    fn close(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<Vec<(bool, Option<Lengths>)>> {
        let core = self.core(py)?;
        let mut entered = enter_all(py, &caches)?;
        for (cache, _) in &entered {
            outcome(py, core.can_close(cache))?; // all are closed, or none
        }
        let mut closed = HashMap::with_capacity(caches.len());
        for ((cache, _), (this, _)) in entered.iter_mut().zip(distinct(&caches)) {
            closed.insert(std::ptr::from_ref(this), outcome(py, close(core, cache))?);
        }
        let of = |cache: &Py<Cache>| closed[&std::ptr::from_ref(cache.get())];
        Ok(caches.iter().map(of).collect())
    }

    /// -> (state, reused, capacity, history_length, committed); None: it is closed
    #[allow(clippy::type_complexity)]
    fn info(&self, py: Python<'_>, cache: Py<Cache>) -> PyResult<Option<(&'static str, u64, u64, u64, u64)>> {
        let cache = outcome(py, cache.get().look(py))?;
        if self.core.is_closed(&cache) {
            return Ok(None);
        }
        let info = outcome(py, self.core.info(&cache))?;
        let (reused, capacity, history, committed) = lengths(&info);
        Ok(Some((info.state.name(), reused, capacity, history, committed)))
    }

    /// Entries that the widest table of these caches has.
    fn widest(&self, py: Python<'_>, caches: Vec<Py<Cache>>, pool: usize) -> PyResult<usize> {
        tables::widest(py, &self.core, &caches, pool)
    }

    /// Writes one row of slots per cache into `out`: int32, C-contiguous, (n, widest) or larger; the rest is `fill`.
    fn block_tables(
        &self,
        py: Python<'_>,
        caches: Vec<Py<Cache>>,
        pool: usize,
        out: &Bound<'_, PyAny>,
        fill: i32,
    ) -> PyResult<()> {
        tables::rows(py, &self.core, &caches, pool, out, fill)
    }

    /// Of (cache, entries, alterations) as it was seen last -> what is seen now; per pool the slots that are new since, as
    /// int32 in native byte order.
    fn fresh_slots<'py>(&self, py: Python<'py>, seen: Vec<tables::Seen>) -> PyResult<tables::Fresh<'py>> {
        tables::fresh(py, &self.core, &seen)
    }

    /// -> per pool what a step over these caches uses, as int32 in native byte order: (all slots, where each cache's end, the
    /// slots from each one's history on, their ends)
    fn step_slots<'py>(&self, py: Python<'py>, caches: Vec<Py<Cache>>) -> PyResult<Vec<tables::Used<'py>>> {
        let pools = 0..self.core.num_pools();
        pools
            .map(|pool| tables::used(py, &self.core, &caches, pool))
            .collect()
    }

    /// -> (indptr, indices, last_page_len) as int32 in native byte order
    fn block_tables_csr<'py>(
        &self,
        py: Python<'py>,
        caches: Vec<Py<Cache>>,
        pool: usize,
        tokens_per_block: u64,
    ) -> PyResult<tables::Csr<'py>> {
        tables::csr(py, &self.core, &caches, pool, tokens_per_block)
    }

    /// All are fenced, or none.
    fn step_begin(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<()> {
        let mut entered = enter_all(py, &caches)?;
        for (cache, _) in &mut entered {
            outcome(py, self.core.step_begin(cache, 0))?;
        }
        for (cache, times) in &mut entered {
            outcome(py, self.core.step_begin(cache, *times))?;
        }
        Ok(())
    }

    /// -> places in the list of those that were closed meanwhile and are released now
    fn step_end(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<Vec<usize>> {
        let once = distinct(&caches);
        let mut entered = Vec::with_capacity(once.len());
        for (cache, times) in &once {
            let cache = outcome(py, cache.enter_soon(py))?;
            outcome(py, self.core.can_end(&cache, *times))?;
            entered.push(cache);
        }
        let core = self.core(py)?;
        let mut released = HashSet::new();
        for (cache, (this, times)) in entered.iter_mut().zip(&once) {
            if outcome(py, core.step_end(cache, *times))? {
                released.insert(std::ptr::from_ref(*this));
            }
        }
        let places = caches.iter().enumerate();
        let released = places.filter(|(_, cache)| released.contains(&std::ptr::from_ref(cache.get())));
        Ok(released.map(|(at, _)| at).collect())
    }

    /// -> [(number, stored, pool, key, parent key or None)] since the last call, at most `most`
    #[allow(clippy::type_complexity)]
    fn drain_events(&self, most: usize) -> Vec<(u64, &'static str, u32, bool, u64, Option<u64>)> {
        let mut events = Vec::new();
        self.core.events.drain(most, &mut events);
        let event = |e: &Event| {
            let kind = match e.kind {
                EventKind::Stored => "stored",
                EventKind::Removed => "removed",
                EventKind::Moved => "moved",
            };
            (e.number, kind, e.pool, e.tier == Tier::Host, e.key, e.parent)
        };
        events.iter().map(event).collect()
    }

    /// Keys that the full blocks of a prompt have in the events.
    #[pyo3(signature = (tokens, scope, epoch=None))]
    fn block_keys(
        &self,
        py: Python<'_>,
        tokens: PyBuffer<i32>,
        scope: &[u8],
        epoch: Option<u64>,
    ) -> PyResult<Vec<u64>> {
        let tokens = int32s(py, &tokens)?;
        outcome(py, self.core.block_keys(&tokens, scope, epoch))
    }

    /// -> leaves that left the device
    fn evict(&self, py: Python<'_>, num_blocks: u64) -> PyResult<u64> {
        let core = self.core(py)?;
        Ok(py.detach(|| core.evict(num_blocks)))
    }

    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        let core = self.core(py)?;
        py.detach(|| core.clear());
        Ok(())
    }

    fn set_epoch(&self, py: Python<'_>, epoch: u64) -> PyResult<()> {
        outcome(py, self.core.set_epoch(epoch))
    }

    fn available_tokens(&self) -> u64 {
        self.core.available_tokens()
    }

    /// `caches`: all that are open or in flight.
    fn check(&self, py: Python<'_>, caches: Vec<Py<Cache>>) -> PyResult<()> {
        let looks = caches.iter().map(|cache| outcome(py, cache.get().look(py)));
        let looks = looks.collect::<PyResult<Vec<_>>>()?;
        let caches: Vec<&kvpool_core::Cache> = looks.iter().map(|cache| &**cache).collect();
        outcome(py, self.core.check(&caches))
    }

    /// -> {counter: value}
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.core.counters();
        let dict = PyDict::new(py);
        dict.set_item("requests", counters.requests)?;
        dict.set_item("prompt_tokens", counters.prompt_tokens)?;
        dict.set_item("reused_tokens", counters.reused_tokens)?;
        dict.set_item("prompt_blocks", counters.prompt_blocks)?;
        dict.set_item("reused_blocks", counters.reused_blocks)?;
        dict.set_item("evicted", counters.evicted)?;
        dict.set_item("dropped", counters.dropped)?;
        dict.set_item("offloaded", counters.offloaded)?;
        dict.set_item("onboarded", counters.onboarded)?;
        Ok(dict)
    }

    /// -> [(slots, free, active, held, cached, fenced, peak) per pool]
    #[allow(clippy::type_complexity)]
    fn books(&self, py: Python<'_>, host: bool) -> Vec<(u32, u32, u32, u32, u32, u32, u32)> {
        let tier = if host { Tier::Host } else { Tier::Device };
        let books = py.detach(|| self.core.books(tier));
        books
            .iter()
            .map(|b| (b.slots, b.free, b.active, b.held, b.cached, b.fenced, b.peak))
            .collect()
    }
}
