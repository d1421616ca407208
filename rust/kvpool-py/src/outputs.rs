//! What came back from the executor for one request of the roster.

use crate::convert::outcome;
use crate::core::Core;
use crate::roster::Item;
use pyo3::prelude::*;
use pyo3::types::PyList;

/// Kept from request to request: a step of hundreds of decodes must not allocate for each.
#[derive(Default)]
pub struct Scratch {
    tokens: Vec<i64>,
    inputs: Vec<i32>,
}

/// Appends what came back for a generation or a last chunk and commits its inputs: those of a chunk; of a generation
/// (None) its last token and what came back but the last. `Ok(Some(reason))`: it ends.
pub fn take_outputs(
    py: Python<'_>,
    cores: &[Py<Core>],
    item: &Item,
    given: &Bound<'_, PyAny>,
    chunk: Option<&[i32]>,
    scratch: &mut Scratch,
) -> PyResult<Result<Option<&'static str>, String>> {
    let Scratch { tokens, inputs } = scratch;
    if !read(given, tokens) {
        return Ok(Err(format!("{}, which is not a list of tokens", given.repr()?)));
    }
    let most = 1 + item.drafts as usize;
    if tokens.is_empty() {
        return Ok(Err("no tokens".to_owned()));
    }
    if tokens.len() > most {
        return Ok(Err(format!("{} tokens where 1 to {most} are due", tokens.len())));
    }
    if tokens
        .iter()
        .any(|&token| i32::try_from(token).is_err() || token < 0)
    {
        return Ok(Err(format!("{tokens:?}, which are not all in 0..2**31-1")));
    }
    let outputs = item.outputs.bind(py);
    let produced = outputs.len();
    tokens.truncate(item.new as usize - produced);
    let stops = item.stops.bind(py);
    let mut reason = None;
    if !stops.is_empty() {
        for at in 0..tokens.len() {
            if stops.contains(tokens[at])? {
                tokens.truncate(at + 1);
                reason = Some("stop");
                break;
            }
        }
    }
    let inputs = match chunk {
        Some(chunk) => chunk,
        None => {
            let last: i32 = outputs.get_item(produced - 1)?.extract()?;
            inputs.clear();
            inputs.push(last);
            inputs.extend(tokens[..tokens.len() - 1].iter().map(|&token| token as i32));
            inputs
        }
    };
    for (core, cache) in cores.iter().zip(&item.handles) {
        let mut entered = outcome(py, cache.get().enter(py))?;
        let core = core.get().core(py)?;
        if let Err(error) = core.commit(&mut entered, inputs) {
            return Ok(Err(format!("tokens that cannot be committed: {error:?}")));
        }
    }
    for &token in &*tokens {
        outputs.append(token)?;
    }
    if reason.is_none() && produced + tokens.len() >= item.new as usize {
        reason = Some("length");
    }
    Ok(Ok(reason))
}

/// Reads a short list of tokens. False: it is none.
fn read(given: &Bound<'_, PyAny>, tokens: &mut Vec<i64>) -> bool {
    tokens.clear();
    let mut push = |token: Bound<'_, PyAny>| token.extract().map(|token| tokens.push(token)).is_ok();
    if let Ok(list) = given.cast_exact::<PyList>() {
        return list.iter().all(push);
    }
    let Ok(given) = given.try_iter() else {
        return false;
    };
    given.into_iter().all(|token| token.is_ok_and(&mut push))
}
