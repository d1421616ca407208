//! Happens-before over slots: vector clocks, taken when work is enqueued.
//!
//! `clock(w)[s] = n`: the first n pieces of work of stream s are done before w starts, whatever the timing. It is the
//! join of
//! - the clock of the work before it in its stream (streams are FIFO),
//! - the clocks of what it waits for,
//! - what the caller had seen done (by a wait that succeeded) when it was enqueued.
//!
//! Two uses of a slot, one of them a write, are ordered if the later one's clock has reached the earlier one's place.
//! The checker trusts no wait that is not attached to the work, so it finds a missing one although the timing was kind.

use crate::hazard::{Access, Hazard};
use crate::types::{join, stream_name, Clock, Event, Tier, CALLER, STREAMS};
use std::collections::VecDeque;

/// Clocks that are kept per stream. Older ones are taken to be as late as the oldest that is kept: nothing waits so long.
const KEPT: usize = 1 << 14;

/// One ordering bug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its name.
    pub hazard: Hazard,
    /// Pool index; none for descriptors.
    pub pool: Option<usize>,
    /// Tier of the slot.
    pub tier: Tier,
    /// Slot, or number of the descriptor buffer.
    pub slot: u32,
    /// The later work.
    pub work: Event,
    /// The work it is not ordered after.
    pub prior: Event,
    /// What the later work does with it.
    pub access: Access,
}

impl Finding {
    /// For people.
    pub fn text(&self, pools: &[String]) -> String {
        let place = match self.pool {
            Some(pool) => format!(
                "{} slot {} of pool {:?}",
                self.tier.name(),
                self.slot,
                pools[pool]
            ),
            None => format!("descriptor buffer {}", self.slot),
        };
        let verb = match self.access {
            Access::Read => "reads",
            Access::Write => "writes",
        };
        format!(
            "{}: {} {} {verb} {place} without being ordered after {} {}",
            self.hazard.name(),
            stream_name(self.work.stream),
            self.work.place,
            stream_name(self.prior.stream),
            self.prior.place
        )
    }
}

#[derive(Debug, Default)]
struct History {
    /// Clocks of the latest work.
    clocks: VecDeque<Clock>,
    /// Work that is older.
    dropped: u64,
}

/// Clocks of the streams and what was found.
#[derive(Debug, Default)]
pub struct Checker {
    /// What the caller has seen done.
    seen: Clock,
    streams: [Clock; STREAMS],
    history: [History; STREAMS],
    /// Not yet drained.
    pub findings: Vec<Finding>,
}

impl Checker {
    /// The clock of an event that was enqueued.
    fn clock(&self, event: Event) -> Clock {
        let history = &self.history[event.stream];
        let at = event.place.saturating_sub(history.dropped + 1) as usize;
        history.clocks.get(at).copied().unwrap_or_default()
    }

    fn join_all(&self, into: &mut Clock, waits: &Clock) {
        for (stream, &place) in waits.iter().enumerate() {
            if place > 0 {
                join(into, &self.clock(Event { stream, place }));
                into[stream] = into[stream].max(place);
            }
        }
    }

    /// Work enters its stream with these waits.
    pub fn enqueue(&mut self, work: Event, waits: &Clock) {
        let mut clock = self.streams[work.stream];
        join(&mut clock, &self.seen);
        self.join_all(&mut clock, waits);
        clock[work.stream] = work.place;
        self.streams[work.stream] = clock;
        if work.stream == CALLER {
            self.seen = clock; // done already: it is the caller's own
        }
        let history = &mut self.history[work.stream];
        history.clocks.push_back(clock);
        if history.clocks.len() > KEPT {
            history.clocks.pop_front();
            history.dropped += 1;
        }
    }

    /// The caller has waited for these.
    pub fn saw(&mut self, waits: &Clock) {
        let mut seen = self.seen;
        self.join_all(&mut seen, waits);
        self.seen = seen;
    }

    /// Whether the caller knows that this is done.
    pub fn has_seen(&self, event: Event) -> bool {
        self.seen[event.stream] >= event.place
    }

    /// A descriptor buffer was filled for `work` while `prior`, which nobody has seen done, reads it.
    pub fn rewritten(&mut self, work: Event, prior: Event, buffer: u32) {
        self.findings.push(Finding {
            hazard: Hazard::DescriptorRewrite,
            pool: None,
            tier: Tier::Host,
            slot: buffer,
            work,
            prior,
            access: Access::Write,
        });
    }

    /// Work that is enqueued uses a slot that `prior` used before.
    #[allow(clippy::too_many_arguments)]
    pub fn pair(
        &mut self,
        work: Event,
        access: Access,
        prior: Event,
        before: Access,
        pool: usize,
        tier: Tier,
        slot: u32,
    ) {
        if self.streams[work.stream][prior.stream] >= prior.place {
            return;
        }
        self.findings.push(Finding {
            hazard: Hazard::of(work.stream, access, tier, prior.stream, before),
            pool: Some(pool),
            tier,
            slot,
            work,
            prior,
            access,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(stream: usize, place: u64) -> Event {
        Event { stream, place }
    }

    fn unordered(checker: &mut Checker, work: Event, prior: Event) -> bool {
        checker.pair(work, Access::Write, prior, Access::Read, 0, Tier::Host, 1);
        checker.findings.pop().is_some()
    }

    #[test]
    fn order_is_transitive_through_waits_and_through_the_caller() {
        let mut checker = Checker::default();
        checker.enqueue(event(0, 1), &[0; STREAMS]);
        checker.enqueue(event(1, 1), &[1, 0, 0, 0, 0, 0]);
        checker.enqueue(event(2, 1), &[0, 1, 0, 0, 0, 0]);
        assert!(!unordered(&mut checker, event(2, 1), event(0, 1)));
        checker.enqueue(event(0, 2), &[0; STREAMS]);
        assert!(unordered(&mut checker, event(0, 2), event(1, 1)));
        checker.saw(&[0, 0, 1, 0, 0, 0]);
        checker.enqueue(event(0, 3), &[0; STREAMS]);
        assert!(!unordered(&mut checker, event(0, 3), event(1, 1)));
    }

    #[test]
    fn clocks_that_are_no_longer_kept_raise_no_alarm() {
        let mut checker = Checker::default();
        checker.enqueue(event(1, 1), &[0; STREAMS]);
        for place in 1..=2 * KEPT as u64 {
            checker.enqueue(event(0, place), &[0, 1, 0, 0, 0, 0]);
        }
        checker.enqueue(event(2, 1), &[3, 0, 0, 0, 0, 0]);
        assert!(!unordered(&mut checker, event(2, 1), event(1, 1)));
        assert!(!unordered(&mut checker, event(2, 1), event(0, 3)));
    }
}
