//! Names of the ordering bugs that the checker finds, and that its tests plant.

use crate::types::{Tier, CALLER};

/// What one piece of work does with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads it.
    Read,
    /// Writes it.
    Write,
}

/// Two uses of one slot, or buffer, that are not ordered; or, as a plant, the kind of wait that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hazard {
    /// A page goes down before the kernel that writes it is done.
    OffloadBeforeCompute,
    /// A device slot is written before the move that reads it is done.
    ReuseBeforeCopy,
    /// A kernel uses a page before it is up.
    ComputeBeforeOnboard,
    /// A page comes up over one that a kernel still uses.
    OnboardOverUse,
    /// The staging buffer is filled again before it was sent.
    StagingReuse,
    /// Descriptors are rewritten before their move is done.
    DescriptorRewrite,
    /// The caller uses a host page before its event.
    HostReadEarly,
    /// A host slot is overwritten while it is read.
    HostOverwrite,
    /// A page comes up before it has gone down.
    OnboardBeforeOffload,
    /// Any other pair.
    Unordered,
}

impl Hazard {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::OffloadBeforeCompute,
        Self::ReuseBeforeCopy,
        Self::ComputeBeforeOnboard,
        Self::OnboardOverUse,
        Self::StagingReuse,
        Self::DescriptorRewrite,
        Self::HostReadEarly,
        Self::HostOverwrite,
        Self::OnboardBeforeOffload,
        Self::Unordered,
    ];

    /// Name in findings and switches.
    pub fn name(self) -> &'static str {
        [
            "offload-before-compute",
            "reuse-before-copy",
            "compute-before-onboard",
            "onboard-over-use",
            "staging-reuse",
            "descriptor-rewrite",
            "host-read-early",
            "host-overwrite",
            "onboard-before-offload",
            "unordered",
        ][self as usize]
    }

    /// By name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hazard| hazard.name() == name)
    }

    /// What it would be if `stream` used a slot of `tier` without waiting for what `prior` did with it.
    pub fn of(stream: usize, access: Access, tier: Tier, prior: usize, before: Access) -> Self {
        use Access::{Read, Write};
        const OFFLOAD: usize = 0;
        const ONBOARD: usize = 1;
        const COPY: usize = 2;
        let kernel = |stream: usize| stream >= CALLER;
        match (tier, stream, access, prior, before) {
            (Tier::Staging, _, Write, _, _) => Self::StagingReuse,
            (Tier::Device, OFFLOAD | COPY, Read, p, Write) if kernel(p) => Self::OffloadBeforeCompute,
            (Tier::Device, _, Write, OFFLOAD | COPY, Read) => Self::ReuseBeforeCopy,
            (Tier::Device, s, _, ONBOARD | COPY, Write) if kernel(s) => Self::ComputeBeforeOnboard,
            (Tier::Device, ONBOARD | COPY, Write, p, _) if kernel(p) => Self::OnboardOverUse,
            (Tier::Host, s, _, OFFLOAD, Write) if kernel(s) => Self::HostReadEarly,
            (Tier::Host, _, Write, _, Read) => Self::HostOverwrite,
            (Tier::Host, ONBOARD, Read, OFFLOAD, Write) => Self::OnboardBeforeOffload,
            _ => Self::Unordered,
        }
    }
}
