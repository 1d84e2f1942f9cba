//! Counting distinct pieces in parallel. Memory grows with the distinct pieces, not with the text.

use rustc_hash::FxHashMap;

use crate::parallel::{self, Check};
use crate::{Error, Splitter, Text};

/// How often each distinct piece of at least two bytes has been seen (one byte has nothing to merge).
#[derive(Debug, Default)]
pub struct Counter {
    counts: FxHashMap<Box<[u8]>, u64>,
}

impl Counter {
    /// Counts the pieces of `texts` on up to `threads` threads; the sum does not depend on their number.
    pub fn add<T: Text>(
        &mut self,
        splitter: &Splitter,
        texts: &[T],
        threads: usize,
        check: Check<'_>,
    ) -> Result<(), Error> {
        // A clone of the splitter per thread: the engine's scratch space is then not fought over.
        let init = || (splitter.clone(), FxHashMap::<&str, u64>::default());
        let states = parallel::fold(texts, threads, check, init, |(splitter, local), _, index, text| {
            let text = text.text().map_err(|error| error.at(index))?.unwrap_or_default();
            splitter.for_each(text, |piece| {
                if piece.len() > 1 {
                    *local.entry(piece).or_insert(0) += 1;
                }
            })
        })?;
        for (piece, count) in states.into_iter().flat_map(|(_, local)| local) {
            match self.counts.get_mut(piece.as_bytes()) {
                Some(sum) => *sum += count,
                None => {
                    self.counts.insert(piece.as_bytes().into(), count);
                }
            }
        }
        Ok(())
    }

    /// The distinct pieces with their counts, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.counts.iter().map(|(piece, &count)| (piece.as_ref(), count))
    }

    /// The number of distinct pieces.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether nothing has been counted.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}
