//! Atomics that do something before each access: `explored` and `stops` say what.

macro_rules! wrapped {
    ($name:ident, $value:ty, $inner:path, $turn:path) => {
        /// An atomic of the checkers.
        #[derive(Debug)]
        pub struct $name($inner);

        #[allow(missing_docs, dead_code)]
        impl $name {
            pub fn new(value: $value) -> Self {
                Self(<$inner>::new(value))
            }
            pub fn load(&self, order: Ordering) -> $value {
                $turn();
                self.0.load(order)
            }
            pub fn store(&self, value: $value, order: Ordering) {
                $turn();
                self.0.store(value, order);
            }
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                $turn();
                self.0.swap(value, order)
            }
            pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                $turn();
                self.0.fetch_add(value, order)
            }
            pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                $turn();
                self.0.fetch_sub(value, order)
            }
            pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                $turn();
                self.0.fetch_or(value, order)
            }
            pub fn fetch_max(&self, value: $value, order: Ordering) -> $value {
                $turn();
                self.0.fetch_max(value, order)
            }
            pub fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                $turn();
                self.0.compare_exchange(old, new, success, failure)
            }
            pub fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                $turn();
                self.0.compare_exchange_weak(old, new, success, failure)
            }
        }
    };
}

pub(super) use wrapped;
