//! A tokenizer as a whole: splitter, vocabulary, and the scratch space of its threads.

use std::sync::{Mutex, PoisonError};

use crate::{learn, parallel, Cache, Counter, Error, Id, Splitter, Vocab};

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
    cache: Cache,
}

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
        let ids = self.encode_with(&mut worker, text);
        self.return_worker(worker);
        ids
    }

    /// The ids of each text, on up to `threads` threads; the same as encoding one by one.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        threads: usize,
    ) -> Result<Vec<Vec<Id>>, Error> {
        let init = || (self.borrow_worker(), Vec::new());
        let states = parallel::fold(texts, threads, init, |(worker, done), index, text| {
            done.push((index, self.encode_with(worker, text.as_ref())?));
            Ok(())
        })?;
        let mut all: Vec<Vec<Id>> = vec![Vec::new(); texts.len()];
        for (worker, done) in states {
            self.return_worker(worker);
            for (index, ids) in done {
                all[index] = ids;
            }
        }
        Ok(all)
    }

    /// The bytes of a sequence of ids.
    pub fn decode(&self, ids: &[Id]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.vocab.token(id)?);
        }
        Ok(bytes)
    }

    fn encode_with(&self, worker: &mut Worker, text: &str) -> Result<Vec<Id>, Error> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let Worker { splitter, cache } = worker;
        splitter.for_each(text, |piece| self.vocab.encode_piece(piece.as_bytes(), cache, &mut ids))?;
        Ok(ids)
    }

    fn borrow_worker(&self) -> Worker {
        let idle = self.workers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| Worker { splitter: self.splitter.clone(), cache: Cache::default() })
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

    /// Counts the pieces of `texts`. Pieces never span two texts.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T]) -> Result<(), Error> {
        self.counter.add(&self.splitter, texts, self.threads)
    }

    /// Learns up to `vocab_size` tokens (fewer when the text has no more pairs). See [`learn`] for `check`.
    pub fn finish(
        self,
        vocab_size: usize,
        check: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Bpe, Error> {
        check_vocab_size(vocab_size)?;
        let merges = learn(self.counter.iter(), vocab_size - 256, check)?;
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
