//! Splitting, counting, merging and encoding, in MB/s: `cargo bench`, or `TEXT=file cargo bench` for other text.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use rustbpe::{learn, Bpe, Counter, Splitter, Trainer, GPT4_PATTERN};

/// Words drawn from a few thousand by Zipf's law, with punctuation, numbers and paragraphs: 4 MB in documents.
fn made_text() -> Vec<String> {
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as usize) % below
    };
    let letters: Vec<char> = "eeeettaaooiinnsshhrrddllcumwfgypbvk".chars().collect();
    let words: Vec<String> =
        (0..8000).map(|_| (0..2 + random(8)).map(|_| letters[random(letters.len())]).collect()).collect();
    let mut documents = Vec::new();
    for _ in 0..1000 {
        let mut text = String::new();
        while text.len() < 4000 {
            let most = 1 + random(words.len());
            text += &words[random(most)];
            text += [" ", " ", " ", " ", ", ", ". ", " 1984 ", "\n\n"][random(8)];
        }
        documents.push(text);
    }
    documents
}

fn bench(c: &mut Criterion) {
    let texts = match std::env::var("TEXT") {
        Ok(file) => {
            let text = std::fs::read_to_string(file).expect("TEXT names a text file");
            text.split_inclusive("\n\n").map(str::to_string).collect()
        }
        Err(_) => made_text(),
    };
    let no_check = &mut || Ok(());
    let mut group = c.benchmark_group("tokenizer");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(texts.iter().map(|text| text.len() as u64).sum()));

    let fast = Splitter::new(GPT4_PATTERN).unwrap();
    for (name, splitter) in [("scanner", &fast), ("regex", &Splitter::general(GPT4_PATTERN).unwrap())] {
        group.bench_function(format!("split/{name}"), |b| {
            b.iter(|| {
                for text in &texts {
                    splitter
                        .for_each(text, no_check, |start, end| {
                            black_box((start, end));
                        })
                        .unwrap();
                }
            });
        });
    }
    group.bench_function("count", |b| {
        b.iter(|| Counter::default().add(&fast, &texts, 1, no_check).unwrap());
    });
    let mut counter = Counter::default();
    counter.add(&fast, &texts, 1, no_check).unwrap();
    let pieces: Vec<_> = counter.into_pieces().collect();
    group.bench_function("merge", |b| {
        b.iter(|| learn(pieces.iter().map(|(piece, count)| (piece, *count)), 8000, no_check).unwrap());
    });
    let mut trainer = Trainer::new(fast, 1);
    trainer.add(&texts, no_check).unwrap();
    let bpe: Bpe = trainer.finish(8256, no_check).unwrap();
    for threads in [1, 2] {
        group.bench_function(format!("encode/{threads}"), |b| {
            b.iter(|| bpe.encode_batch::<u16, _>(&texts, None, threads, no_check).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
