//! Descriptors: neighbouring pages that go to neighbouring slots become one run, which is one memcpy.

/// `len` pages from slot `src` on to slot `dst` on; `index` is the number of the first in its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First slot that is read.
    pub src: u32,
    /// First slot that is written.
    pub dst: u32,
    /// Pages.
    pub len: u32,
    /// Number of its first page in the batch.
    pub index: u32,
}

impl Run {
    /// Each page by itself.
    pub fn pages(self) -> impl Iterator<Item = Run> {
        (0..self.len).map(move |i| Run {
            src: self.src + i,
            dst: self.dst + i,
            len: 1,
            index: self.index + i,
        })
    }
}

/// Descriptors of a batch, in its order, into `runs`. `index`: number of the first page.
pub fn merge(src: &[i32], dst: &[i32], index: u32, runs: &mut Vec<Run>) {
    runs.clear();
    runs.reserve(src.len());
    let mut last = Run {
        src: 0,
        dst: 0,
        len: 0,
        index,
    };
    for (at, (&src, &dst)) in src.iter().zip(dst).enumerate() {
        let (src, dst) = (src as u32, dst as u32);
        if last.len > 0 && src == last.src + last.len && dst == last.dst + last.len {
            last.len += 1;
            continue;
        }
        if last.len > 0 {
            runs.push(last);
        }
        last = Run {
            src,
            dst,
            len: 1,
            index: index + at as u32,
        };
    }
    if last.len > 0 {
        runs.push(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(src: &[i32], dst: &[i32]) -> Vec<(u32, u32, u32, u32)> {
        let mut runs = Vec::new();
        merge(src, dst, 10, &mut runs);
        runs.iter().map(|r| (r.src, r.dst, r.len, r.index)).collect()
    }

    #[test]
    fn neighbours_become_one_run() {
        assert_eq!(merged(&[], &[]), []);
        assert_eq!(merged(&[4], &[7]), [(4, 7, 1, 10)]);
        assert_eq!(merged(&[4, 5, 6], &[1, 2, 3]), [(4, 1, 3, 10)]);
        assert_eq!(merged(&[4, 5, 6], &[1, 2, 4]), [(4, 1, 2, 10), (6, 4, 1, 12)]);
        assert_eq!(merged(&[6, 5], &[2, 1]), [(6, 2, 1, 10), (5, 1, 1, 11)]);
    }

    #[test]
    fn a_run_is_its_pages() {
        let run = Run {
            src: 4,
            dst: 1,
            len: 3,
            index: 10,
        };
        let pages: Vec<_> = run.pages().map(|p| (p.src, p.dst, p.len, p.index)).collect();
        assert_eq!(pages, [(4, 1, 1, 10), (5, 2, 1, 11), (6, 3, 1, 12)]);
    }
}
