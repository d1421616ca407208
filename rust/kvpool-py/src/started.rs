//! The `Started` class: what the scheduler asks of a core, one call per phase.

use crate::cache::{enter_all, Cache};
use crate::convert::{claim, int32s, outcome, plan, raise, Copies, Ranges};
use crate::core::Core;
use kvpool_core::types::{PageCopy, RetentionSpec};
use kvpool_core::Refusal;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

/// (tokens, scope, epoch, retention, most tokens to reuse or None)
type First = (
    PyBuffer<i32>,
    PyBackedBytes,
    Option<u64>,
    Option<Ranges>,
    Option<u64>,
);

/// As many tokens behind the history as there is room for; see `Started::provide`. `None`: it is closed now.
fn chunk(
    core: &kvpool_core::Core,
    cache: &mut kvpool_core::Cache,
    tokens: u64,
    unit: u64,
    leave: &[u32],
    copies: &mut Vec<PageCopy>,
) -> kvpool_core::Result<Option<u64>> {
    let mut room = core.fitting(cache, tokens, unit, leave)?;
    let history = core.info(cache)?.history;
    if room > 0 && !core.provide(cache, history + room, copies)? {
        room = 0;
    }
    if room == 0 && core.is_in_work(cache) {
        core.close(cache)?;
        return Ok(None);
    }
    Ok(Some(room))
}

/// (why, cache, reused tokens, slots taken per pool, pages shared per pool)
type Claimed = (&'static str, Option<Cache>, u64, Vec<u32>, Vec<u32>);

/// A scheduler's view of a core. Holds no state of its own.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Started {
    core: Py<Core>,
}

#[pymethods]
impl Started {
    #[new]
    fn new(core: Py<Core>) -> Self {
        Self { core }
    }

    /// -> per pool (available, returning): device slots that can be had now; that come back after the steps in flight
    fn pressure(&self) -> Vec<(u32, u32)> {
        self.core.get().core.pressure()
    }

    /// -> per pool: pages that only SUSPENDED caches claim and for which the host has no room
    fn stuck(&self) -> Vec<u32> {
        self.core.get().core.stuck()
    }

    /// Claims for first chunks, in order, within `budget` new tokens -> ("kept" | "memory" | "tokens", cache or None,
    /// reused tokens, slots taken per pool, pages shared per pool) for those that were looked at. A first chunk is `unit` tokens at least, or all (None: always all).
    fn claim(
        &self,
        py: Python<'_>,
        requests: Vec<First>,
        unit: Option<u64>,
        budget: u64,
    ) -> PyResult<Vec<Claimed>> {
        let core = self.core.get();
        let mut tokens = Vec::with_capacity(requests.len());
        for (given, ..) in &requests {
            tokens.push(int32s(py, given)?);
        }
        let mut timed = core.core.is_timed();
        let mut claims = Vec::with_capacity(requests.len());
        for ((_, scope, epoch, ranges, most), tokens) in requests.iter().zip(tokens) {
            let claim = claim(tokens, scope, (*epoch, ranges), (None, *most));
            timed |= claim.retention.as_ref().is_some_and(RetentionSpec::is_timed);
            claims.push(claim);
        }
        if timed {
            core.read_clock(py)?;
        }
        let starts = outcome(py, core.core.claim_starts(claims, unit, budget))?;
        let start = |start: kvpool_core::Start| match start {
            Ok(cache) => {
                let reused = core.core.info(&cache).map_or(0, |info| info.reused);
                let (taken, shared) = core.core.costs(&cache);
                ("kept", Some(Cache::new(cache)), reused, taken, shared)
            }
            Err(Refusal::Memory) => ("memory", None, 0, vec![], vec![]),
            Err(Refusal::Tokens) => ("tokens", None, 0, vec![], vec![]),
        };
        Ok(starts.into_iter().map(start).collect())
    }

    /// Most tokens behind its history that each (cache, tokens, unit) could get by itself now: all, or a multiple of its
    /// unit; 0: not one unit. `leave`: per pool, slots that must be left.
    fn fitting(
        &self,
        py: Python<'_>,
        caches: Vec<(Py<Cache>, u64, u64)>,
        leave: Vec<u32>,
    ) -> PyResult<Vec<u64>> {
        let core = self.core.get().core(py)?;
        let handles: Vec<Py<Cache>> = caches.iter().map(|(cache, ..)| cache.clone_ref(py)).collect();
        let mut entered = enter_all(py, &handles)?;
        let fits = entered.iter_mut().zip(&caches);
        fits.map(|((cache, _), (_, tokens, unit))| outcome(py, core.fitting(cache, *tokens, *unit, &leave)))
            .collect()
    }

    /// Room for (cache, tokens behind its history, unit) in order: as much as there is, in multiples of the unit ->
    /// (tokens per cache, 0 if not one unit, None if it was only claimed and is closed now; copies to make).
    fn provide(
        &self,
        py: Python<'_>,
        caches: Vec<(Py<Cache>, u64, u64)>,
        leave: Vec<u32>,
    ) -> PyResult<(Vec<Option<u64>>, Copies)> {
        let core = self.core.get().core(py)?;
        let handles: Vec<Py<Cache>> = caches.iter().map(|(cache, ..)| cache.clone_ref(py)).collect();
        let mut entered = enter_all(py, &handles)?;
        let (mut provided, mut copies) = (Vec::with_capacity(caches.len()), Vec::new());
        for (at, (_, tokens, unit)) in caches.iter().enumerate() {
            match chunk(core, &mut entered[at].0, *tokens, *unit, &leave, &mut copies) {
                Ok(room) => provided.push(room),
                Err(error) => {
                    // Nobody will make the copies that were planned so far.
                    for (cache, _) in entered[..at].iter_mut().rev() {
                        core.copies_failed(cache);
                    }
                    return Err(raise(py, error));
                }
            }
        }
        Ok((provided, plan(&copies)))
    }

    /// Per pool the pages that could leave the device if this ACTIVE cache were suspended; None if one would find no room.
    fn below(&self, py: Python<'_>, cache: &Bound<'_, Cache>) -> PyResult<Option<Vec<u32>>> {
        let cache = outcome(py, cache.get().look(py))?;
        outcome(py, self.core.get().core.below(&cache))
    }

    /// Per pool (live pages of the cache on the device, how many of them nobody else claims).
    fn holds(&self, py: Python<'_>, cache: &Bound<'_, Cache>) -> PyResult<Vec<(u32, u32)>> {
        let cache = outcome(py, cache.get().look(py))?;
        outcome(py, self.core.get().core.holds(&cache))
    }

    /// Per pool the slots that are missing for so many tokens behind the history, with `leave` to be left.
    fn lacking(
        &self,
        py: Python<'_>,
        cache: &Bound<'_, Cache>,
        tokens: u64,
        leave: Vec<u32>,
    ) -> PyResult<Vec<u32>> {
        let mut entered = outcome(py, cache.get().enter(py))?;
        outcome(py, self.core.get().core.lacking(&mut entered, tokens, &leave))
    }

    /// Whether a launched step may still touch the cache.
    fn in_flight(&self, py: Python<'_>, cache: &Bound<'_, Cache>) -> PyResult<bool> {
        let cache = outcome(py, cache.get().look(py))?;
        Ok(self.core.get().core.is_in_flight(&cache))
    }
}
