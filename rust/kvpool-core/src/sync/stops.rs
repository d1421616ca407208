//! std's atomics, every access of which is a point where its thread can be stopped or counted.

use super::wrapped::wrapped;
use std::cell::{Cell, RefCell};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{self, Ordering};
use std::sync::MutexGuard;

/// What happens at the points of a thread; told their number, from 1.
pub type Hook = Box<dyn FnMut(u64)>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    static POINTS: Cell<u64> = const { Cell::new(0) };
}

/// From now on, and counted from here, this happens at every point of the calling thread.
pub fn at_points(hook: Option<Hook>) {
    POINTS.set(0);
    HOOK.set(hook);
}

/// Points of the calling thread since `at_points`.
pub fn points() -> u64 {
    POINTS.get()
}

/// The calling thread is about to do something that another one can see.
pub fn point() {
    POINTS.set(POINTS.get() + 1);
    // Taken out meanwhile: a hook that panics is not called again.
    if let Some(mut hook) = HOOK.take() {
        hook(POINTS.get());
        HOOK.set(Some(hook));
    }
}

/// Inside a `Sole`; leaving it is a point.
#[derive(Debug)]
pub struct Inside<'a, T>(pub(super) MutexGuard<'a, T>);

impl<T> Deref for Inside<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Inside<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Inside<'_, T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            point();
        }
    }
}

wrapped!(AtomicU8, u8, atomic::AtomicU8, point);
wrapped!(AtomicU32, u32, atomic::AtomicU32, point);
wrapped!(AtomicU64, u64, atomic::AtomicU64, point);
