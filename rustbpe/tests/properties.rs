//! The core against slow, obvious versions of itself.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use proptest::prelude::*;
use rustbpe::{learn, Bpe, Counter, Error, Id, Pair, Splitter, Trainer, Vocab, GPT4_PATTERN};

/// One merge after the other, counting everything anew each time.
fn naive_learn(pieces: &[(Vec<u8>, u64)], num_merges: usize) -> Vec<Pair> {
    let mut words: Vec<(Vec<Id>, u64)> = pieces
        .iter()
        .map(|(piece, count)| (piece.iter().map(|&byte| Id::from(byte)).collect(), *count))
        .collect();
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let mut counts = BTreeMap::<Pair, u64>::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += count;
            }
        }
        // The first maximum of a sorted map is the smallest pair.
        let Some((&best, _)) = counts.iter().rev().max_by_key(|(_, &count)| count) else { break };
        for (word, _) in &mut words {
            *word = replace(word, best, 256 + merges.len() as Id);
        }
        merges.push(best);
    }
    merges
}

fn replace(word: &[Id], pair: Pair, new: Id) -> Vec<Id> {
    let (mut out, mut i) = (Vec::new(), 0);
    while i < word.len() {
        if word.get(i..i + 2) == Some(&[pair.0, pair.1]) {
            out.push(new);
            i += 2;
        } else {
            out.push(word[i]);
            i += 1;
        }
    }
    out
}

/// The lowest merge first, the leftmost of equals, by bytes.
fn naive_encode(vocab: &Vocab, piece: &[u8]) -> Vec<Id> {
    let ids: BTreeMap<Vec<u8>, Id> = vocab.tokens().map(|(bytes, id)| (bytes.to_vec(), id)).collect();
    if let Some(&id) = ids.get(piece) {
        return vec![id];
    }
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|&byte| vec![byte]).collect();
    loop {
        let made = parts.windows(2).enumerate();
        let lowest = made.filter_map(|(i, pair)| ids.get(&pair.concat()).map(|&id| (id, i))).min();
        let Some((_, i)) = lowest else { break };
        let right = parts.remove(i + 1);
        parts[i].extend(right);
    }
    parts.iter().map(|part| ids[part]).collect()
}

/// The default splitter, compiled once.
fn gpt4() -> Splitter {
    static SPLITTER: OnceLock<Splitter> = OnceLock::new();
    SPLITTER.get_or_init(|| Splitter::new(GPT4_PATTERN).unwrap()).clone()
}

fn train(texts: &[String], vocab_size: usize, threads: usize, chunk: usize) -> Bpe {
    let mut trainer = Trainer::new(gpt4(), threads);
    for some in texts.chunks(chunk) {
        trainer.add(some, &mut || Ok(())).unwrap();
    }
    trainer.finish(vocab_size, &mut || Ok(())).unwrap()
}

fn tokens(bpe: &Bpe) -> Vec<(Vec<u8>, Id)> {
    bpe.vocab().tokens().map(|(bytes, id)| (bytes.to_vec(), id)).collect()
}

proptest! {
    #[test]
    fn merges_equal_the_naive_ones(
        pieces in prop::collection::vec((prop::collection::vec(97..101u8, 0..12), 1..5u64), 0..12),
        num_merges in 0..40usize,
    ) {
        let given = pieces.iter().map(|(piece, count)| (piece.as_slice(), *count));
        let found = learn(given, num_merges, &mut || Ok(())).unwrap();
        prop_assert_eq!(found, naive_learn(&pieces, num_merges));
    }

    #[test]
    fn encodings_equal_the_naive_ones(
        corpus in prop::collection::vec("[a-d]{1,12}", 1..8),
        text in "[a-d]{0,200}",
    ) {
        let mut trainer = Trainer::new(Splitter::new("").unwrap(), 1);
        trainer.add(&corpus, &mut || Ok(())).unwrap();
        let bpe = trainer.finish(300, &mut || Ok(())).unwrap();
        let twice = [bpe.encode(&text).unwrap(), bpe.encode(&text).unwrap()]; // the second from the cache
        let expected = naive_encode(bpe.vocab(), text.as_bytes());
        prop_assert_eq!(&twice[0], &expected);
        prop_assert_eq!(&twice[1], &expected);
        prop_assert_eq!(bpe.decode(&expected).unwrap(), text.as_bytes());
    }

    #[test]
    fn threads_and_chunks_change_nothing(
        texts in prop::collection::vec("[a-c ]{0,30}", 0..20),
        threads in 2..5usize,
        chunk in 1..9usize,
    ) {
        let one = train(&texts, 280, 1, 1000);
        let many = train(&texts, 280, threads, chunk);
        prop_assert_eq!(tokens(&one), tokens(&many));
        let (ids, at) = many.encode_batch::<u16, _>(&texts, Some(9), threads, &mut || Ok(())).unwrap();
        for (i, text) in texts.iter().enumerate() {
            let expected: Vec<u16> = [9].into_iter().chain(one.encode(text).unwrap().into_iter().map(|id| id as u16)).collect();
            prop_assert_eq!(&ids[at[i] as usize..at[i + 1] as usize], &expected);
        }
    }

    #[test]
    fn any_text_comes_back(text in ".{0,80}") {
        let bpe = train(&[text.clone(), text.clone()], 300, 1, 1);
        let ids = bpe.encode(&text).unwrap();
        prop_assert_eq!(bpe.decode(&ids).unwrap(), text.as_bytes());
    }
}

#[test]
fn a_megabyte_of_anything_is_quick() {
    let mut trainer = Trainer::new(gpt4(), 1);
    let letters: String = (0..1 << 20).map(|i: u64| char::from(b'a' + (i * i / 7 % 26) as u8)).collect();
    for text in ["a".repeat(1 << 20), " ".repeat(1 << 20), "🎈".repeat(1 << 18), letters] {
        trainer.add(&[&text], &mut || Ok(())).unwrap();
        let bpe = Bpe::new(gpt4(), Vocab::from_merges(&[(97, 97)]).unwrap());
        assert_eq!(bpe.decode(&bpe.encode(&text).unwrap()).unwrap(), text.as_bytes());
    }
    let bpe = trainer.finish(2000, &mut || Ok(())).unwrap();
    assert_eq!(bpe.encode(&"a".repeat(1 << 20)).unwrap().len(), 1);
}

#[test]
fn counts_beyond_32_bits_are_kept() {
    let big = 1u64 << 40;
    let pieces: [(&[u8], u64); 2] = [(b"ab", big), (b"cd", big + 1)];
    assert_eq!(learn(pieces.into_iter(), 2, &mut || Ok(())).unwrap(), [(99, 100), (97, 98)]);
}

#[test]
fn the_caller_can_stop_it() {
    let pieces: [(&[u8], u64); 1] = [(b"abcd", 1)];
    let mut left = 2;
    let stopped = learn(pieces.into_iter(), 3, &mut || {
        left -= 1;
        if left == 0 {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    });
    assert_eq!(stopped.unwrap_err(), Error::Interrupted);
}

#[test]
fn bad_vocabularies_are_refused() {
    let bytes = || (0..=255u8).map(|byte| (vec![byte], Id::from(byte)));
    let refused = |ranks: Vec<(Vec<u8>, Id)>| matches!(Vocab::from_ranks(ranks), Err(Error::Ranks(_)));
    assert!(refused(bytes().skip(1).collect()));
    assert!(refused(bytes().chain([(b"ab".to_vec(), 255)]).collect()));
    assert!(refused(bytes().chain([(b"ab".to_vec(), 256), (b"ab".to_vec(), 257)]).collect()));
    assert!(refused(bytes().chain([(Vec::new(), 256)]).collect()));
    assert!(refused(bytes().chain([(b"ab".to_vec(), Id::MAX)]).collect()));
    assert!(matches!(Vocab::from_merges(&[(0, 300)]), Err(Error::UnknownId(300))));
    let gap = Vocab::from_ranks(bytes().chain([(b"ab".to_vec(), 300)])).unwrap();
    assert_eq!((gap.len(), gap.token(299)), (257, Err(Error::UnknownId(299))));
    assert!(Trainer::new(Splitter::new("").unwrap(), 1).finish(255, &mut || Ok(())).is_err());
}

#[test]
fn counting_skips_what_cannot_merge() {
    let mut counter = Counter::default();
    counter.add(&gpt4(), &["a bc bc", " bc"], 2, &mut || Ok(())).unwrap();
    let pieces: Vec<_> =
        counter.into_pieces().map(|(piece, count)| (piece.as_ref().to_vec(), count)).collect();
    assert_eq!(pieces, [(b" bc".to_vec(), 3)]);
}
