//! Work shared over scoped threads. No global pool, so a process may fork at any time.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::{Error, Text};

/// Called now and then by the thread that asked for the work; its error ends the work.
pub type Check<'c> = &'c mut dyn FnMut() -> Result<(), Error>;

/// The number of threads this process may use at once.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Neighbouring texts of about `bytes` together, so that many short texts are handed out at once.
pub(crate) fn batches<T: Text>(texts: &[T], bytes: usize) -> Vec<Range<usize>> {
    let mut batches = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        size += text.size() + 1;
        if size >= bytes || i + 1 == texts.len() {
            batches.push(start..i + 1);
            (start, size) = (i + 1, 0);
        }
    }
    batches
}

/// Says inside a long piece of work whether to go on.
pub(crate) struct Poll<'a, 'c> {
    failed: &'a AtomicBool,
    check: Option<Check<'c>>,
}

impl Poll<'_, '_> {
    /// An error when another thread has failed, or when the caller wants to stop.
    pub(crate) fn poll(&mut self) -> Result<(), Error> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.check.as_mut().map_or(Ok(()), |check| check())
    }
}

/// Folds `work` over `items` on up to `threads` threads and returns one state per thread.
///
/// Each item is seen exactly once, by one thread; which thread is left to chance, so the caller must combine
/// the states in a way that does not depend on it. The first error stops everybody and is returned.
pub(crate) fn fold<'t, T: Sync, S: Send>(
    items: &'t [T],
    threads: usize,
    check: Check<'_>,
    init: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &mut Poll<'_, '_>, usize, &'t T) -> Result<(), Error> + Sync,
) -> Result<Vec<S>, Error> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let run = |check: Option<Check<'_>>| -> S {
        let mut state = init();
        let mut poll = Poll { failed: &failed, check };
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            if let Err(error) = poll.poll().and_then(|()| work(&mut state, &mut poll, index, item)) {
                // Only the first to fail has something to say; the others stop because of it.
                if !failed.swap(true, Ordering::Relaxed) {
                    *first_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
                break;
            }
        }
        state
    };
    let helpers = threads.min(items.len()).saturating_sub(1);
    let states = thread::scope(|scope| {
        // A thread that cannot be started is a thread fewer, not a failure.
        let start = |_| thread::Builder::new().spawn_scoped(scope, || run(None)).ok();
        let handles: Vec<_> = (0..helpers).filter_map(start).collect();
        let mut states = vec![run(Some(check))];
        for handle in handles {
            states.push(handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        states
    });
    match first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(states),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_seen_once() {
        for threads in [1, 2, 7] {
            let items: Vec<usize> = (0..1000).collect();
            let mut checked = 0;
            let mut check = || {
                checked += 1;
                Ok(())
            };
            let states = fold(&items, threads, &mut check, Vec::new, |seen, _, index, &item| {
                assert_eq!(index, item);
                seen.push(item);
                Ok(())
            });
            let mut all = states.unwrap().concat();
            all.sort_unstable();
            assert_eq!(all, items);
        }
    }

    #[test]
    fn the_first_error_is_returned() {
        for threads in [1, 2, 7] {
            let result = fold(
                &[1, 2, 3],
                threads,
                &mut || Ok(()),
                || (),
                |(), poll, _, &x| {
                    if x == 1 && threads > 1 {
                        loop {
                            poll.poll()?; // until the other thread fails
                        }
                    }
                    if x == 2 {
                        Err(Error::UnknownId(2))
                    } else {
                        Ok(())
                    }
                },
            );
            assert_eq!(result.unwrap_err(), Error::UnknownId(2));
        }
    }

    #[test]
    fn the_caller_can_stop_it() {
        let stopped = fold(
            &[1, 2, 3],
            2,
            &mut || Err(Error::Interrupted),
            || (),
            |(), poll, _, _| loop {
                poll.poll()?;
            },
        );
        assert_eq!(stopped.unwrap_err(), Error::Interrupted);
    }

    #[test]
    fn batches_cover_all() {
        let texts = ["", "aaaa", "b", "", "cccccccccc", ""];
        assert_eq!(batches(&texts, 5), [0..2, 2..5, 5..6]);
        assert_eq!(batches(&texts, 1000), vec![0..texts.len()]);
        assert!(batches::<&str>(&[], 5).is_empty());
    }
}
