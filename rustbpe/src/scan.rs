//! The split patterns of GPT-4 and its successors, written out by hand: one look at each character, no
//! backtracking. Each is held to its regular expression by tests over random text.

use crate::classes::{Classes, BLANK, BREAK, CASELESS, LETTER, LOWER, MARK, NUMBER, OTHER, SPACE, UPPER};

const GPT4_HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const GPT4_TAIL: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// GPT-4's as tiktoken has it: white space at the end of the text is one piece.
pub(crate) const CL100K: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
);

/// GPT-4o's: words begin at capitals and keep their accents and their 's.
pub(crate) const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Which pattern, and how long a piece of digits may be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Family {
    Gpt4,
    Cl100k,
    O200k,
}

/// Finds where pieces end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scanner {
    classes: &'static Classes,
    family: Family,
    digits: u32,
}

impl Scanner {
    /// A scanner for `pattern`, if it is one of those known here.
    pub(crate) fn of(pattern: &str) -> Option<Self> {
        let (family, digits) = match pattern {
            CL100K => (Family::Cl100k, 3),
            O200K => (Family::O200k, 3),
            _ => {
                let digits = pattern.strip_prefix(GPT4_HEAD)?.strip_suffix(GPT4_TAIL)?;
                (Family::Gpt4, digits.parse().ok().filter(|&digits| (1..=9).contains(&digits))?)
            }
        };
        Some(Scanner { classes: Classes::get(), family, digits })
    }

    /// Calls `take` with the start and end of each piece from `start` on, until a piece ends at `stop` or later.
    /// Returns where that one ended. `start` must be a border of characters in UTF-8.
    #[inline(always)]
    pub(crate) fn scan(
        &self,
        text: &[u8],
        mut start: usize,
        stop: usize,
        mut take: impl FnMut(usize, usize),
    ) -> usize {
        let stop = stop.min(text.len());
        while start < stop {
            let end = match self.family {
                Family::O200k => self.o200k(text, start),
                Family::Gpt4 | Family::Cl100k => self.gpt4(text, start),
            };
            take(start, end);
            start = end;
        }
        start
    }

    #[inline(always)]
    fn gpt4(&self, text: &[u8], start: usize) -> usize {
        let (class, next) = self.classes.at(text, start);
        if class & LETTER != 0 {
            return self.letters(text, next);
        }
        let (class_after, after_next) = self.classes.at(text, next);
        if class & (BLANK | OTHER | MARK) != 0 && class_after & LETTER != 0 {
            return match contraction(text, start) {
                0 => self.letters(text, after_next),
                size => start + size,
            };
        }
        if class & NUMBER != 0 {
            return self.numbers(text, next);
        }
        if class & SPACE == 0 {
            return self.breaks(text, self.run(text, next, OTHER | MARK), b'\n');
        }
        if text[start] == b' ' && class_after & (OTHER | MARK) != 0 {
            return self.breaks(text, self.run(text, after_next, OTHER | MARK), b'\n');
        }
        self.space(text, start)
    }

    fn o200k(&self, text: &[u8], start: usize) -> usize {
        let (class, next) = self.classes.at(text, start);
        if class & LETTER != 0 {
            let (_, word) = self.cased_word(text, start);
            return word + contraction(text, word);
        }
        if class & NUMBER != 0 {
            return self.numbers(text, next);
        }
        if class & BREAK == 0 {
            // Any character but a line break may begin a word. A mark may also be one, alone: it is tried
            // after the words with a small letter (or none that has case), but before those in capitals.
            let (has_lower, word) = self.cased_word(text, next);
            if word > next && (has_lower || class & MARK == 0) {
                return word + contraction(text, word);
            }
            if class & MARK != 0 {
                return next + contraction(text, next);
            }
        }
        let (class_after, after_next) = self.classes.at(text, next);
        if class & SPACE == 0 {
            return self.breaks(text, self.run(text, next, OTHER | MARK), b'/');
        }
        if text[start] == b' ' && class_after & OTHER != 0 {
            return self.breaks(text, self.run(text, after_next, OTHER | MARK), b'/');
        }
        self.space(text, start)
    }

    /// Where capitals followed by small letters end, and whether the last part is not in capitals. Letters without
    /// case and marks count as both.
    fn cased_word(&self, text: &[u8], start: usize) -> (bool, usize) {
        let (mut at, mut after_both) = (start, start);
        loop {
            let (class, next) = self.classes.at(text, at);
            if class & LOWER != 0 {
                return (true, self.run(text, next, LOWER | CASELESS | MARK));
            }
            if class & (UPPER | CASELESS | MARK) == 0 {
                break;
            }
            at = next;
            if class & UPPER == 0 {
                after_both = at;
            }
        }
        // No small letter follows: the word must end in a letter that counts as one, if there is any.
        if after_both > start {
            (true, after_both)
        } else {
            (false, at)
        }
    }

    /// The end of a run of letters.
    #[inline(always)]
    fn letters(&self, text: &[u8], mut at: usize) -> usize {
        loop {
            match text.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
                Some(eight) => match ascii_letters(u64::from_le_bytes(*eight)) {
                    8 => {
                        at += 8;
                        continue;
                    }
                    some => at += some,
                },
                None => {
                    while text.get(at).is_some_and(u8::is_ascii_alphabetic) {
                        at += 1;
                    }
                }
            }
            if text.get(at).is_none_or(u8::is_ascii) {
                return at;
            }
            let end = self.run_beyond_ascii(text, at, LETTER);
            if end == at || text.get(end).is_none_or(|byte| !byte.is_ascii_alphabetic()) {
                return end;
            }
            at = end;
        }
    }

    fn run_beyond_ascii(&self, text: &[u8], mut at: usize, classes: u8) -> usize {
        while text.get(at).is_some_and(|byte| !byte.is_ascii()) {
            let (class, next) = self.classes.at(text, at);
            if class & classes == 0 {
                break;
            }
            at = next;
        }
        at
    }

    /// The end of a run of characters of these classes.
    #[inline(always)]
    fn run(&self, text: &[u8], mut at: usize, classes: u8) -> usize {
        loop {
            let (class, next) = self.classes.at(text, at);
            if class & classes == 0 {
                return at;
            }
            at = next;
        }
    }

    /// The end of a number that has begun.
    #[inline(always)]
    fn numbers(&self, text: &[u8], mut at: usize) -> usize {
        for _ in 1..self.digits {
            let (class, next) = self.classes.at(text, at);
            if class & NUMBER == 0 {
                break;
            }
            at = next;
        }
        at
    }

    /// The end of a run of line breaks, with `also` among them.
    #[inline(always)]
    fn breaks(&self, text: &[u8], mut at: usize, also: u8) -> usize {
        while text.get(at).is_some_and(|&byte| byte == b'\n' || byte == b'\r' || byte == also) {
            at += 1;
        }
        at
    }

    /// A run of white space: up to its last line break if it has one; at the end of the text all of it; else it
    /// leaves its last character to what follows, unless it is only one.
    fn space(&self, text: &[u8], start: usize) -> usize {
        let (mut at, mut last, mut after_break) = (start, start, start);
        loop {
            let (class, next) = self.classes.at(text, at);
            if class & SPACE == 0 {
                break;
            }
            (last, at) = (at, next);
            if class & BREAK != 0 {
                after_break = at;
            }
        }
        let is_end = at == text.len();
        if after_break > start && !(is_end && self.family == Family::Cl100k) {
            after_break
        } else if is_end || last == start {
            at
        } else {
            last
        }
    }
}

/// How many of eight bytes are ASCII letters, before the first that is not.
#[inline(always)]
fn ascii_letters(eight: u64) -> usize {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let each = |byte: u8| u64::from(byte) * 0x0101_0101_0101_0101;
    let small = (eight & !HIGH) | each(0x20); // both cases as one
    let from_a = small + each(0x80 - b'a'); // the high bit of each byte: at least 'a'
    let past_z = small + each(0x7f - b'z'); // more than 'z'
    let no_letter = !(from_a & !past_z & !eight) & HIGH;
    no_letter.trailing_zeros() as usize / 8 // 64 / 8 when all are letters
}

/// The size of 's 't 'd 'm 'll 've 're (in any case) at `at`; 0 if none is there.
#[inline(always)]
fn contraction(text: &[u8], at: usize) -> usize {
    if text.get(at) != Some(&b'\'') {
        return 0;
    }
    let lower = |i: usize| text.get(at + i).map_or(0, u8::to_ascii_lowercase);
    match (lower(1), lower(2)) {
        (b's' | b't' | b'd' | b'm', _) => 2,
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => 3,
        (0xc5, 0xbf) => 3, // ſ, which is an s when case is ignored
        _ => 0,
    }
}
