//! Work shared over scoped threads. No global pool, so a process may fork at any time.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::Error;

/// The number of threads this process may use at once.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Folds `work` over `items` on up to `threads` threads and returns one state per thread.
///
/// Each item is seen exactly once, by one thread; which thread is left to chance, so the caller must combine
/// the states in a way that does not depend on it. The first error stops everybody.
pub(crate) fn fold<'t, T: Sync, S: Send>(
    items: &'t [T],
    threads: usize,
    init: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, &'t T) -> Result<(), Error> + Sync,
) -> Result<Vec<S>, Error> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let run = || -> Result<S, Error> {
        let mut state = init();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            if let Err(error) = work(&mut state, index, item) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(state)
    };
    let helpers = threads.min(items.len()).saturating_sub(1);
    thread::scope(|scope| {
        // A thread that cannot be started is a thread fewer, not a failure.
        let handles: Vec<_> =
            (0..helpers).filter_map(|_| thread::Builder::new().spawn_scoped(scope, run).ok()).collect();
        let mine = run();
        let others = handles.into_iter().map(|handle| match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        std::iter::once(mine).chain(others).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_seen_once() {
        for threads in [1, 2, 7] {
            let items: Vec<usize> = (0..1000).collect();
            let states = fold(&items, threads, Vec::new, |seen, index, &item| {
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
    fn an_error_is_returned() {
        let result =
            fold(&[1, 2, 3], 2, || (), |(), _, &x| if x == 2 { Err(Error::UnknownId(2)) } else { Ok(()) });
        assert_eq!(result.unwrap_err(), Error::UnknownId(2));
    }
}
