//! Cutting text into pieces that merges never cross.
//!
//! The patterns of GPT-4 (with any number of digits a piece), cl100k and o200k have a scanner of their own; any
//! other pattern goes through a regex engine that can go back: the same pieces, slower.

use fancy_regex::RegexBuilder;

use crate::parallel::Check;
use crate::scan::Scanner;
use crate::Error;

/// The split pattern used when none is given: GPT-4's (up to three digits a piece).
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Steps the general engine may go back in one match.
const BACKTRACK_LIMIT: usize = 1 << 30;
/// Bytes of text between two looks at whether to go on.
const CHECK_BYTES: usize = 1 << 20;

/// A compiled split pattern. The empty pattern keeps each text whole.
///
/// ```
/// let splitter = rustbpe::Splitter::new(rustbpe::GPT4_PATTERN)?;
/// assert_eq!(splitter.pieces("It's 12345 o'clock")?, ["It", "'s", " ", "123", "45", " o", "'clock"]);
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
    Scan(Scanner),
    General(fancy_regex::Regex),
}

impl Splitter {
    /// Compiles `pattern`, or says why it cannot be compiled.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match Scanner::of(pattern) {
            _ if pattern.is_empty() => Engine::Whole,
            Some(scanner) => Engine::Scan(scanner),
            None => return Self::general(pattern),
        };
        Ok(Splitter { pattern: pattern.to_string(), engine })
    }

    /// The same pieces by the regex engine, whatever the pattern: slow, and the measure of the scanner.
    pub fn general(pattern: &str) -> Result<Self, Error> {
        let built = RegexBuilder::new(pattern).backtrack_limit(BACKTRACK_LIMIT).build();
        let engine = Engine::General(built.map_err(|error| Error::Pattern(error.to_string()))?);
        Ok(Splitter { pattern: pattern.to_string(), engine })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Whether the pattern has a scanner of its own.
    pub fn is_fast(&self) -> bool {
        !matches!(self.engine, Engine::General(_))
    }

    /// The pieces of a text. What the pattern does not match belongs to no piece.
    pub fn pieces<'t>(&self, text: &'t str) -> Result<Vec<&'t str>, Error> {
        let mut pieces = Vec::new();
        self.for_each(text, &mut || Ok(()), |start, end| pieces.push(&text[start..end]))?;
        Ok(pieces)
    }

    /// Calls `take` with the start and end of each piece in order. `check` is called about every megabyte; its
    /// error ends the work.
    #[inline]
    pub fn for_each(
        &self,
        text: &str,
        check: Check<'_>,
        mut take: impl FnMut(usize, usize),
    ) -> Result<(), Error> {
        match &self.engine {
            Engine::Whole if text.is_empty() => {}
            Engine::Whole => take(0, text.len()),
            Engine::Scan(scanner) => {
                let mut start = 0;
                while start < text.len() {
                    start = scanner.scan(text.as_bytes(), start, start + CHECK_BYTES, &mut take);
                    check()?;
                }
            }
            Engine::General(regex) => {
                let mut checked = 0;
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| Error::Split(error.to_string()))?;
                    if found.start() < found.end() {
                        take(found.start(), found.end());
                    }
                    if found.end() - checked >= CHECK_BYTES {
                        checked = found.end();
                        check()?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::scan::{CL100K, O200K};
    use proptest::prelude::*;

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(matches!(Splitter::new("("), Err(Error::Pattern(_))));
    }

    #[test]
    fn the_empty_pattern_keeps_the_text_whole() {
        let whole = Splitter::new("").unwrap();
        assert_eq!(whole.pieces("two words").unwrap(), ["two words"]);
        assert!(whole.pieces("").unwrap().is_empty());
    }

    #[test]
    fn long_runs_are_one_piece() {
        for (splitter, _) in engines() {
            for letter in ["a", "é", "!", "🎈", " ", "東"] {
                let text = letter.repeat(1 << 20);
                assert_eq!(splitter.pieces(&text).unwrap(), [text.as_str()]);
            }
            let text = format!("{}a", " ".repeat(1 << 20));
            assert_eq!(splitter.pieces(&text).unwrap(), [&text[..(1 << 20) - 1], " a"]);
        }
    }

    #[test]
    fn an_engine_that_gives_up_is_an_error() {
        let general = Splitter::general(GPT4_PATTERN).unwrap();
        assert!(matches!(general.pieces(&" ".repeat(1 << 21)), Err(Error::Split(_))));
    }

    #[test]
    fn the_caller_can_stop_it() {
        for splitter in [Splitter::new(GPT4_PATTERN).unwrap(), Splitter::general(r"\w+|\W").unwrap()] {
            let mut seen = 0;
            let text = "a ".repeat(2 << 20);
            let stopped = splitter.for_each(&text, &mut || Err(Error::Interrupted), |_, end| seen = end);
            assert_eq!(stopped.unwrap_err(), Error::Interrupted);
            assert!((1 << 20..text.len()).contains(&seen));
        }
    }

    /// The scanner and the regex engine for each known pattern, compiled once.
    fn engines() -> &'static [(Splitter, Splitter)] {
        static ENGINES: OnceLock<Vec<(Splitter, Splitter)>> = OnceLock::new();
        ENGINES.get_or_init(|| {
            let digits = (1..4).map(|digits| GPT4_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}")));
            let patterns = digits.chain([CL100K.to_string(), O200K.to_string()]);
            let both = patterns.map(|p| (Splitter::new(&p).unwrap(), Splitter::general(&p).unwrap()));
            both.inspect(|(fast, general)| assert!(fast.is_fast() && !general.is_fast())).collect()
        })
    }

    /// Text in which all that the patterns look at comes up often: letters of each kind, marks, numbers, blanks,
    /// line breaks, apostrophes, in ASCII and beyond, and the last and first characters of UTF-8's sizes.
    fn texts() -> impl Strategy<Value = String> {
        let often = concat!(
            "[a-cA-C'sdmtlverSDMTLVERſ0-9 \t\r\n/\u{b}\u{a0}\u{2028}\u{85}\u{1c}\u{3000}!?.,_éßÅǅʰªº中あ",
            "\u{301}\u{93f}\u{20dd}٣½Ⅷ߿ࠀ\u{ffff}\u{10000}𝐀𝐚😀\u{10ffff}]{0,40}"
        );
        prop_oneof![
            3 => often,
            1 => ".{0,60}",
            1 => prop::collection::vec(any::<char>(), 0..40).prop_map(String::from_iter),
            1 => "([A-Za-z]{1,12}('[a-zA-Z]{0,3})?[ \n]{0,3}|[0-9]{1,5}|[.,;/]{1,3}){0,12}",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn the_scanner_cuts_like_the_regex(text in texts()) {
            for (fast, general) in engines() {
                let cut = fast.pieces(&text).unwrap();
                prop_assert_eq!(cut.concat(), text.as_str());
                prop_assert_eq!(cut, general.pieces(&text).unwrap(), "{}", fast.pattern());
            }
        }
    }
}
