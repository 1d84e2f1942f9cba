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
const CACHED_BYTES: usize = 48; // longer pieces rarely come again
const CACHED_PIECES: usize = 1 << 17; // then the cache starts afresh

/// Tokens, and which two tokens make which. The id is also the rank: the lowest possible merge comes first.
#[derive(Debug)]
pub struct Vocab {
    bytes: Vec<u8>,
    spans: Vec<Range<u32>>, // of each id in `bytes`; empty where an id is unused
    num_tokens: usize,
    whole: FxHashMap<Box<[u8]>, Id>,
    merged: FxHashMap<Pair, Id>,
    of_byte: [Id; 256],
}

/// Pieces of several tokens seen before, for one thread at a time.
#[derive(Debug, Default)]
pub struct Cache {
    spans: FxHashMap<Box<[u8]>, Range<u32>>,
    ids: Vec<Id>,
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
            merged: FxHashMap::default(),
            of_byte: [NONE; 256],
        };
        for (token, id) in ranks {
            vocab.insert(token, id)?;
        }
        if let Some(byte) = vocab.of_byte.iter().position(|&id| id == NONE) {
            return Err(Error::Ranks(format!("the single byte {byte} has no id")));
        }
        vocab.merged = vocab.pairs();
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
        if let [byte] = token[..] {
            self.of_byte[byte as usize] = id;
        }
        if let Some(other) = self.whole.insert(token.into(), id) {
            return Err(Error::Ranks(format!("ids {other} and {id} have the same bytes")));
        }
        self.num_tokens += 1;
        Ok(())
    }

    /// Every way to cut a token into two tokens, so that merging needs no bytes any more.
    fn pairs(&self) -> FxHashMap<Pair, Id> {
        // Only lengths that tokens have are tried, because a token can be a megabyte long.
        let lengths: BTreeSet<usize> = self.whole.keys().map(|token| token.len()).collect();
        let mut pairs = FxHashMap::default();
        for (token, &id) in &self.whole {
            for &cut in lengths.range(1..token.len()).filter(|&cut| lengths.contains(&(token.len() - cut))) {
                let (left, right) = token.split_at(cut);
                if let (Some(&left), Some(&right)) = (self.whole.get(left), self.whole.get(right)) {
                    pairs.insert((left, right), id);
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

    /// Appends the ids of one piece to `out`.
    pub fn encode_piece(&self, piece: &[u8], cache: &mut Cache, out: &mut Vec<Id>) {
        if let Some(&id) = self.whole.get(piece) {
            out.push(id);
            return;
        }
        if piece.len() > CACHED_BYTES {
            return self.merge(piece, out);
        }
        if let Some(span) = cache.spans.get(piece) {
            out.extend_from_slice(&cache.ids[span.start as usize..span.end as usize]);
            return;
        }
        let start = out.len();
        self.merge(piece, out);
        cache.remember(piece, &out[start..]);
    }

    fn merge(&self, piece: &[u8], out: &mut Vec<Id>) {
        if piece.len() <= SHORT {
            self.merge_short(piece, out);
        } else {
            self.merge_long(piece, out);
        }
    }

    fn rank(&self, left: Id, right: Id) -> Id {
        self.merged.get(&(left, right)).copied().unwrap_or(NONE)
    }

    /// Takes the lowest merge of all neighbours, the leftmost of equals, until none is left: O(n^2).
    fn merge_short(&self, piece: &[u8], out: &mut Vec<Id>) {
        let start = out.len();
        out.extend(piece.iter().map(|&byte| self.of_byte[byte as usize]));
        let mut ranks = [NONE; SHORT];
        let mut len = piece.len();
        let ids = &mut out[start..];
        for i in 0..len - 1 {
            ranks[i] = self.rank(ids[i], ids[i + 1]);
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
        let mut heap: BinaryHeap<Reverse<(Id, usize)>> = (0..len - 1)
            .map(|i| (self.rank(ids[i], ids[i + 1]), i))
            .filter(|&(rank, _)| rank != NONE)
            .map(Reverse)
            .collect();
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

impl Cache {
    fn remember(&mut self, piece: &[u8], ids: &[Id]) {
        if self.spans.len() >= CACHED_PIECES {
            self.spans.clear();
            self.ids.clear();
        }
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.spans.insert(piece.into(), start..self.ids.len() as u32);
    }
}
