//! Counting distinct pieces in parallel. Memory grows with the distinct pieces, not with the text.

use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

use crate::parallel::{self, Check};
use crate::short::{self, Key};
use crate::{Error, Splitter, Text};

/// A thread keeps this many slots for itself, which fit its cache, before it hands its counts on.
const LOCAL_SLOTS: usize = 1 << 16;
const BATCH_BYTES: usize = 256 << 10; // of text handed to a thread at once

/// How often each distinct piece of at least two bytes has been seen (one byte has nothing to merge).
#[derive(Debug, Default)]
pub struct Counter {
    total: Mutex<Counts>,
    locals: Mutex<Vec<Counts>>,
}

/// Counts by piece: short pieces in an open table, the few long ones in a map.
#[derive(Debug, Default)]
struct Counts {
    slots: Vec<Slot>,
    used: usize,
    long: FxHashMap<Box<[u8]>, u64>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Slot {
    key: Key, // 0 where nothing is
    count: u64,
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
        let batches = parallel::batches(texts, BATCH_BYTES);
        let init = || {
            let idle = lock(&self.locals).pop();
            // A clone of the splitter per thread: the engine's scratch space is then not fought over.
            (splitter.clone(), idle.unwrap_or_else(|| Counts::with_slots(LOCAL_SLOTS)))
        };
        let states = parallel::fold(&batches, threads, check, init, |state, poll, _, batch| {
            let (splitter, local) = state;
            for i in batch.clone() {
                let text = texts[i].text().map_err(|error| error.at(i))?.unwrap_or_default();
                splitter.for_each(text, &mut || poll.poll(), |start, end| {
                    match short::key(text.as_bytes(), start, end) {
                        Some(key) => local.add(key, 1),
                        None => local.add_long(&text.as_bytes()[start..end], 1),
                    }
                    if local.is_full() {
                        local.drain_into(&mut lock(&self.total));
                    }
                })?;
            }
            Ok(())
        })?;
        lock(&self.locals).extend(states.into_iter().map(|(_, local)| local));
        Ok(())
    }

    /// The distinct pieces of at least two bytes with their counts, in no particular order.
    pub fn into_pieces(self) -> impl Iterator<Item = (Piece, u64)> {
        let mut total = self.total.into_inner().unwrap_or_else(PoisonError::into_inner);
        for mut local in self.locals.into_inner().unwrap_or_else(PoisonError::into_inner) {
            local.drain_into(&mut total);
        }
        let short = total.slots.into_iter().filter(|slot| slot.key != 0);
        let short = short.map(|slot| (Piece::Short(slot.key.to_le_bytes()), slot.count));
        let long = total.long.into_iter().map(|(piece, count)| (Piece::Long(piece), count));
        short.chain(long).filter(|(piece, _)| piece.as_ref().len() > 1)
    }
}

/// A piece of text, by its bytes.
#[derive(Debug)]
pub enum Piece {
    /// Up to 15 bytes, their number in the last place.
    Short([u8; 16]),
    /// More than that.
    Long(Box<[u8]>),
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        match self {
            Piece::Short(bytes) => &bytes[..usize::from(bytes[short::SHORT])],
            Piece::Long(bytes) => bytes,
        }
    }
}

impl Counts {
    fn with_slots(slots: usize) -> Self {
        Counts { slots: vec![Slot::default(); slots], ..Counts::default() }
    }

    #[inline(always)]
    fn add(&mut self, key: Key, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = (short::hash(key) >> (64 - self.slots.len().trailing_zeros())) as usize;
        loop {
            let slot = &mut self.slots[at & mask];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.key == 0 {
                *slot = Slot { key, count };
                self.used += 1;
                return;
            }
            at += 1;
        }
    }

    fn add_long(&mut self, piece: &[u8], count: u64) {
        match self.long.get_mut(piece) {
            Some(sum) => *sum += count,
            None => {
                self.long.insert(piece.into(), count);
            }
        }
    }

    /// Whether a local table should be handed on.
    #[inline(always)]
    fn is_full(&self) -> bool {
        (self.used + self.long.len()) * 4 > LOCAL_SLOTS * 3
    }

    /// Adds all to `total` and is empty afterwards.
    fn drain_into(&mut self, total: &mut Counts) {
        // Room first: pieces come in the order of their hash, and would crowd at the front of a small table.
        while (total.used + self.used) * 4 > total.slots.len() * 3 {
            total.grow();
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.key != 0) {
            total.add(slot.key, slot.count);
            slot.key = 0;
        }
        self.used = 0;
        for (piece, count) in self.long.drain() {
            total.add_long(&piece, count);
        }
    }

    fn grow(&mut self) {
        let slots = vec![Slot::default(); (self.slots.len() * 2).max(1 << 10)];
        let old = std::mem::replace(&mut self.slots, slots);
        self.used = 0;
        for slot in old.into_iter().filter(|slot| slot.key != 0) {
            self.add(slot.key, slot.count);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
