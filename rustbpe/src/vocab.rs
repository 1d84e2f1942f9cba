//! A vocabulary: bytes to ids and back.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::ops::Range;

use rustc_hash::FxHashMap;

use crate::{Error, Id, Pair};

/// Ids must lie below this.
pub(crate) const MAX_TOKENS: usize = 1 << 24;

const NONE: u32 = u32::MAX;
const SHORT: usize = 64; // pieces up to this many bytes are merged by scanning, longer ones by a heap

/// Tokens, and which two tokens make which. The id is also the rank: the lowest possible merge comes first.
#[derive(Debug)]
pub struct Vocab {
    bytes: Vec<u8>,
    spans: Vec<Range<u32>>, // of each id in `bytes`; empty where an id is unused
    num_tokens: usize,
    whole: FxHashMap<Box<[u8]>, Id>,
    merged: Pairs,
    of_byte: [Id; 256],
    of_two_bytes: Vec<Id>, // of each two bytes in a row the token, or NONE
}

impl Vocab {
    /// The vocabulary of the 256 bytes and one token per merge.
    pub fn from_merges(merges: &[Pair]) -> Result<Self, Error> {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            let part = |id: Id| tokens.get(id as usize).ok_or(Error::UnknownId(id));
            let joined = [part(left)?.as_slice(), part(right)?.as_slice()].concat();
            tokens.push(joined);
        }
        Self::from_ranks(tokens.into_iter().zip(0..))
    }

    /// The vocabulary of any byte-level ranks, such as tiktoken's. All 256 single bytes must be among them.
    pub fn from_ranks(ranks: impl IntoIterator<Item = (Vec<u8>, Id)>) -> Result<Self, Error> {
        let mut vocab = Vocab {
            bytes: Vec::new(),
            spans: Vec::new(),
            num_tokens: 0,
            whole: FxHashMap::default(),
            merged: Pairs::default(),
            of_byte: [NONE; 256],
            of_two_bytes: vec![NONE; 1 << 16],
        };
        for (token, id) in ranks {
            vocab.insert(token, id)?;
        }
        if let Some(byte) = vocab.of_byte.iter().position(|&id| id == NONE) {
            return Err(Error::Ranks(format!("the single byte {byte} has no id")));
        }
        vocab.merged = Pairs::new(&vocab.pairs());
        Ok(vocab)
    }

    fn insert(&mut self, token: Vec<u8>, id: Id) -> Result<(), Error> {
        let index = id as usize;
        if index >= MAX_TOKENS || self.bytes.len() + token.len() >= u32::MAX as usize {
            return Err(Error::Ranks(format!("ids must be below {MAX_TOKENS}, found {id}")));
        }
        if token.is_empty() {
            return Err(Error::Ranks(format!("id {id} has no bytes")));
        }
        if index >= self.spans.len() {
            self.spans.resize(index + 1, 0..0);
        }
        if !self.spans[index].is_empty() {
            return Err(Error::Ranks(format!("id {id} occurs twice")));
        }
        let start = self.bytes.len() as u32;
        self.bytes.extend_from_slice(&token);
        self.spans[index] = start..self.bytes.len() as u32;
        match token[..] {
            [byte] => self.of_byte[byte as usize] = id,
            [first, second] => self.of_two_bytes[usize::from(first) << 8 | usize::from(second)] = id,
            _ => {}
        }
        if let Some(other) = self.whole.insert(token.into(), id) {
            return Err(Error::Ranks(format!("ids {other} and {id} have the same bytes")));
        }
        self.num_tokens += 1;
        Ok(())
    }

    /// Every way to cut a token into two tokens, so that merging needs no bytes any more.
    fn pairs(&self) -> Vec<(Pair, Id)> {
        // Only lengths that tokens have are tried, because a token can be a megabyte long.
        let lengths: BTreeSet<usize> = self.whole.keys().map(|token| token.len()).collect();
        let mut pairs = Vec::new();
        for (token, &id) in &self.whole {
            for &cut in lengths.range(1..token.len()).filter(|&cut| lengths.contains(&(token.len() - cut))) {
                let (left, right) = token.split_at(cut);
                if let (Some(&left), Some(&right)) = (self.whole.get(left), self.whole.get(right)) {
                    pairs.push(((left, right), id));
                }
            }
        }
        pairs
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.num_tokens
    }

    /// The largest id of a token.
    pub fn largest_id(&self) -> Id {
        self.spans.len() as Id - 1
    }

    /// Never: the single bytes are always there.
    pub fn is_empty(&self) -> bool {
        self.num_tokens == 0
    }

    /// The bytes of a token.
    pub fn token(&self, id: Id) -> Result<&[u8], Error> {
        match self.spans.get(id as usize) {
            Some(span) if !span.is_empty() => Ok(&self.bytes[span.start as usize..span.end as usize]),
            _ => Err(Error::UnknownId(id)),
        }
    }

    /// The tokens in the order of their ids.
    pub fn tokens(&self) -> impl Iterator<Item = (&[u8], Id)> {
        (0..self.spans.len() as Id).filter_map(|id| self.token(id).ok().map(|bytes| (bytes, id)))
    }

    /// The id of a piece that is one token.
    pub(crate) fn whole(&self, piece: &[u8]) -> Option<Id> {
        self.whole.get(piece).copied()
    }

    /// Appends the ids of a piece to `out`, by merging its bytes.
    pub(crate) fn merge(&self, piece: &[u8], out: &mut Vec<Id>) {
        if piece.len() <= SHORT {
            self.merge_short(piece, out);
        } else {
            self.merge_long(piece, out);
        }
    }

    #[inline]
    fn rank(&self, left: Id, right: Id) -> Id {
        self.merged.get(left, right)
    }

    /// The rank of two bytes.
    #[inline]
    fn rank_of_bytes(&self, two: &[u8]) -> Id {
        self.of_two_bytes[usize::from(two[0]) << 8 | usize::from(two[1])]
    }

    /// Takes the lowest merge of all neighbours, the leftmost of equals, until none is left: O(n^2).
    fn merge_short(&self, piece: &[u8], out: &mut Vec<Id>) {
        let start = out.len();
        out.extend(piece.iter().map(|&byte| self.of_byte[byte as usize]));
        let mut ranks = [NONE; SHORT];
        let mut len = piece.len();
        let ids = &mut out[start..];
        for (rank, two) in ranks.iter_mut().zip(piece.windows(2)) {
            *rank = self.rank_of_bytes(two);
        }
        // ranks[i] belongs to the neighbours i and i + 1; ranks[len - 1] is always NONE
        loop {
            let (mut at, mut lowest) = (0, NONE);
            for (i, &rank) in ranks[..len].iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NONE {
                break;
            }
            ids[at] = lowest;
            ids.copy_within(at + 2..len, at + 1);
            ranks.copy_within(at + 1..len, at);
            len -= 1;
            ranks[at] = if at + 1 < len { self.rank(lowest, ids[at + 1]) } else { NONE };
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], lowest);
            }
        }
        out.truncate(start + len);
    }

    /// The same merges in the same order with a heap and a linked list: O(n log n).
    fn merge_long(&self, piece: &[u8], out: &mut Vec<Id>) {
        let len = piece.len();
        let mut ids: Vec<Id> = piece.iter().map(|&byte| self.of_byte[byte as usize]).collect();
        let mut next: Vec<usize> = (1..=len).collect(); // of a living place; len is the end
        let mut prev: Vec<usize> = (0..len).map(|i| i.wrapping_sub(1)).collect(); // usize::MAX is the front
        let ranks = piece.windows(2).map(|two| self.rank_of_bytes(two)).zip(0..);
        let mut heap: BinaryHeap<Reverse<(Id, usize)>> =
            ranks.filter(|&(rank, _)| rank != NONE).map(Reverse).collect();
        while let Some(Reverse((rank, at))) = heap.pop() {
            // Stale when this place was swallowed (its id is NONE) or its pair has changed.
            let right = next[at];
            if ids[at] == NONE || right == len || self.rank(ids[at], ids[right]) != rank {
                continue;
            }
            ids[at] = rank;
            ids[right] = NONE;
            next[at] = next[right];
            if next[at] < len {
                prev[next[at]] = at;
                let rank = self.rank(ids[at], ids[next[at]]);
                if rank != NONE {
                    heap.push(Reverse((rank, at)));
                }
            }
            if let Some(&left) = ids.get(prev[at]) {
                let rank = self.rank(left, ids[at]);
                if rank != NONE {
                    heap.push(Reverse((rank, prev[at])));
                }
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != NONE));
    }
}

/// Which token two tokens make, in an open table at most half full.
#[derive(Debug, Default)]
struct Pairs {
    slots: Vec<(Id, Id, Id)>, // left, right, both together; NONE where nothing is
    shift: u32,
}

impl Pairs {
    fn new(pairs: &[(Pair, Id)]) -> Self {
        let bits = (pairs.len() * 2).next_power_of_two().trailing_zeros().max(4);
        let mut table = Pairs { slots: vec![(NONE, NONE, NONE); 1 << bits], shift: 64 - bits };
        for &((left, right), id) in pairs {
            let at = table.find(left, right);
            table.slots[at] = (left, right, id);
        }
        table
    }

    /// The slot of a pair, or the empty one where it would be.
    #[inline]
    fn find(&self, left: Id, right: Id) -> usize {
        let pair = u64::from(left) << 32 | u64::from(right);
        let mut at = (pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ pair).wrapping_mul(0xd6e8_feb8_6659_fd93);
        at >>= self.shift;
        loop {
            let slot = self.slots[at as usize];
            if (slot.0, slot.1) == (left, right) || slot.0 == NONE {
                return at as usize;
            }
            at = (at + 1) & (self.slots.len() as u64 - 1);
        }
    }

    #[inline]
    fn get(&self, left: Id, right: Id) -> Id {
        self.slots[self.find(left, right)].2
    }
}
