//! Cutting text into pieces that merges never cross.
//!
//! GPT-4's pattern, with any number of digits a piece, runs on an engine that takes linear time; any other
//! pattern goes through one that can go back. A scanner written by hand would be one more [`Engine`], held to
//! the general one by the same tests.

use fancy_regex::RegexBuilder;
use regex_automata::{meta, Anchored, Input};

use crate::Error;

/// The split pattern used when none is given: GPT-4's (up to three digits a piece).
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Steps the general engine may go back in one match.
const BACKTRACK_LIMIT: usize = 1 << 30;

/// A compiled split pattern. The empty pattern keeps each text whole.
///
/// ```
/// let splitter = rustbpe::Splitter::new(rustbpe::GPT4_PATTERN)?;
/// let mut pieces = Vec::new();
/// splitter.for_each("It's 12345 o'clock", |piece| pieces.push(piece.to_string()))?;
/// assert_eq!(pieces, ["It", "'s", " ", "123", "45", " o", "'clock"]);
/// # Ok::<(), rustbpe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Clone, Debug)]
enum Engine {
    Whole,
    Linear(meta::Regex),
    General(fancy_regex::Regex),
}

impl Splitter {
    /// Compiles `pattern`, or says why it cannot be compiled.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match linear(pattern) {
            _ if pattern.is_empty() => Engine::Whole,
            Some(same) => {
                let built = meta::Regex::new(&same);
                Engine::Linear(built.map_err(|error| Error::Pattern(error.to_string()))?)
            }
            None => return Self::general(pattern),
        };
        Ok(Splitter { pattern: pattern.to_string(), engine })
    }

    fn general(pattern: &str) -> Result<Self, Error> {
        let built = RegexBuilder::new(pattern).backtrack_limit(BACKTRACK_LIMIT).build();
        let engine = Engine::General(built.map_err(|error| Error::Pattern(error.to_string()))?);
        Ok(Splitter { pattern: pattern.to_string(), engine })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `take` with each piece in order. Text that the pattern does not match belongs to no piece.
    pub fn for_each<'t>(&self, text: &'t str, mut take: impl FnMut(&'t str)) -> Result<(), Error> {
        match &self.engine {
            Engine::Whole if text.is_empty() => {}
            Engine::Whole => take(text),
            Engine::Linear(regex) => {
                let mut start = 0;
                // The pattern matches at every position, so each piece begins where the last one ended.
                let input = |start| Input::new(text).range(start..).anchored(Anchored::Yes);
                while let Some(found) = regex.search(&input(start)) {
                    let piece = leave_last_space(&text[start..found.end()], found.end() == text.len());
                    start += piece.len();
                    take(piece);
                }
            }
            Engine::General(regex) => {
                for found in regex.find_iter(text) {
                    let piece = found.map_err(|error| Error::Split(error.to_string()))?.as_str();
                    if !piece.is_empty() {
                        take(piece);
                    }
                }
            }
        }
        Ok(())
    }
}

/// GPT-4's pattern (with any number of digits) without what a linear engine cannot do, or None for others.
///
/// Its possessive `?+` and `++` change nothing, because what follows them cannot match what they took; the
/// alternative `\s+(?!\S)` is left to [`leave_last_space`].
fn linear(pattern: &str) -> Option<String> {
    const HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
    const TAIL: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
    let digits = pattern.strip_prefix(HEAD)?.strip_suffix(TAIL)?;
    let tail = TAIL.strip_suffix(r"|\s+(?!\S)|\s+")?;
    digits.parse::<u8>().ok()?;
    Some(format!(r"{HEAD}{digits}{tail}|\s+").replace("?+", "?").replace("++", "+"))
}

/// `\s+(?!\S)|\s+`: a run of spaces inside a text leaves its last one to the next piece, if it has two.
///
/// No other alternative ends in white space that is not a line break, and none of this one in a line break.
fn leave_last_space(piece: &str, is_last: bool) -> &str {
    match piece.char_indices().next_back() {
        Some((last, space))
            if !is_last && last > 0 && space.is_whitespace() && !matches!(space, '\r' | '\n') =>
        {
            &piece[..last]
        }
        _ => piece,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use proptest::prelude::*;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter.for_each(text, |piece| out.push(piece.to_string())).unwrap();
        out
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(matches!(Splitter::new("("), Err(Error::Pattern(_))));
    }

    #[test]
    fn the_empty_pattern_keeps_the_text_whole() {
        let whole = Splitter::new("").unwrap();
        assert_eq!(pieces(&whole, "two words"), ["two words"]);
        assert!(pieces(&whole, "").is_empty());
    }

    #[test]
    fn long_runs_are_one_piece() {
        let gpt4 = Splitter::new(GPT4_PATTERN).unwrap();
        for letter in ["a", "é", "!", "🎈", " "] {
            let text = letter.repeat(1 << 20);
            assert_eq!(pieces(&gpt4, &text), [text.as_str()]);
        }
        let spaces = " ".repeat(1 << 20);
        assert_eq!(pieces(&gpt4, &format!("{spaces}a")), [&spaces[1..], " a"]);
    }

    #[test]
    fn an_engine_that_gives_up_is_an_error() {
        let general = Splitter::general(GPT4_PATTERN).unwrap();
        let text = " ".repeat(1 << 21);
        assert!(matches!(general.for_each(&text, |_| ()), Err(Error::Split(_))));
    }

    /// Both engines for one, two and three digits, compiled once.
    fn engines() -> &'static [(Splitter, Splitter)] {
        static ENGINES: OnceLock<Vec<(Splitter, Splitter)>> = OnceLock::new();
        ENGINES.get_or_init(|| {
            let patterns = (1..4).map(|digits| GPT4_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}")));
            let both = patterns.map(|p| (Splitter::new(&p).unwrap(), Splitter::general(&p).unwrap()));
            both.inspect(|(fast, _)| assert!(matches!(fast.engine, Engine::Linear(_)))).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn the_linear_engine_cuts_like_the_general_one(
            text in prop_oneof![
                ".{0,60}",
                "[a-cA-C'sdmtlverſ0-9 \t\r\n\u{a0}\u{2028}\u{85}\u{1c}!?.,é中٣½]{0,40}",
            ],
            digits in 1..4usize,
        ) {
            let (fast, general) = &engines()[digits - 1];
            let cut = pieces(fast, &text);
            prop_assert_eq!(cut.concat(), text.clone());
            prop_assert_eq!(cut, pieces(general, &text));
        }
    }
}
