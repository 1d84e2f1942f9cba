//! Everything that can go wrong, as one type.

use std::fmt;

use crate::Id;

/// What must hold and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The vocabulary must have room for the 256 bytes and at most 2^24 tokens.
    VocabSize(usize),
    /// The split pattern is not a valid regular expression.
    Pattern(String),
    /// The regex engine gave up on a text.
    Split(String),
    /// The ranks given are not a byte-level vocabulary.
    Ranks(String),
    /// No token has this id.
    UnknownId(Id),
    /// A text is not UTF-8: its number in the batch, and where the first bad byte is.
    Utf8 {
        /// The number of the text.
        text: usize,
        /// The position of the byte.
        byte: usize,
    },
    /// The distinct pieces add up to more than 2^32 bytes.
    TooLarge,
    /// The caller asked to stop.
    Interrupted,
}

impl Error {
    /// The same error, of the text with this number.
    pub(crate) fn at(self, text: usize) -> Self {
        match self {
            Error::Utf8 { byte, .. } => Error::Utf8 { text, byte },
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::VocabSize(found) => {
                write!(f, "vocab_size must be from 256 to {}, found {found}", crate::vocab::MAX_TOKENS)
            }
            Error::Pattern(why) => write!(f, "Invalid regex pattern: {why}"),
            Error::Split(why) => write!(f, "the split pattern could not be applied to this text: {why}"),
            Error::Ranks(why) => write!(f, "ranks must be a byte-level vocabulary: {why}"),
            Error::UnknownId(id) => write!(f, "Unknown token id: {id}"),
            Error::Utf8 { text, byte } => write!(f, "text {text} is not UTF-8 from byte {byte} on"),
            Error::TooLarge => write!(f, "the distinct pieces must stay under 4 GiB; train on less text"),
            Error::Interrupted => write!(f, "interrupted"),
        }
    }
}

impl std::error::Error for Error {}
