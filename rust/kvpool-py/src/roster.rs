//! The `Roster` class: the started requests, as far as every step touches them.
//!
//! A step of hundreds of decodes must not cost a Python call each, so what a decode needs in every step is here: room for
//! its next token, and (`outputs.rs`) what its output does to it. Who gives way to whom is the scheduler's business.
//!
//! Items are sorted by age. `step == 0`: in no step; else the number of the step that it is in.

use crate::cache::Cache;
use crate::convert::{outcome, plan, Copies};
use crate::core::Core;
use crate::forecast::{steps, Forecast};
use crate::outputs::{take_outputs, Scratch};
use kvpool_core::forecast::Growth;
use kvpool_core::types::{CacheState, PageCopy};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFrozenSet, PyList};
use std::sync::{Mutex, MutexGuard};

pub struct Item {
    age: u64,
    request: Py<PyAny>,
    id: Py<PyAny>,
    /// In every manager, and the core's part of them.
    caches: Vec<Py<PyAny>>,
    pub handles: Vec<Py<Cache>>,
    pub outputs: Py<PyList>,
    pub stops: Py<PyFrozenSet>,
    prompt: u64,
    pub new: u64,
    pub drafts: u64,
    /// Only its last token is to be computed.
    generates: bool,
    step: u64,
    /// Per pool: pages that others had claimed before it started; most that it can come to hold.
    shared: Vec<u32>,
    most: Vec<u64>,
}

impl Item {
    fn produced(&self, py: Python<'_>) -> u64 {
        self.outputs.bind(py).len() as u64
    }

    fn length(&self, py: Python<'_>) -> u64 {
        self.prompt + self.produced(py)
    }

    /// Tokens of its next generation, clipped at the end.
    fn tokens(&self, py: Python<'_>) -> u64 {
        (1 + self.drafts).min(self.new - self.produced(py))
    }
}

/// What became of the generations of a pass.
#[pyclass(frozen, get_all, module = "kvpool._core")]
pub struct Allocation {
    /// Tokens of those that have room.
    tokens: u64,
    /// Requests that have room.
    count: usize,
    /// Age of the one that has none, where the search stopped.
    refused: Option<u64>,
    /// Whether one was passed over for want of tokens.
    short_of_tokens: bool,
    /// Ages of those that were suspended and are not any more.
    resumed: Vec<u64>,
    /// Managers that have copies to make: (which one, caches, the copies).
    copies: Vec<(usize, Vec<Py<Cache>>, Copies)>,
}

/// What a manager has to copy for the requests of a pass.
#[derive(Default)]
struct ToCopy {
    caches: Vec<Py<Cache>>,
    copies: Vec<PageCopy>,
    /// How many there were before the request that is looked at.
    before: usize,
}

/// Started requests.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Roster {
    cores: Vec<Py<Core>>,
    items: Mutex<Vec<Item>>,
}

impl Roster {
    fn items(&self) -> PyResult<MutexGuard<'_, Vec<Item>>> {
        self.items
            .try_lock()
            .map_err(|_| PyValueError::new_err("the roster is in use by another thread"))
    }

    fn find(items: &[Item], age: u64) -> PyResult<usize> {
        items
            .binary_search_by_key(&age, |item| item.age)
            .map_err(|_| PyValueError::new_err(format!("age {age} is not in the roster")))
    }

    /// Room for one generation in every manager, or in none. Fills `made` per manager.
    fn room(&self, py: Python<'_>, item: &Item, made: &mut [ToCopy]) -> PyResult<Option<bool>> {
        let capacity = item.length(py) - 1 + item.tokens(py);
        if item.handles.len() > 1 {
            for (core, cache) in self.cores.iter().zip(&item.handles) {
                let mut entered = outcome(py, cache.get().enter(py))?;
                let core = core.get().core(py)?;
                let tokens = capacity - outcome(py, core.info(&entered))?.history;
                if outcome(py, core.fitting(&mut entered, tokens, tokens, &[]))? < tokens {
                    return Ok(None);
                }
            }
        }
        for made in &mut *made {
            made.before = made.copies.len();
        }
        let mut resumed = false;
        for (side, (core, cache)) in self.cores.iter().zip(&item.handles).enumerate() {
            let core = &core.get().core;
            let mut entered = outcome(py, cache.get().enter(py))?;
            let before = outcome(py, core.info(&entered))?;
            if before.state == CacheState::Active && before.capacity >= capacity {
                continue;
            }
            resumed |= before.state != CacheState::Active;
            if !outcome(py, core.provide(&mut entered, capacity, &mut made[side].copies))? {
                for ((core, cache), made) in self.cores.iter().zip(&item.handles).zip(made).take(side) {
                    let mut entered = outcome(py, cache.get().enter_soon(py))?;
                    core.get().core.copies_failed(&mut entered);
                    made.copies.truncate(made.before);
                    made.caches.retain(|other| !other.is(cache));
                }
                return Ok(None);
            }
            if made[side].copies.len() > made[side].before || item.handles.len() > 1 {
                made[side].caches.push(cache.clone_ref(py));
            } else {
                core.copies_done(&mut entered);
            }
        }
        Ok(Some(resumed))
    }
}

#[pymethods]
impl Roster {
    /// For the managers of these cores.
    #[new]
    fn new(cores: Vec<Py<Core>>) -> Self {
        Self {
            cores,
            items: Mutex::new(Vec::new()),
        }
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.items()?.len())
    }

    /// A request has started. caches: in every manager, with the core's part of it. shared, most: per pool.
    #[allow(clippy::too_many_arguments)]
    fn insert(
        &self,
        age: u64,
        request: Py<PyAny>,
        id: Py<PyAny>,
        caches: Vec<(Py<PyAny>, Py<Cache>)>,
        outputs: Py<PyList>,
        stops: Py<PyFrozenSet>,
        prompt: u64,
        new: u64,
        drafts: u64,
        shared: Vec<u32>,
        most: Vec<u64>,
    ) -> PyResult<()> {
        let mut items = self.items()?;
        let at = items.partition_point(|item| item.age < age);
        let (caches, handles) = caches.into_iter().unzip();
        items.insert(
            at,
            Item {
                age,
                request,
                id,
                caches,
                handles,
                outputs,
                stops,
                prompt,
                new,
                drafts,
                generates: false,
                step: 0,
                shared,
                most,
            },
        );
        Ok(())
    }

    /// A request has ended or was freed.
    fn remove(&self, age: u64) -> PyResult<()> {
        let mut items = self.items()?;
        let at = Self::find(&items, age)?;
        items.remove(at);
        Ok(())
    }

    /// The request generates from now on, and can come to hold so many pages per pool.
    fn set_generates(&self, age: u64, most: Vec<u64>) -> PyResult<()> {
        let mut items = self.items()?;
        let at = Self::find(&items, age)?;
        items[at].generates = true;
        items[at].most = most;
        Ok(())
    }

    /// Whether the request is in a step.
    fn in_step(&self, age: u64) -> PyResult<bool> {
        let items = self.items()?;
        Ok(items[Self::find(&items, age)?].step != 0)
    }

    /// Puts the request into a step.
    fn set_step(&self, age: u64, step: u64) -> PyResult<()> {
        let mut items = self.items()?;
        let at = Self::find(&items, age)?;
        items[at].step = step;
        Ok(())
    }

    /// Room for the next token and drafts of those that generate, the oldest first, from the age `first` on, as long as there are
    /// `tokens` and `places`; they are in step `step` then. Passes over those in a step, in `gone` (ages) and in `busy` (ids).
    #[allow(clippy::too_many_arguments)]
    fn allocate(
        &self,
        py: Python<'_>,
        step: u64,
        tokens: u64,
        places: usize,
        gone: Vec<u64>,
        busy: Option<Bound<'_, PyFrozenSet>>,
        first: u64,
    ) -> PyResult<Allocation> {
        let mut items = self.items()?;
        let mut made: Vec<ToCopy> = Vec::new();
        made.resize_with(self.cores.len(), Default::default);
        let mut found = Allocation {
            tokens: 0,
            count: 0,
            refused: None,
            short_of_tokens: false,
            resumed: Vec::new(),
            copies: Vec::new(),
        };
        for core in &self.cores {
            core.get().core(py)?; // reads the clock
        }
        let from = items.partition_point(|item| item.age < first);
        for item in &mut items[from..] {
            if !item.generates || item.step != 0 || (!gone.is_empty() && gone.contains(&item.age)) {
                continue;
            }
            if let Some(busy) = &busy {
                if busy.contains(&item.id)? {
                    continue;
                }
            }
            let wanted = item.tokens(py);
            if found.count >= places {
                break;
            }
            if found.tokens + wanted > tokens {
                found.short_of_tokens = true;
                break;
            }
            match self.room(py, item, &mut made) {
                Ok(Some(true)) => found.resumed.push(item.age),
                Ok(Some(false)) => {}
                Ok(None) => {
                    found.refused = Some(item.age);
                    break;
                }
                Err(error) => {
                    // Nobody will make the copies that were planned so far.
                    for (core, made) in self.cores.iter().zip(&made) {
                        core.get().copies_failed(py, &made.caches)?;
                    }
                    return Err(error);
                }
            }
            item.step = step;
            found.count += 1;
            found.tokens += wanted;
        }
        let made = made.into_iter().enumerate();
        let made = made.filter(|(_, made)| !made.caches.is_empty());
        found.copies = made
            .map(|(side, made)| (side, made.caches, plan(&made.copies)))
            .collect();
        Ok(found)
    }

    /// The requests that generate in a step, the oldest first.
    fn requests<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Bound<'py, PyList>> {
        let items = self.items()?;
        let list = PyList::empty(py);
        for item in items.iter().filter(|item| item.generates && item.step == step) {
            list.append(&item.request)?;
        }
        Ok(list)
    }

    /// Per manager: the caches of all requests in a step, the oldest first.
    fn caches<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Vec<Bound<'py, PyList>>> {
        let items = self.items()?;
        let list = |side: usize| {
            let list = PyList::empty(py);
            for item in items.iter().filter(|item| item.step == step) {
                list.append(&item.caches[side])?;
            }
            Ok(list)
        };
        (0..self.cores.len()).map(list).collect()
    }

    /// A step is over: its requests are in none any more.
    fn release(&self, step: u64) -> PyResult<()> {
        let mut items = self.items()?;
        items
            .iter_mut()
            .filter(|item| item.step == step)
            .for_each(|item| item.step = 0);
        Ok(())
    }

    /// A step is over, as for `release`. What came back for its generations: inputs are committed, outputs appended -> (ids
    /// found, [(age, reason)] of those that end, [(age, what was wrong)]).
    #[allow(clippy::type_complexity)]
    fn collect(
        &self,
        py: Python<'_>,
        step: u64,
        outputs: &Bound<'_, PyDict>,
    ) -> PyResult<(usize, Vec<(u64, &'static str)>, Vec<(u64, String)>)> {
        let mut items = self.items()?;
        let (mut found, mut ended, mut failed) = (0, Vec::new(), Vec::new());
        let mut scratch = Scratch::default();
        for item in items.iter_mut().filter(|item| item.step == step) {
            item.step = 0;
            if !item.generates {
                continue;
            }
            let Some(given) = outputs.get_item(&item.id)? else {
                failed.push((item.age, "no tokens".to_owned()));
                continue;
            };
            found += 1;
            match take_outputs(py, &self.cores, item, &given, None, &mut scratch)? {
                Ok(None) => {}
                Ok(Some(reason)) => ended.push((item.age, reason)),
                Err(what) => failed.push((item.age, what)),
            }
        }
        Ok((found, ended, failed))
    }

    /// What came back for a last chunk: its inputs are committed, outputs appended -> (why it ends or None, what was wrong
    /// or None).
    fn take(
        &self,
        py: Python<'_>,
        age: u64,
        given: &Bound<'_, PyAny>,
        inputs: PyBuffer<i32>,
    ) -> PyResult<(Option<&'static str>, Option<String>)> {
        let items = self.items()?;
        let item = &items[Self::find(&items, age)?];
        let inputs = inputs.to_vec(py)?;
        let mut scratch = Scratch::default();
        Ok(
            match take_outputs(py, &self.cores, item, given, Some(&inputs), &mut scratch)? {
                Ok(reason) => (reason, None),
                Err(what) => (None, Some(what)),
            },
        )
    }

    /// Started requests as they grow to the share of their new tokens that is expected.
    fn forecast(&self, py: Python<'_>, share: f64) -> PyResult<Forecast> {
        let items = self.items()?;
        let mut pools = Vec::new();
        let mut at = 0;
        for (side, core) in self.cores.iter().enumerate() {
            let core = &core.get().core;
            let t = core.tokens_per_block();
            for pool in 0..core.num_pools() {
                let mut rows = Vec::with_capacity(items.len() + 16);
                for item in items.iter() {
                    let cache = outcome(py, item.handles[side].get().look(py))?;
                    let held = u64::from(core.held(&cache, pool));
                    rows.push(Growth {
                        steps: steps(share, item.new, item.produced(py)),
                        tokens: item.length(py),
                        most: item.most[at],
                        held,
                        back: held.saturating_sub(u64::from(item.shared[at])),
                    });
                }
                pools.push(kvpool_core::forecast::Forecast::new(t, rows));
                at += 1;
            }
        }
        Ok(Forecast::new(pools))
    }

    /// Per pool: decode slots (given per pool) that are reserved for started requests and that they do not hold yet. `but`: age
    /// of one that is left out.
    #[pyo3(signature = (decode_slots, but=None))]
    fn debts(&self, py: Python<'_>, decode_slots: Vec<u32>, but: Option<u64>) -> PyResult<Vec<u32>> {
        let items = self.items()?;
        let mut debts = vec![0; decode_slots.len()];
        let mut at = 0;
        for (side, core) in self.cores.iter().enumerate() {
            let core = &core.get().core;
            for pool in 0..core.num_pools() {
                let slots = decode_slots[at];
                for item in items.iter().filter(|item| slots > 0 && Some(item.age) != but) {
                    let cache = outcome(py, item.handles[side].get().look(py))?;
                    debts[at] += slots.saturating_sub(core.held_here(&cache, pool));
                }
                at += 1;
            }
        }
        Ok(debts)
    }
}
