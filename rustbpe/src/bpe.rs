//! A tokenizer as a whole: splitter, vocabulary, and the scratch space of its threads.

use std::sync::{Mutex, PoisonError};

use crate::cache::{Cache, Ids};
use crate::parallel::{self, Check};
use crate::short::{self, Pieces};
use crate::{learn, Counter, Error, Id, Splitter, Text, Vocab};

const BATCH_BYTES: usize = 256 << 10; // of text handed to a thread at once

/// A trained tokenizer. Shared freely between threads.
#[derive(Debug)]
pub struct Bpe {
    splitter: Splitter,
    vocab: Vocab,
    workers: Mutex<Vec<Worker>>,
}

/// What one thread needs for itself while it encodes.
#[derive(Debug)]
struct Worker {
    splitter: Splitter,
    pieces: Pieces,
    cache: Cache,
    ids: Ids,
}

/// An integer that ids are handed out as. The caller chooses one that holds the largest id.
pub trait Token: Copy + Send {
    /// `id` as this type.
    fn of(id: Id) -> Self;
}

macro_rules! token {
    ($($type:ty)*) => {$(
        impl Token for $type {
            fn of(id: Id) -> Self {
                id as $type
            }
        }
    )*};
}
token!(u16 u32 i32);

impl Bpe {
    /// A tokenizer from a pattern and a vocabulary.
    pub fn new(splitter: Splitter, vocab: Vocab) -> Self {
        Bpe { splitter, vocab, workers: Mutex::new(Vec::new()) }
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// The split pattern.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str) -> Result<Vec<Id>, Error> {
        let mut worker = self.borrow_worker();
        worker.ids.clear();
        self.encode_with(&mut worker, text, &mut || Ok(()))?;
        let ids = worker.ids.as_slice().to_vec();
        self.return_worker(worker);
        Ok(ids)
    }

    /// Appends the ids of a text to those of the worker.
    fn encode_with(&self, worker: &mut Worker, text: &str, check: Check<'_>) -> Result<(), Error> {
        let Worker { splitter, pieces, cache, ids } = worker;
        let bytes = text.as_bytes();
        let mut encode = |pieces: &[short::Found]| cache.encode(&self.vocab, bytes, pieces, ids);
        let split = splitter.for_each(text, check, |start, end| pieces.push(bytes, start, end, &mut encode));
        pieces.flush(encode);
        split
    }

    /// The ids of all texts one after another, and where each text begins: text i is ids[at[i]..at[i + 1]].
    ///
    /// Runs on up to `threads` threads, with the same result for any number. `prepend` begins each text but the
    /// missing ones, which have no ids at all. `check` is called now and then; its error ends the work.
    pub fn encode_batch<I: Token, T: Text>(
        &self,
        texts: &[T],
        prepend: Option<Id>,
        threads: usize,
        check: Check<'_>,
    ) -> Result<(Vec<I>, Vec<i64>), Error> {
        let batches = parallel::batches(texts, BATCH_BYTES);
        let init = || (self.borrow_worker(), Vec::new());
        let states = parallel::fold(&batches, threads, check, init, |(worker, done), poll, index, batch| {
            worker.ids.clear();
            let mut lengths = Vec::with_capacity(batch.len());
            for i in batch.clone() {
                let start = worker.ids.as_slice().len();
                if let Some(text) = texts[i].text().map_err(|error| error.at(i))? {
                    worker.ids.extend(prepend.as_slice());
                    self.encode_with(worker, text, &mut || poll.poll())?;
                }
                lengths.push((worker.ids.as_slice().len() - start) as i64);
            }
            let ids: Vec<I> = worker.ids.as_slice().iter().map(|&id| I::of(id)).collect();
            done.push((index, ids, lengths));
            Ok(())
        })?;
        let mut done = Vec::with_capacity(batches.len());
        for (worker, some) in states {
            self.return_worker(worker);
            done.extend(some);
        }
        done.sort_unstable_by_key(|(index, _, _)| *index);
        let mut ids = Vec::with_capacity(done.iter().map(|(_, ids, _)| ids.len()).sum());
        let mut at = Vec::with_capacity(texts.len() + 1);
        at.push(0);
        let mut end = 0;
        for (_, some, lengths) in done {
            ids.extend_from_slice(&some);
            at.extend(lengths.iter().map(|length| {
                end += length;
                end
            }));
        }
        Ok((ids, at))
    }

    /// The bytes of a sequence of ids.
    pub fn decode(&self, ids: &[Id]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.vocab.token(id)?);
        }
        Ok(bytes)
    }

    fn borrow_worker(&self) -> Worker {
        let idle = self.workers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| Worker {
            splitter: self.splitter.clone(),
            pieces: Pieces::default(),
            cache: Cache::default(),
            ids: Ids::default(),
        })
    }

    fn return_worker(&self, worker: Worker) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
    }
}

/// Gathers counts from batches of text, then learns.
#[derive(Debug)]
pub struct Trainer {
    splitter: Splitter,
    counter: Counter,
    threads: usize,
}

impl Trainer {
    /// A trainer that counts on up to `threads` threads.
    pub fn new(splitter: Splitter, threads: usize) -> Self {
        Trainer { splitter, counter: Counter::default(), threads }
    }

    /// Counts the pieces of `texts`. Pieces never span two texts. An error of `check` ends the work.
    pub fn add<T: Text>(&mut self, texts: &[T], check: Check<'_>) -> Result<(), Error> {
        self.counter.add(&self.splitter, texts, self.threads, check)
    }

    /// Learns up to `vocab_size` tokens (fewer when the text has no more pairs). See [`learn`] for `check`.
    pub fn finish(
        self,
        vocab_size: usize,
        check: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Bpe, Error> {
        check_vocab_size(vocab_size)?;
        let merges = learn(self.counter.into_pieces(), vocab_size - 256, check)?;
        Ok(Bpe::new(self.splitter, Vocab::from_merges(&merges)?))
    }
}

/// A vocabulary size must have room for all bytes.
pub(crate) fn check_vocab_size(vocab_size: usize) -> Result<(), Error> {
    if (256..=crate::vocab::MAX_TOKENS).contains(&vocab_size) {
        Ok(())
    } else {
        Err(Error::VocabSize(vocab_size))
    }
}
