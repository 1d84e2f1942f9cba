//! Pieces met before, with their ids, for one thread at a time: most of a text never reaches the merge loop.

use std::ops::Range;

use rustc_hash::FxHashMap;

use crate::short::{self, Found, Key};
use crate::{Id, Vocab};

const SETS: usize = 1 << 16; // of 64 bytes: 4 MiB, which hold 97 % of the pieces of English prose
const HELD: usize = 4; // ids of a short piece at most
const LONG_BYTES: usize = 48; // longer pieces rarely come again
const LONG_PIECES: usize = 1 << 15; // then the map starts afresh
const COUNT_SHIFT: u32 = 24; // ids are below 2^24, so the number of ids fits above the first

/// Two pieces whose hashes are alike, in one line of memory; the newer one is first.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Set([Entry; 2]);

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    key: Key, // 0 where nothing is
    ids: [Id; HELD],
}

/// What one thread remembers of one vocabulary.
#[derive(Debug)]
pub(crate) struct Cache {
    sets: Vec<Set>,
    long: FxHashMap<Box<[u8]>, Range<u32>>,
    long_ids: Vec<Id>,
    merged: Vec<Id>,
}

/// A list of ids with room at its end, so that a few can be written at once.
#[derive(Debug, Default)]
pub(crate) struct Ids {
    ids: Vec<Id>,
    len: usize,
}

impl Ids {
    /// The ids.
    pub(crate) fn as_slice(&self) -> &[Id] {
        &self.ids[..self.len]
    }

    /// Forgets the ids and keeps the room.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends some ids.
    pub(crate) fn extend(&mut self, some: &[Id]) {
        self.reserve(some.len());
        self.ids[self.len..self.len + some.len()].copy_from_slice(some);
        self.len += some.len();
    }

    /// Appends the first `count` of four ids.
    #[inline(always)]
    fn extend_four(&mut self, four: [Id; HELD], count: usize) {
        if self.ids.len() < self.len + HELD {
            self.reserve(HELD);
        }
        self.ids[self.len..self.len + HELD].copy_from_slice(&four);
        self.len += count;
    }

    #[cold]
    fn reserve(&mut self, more: usize) {
        if self.ids.len() < self.len + more {
            self.ids.resize((self.len + more + 1024).next_power_of_two(), 0);
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Cache {
            sets: vec![Set::default(); SETS],
            long: FxHashMap::default(),
            long_ids: Vec::new(),
            merged: Vec::new(),
        }
    }
}

impl Cache {
    /// Appends the ids of these pieces of `text` to `out`.
    pub(crate) fn encode(&mut self, vocab: &Vocab, text: &[u8], pieces: &[Found], out: &mut Ids) {
        for piece in pieces {
            if piece.key == 0 {
                self.encode_long(vocab, &text[piece.start..piece.end], out);
                continue;
            }
            let set = &self.sets[slot(piece.key)];
            // Which of the two it is must not be a branch: it would be guessed, often wrongly.
            let [newer, older] = set.0.map(|entry| entry.key == piece.key);
            if !(newer | older) {
                self.encode_new(vocab, piece.key, &text[piece.start..piece.end], out);
                continue;
            }
            let [first, rest @ ..] = set.0[usize::from(older)].ids;
            let ids = [first & ((1 << COUNT_SHIFT) - 1), rest[0], rest[1], rest[2]];
            out.extend_four(ids, (first >> COUNT_SHIFT) as usize);
        }
    }

    /// A short piece that is not remembered.
    #[cold]
    #[inline(never)]
    fn encode_new(&mut self, vocab: &Vocab, key: Key, piece: &[u8], out: &mut Ids) {
        self.merged.clear();
        match vocab.whole(piece) {
            Some(id) => self.merged.push(id),
            None => vocab.merge(piece, &mut self.merged),
        }
        out.extend(&self.merged);
        if self.merged.len() <= HELD {
            let mut ids = [0; HELD];
            ids[..self.merged.len()].copy_from_slice(&self.merged);
            ids[0] |= (self.merged.len() as Id) << COUNT_SHIFT;
            let Set([newer, older]) = &mut self.sets[slot(key)];
            *older = *newer;
            *newer = Entry { key, ids };
        }
    }

    #[inline(never)]
    fn encode_long(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Ids) {
        if piece.len() <= LONG_BYTES {
            if let Some(span) = self.long.get(piece) {
                return out.extend(&self.long_ids[span.start as usize..span.end as usize]);
            }
        }
        self.merged.clear();
        match vocab.whole(piece) {
            Some(id) => self.merged.push(id),
            None => vocab.merge(piece, &mut self.merged),
        }
        out.extend(&self.merged);
        if piece.len() <= LONG_BYTES {
            if self.long.len() >= LONG_PIECES {
                self.long.clear();
                self.long_ids.clear();
            }
            let start = self.long_ids.len() as u32;
            self.long_ids.extend_from_slice(&self.merged);
            self.long.insert(piece.into(), start..self.long_ids.len() as u32);
        }
    }
}

/// Where a piece is kept.
#[inline(always)]
fn slot(key: Key) -> usize {
    (short::hash(key) >> (64 - SETS.trailing_zeros())) as usize
}
