//! Byte-level byte-pair encoding (BPE): training, encoding and decoding.
//!
//! The core knows no Python; [`Bpe`] is its face, and `python.rs` is the only border.
//!
//! ```
//! use rustbpe::{Splitter, Trainer, GPT4_PATTERN};
//!
//! let mut trainer = Trainer::new(Splitter::new(GPT4_PATTERN)?, 1);
//! trainer.add(&["low lower lowest", "new newer newest"], &mut || Ok(()))?;
//! let bpe = trainer.finish(300, &mut || Ok(()))?;
//! let ids = bpe.encode("lowest")?;
//! assert_eq!(bpe.decode(&ids)?, b"lowest");
//! # Ok::<(), rustbpe::Error>(())
//! ```
//!
//! Order of files: `split` cuts text into pieces, `count` counts distinct pieces, `merge` learns merges from
//! the counts, `vocab` turns pieces into ids, `bpe` puts them together, `parallel` shares work over threads.

#[cfg(feature = "python")]
mod arrow;
mod bpe;
mod cache;
mod classes;
mod count;
mod decode;
mod error;
mod merge;
mod parallel;
#[cfg(feature = "python")]
mod python;
mod scan;
mod short;
mod split;
mod text;
mod vocab;

pub use bpe::{Bpe, Token, Trainer};
pub use count::{Counter, Piece};
pub use decode::Decoder;
pub use error::Error;
pub use merge::{learn, Pair};
pub use parallel::{available_threads, Check};
pub use split::{Splitter, GPT4_PATTERN};
pub use text::{ByteText, Text};
pub use vocab::Vocab;

/// The id of a token. The 256 single bytes and one token per merge.
pub type Id = u32;
