//! Learning merges: the most frequent pair of neighbours becomes a token, again and again.
//!
//! All distinct pieces lie in one array, a border symbol between them. A token that covers bytes s..e has its
//! id at s and at e-1, so its neighbours are found by the lengths of ids alone: the right one starts at e, the
//! left one ends at s-1. Each pair knows where it occurs; a place that has changed since is recognised when
//! it is visited, because an id never comes back to a place it has left. So a merge costs its occurrences,
//! and a piece of a megabyte costs no more than a megabyte of words.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::{Error, Id};

/// Two neighbouring tokens, left and right.
pub type Pair = (Id, Id);

const BORDER: Id = Id::MAX;
const DEAD: Id = Id::MAX - 1; // inside a token, at neither of its ends

#[derive(Default)]
struct Occurrences {
    count: u64,
    places: Vec<u32>,
}

struct Learner {
    symbols: Vec<Id>,
    piece_at: Vec<u32>,
    counts: Vec<u64>,
    lengths: Vec<u32>, // bytes of each token id
    pairs: FxHashMap<Pair, Occurrences>,
    fresh: Vec<Pair>, // pairs that did not exist before the current merge
}

/// Learns up to `num_merges` merges from pieces and their counts; merge i makes token 256 + i.
///
/// The pair with the highest count is next; of equal counts, the smaller pair of ids. Counts include
/// overlapping occurrences ("aaa" holds the pair (a, a) twice); merging goes from left to right. Ends early
/// when every piece is one token. `check` is called before each merge; its error ends the work.
pub fn learn(
    pieces: impl Iterator<Item = (impl AsRef<[u8]>, u64)>,
    num_merges: usize,
    check: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Vec<Pair>, Error> {
    let mut learner = Learner::new(pieces)?;
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> =
        learner.pairs.iter().map(|(&pair, found)| (found.count, Reverse(pair))).collect();
    let mut merges = Vec::with_capacity(num_merges);
    while merges.len() < num_merges {
        let Some((count, Reverse(pair))) = heap.pop() else { break };
        let Some(found) = learner.pairs.get(&pair) else { continue };
        if found.count != count {
            // Counts only fall after the merge that made a pair, so an old entry is never too low.
            if found.count > 0 {
                heap.push((found.count, Reverse(pair)));
            } else {
                learner.pairs.remove(&pair);
            }
            continue;
        }
        check()?;
        learner.merge(pair);
        merges.push(pair);
        for pair in learner.fresh.drain(..) {
            let count = learner.pairs[&pair].count;
            if count > 0 {
                heap.push((count, Reverse(pair)));
            } else {
                learner.pairs.remove(&pair);
            }
        }
    }
    Ok(merges)
}

impl Learner {
    fn new(pieces: impl Iterator<Item = (impl AsRef<[u8]>, u64)>) -> Result<Self, Error> {
        let (mut symbols, mut piece_at, mut counts) = (vec![BORDER], vec![0], Vec::new());
        for (piece, count) in pieces {
            let piece = piece.as_ref();
            if piece.len() < 2 {
                continue;
            }
            if symbols.len() + piece.len() >= u32::MAX as usize {
                return Err(Error::TooLarge);
            }
            symbols.extend(piece.iter().map(|&byte| Id::from(byte)));
            symbols.push(BORDER);
            piece_at.resize(symbols.len(), counts.len() as u32);
            counts.push(count);
        }
        let mut pairs = FxHashMap::<Pair, Occurrences>::default();
        for place in 1..symbols.len().saturating_sub(1) {
            let pair = (symbols[place], symbols[place + 1]);
            if pair.0 != BORDER && pair.1 != BORDER {
                let found = pairs.entry(pair).or_default();
                found.count += counts[piece_at[place] as usize];
                found.places.push(place as u32);
            }
        }
        Ok(Learner { symbols, piece_at, counts, lengths: vec![1; 256], pairs, fresh: Vec::new() })
    }

    /// Replaces each occurrence of `pair`, from left to right, by a new token.
    fn merge(&mut self, pair: Pair) {
        let (left, right) = pair;
        let new = self.lengths.len() as Id;
        let (left_len, right_len) = (self.lengths[left as usize], self.lengths[right as usize]);
        self.lengths.push(left_len + right_len);
        let mut places = match self.pairs.get_mut(&pair) {
            Some(found) => std::mem::take(&mut found.places),
            None => return,
        };
        if left == right {
            places.sort_unstable(); // only here do occurrences overlap, and their order matters
        }
        for place in places {
            let middle = place + left_len;
            if self.symbols[place as usize] != left || self.symbols[middle as usize] != right {
                continue;
            }
            let end = middle + right_len;
            let count = self.counts[self.piece_at[place as usize] as usize];
            self.lose(pair, count);
            let before = self.symbols[place as usize - 1];
            if before != BORDER {
                self.lose((before, left), count);
                self.gain((before, new), count, place - self.lengths[before as usize]);
            }
            let after = self.symbols[end as usize];
            if after != BORDER {
                self.lose((right, after), count);
                self.gain((new, after), count, place);
            }
            self.symbols[middle as usize - 1] = DEAD;
            self.symbols[middle as usize] = DEAD;
            self.symbols[place as usize] = new;
            self.symbols[end as usize - 1] = new;
        }
        let merged = self.pairs.remove(&pair);
        debug_assert_eq!(merged.map(|found| found.count), Some(0));
    }

    fn lose(&mut self, pair: Pair, count: u64) {
        if let Some(found) = self.pairs.get_mut(&pair) {
            found.count -= count;
        }
    }

    fn gain(&mut self, pair: Pair, count: u64, place: u32) {
        let fresh = &mut self.fresh;
        let found = self.pairs.entry(pair).or_insert_with(|| {
            fresh.push(pair);
            Occurrences::default()
        });
        found.count += count;
        found.places.push(place);
    }
}
